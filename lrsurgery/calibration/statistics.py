"""Statistics of calibration: second moments of each layer's inputs and output gradients, stored as a folder.

The file is long because the folder, what it may hold and what is made of it are one format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from lrsurgery.errors import CalibrationError
from lrsurgery.files.json import Json, json_text, read_as
from lrsurgery.files.pieces import Piece, load_piece, piece_digest, save_piece
from lrsurgery.files.writing import replace_file
from lrsurgery.linalg.weighted import Metric, StackedMetric, combine, damp
from lrsurgery.surgery.rows import Replacement

FORMAT = 1
KIND = " as "  # between a layer's name and a further kind that it was collected as
FILE_NAME = "statistics.json"
# Least Tikhonov damping, as a share of the mean diagonal. It gives weight to input directions that no sample showed,
# and to rare gradients, whose estimates are poor (measured in examples/benchmarks/calibration.py).
DAMPING = {"inputs": 1e-3, "gradients": 1e-2}
# Few samples make a poor estimate, which is worse in more dimensions (as in Ledoit & Wolf 2004).
SCARCE = {"inputs": 0.5, "gradients": 1.0}


def damping_share(of: str, size: int, positions: int) -> float:
    """The Tikhonov damping of a moment (size, size) over `positions`, as a share (at most 1) of its mean diagonal.

    It is proportional to (size / positions)^2, so well-estimated moments get only the least damping.
    """
    return min(1.0, max(DAMPING[of], (SCARCE[of] * size / max(1, positions)) ** 2))


@dataclass(frozen=True)
class LayerUse:
    """How often calibration used one layer."""

    kind: str
    rows: int
    columns: int
    positions: int  # inputs of its matrix: tokens, or output positions of a convolution (of v, if spatial); 0: unused
    outputs: int  # tokens, or output positions of a convolution
    # positions and outputs of fused experts are those of all of them
    same_input: str | None = None  # the first of the layers that received the same inputs, all of them; None: no other
    groups: int = 1  # each with its own matrix and moments
    unseen: int | None = None  # experts that no token was given to


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's matrix (rows, columns); of fused experts one of each for each expert, in front."""

    inputs: Tensor  # (columns, columns), the mean of x x^T over positions; with several groups, these come first
    # (rows, rows), the sum of g g^T over positions, per scored token or image; or its diagonal (rows,). Of a table that
    # is looked up, `inputs` has g g^T, and this how often each row was looked up.
    gradients: Tensor | None
    counts: Tensor | None = None  # (experts,), the positions of each expert

    def metric(self, use: LayerUse) -> Metric | StackedMetric:
        """The damped metric for factorising the layer."""
        if self.counts is not None:
            return StackedMetric(self._of_experts(use, self.counts))
        return self._damped(use)

    def _of_experts(self, use: LayerUse, counts: Tensor) -> Callable[[int], Metric]:
        """The metric of each expert by its own tokens; one that saw none takes the mean metric of its bank.

        Without gradients, which count the tokens of an expert, its inputs weigh as much as it has tokens.
        """
        total, experts = float(counts.sum()), len(counts)
        mean = Moments(
            torch.einsum("e,eij->ij", counts / max(1.0, total), self.inputs),
            None if self.gradients is None else self.gradients.mean(0),
        )

        def metric(expert: int) -> Metric:
            count = int(counts[expert])
            if not count:
                return mean._damped(use)
            gradients = None if self.gradients is None else self.gradients[expert]
            if gradients is not None and not bool(gradients.any()):
                gradients = mean.gradients
            own = Moments(self.inputs[expert], gradients)._damped(replace(use, positions=count))
            if own.gradients is None and own.inputs is not None:
                return Metric(own.inputs * (count * experts / total))
            return own

        return metric

    def _damped(self, use: LayerUse) -> Metric:
        inputs = damp(self.inputs, damping_share("inputs", use.columns, use.positions))
        if self.gradients is None or not bool(self.gradients.any()):
            return Metric(inputs)
        return Metric(inputs, damp(self.gradients, damping_share("gradients", use.rows, use.positions)))


def key_of(name: str, kind: str) -> str:
    """The key of a layer that was collected as another kind, too."""
    return f"{name}{KIND}{kind}"


class Statistics:
    """The moments of a model's layers, in memory or read from a folder one layer at a time."""

    def __init__(
        self,
        uses: Mapping[str, LayerUse],
        facts: Json,
        read: Callable[[str], Moments],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.uses, self.facts, self._read = dict(uses), dict(facts), read
        self.digests = dict(digests or {})  # layer -> digest of its moments in the file

    @property
    def has_gradients(self) -> bool:
        return bool(self.facts["metric"] == "fisher")

    @property
    def temperature(self) -> float | None:
        """The temperature of the Fisher information; None without gradients, or with those of another loss."""
        own = self.has_gradients and "head" not in self.facts
        return float(self.facts.get("temperature", 1.0)) if own else None

    def key(self, name: str, kind: str | None = None) -> str:
        """The key in `uses` of a layer as this kind; of one that was collected as one kind, its name.

        Raises KeyError if it was not collected.
        """
        key = self._key(name, kind)
        if key is None:
            raise KeyError(f"{name} as {kind}")
        return key

    def _key(self, name: str, kind: str | None) -> str | None:
        for key in (name, key_of(name, kind or "")):
            if key in self.uses and kind in (None, self.uses[key].kind):
                return key
        return None

    def holds(self, row: Replacement) -> bool:
        """Whether a layer was collected as this kind."""
        return any(
            self.uses[key].kind == row.kind for key in (row.name, key_of(row.name, row.kind)) if key in self.uses
        )

    def use(self, row: Replacement) -> LayerUse:
        """How often calibration used a layer as this kind."""
        return self.uses[self.key(row.name, row.kind)]

    def moments(self, name: str, kind: str | None = None) -> Moments:
        """The moments of one layer, as a kind if it was collected as several."""
        return self._read(self.key(name, kind))

    def metric(self, name: str, kind: str | None = None) -> Metric | StackedMetric | None:
        """The metric of one layer; None if the layer received no input."""
        use = self.uses[self.key(name, kind)]
        return self.moments(name, kind).metric(use) if use.positions else None

    def gradients(self, name: str, kind: str, rows: int) -> Tensor | None:
        """The damped second moment of the gradients at a layer's outputs: (rows, rows), or its diagonal (rows,).

        None where there is none: without gradients, for layers that were not collected as this kind, or of experts.
        """
        if not self.has_gradients or self._key(name, kind) is None:
            return None
        metric = self.metric(name, kind)
        found = metric.gradients if isinstance(metric, Metric) else None
        return None if found is None or len(found) != rows else found

    def metric_of(self, row: Replacement) -> Metric | StackedMetric | None:
        """The metric of a layer, for all uses of its weight; None if none received an input."""
        uses = ((row.name, row.kind), *row.tied)
        known = [(name, kind) for name, kind in uses if self._key(name, kind) is not None]
        metrics = [metric for name, kind in known if (metric := self.metric(name, kind)) is not None]
        if len(metrics) < 2:
            return next(iter(metrics), None)
        return combine([metric for metric in metrics if isinstance(metric, Metric)])  # experts are tied to none

    def digest_of(self, row: Replacement) -> str | None:
        """A digest of the moments in `metric_of`; None if they are in memory."""
        keys = [self._key(name, kind) for name, kind in ((row.name, row.kind), *row.tied)]
        found = [digest for key in keys if key is not None and (digest := self.digests.get(key)) is not None]
        return " ".join(found) or None

    def of_schemes(self, row: Replacement) -> Replacement:
        """The row with those of its convolution schemes that were collected."""
        known = [option for option in row.options if self.holds(option)]
        return row if len(known) in (0, len(row.options)) else replace(known[0], others=tuple(known[1:]))

    def without_gradients(self) -> Statistics:
        """The same statistics without output gradients, as importance activations collects them."""
        digests = {name: f"{digest}-inputs" for name, digest in self.digests.items()}
        facts = {**self.facts, "metric": "activations"}
        return Statistics(self.uses, facts, lambda name: replace(self._read(name), gradients=None), digests)

    def groups(self) -> list[list[str]]:
        """Names of layers that received the same inputs, several each; the first that was called comes first."""
        groups: dict[str, list[str]] = {}
        for name, use in self.uses.items():
            first = self.uses.get(use.same_input or "")
            if use.same_input is None or first is None or not use.positions or first.same_input is not None:
                continue
            if (use.kind, use.columns, use.positions) == (first.kind, first.columns, first.positions):
                groups.setdefault(use.same_input, [use.same_input]).append(name)
        return list(groups.values())

    def unused_layers(self) -> list[str]:
        """Layers that received no input, such as experts that were never selected."""
        return [name for name, use in self.uses.items() if not use.positions and KIND not in name]

    def check_for(self, rows: Iterable[Replacement], where: str = "the statistics") -> None:
        """Raise CalibrationError if they lack a layer, or have it with another kind or shape."""
        for row in map(self.of_schemes, rows):
            use = self.uses.get(key_of(row.name, row.kind)) or self.uses.get(row.name)
            if use is None:
                raise CalibrationError(
                    f"{where}: layer {row.name} is missing; collect them again, or add --exclude '{row.name}'"
                )
            if use.kind != row.kind:
                raise CalibrationError(
                    f"{where}: {row.name} was calibrated as {use.kind}, but is planned as {row.kind}; pass the same"
                    " --conv"
                )
            if (use.rows, use.columns, use.groups) != (row.rows, row.columns, row.groups):
                raise CalibrationError(
                    f"{where}: {row.name} was ({use.rows}, {use.columns}) and is ({row.rows}, {row.columns}) here:"
                    " they belong to another model"
                )

    @staticmethod
    def read(folder: Path) -> Statistics:
        """Read a folder of `StatisticsWriter`. Raises CalibrationError if it is missing or damaged."""
        if not (folder / FILE_NAME).exists():
            raise CalibrationError(f"{folder}: no {FILE_NAME} in it; --save-statistics writes such a folder")
        body = read_as(_File, folder / FILE_NAME, "statistics", CalibrationError, newest=FORMAT)
        layers = body["layers"]

        def read(name: str) -> Moments:
            return _moments_in(folder, layers[name])

        uses = {name: _use_of(layer) for name, layer in layers.items()}
        return Statistics(uses, {**body["facts"]}, read, {name: layer["digest"] for name, layer in layers.items()})


Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Facts(TypedDict):
    """What was collected, and how; further facts stand beside these."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    metric: Literal["fisher", "activations"]
    temperature: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    samples: NotRequired[Count]
    tokens: NotRequired[Count | None]
    scored_in: NotRequired[str]


class _Layer(TypedDict):
    """A layer in statistics.json: a `LayerUse`, and the file of its moments."""

    kind: str
    rows: Count
    columns: Count
    positions: Count
    outputs: Count
    same_input: NotRequired[str]
    groups: NotRequired[Annotated[int, Field(ge=1, lt=1 << 31)]]
    unseen: NotRequired[Count]
    file: Annotated[str, Field(pattern=r"^\d{5,}\.safetensors$")]
    digest: str


class _File(TypedDict):
    """statistics.json."""

    facts: _Facts
    layers: dict[str, _Layer]


def _use_of(layer: _Layer) -> LayerUse:
    return LayerUse(**{field.name: layer[field.name] for field in fields(LayerUse) if field.name in layer})  # type: ignore[literal-required]


def _moments_in(folder: Path, layer: _Layer) -> Moments:
    """Read the moments of a layer. Raises CalibrationError for a damaged file."""
    piece = load_piece(folder / layer["file"])
    sizes = {"inputs": layer["columns"], "gradients": layer["rows"]}
    counts = None if piece is None else piece.tensors.pop("counts", None)
    groups = layer.get("groups", 1)
    lead = (len(counts),) if counts is not None else (groups,) if groups > 1 else ()
    if (
        piece is None
        or piece.facts != {"digest": layer["digest"]}
        or "inputs" not in piece.tensors
        or any(
            tuple(moment.shape) not in {(*lead, size, size), *([(*lead, size)] if key == "gradients" else [])}
            for key, moment in piece.tensors.items()
            for size in [sizes.get(key)]
        )
    ):
        raise CalibrationError(f"{folder / layer['file']}: damaged, or of other statistics; collect them again")
    return Moments(piece.tensors["inputs"], piece.tensors.get("gradients"), counts)


def merge(one: tuple[LayerUse, Moments], other: tuple[LayerUse, Moments]) -> tuple[LayerUse, Moments]:
    """Merge two collections for one layer: input means are weighted by their positions, gradient sums are added."""
    (use, moments), (use_2, moments_2) = one, other
    positions = use.positions + use_2.positions
    if moments.counts is None or moments_2.counts is None:
        counts = None
        inputs = (moments.inputs * use.positions + moments_2.inputs * use_2.positions) / max(1, positions)
    else:
        counts = moments.counts + moments_2.counts
        sums = (each.inputs * each.counts[:, None, None] for each in (moments, moments_2) if each.counts is not None)
        inputs = sum(sums, torch.zeros_like(moments.inputs)) / counts.clamp(min=1)[:, None, None]
        use = replace(use, unseen=int((counts == 0).sum()))
    gradients = None
    if moments.gradients is not None and moments_2.gradients is not None:
        gradients = moments.gradients + moments_2.gradients
    same = use.same_input if use.same_input == use_2.same_input else None
    use = replace(use, positions=positions, outputs=use.outputs + use_2.outputs, same_input=same)
    return use, Moments(inputs, gradients, counts)


class StatisticsWriter:
    """Store of statistics in a folder, layer by layer; the folder is readable after `finish`."""

    def __init__(self, folder: Path, renames: Mapping[str, str] | None = None, owner: str = "") -> None:
        """`renames` maps names in the files to the names that layers are added under; `owner` is noted."""
        self._owner = owner
        self._folder, self._layers, self._files = folder, dict[str, _Layer](), 0
        self._original = {new: old for old, new in (renames or {}).items()}

    def __contains__(self, row: Replacement) -> bool:
        return self._key(row.name, row.kind) in self._layers

    def _key(self, name: str, kind: str) -> str:
        name = self._original.get(name, name)
        former = self._layers.get(name)
        return name if former is None or former["kind"] == kind else key_of(name, kind)

    def add(self, name: str, use: LayerUse, moments: Moments) -> None:
        """Write the moments of one layer as a kind, merged with those added before."""
        name = self._key(name, use.kind)
        if use.same_input is not None:
            use = replace(use, same_input=self._original.get(use.same_input, use.same_input))
        if name in self._layers:
            former = self._layers.pop(name)
            kept = _moments_in(self._folder, former)
            use, moments = merge((_use_of(former), kept), (use, moments))
        file = f"{self._files:05d}.safetensors"
        self._files += 1
        tensors = {"inputs": moments.inputs}
        if moments.gradients is not None:
            tensors["gradients"] = moments.gradients
        if moments.counts is not None:
            tensors["counts"] = moments.counts
        digest = piece_digest(name, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        save_piece(self._folder / file, Piece({"digest": digest}, tensors))
        counts = {
            key: value for key, value in asdict(use).items() if value is not None and (key, value) != ("groups", 1)
        }
        self._layers[name] = _Layer(**counts, file=file, digest=digest)  # type: ignore[typeddict-item]

    def finish(self, facts: Json) -> Statistics:
        """Write `statistics.json` and return the statistics."""
        body = {"format_version": FORMAT, "owner": self._owner, "facts": dict(facts), "layers": self._layers}
        replace_file(self._folder / FILE_NAME, json_text(body))
        return Statistics.read(self._folder)
