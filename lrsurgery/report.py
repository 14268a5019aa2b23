"""The rank report: one row a layer, one JSON that everything else is drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.errors import PlanError, SourceError
from lrsurgery.layers import KINDS, FactorisedLayer
from lrsurgery.linalg import Decomposed, Factors, product_values, relative_error
from lrsurgery.plan import ALREADY, Kept, Plan, Replaced, find_heads, plan_rows
from lrsurgery.ranks import FractionRank, RankSpec, entropy_rank, nuclear_rank, stable_rank
from lrsurgery.surgery import factorised_layers

FORMAT_VERSION = 1
FILE_NAME = "rank_report.json"


@dataclass(frozen=True)
class EffectiveRanks:
    """Three measures of how many directions matter; "effective rank" alone names none of them."""

    nuclear: float  # ||W||_* / ||W||_2
    entropy: float  # exp(H(s / sum s)), Roy & Vetterli (2007)
    stable: float  # ||W||_F^2 / ||W||_2^2

    @staticmethod
    def of(values: Tensor) -> EffectiveRanks:
        """From singular values (n,)."""
        return EffectiveRanks(nuclear_rank(values), entropy_rank(values), stable_rank(values))


@dataclass(frozen=True)
class Row:
    """One layer. Errors are relative to the dense weight's own norm; None where a value is not known."""

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str  # "factorised" or "dense"
    reason: str | None  # why it stayed dense
    full_rank: int | None
    rank: int | None
    parameters_before: int
    parameters_after: int | None  # None in a plan whose rank waits for the singular values
    energy_kept: float | None = None  # sum of the kept squared singular values / sum of all
    relative_error: float | None = None  # ||W - U V||_F / ||W||_F, from the factors as stored
    spectral_error: float | None = None  # largest singular value left out / largest of all
    before: EffectiveRanks | None = None
    after: EffectiveRanks | None = None

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> Row:
        """From its JSON object. Raises TypeError or KeyError where it is none."""
        ranks = {key: EffectiveRanks(**body[key]) if body.get(key) else None for key in ("before", "after")}
        return Row(**{**body, "shape": tuple(body["shape"]), **ranks})


@dataclass(frozen=True)
class Report:
    """Rows and what made them."""

    rows: tuple[Row, ...]
    parameters_before: int  # of the whole model, tied tensors once
    parameters_after: int | None
    bytes_before: int | None = None  # of the weights in the files
    bytes_after: int | None = None
    source: dict[str, Any] = field(default_factory=dict)  # reference, revision, digest of the tensors
    command: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def factorised(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "factorised")

    @property
    def dense(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "dense")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object (design, section 7)."""
        body = asdict(self)
        rows = body.pop("rows")
        before, after = body.pop("parameters_before"), body.pop("parameters_after")
        totals = {
            "layers_factorised": len(self.factorised),
            "layers_dense": len(self.dense),
            "parameters_before": before,
            "parameters_after": after,
            "share": None if after is None or not before else after / before,
            "bytes_before": body.pop("bytes_before"),
            "bytes_after": body.pop("bytes_after"),
        }
        return {"format_version": FORMAT_VERSION, "totals": totals, **body, "layers": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @staticmethod
    def read(folder: Path) -> Report:
        """The report in a folder. Raises SourceError where there is none, or it is damaged or newer than this."""
        file = folder / FILE_NAME
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["format_version"] > FORMAT_VERSION:
                raise SourceError(f"{file}: report format {body['format_version']} is newer than this lrsurgery reads")
            totals = body["totals"]
            rows = tuple(Row.from_dict(row) for row in body["layers"])
            return Report(
                rows,
                totals["parameters_before"], totals["parameters_after"],
                totals["bytes_before"], totals["bytes_after"],
                body["source"], body["command"], body["options"], body["versions"], tuple(body["notes"]),
            )  # fmt: skip
        except FileNotFoundError as e:
            raise SourceError(f"{folder}: no {FILE_NAME} in it") from e
        except (ValueError, KeyError, TypeError) as e:
            raise SourceError(f"{file}: not a rank report ({e!r})") from e


def measured_row(row: Replaced, matrix: Tensor, factors: Factors, found: Decomposed) -> Row:
    """The row of a layer after surgery: matrix (rows, columns), factors as stored, what decomposing found."""
    assert row.rank is not None
    values = found.values.double()
    top = float(values[0])
    left_out = float(values[row.rank]) if row.rank < row.full_rank else 0.0
    # every init gives factors in balanced form: the norms of u's columns times those of v's rows are its values
    kept = _norms(factors.u, 0) * _norms(factors.v, 1)
    return Row(
        row.name, row.kind, row.shape, "factorised", None, row.full_rank, row.rank,
        row.parameters, row.factorised_parameters,
        energy_kept=float(values[: row.rank].square().sum()) / found.energy if found.energy else 1.0,
        relative_error=relative_error(matrix, factors),
        spectral_error=None if math.isnan(left_out) else left_out / top if top else 0.0,
        before=None if bool(values.isnan().any()) else EffectiveRanks.of(values),  # "fast" looks at some alone
        after=EffectiveRanks.of(kept),
    )  # fmt: skip


def _norms(factor: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(factor, dim=dim, dtype=torch.float64)
    return norms


def planned_row(row: Replaced | Kept) -> Row:
    """A row of a plan, before anything is measured."""
    if isinstance(row, Kept):
        return Row(row.name, row.kind, row.shape, "dense", row.reason, None, None, row.parameters, row.parameters)
    return Row(
        row.name,
        row.kind,
        row.shape,
        "factorised",
        None,
        row.full_rank,
        row.rank,
        row.parameters,
        row.factorised_parameters,
    )


def plan_report(plan: Plan, parameters: int, measured: Mapping[str, Row] | None = None, **facts: Any) -> Report:
    """The report of a plan over a model of this many parameters, with measured rows where there are some."""
    rows = tuple((measured or {}).get(row.name) or planned_row(row) for row in plan.rows)
    known = all(row.parameters_after is not None for row in rows)
    saved = sum(row.parameters_before - (row.parameters_after or 0) for row in rows)
    return Report(rows, parameters, parameters - saved if known else None, **facts)


def rank_report(module: nn.Module, against: nn.Module | None = None) -> Report:
    """What is factorised in a model in memory; with `against`, the dense model, also the errors and the energy kept.

    Raises PlanError where `against` lacks a layer.
    """
    others = dict(against.named_modules()) if against is not None else {}
    rows = [
        _row_of(name, layer, others.get(name), against is None) for name, layer in factorised_layers(module).items()
    ]
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    rows = sorted([*rows, *_dense_rows(module)], key=lambda row: order.get(row.name, len(order)))
    after = sum(p.numel() for p in module.parameters())
    before = after + sum(r.parameters_before - (r.parameters_after or 0) for r in rows)
    return Report(tuple(rows), before, after)


def _row_of(name: str, layer: FactorisedLayer, dense: nn.Module | None, alone: bool) -> Row:
    factors = Factors(*(f.detach() for f in layer.factors))
    bias = layer.bias.numel() if layer.bias is not None else 0
    row = Replaced(
        name, layer.kind, tuple(layer.weight.shape), factors.u.shape[0], factors.v.shape[1], layer.rank, bias
    )
    # trained factors are balanced no more, so their values come from the r x r core
    after = EffectiveRanks.of(product_values(factors))
    if alone:
        return replace(planned_row(row), after=after)
    weight = getattr(dense, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != row.shape:
        raise PlanError(f"{name}: the model to compare with has no such layer of shape {row.shape}")
    matrix = KINDS[layer.kind].to_matrix(weight.detach())
    values = torch.linalg.svdvals(matrix.double())
    found = Decomposed(factors, values, float(values.square().sum()))
    return replace(measured_row(row, matrix, factors, found), after=after, energy_kept=None)


def _dense_rows(module: nn.Module) -> list[Row]:
    rows = plan_rows(module, RankSpec(FractionRank(1.0)), heads=find_heads(module), allow_larger=True)
    return [
        Row(
            r.name,
            r.kind,
            r.shape,
            "dense",
            r.reason if isinstance(r, Kept) else "left dense",
            None,
            None,
            r.parameters,
            r.parameters,
        )
        for r in rows
        if r.reason != ALREADY
    ]
