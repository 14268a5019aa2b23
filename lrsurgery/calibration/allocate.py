"""Rank decisions, for models in memory and for checkpoints on disk.

A policy decides each layer from its singular values; a budget decides all layers together. Statistics of calibration
weight the error of a rank and predict the increase of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.spectra import SpectrumLookup
from lrsurgery.errors import BudgetError, SurgeryError
from lrsurgery.linalg.weighted import second_order
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import decomposition_bytes
from lrsurgery.surgery.budget import Budget, Layer, allocate, cheapest
from lrsurgery.surgery.plan import Kept, Plan, Replacement, decide_all
from lrsurgery.surgery.ranks import ParameterShare, break_even_rank, rank_within

# Least rank of a layer, as a share of its uniform rank, where nothing compares layers by the loss. Inputs alone compare
# them worse than not at all (examples/guides/calibration.md), so no layer goes below its uniform rank then.
LEAST = {"activations": 1.0, "none": 0.75}
DENSE = "worth its parameters dense, within the budget"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Access to the dense weights of a model in memory or on disk, with the size of the model."""

    read: Callable[[str], Tensor]  # layer -> its dense weight
    widths: Mapping[str, int]  # layer -> bytes per entry of its weight as read
    stored_widths: Mapping[str, int]  # layer -> bytes per entry of its weight as written
    parameters: int
    stored_bytes: int
    device: torch.device | None = None  # device for computation; None: that of each weight


def allocate_ranks(
    plan: Plan,
    weights: Weights,
    compute: Compute,
    statistics: Statistics | None = None,
    *,
    known: dict[str, Tensor] | None = None,
) -> Plan:
    """Decide every rank of a plan, and predict the increase of the loss if the statistics have gradients.

    Singular values, with statistics those in the layer's metric, go to the cache. `known` holds them by layer from an
    earlier call with the same weights and statistics, and gets what it lacks.

    Raises BudgetError that gives the smallest feasible budget; SurgeryError that names the layer.
    """
    budget = plan.target if isinstance(plan.target, Budget) else None
    weighted = statistics is not None
    rows = [row for row in plan.replacements if row.rank is None or budget is not None or weighted]

    def values_of(row: Replacement) -> Tensor:
        metric = statistics.metric(row.name) if statistics is not None else None
        digest = statistics.digests.get(row.name) if statistics is not None else None
        weight = weights.read(row.name)
        lookup = SpectrumLookup(weight, row.layout, compute, weights.device or weight.device)
        try:
            return lookup.values(metric, digest)
        except SurgeryError as e:
            raise type(e)(f"{row.name}: {e}") from e

    values = {} if known is None else known
    new = [row for row in rows if row.name not in values]
    needs = [decomposition_bytes(row, weights.widths[row.name], weighted=weighted) for row in new]
    values.update(zip((row.name for row in new), compute.in_order(values_of, new, needs), strict=True))
    if budget is not None:
        plan = apply_budget(plan, budget, values, weights, statistics)
    else:
        plan = decide_all(plan, lambda row: values[row.name])
    if statistics is None or not statistics.has_gradients:
        return plan
    return plan.with_rows(
        {
            row.name: replace(row, predicted_loss=second_order(values[row.name], row.rank or 0))
            for row in plan.replacements
        }
    )


def apply_budget(
    plan: Plan,
    budget: Budget,
    values: Mapping[str, Tensor],
    weights: Weights,
    statistics: Statistics | None = None,
) -> Plan:
    """Decide the ranks that minimise the total loss within a budget; layers may stay dense.

    `values` are singular values by layer, with statistics those in its metric. The loss of a rank is the predicted
    increase of the loss if the statistics have gradients, else the share of the layer's squared norm (in its metric, if
    there is one). Such shares say little about the loss, so ranks then stay near or above the uniform ones (`LEAST`).

    Raises BudgetError that gives the smallest feasible budget.
    """
    rows = plan.replacements
    costs = {row.name: _costs(budget, row, statistics, weights.stored_widths) for row in rows}
    whole = sum(cost.dense for cost in costs.values())
    if rows and not whole:
        raise BudgetError(
            f"budget {budget}: no layer received calibration input, so FLOPs are unknown; calibrate with other data"
        )
    total = {"params": weights.parameters, "bytes": weights.stored_bytes, "flops": whole}[budget.kind]
    if budget.of == "model" and budget.kind == "flops":
        raise BudgetError(f"budget {budget}: FLOPs are counted for the layers only; remove --budget-of")
    rest = total - whole if budget.of == "model" else 0  # cost of parameters in no planned layer
    asked = budget.amount if budget.kind == "bytes" else budget.amount * (rest + whole)
    share = max(1e-9, min(1.0, (asked - rest) / whole))
    layers = [_make_layer(budget, row, costs[row.name], values[row.name], statistics, share) for row in rows]
    if statistics is None or not statistics.has_gradients:
        least_share = LEAST["none" if statistics is None else "activations"]
        layers = _keep_near_uniform(layers, share, budget.multiple_of, least_share, asked - rest)
    least = rest + cheapest(layers)
    if asked < least:
        smallest = f"bytes:{least}" if budget.kind == "bytes" else f"{_round_up(least / (rest + whole)):g}"
        raise BudgetError(f"budget {budget}: out of reach; the smallest that can be met is {smallest}")
    ranks = allocate(layers, asked - rest)
    decided: dict[str, Replacement | Kept] = {}
    for row, layer in zip(rows, layers, strict=True):
        rank = ranks[row.name]
        if rank is None:
            reason = DENSE if layer.ranks else "no rank saves parameters"
            decided[row.name] = Kept(row.name, row.kind, row.shape, row.parameters, reason)
        else:
            decided[row.name] = replace(row, rank=rank)
    return plan.with_rows(decided)


def _keep_near_uniform(layers: list[Layer], share: float, step: int, least: float, limit: float) -> list[Layer]:
    """Drop ranks below `least` of the uniform one, which keeps `share` of the layer's cost; below less if need be."""

    def bounded(layer: Layer, part: float) -> Layer:
        lowest = rank_within(part * share * layer.dense_cost, max(1, layer.rank_cost), layer.saving) // step * step
        return replace(layer, ranks=[rank for rank in layer.ranks if rank >= lowest] or layer.ranks)

    for part in (1.0, 0.95, 0.9, 0.75, 0.5, 0.25):
        near = [bounded(layer, part) for layer in layers]
        if part <= least and cheapest(near) <= limit:
            return near
    return layers


def _round_up(share: float) -> float:
    """Round up to four digits, so that the reported budget is feasible."""
    digits = 10.0 ** (3 - math.floor(math.log10(share)))
    return math.ceil(share * digits) / digits


class _Cost(NamedTuple):
    """In the unit of the budget: of the dense matrix, of a unit of rank, and what pivots save per rank squared."""

    dense: int
    rank: int
    saving: int


def _costs(budget: Budget, row: Replacement, statistics: Statistics | None, widths: Mapping[str, int]) -> _Cost:
    pivoted = int(row.side is not None)
    if budget.kind in ("params", "bytes"):
        width = 1 if budget.kind == "params" else widths[row.name]
        return _Cost(width * row.rows * row.columns, width * (row.rows + row.columns), width * pivoted)
    if statistics is None and not row.layout.takes_tokens:
        raise BudgetError(
            f"budget {budget}: the number of positions of a convolution is unknown; add --calibration, or use a share"
            " of the parameters"
        )
    if statistics is None:
        return _Cost(row.flops, 2 * (row.rows + row.columns), 2 * pivoted)
    use = statistics.uses[row.name]
    per_rank = 2 * (use.outputs * row.rows + use.positions * row.columns)
    return _Cost(use.outputs * row.flops, per_rank, 2 * use.outputs * pivoted)


def _make_layer(
    budget: Budget,
    row: Replacement,
    cost: _Cost,
    values: Tensor,
    statistics: Statistics | None,
    share: float,
) -> Layer:
    squares = values.double().cpu().square()
    total = float(squares.sum())
    if total > 0 and not (statistics is not None and statistics.has_gradients):  # with gradients, losses compare
        squares = squares / total
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    step = budget.multiple_of
    pivoted = row.side is not None
    most = min(break_even_rank(row.rows, row.columns, pivoted=pivoted), row.full_rank)
    ranks = list(range(step, most + 1, step)) if step <= most else []
    if statistics is not None and not statistics.uses[row.name].positions and ranks:
        # no calibration input, so its loss is unknown: keep the share of its parameters that the budget keeps overall
        rank = ParameterShare(share).rank_of(row.rows, row.columns, pivoted=pivoted)
        ranks, tails = [max(step, min(most, rank // step * step))], torch.zeros_like(tails)
    return Layer(row.name, cost.dense, cost.rank, ranks, tails, cost.saving)
