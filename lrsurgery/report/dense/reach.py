"""What share of a model's parameters lies in layers that can be factorised, and why the rest does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from lrsurgery.checkpoints.mapping import open_checkpoint, tied_weights
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.files.json import Json
from lrsurgery.surgery.plan import SurgeryOptions, find_heads, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec
from lrsurgery.surgery.rows import Kept, Replacement

VECTORS = "biases, norms and other vectors"


@dataclass(frozen=True)
class Part:
    """Parameters with something in common."""

    what: str
    parameters: int
    layers: int
    example: str  # the name of one of them; empty for vectors


@dataclass(frozen=True)
class Reach:
    """The parameters of a model, those within reach and those that are not, the larger parts first."""

    parameters: int
    within: tuple[Part, ...]
    rest: tuple[Part, ...]

    @property
    def share(self) -> float:
        """The share of the parameters that can be factorised; a model without parameters has none."""
        return sum(part.parameters for part in self.within) / max(1, self.parameters)

    def to_dict(self) -> Json:
        """As JSON, with the share."""
        return {**asdict(self), "share": self.share}

    def lines(self) -> Iterator[str]:
        """The table as lines of text."""
        for title, parts in ((f"within reach: {self.share:.1%}", self.within), ("not within reach", self.rest)):
            yield title
            for part in parts:
                share = f"{part.parameters / max(1, self.parameters):.1%}"
                such = f"  ({part.layers} x, such as {part.example})" if part.example else ""
                yield f"  {share:>6}  {part.parameters:>15,}  {part.what}{such}"


def reach_of(model: nn.Module, tied: Mapping[str, str] | None = None) -> Reach:
    """The reach of a dense model, which may be on the meta device; `tied` as for `plan_rows`."""
    heads = find_heads(model)
    tied = tied_weights(model) if tied is None else tied

    def rows_with(*, everything: bool) -> list[Replacement | Kept]:
        full = RankSpec(FractionRank(1.0))
        options = SurgeryOptions(target=full, allow_larger=True, embeddings=everything, heads=everything)
        return plan_rows(model, options, heads=heads, tied=tied)

    usual = {row.name for row in rows_with(everything=False) if isinstance(row, Replacement)}
    within: dict[str, list[tuple[str, int]]] = {}
    rest: dict[str, list[tuple[str, int]]] = {}
    for row in rows_with(everything=True):
        if isinstance(row, Replacement):
            what = "layers" if row.name in usual else "output heads and classifiers (--include-heads)"
            if row.layout.lookup:
                what = "tables of tokens, with the heads tied to them (--include-embeddings)"
            within.setdefault(what, []).append((row.name, row.parameters - row.bias))
        elif not row.reason.startswith("tied to"):  # which counts with the layer that it is tied to
            rest.setdefault(row.reason, []).append((row.name, row.parameters))
    parameters = sum(p.numel() for p in model.parameters())
    counted = sum(count for parts in (within, rest) for each in parts.values() for _, count in each)
    parts = _parts(rest)
    if parameters > counted:
        parts.append(Part(VECTORS, parameters - counted, 0, ""))
    return Reach(parameters, tuple(_parts(within)), tuple(sorted(parts, key=lambda part: -part.parameters)))


def _parts(found: Mapping[str, list[tuple[str, int]]]) -> list[Part]:
    parts = [Part(what, sum(n for _, n in each), len(each), each[0][0]) for what, each in found.items()]
    return sorted(parts, key=lambda part: -part.parameters)


def read_reach(source: Source, options: SourceOptions) -> Reach:
    """The reach of a dense checkpoint; no weight is read. Raises SourceError."""
    checkpoint = open_checkpoint(source, options)
    return reach_of(checkpoint.model, checkpoint.tied)
