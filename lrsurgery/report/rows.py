"""Rows of a report: from a plan, from surgery, from factors alone, and from factors against the dense weights.

The file is long because all that makes a row is here: a column has one origin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.errors import PlanError, WeightError
from lrsurgery.files.json import Json
from lrsurgery.linalg.factors import (
    Factors,
    balance_of,
    blocks_of,
    largest,
    power_of_two,
    product_values,
    relative_error,
    stacked_values,
)
from lrsurgery.linalg.spectrum import EffectiveRanks, Points
from lrsurgery.linalg.subspaces import directions, overlap
from lrsurgery.linalg.svd import Decomposition, spectral_factors
from lrsurgery.linalg.weighted import Metric, second_order, weighted_norm
from lrsurgery.report.schema import Report, Row
from lrsurgery.runtime import DTYPES
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.experts.stack import Stack
from lrsurgery.surgery.kinds.folds import fold_of, weight_of
from lrsurgery.surgery.layers import FactorisedLayer, count_parameters
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.plan import ALREADY, Plan, SurgeryOptions, find_heads, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec
from lrsurgery.surgery.rows import Joint, Kept, Replacement
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.surgery.tables.ties import leaders_of_tied


def measured_row(
    row: Replacement, matrix: Tensor | Stack, factors: Factors, found: Decomposition, *, in_loss: bool = False
) -> Row:
    """The row of a layer after surgery: matrix (rows, columns), factors of the product as it is stored.

    `in_loss` says that singular values in the metric are in units of the loss, as those of the Fisher information are.
    """
    assert row.rank is not None
    values = found.values.double()
    top = float(values[0])
    left_out = float(values[row.rank]) if row.rank < row.full_rank else 0.0
    unknown = not bool(values.isfinite().all())  # "fast" computes the largest alone
    # every init gives balanced factors: the product's singular values are the norms of u's columns times v's rows
    even = factors if row.pivots is None else found.factors
    kept = stacked_values(list((_norms(even.u, -2) * _norms(even.v, -1)).reshape(-1, row.rank)))
    energy_kept = float(values[: row.rank].square().sum()) / found.energy if found.energy else 1.0
    spectral_error = None if math.isnan(left_out) else left_out / top if top else 0.0
    weighted_error, predicted = _in_metric(found.weighted, row.rank, in_loss)
    each = Pairs(matrix, factors)
    if found.weighted is not None:  # the directions kept are the metric's, not the weight's own leading ones
        energy_kept = _energy_within(each, found.energy)
        spectral_error = _spectral_norms_of_difference(each) / top if top else 0.0
    return replace(
        planned_row(row),
        energy_kept=_finite(energy_kept),
        relative_error=_finite(_relative_error(each)),
        spectral_error=_finite(spectral_error),
        weighted_error=_finite(weighted_error),
        predicted_loss=_finite(predicted),
        balance=None if row.pivots else _finite(balance_of(factors)),
        before=None if unknown else EffectiveRanks.of(values),
        spectrum_before=None if unknown else Points.of(values),
        **_after(kept.sort(descending=True).values),
    )


def shared_row(row: Replacement, matrix: Tensor, factors: Factors, values: Tensor, metric: Metric) -> Row:
    """As `measured_row`, of a layer that shares its v, with its own singular values and a metric in units of the loss.

    `predicted_loss` is the layer's own part of that of the group.
    """
    wide, top = values.double(), float(values[0])
    metric = Metric(*(None if moment is None else moment.to(matrix.device) for moment in metric))
    whole = weighted_norm(matrix, metric)
    lost = weighted_norm(matrix.double() - factors.u.double() @ factors.v.double(), metric)
    return replace(
        planned_row(row),
        energy_kept=_finite(_energy_within(Pairs(matrix, factors), float(wide.square().sum()))),
        relative_error=_finite(relative_error(matrix, factors)),
        spectral_error=_finite(_spectral_norms_of_difference(Pairs(matrix, factors)) / top if top else 0.0),
        weighted_error=_finite(lost / whole if whole else 0.0),
        predicted_loss=_finite(0.5 * lost**2),
        before=EffectiveRanks.of(values),
        spectrum_before=Points.of(values),
        **_after(product_values(factors)),
    )


@dataclass(frozen=True)
class Pairs:
    """Each matrix (rows, columns) of a layer with its factors: one, or one for each of groups or fused experts."""

    matrix: Tensor | Stack
    factors: Factors

    def __iter__(self) -> Iterator[tuple[Tensor, Factors]]:
        if isinstance(self.matrix, Tensor) and self.matrix.ndim == 2:
            return iter([(self.matrix, self.factors)])
        return zip(self.matrix, blocks_of(self.factors), strict=True)


def _relative_error(each: Pairs) -> float:
    """||W - u v||_F / ||W||_F, over all matrices of a layer."""
    lost: list[float] = []
    norms: list[float] = []
    for matrix, factors in each:
        norms.append(float(torch.linalg.vector_norm(matrix, dtype=torch.float64)))
        lost.append(relative_error(matrix, factors) * (norms[-1] or 1.0))
    return math.hypot(*lost) / (math.hypot(*norms) or 1.0)


def _finite(figure: float | None) -> float | None:
    """None for a figure that overflowed: it is not known."""
    return figure if figure is not None and math.isfinite(figure) else None


def _after(values: Tensor) -> dict[str, Any]:
    """Effective ranks and spectrum of a product with these singular values; None where they overflowed."""
    if not bool(values.isfinite().all()):
        return {"after": None, "spectrum_after": None}
    return {"after": EffectiveRanks.of(values.double(), limit=math.inf), "spectrum_after": Points.of(values)}


def _in_metric(values: Tensor | None, rank: int, in_loss: bool) -> tuple[float | None, float | None]:
    """(relative error in the metric, predicted increase of the loss where the metric is in its units)."""
    if values is None:
        return None, None
    squares = values.double().square()
    whole, lost = float(squares.sum()), float(squares[rank:].sum())
    return math.sqrt(lost / whole) if whole else 0.0, second_order(values, rank) if in_loss else None


def _energy_within(each: Pairs, energy: float) -> float:
    """||Q_u^T W Q_v||_F^2 / ||W||_F^2 with Q_u, Q_v orthonormal bases of the factors' subspaces."""
    kept = 0.0
    for matrix, factors in each:
        ours = directions(factors)
        within = ours.u.T @ matrix.to(ours.u.dtype) @ ours.v
        kept += float(torch.linalg.vector_norm(within, dtype=torch.float64)) ** 2
    return min(1.0, kept / energy) if energy else 1.0


def _norms(factor: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(factor, dim=dim, dtype=torch.float64)
    return norms


def planned_row(row: Replacement | Kept) -> Row:
    """The row of a plan, before anything is measured."""
    if isinstance(row, Kept):
        return Row(row.name, row.kind, row.shape, "dense", row.reason, None, None, row.parameters, row.parameters)
    return Row(
        name=row.name,
        kind=row.kind,
        shape=row.shape,
        status="factorised",
        reason=None,
        full_rank=row.full_rank,
        rank=row.rank,
        parameters_before=row.parameters,
        parameters_after=row.factorised_parameters,
        flops_before=row.flops,
        flops_after=row.factorised_flops,
        predicted_loss=row.predicted_loss,
        form=None if row.rank is None else "pivoted" if row.pivots else "balanced",
        v_of=None if row.joint is None else row.joint.names[0],
        groups=row.groups,
    )


def trained_row(row: Row, factors: Factors) -> Row:
    """The row with the spectrum and balance of factors, which training may have left unbalanced."""
    # the parts of a pivoted layer are not meant to be balanced, nor each of the layers that share one v
    balance = None if row.form == "pivoted" or row.v_of is not None else _finite(balance_of(factors))
    return replace(row, balance=balance, **_after(product_values(factors)))


def refitted_row(row: Row, dense: Any, layer: FactorisedLayer) -> Row:
    """The row of a layer after its factors were fitted to outputs, with its error against the dense weight.

    What was predicted of the former factors is not known of these, and the spectral error would cost a decomposition.
    """
    factors = Factors(*(factor.detach() for factor in layer.factors))
    weight = weight_of(dense) if fold_of(dense) else dense.weight
    each = Pairs(layer.layout.matrix_of(weight.detach(), layer.groups), factors)
    energy = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)) ** 2
    return replace(
        trained_row(row, factors),
        energy_kept=_finite(_energy_within(each, energy)),
        relative_error=_finite(_relative_error(each)),
        spectral_error=None,
        weighted_error=None,
        predicted_loss=None,
        overlap=None,
    )


def compared_row(row: Row, matrix: Tensor | Stack, factors: Factors) -> Row:
    """The row with what factors of any origin keep of the dense matrix (rows, columns): errors, energy, directions.

    `energy_kept` is ||Q_u^T W Q_v||_F^2 / ||W||_F^2 with Q_u, Q_v orthonormal bases of the factors' subspaces. After a
    spectral init it equals the sum of the kept squared singular values over that of all.
    """
    assert row.rank is not None
    each = Pairs(matrix, factors)
    rank = min(row.rank, *matrix.shape[-2:])  # a v that layers share may have more rows
    values_of, energy, angles = [], 0.0, None
    for one, _ in each:
        dense = spectral_factors(one, rank)
        values_of.append(dense.values)
        energy += dense.energy
        if matrix.ndim == 2 and dense.energy:  # of several matrices, there would be as many angles
            angles = overlap(directions(dense.factors), directions(factors))
    values = stacked_values(values_of)
    gap = _spectral_norms_of_difference(each)
    return replace(
        trained_row(row, factors),
        energy_kept=_finite(_energy_within(each, energy)),
        relative_error=_finite(_relative_error(each)),
        spectral_error=_finite(gap / float(values[0])) if values[0] > 0 else 0.0,
        before=EffectiveRanks.of(values),
        spectrum_before=Points.of(values),
        overlap=angles,
    )


def _spectral_norms_of_difference(each: Pairs) -> float:
    """||W - u v||_2; over several matrices the root of the sum of the squares, as their singular values are stacked."""
    return math.hypot(*(_spectral_norm_of_difference(*pair) for pair in each))


def _spectral_norm_of_difference(matrix: Tensor, factors: Factors) -> float:
    wide = factors.u.to(torch.promote_types(matrix.dtype, torch.float32))
    scale = power_of_two(largest(matrix))  # keeps squares in the range of fp32
    rest = torch.addmm(matrix.to(wide.dtype) / scale, wide / scale, factors.v.to(wide.dtype), alpha=-1)
    gram = rest @ rest.T if rest.shape[0] <= rest.shape[1] else rest.T @ rest
    return scale * math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))


def plan_report(plan: Plan, parameters: int, measured: Mapping[str, Row] | None = None) -> Report:
    """The rows and totals of a plan over a model of this many parameters; `measured` rows replace planned ones."""
    rows = tuple((measured or {}).get(row.name) or planned_row(row) for row in plan.rows)
    return Report(rows, parameters, parameters_after(rows, parameters))


def parameters_after(rows: tuple[Row, ...], parameters: int) -> int | None:
    """The model's parameters once `rows` are done; None while a rank is not known."""
    if any(row.parameters_after is None for row in rows):
        return None
    return parameters - sum(row.parameters_before - (row.parameters_after or 0) for row in rows)


def rank_report(module: nn.Module, against: nn.Module | None = None, *, measured: bool = True) -> Report:
    """The report of a model in memory: factorised layers with their spectra, and why others stayed dense.

    With `against`, the dense model, also errors, energy and directions. Without `measured` no weight is read, so they
    may lie on the meta device.

    Raises PlanError where `against` lacks a layer; WeightError where one of its weights is not finite.
    """
    others = dense_layers(against) if against is not None else {}
    layers = factorised_layers(module)
    names, tied = {id(layer): name for name, layer in layers.items()}, leaders_of_tied(layers)
    rows = [
        _row_of(layer, row, others.get(name), against is None) if measured else planned_row(row)
        for name, layer in layers.items()
        if name not in tied
        for row in [replacement_of(name, layer, names, _tied_with(name, layers, tied))]
    ]
    rows += [
        planned_row(Kept(name, layers[name].kind, tuple(layers[name].weight.shape), 0, f"tied to {leader}"))
        for name, leader in tied.items()
    ]
    order = {name: i for i, name in enumerate(dense_layers(module))}
    rows = sorted([*rows, *_dense_rows(module)], key=lambda row: order.get(row.name, len(order)))
    after = count_parameters(module)
    before = after + sum(r.parameters_before - (r.parameters_after or 0) for r in rows)
    return Report(tuple(rows), before, after)


def replacement_of(
    name: str,
    layer: FactorisedLayer,
    names: Mapping[int, str] | None = None,
    tied: tuple[tuple[str, str], ...] = (),
) -> Replacement:
    """The row of a plan that would give this factorised layer.

    `names` are those of layers by id, for shared ones; `tied` as in the row.
    """
    (rows, columns), shape = layer.matrix_shape, tuple(layer.weight.shape)
    bias = 0 if layer.bias is None else layer.bias.numel()
    per_u = layer.layout.v_per_u(layer)
    active, groups = layer.layout.active(layer), layer.groups
    row = Replacement(name, layer.kind, shape, rows, columns, layer.rank, bias, per_u, side=layer.side, groups=groups)
    row = replace(row, active=active)
    if not isinstance(layer, SharedLinear):
        return replace(row, tied=tied)
    group = tuple((names or {}).get(id(each), name) for each in layer.group)
    joint = Joint(group, sum(each.out_features for each in layer.group), (layer.start, layer.own))
    return replace(row, joint=joint)


def _tied_with(
    name: str, layers: Mapping[str, FactorisedLayer], tied: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    return tuple((other, layers[other].kind) for other, leader in tied.items() if leader == name)


def _row_of(layer: FactorisedLayer, planned: Replacement, dense: nn.Module | None, alone: bool) -> Row:
    factors = Factors(*(f.detach() for f in layer.factors))
    row, name = planned_row(planned), planned.name
    if alone:
        return trained_row(row, factors)
    weight = None if dense is None else weight_of(dense) if fold_of(dense) else getattr(dense, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != row.shape:
        raise PlanError(f"{name}: the model to compare with has no such layer of shape {row.shape}")
    try:
        return compared_row(row, layer.layout.matrix_of(weight.detach(), layer.groups), factors)
    except WeightError as e:
        raise WeightError(f"{name}: {e}") from e


def _dense_rows(module: nn.Module) -> list[Row]:
    options = SurgeryOptions(target=RankSpec(FractionRank(1.0)), allow_larger=True)
    rows = plan_rows(module, options, heads=find_heads(module))
    return [
        planned_row(Kept(r.name, r.kind, r.shape, r.parameters, r.reason or "left dense"))
        for r in rows
        if r.reason != ALREADY
    ]


def recorded_options(
    surgery: SurgeryOptions,
    source: SourceOptions | None = None,
    dtype: torch.dtype | None = None,
    calibration: Json | None = None,
) -> Json:
    """The options that decide the result of surgery, as a report records them; `dtype` None keeps each tensor's own."""
    budget = surgery.budget
    return {
        "rank": None if budget is not None else str(surgery.target),
        "budget": None if budget is None else str(budget),
        "init": surgery.init,
        "conv": surgery.conv,
        "include": list(surgery.include),
        "exclude": list(surgery.exclude),
        "allow_larger": surgery.allow_larger,
        "multiple_of": surgery.target.multiple_of,
        "seed": surgery.seed,
        "from_scratch": source is not None and source.from_scratch_seed is not None,
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        "min_speedup": surgery.min_speedup,
        "svd": surgery.svd,
        "form": surgery.form,
        "share": surgery.share,
        "embeddings": surgery.takes_embeddings,
        "heads": surgery.heads,
        "calibration": calibration,
    }
