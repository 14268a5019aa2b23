"""Rank decisions, for models in memory and for checkpoints on disk.

A policy decides each layer from its singular values; a budget decides all layers together. Statistics of calibration
weight the error of a rank and predict the increase of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.spectra import SpectrumLookup, joint_lookup
from lrsurgery.errors import BudgetError, SurgeryError
from lrsurgery.linalg.weighted import Metric, joint_values, second_order
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import decomposition_bytes
from lrsurgery.surgery.budget import UNITS, Budget, Curve, Layer, cheapest
from lrsurgery.surgery.plan import Plan, decide_all, losses
from lrsurgery.surgery.ranks import ParameterShare, break_even_rank
from lrsurgery.surgery.rows import Kept, Replacement, join_rows, whole_of
from lrsurgery.surgery.shared.choice import allocate_groups
from lrsurgery.surgery.speed import Timer

# Least rank of a layer, as a share of its uniform rank, where nothing compares layers by the loss. Inputs alone compare
# them worse than not at all (examples/guides/calibration.md), so no layer goes below its uniform rank then.
LEAST = {"activations": 1.0, "none": 0.75}
DENSE = "worth its parameters dense, within the budget"
PICO = 1e12  # a budget's costs are integers
NARROW = ("linear", "conv1d")  # kinds whose factors are linear layers of torch, which quantisers take
NF4_BLOCK = 64  # entries that have one scale
NF4_ACCOUNT = 160  # bytes at most of the 16 levels and a line of JSON that are stored with each weight


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Access to the dense weights of a model in memory or on disk, with the size of the model."""

    read: Callable[[str], Any]  # layer -> its dense weight, or a `Stack` of experts
    widths: Mapping[str, int]  # layer -> bytes per entry of its weight as read
    stored_widths: Mapping[str, int]  # layer -> bytes per entry of its weight as written
    parameters: int
    stored_bytes: int
    device: torch.device | None = None  # device for computation; None: that of each weight
    timer: Timer | None = None  # of the layers, for a budget of time
    alone: frozenset[str] = frozenset()  # layers that can share their v with no other
    heads: frozenset[str] = frozenset()  # layers that are never quantised


def allocate_ranks(
    plan: Plan,
    weights: Weights,
    compute: Compute,
    statistics: Statistics | None = None,
    *,
    share: bool = False,
    known: dict[tuple[str, str], Tensor] | None = None,
) -> Plan:
    """Decide every rank of a plan, and predict the increase of the loss if the statistics have gradients.

    `share` offers a budget groups of layers with the same inputs, which may have one v, where the statistics compare
    layers by the loss.

    Singular values, with statistics those in the layer's metric, go to the cache. `known` holds them by layer and
    kind from an earlier call with the same weights and statistics, and gets what it lacks.

    Raises BudgetError that gives the smallest feasible budget; SurgeryError that names the layer.
    """
    budget = plan.target if isinstance(plan.target, Budget) else None
    weighted = statistics is not None
    if statistics is not None:
        plan = plan.with_rows({row.name: statistics.of_schemes(row) for row in plan.replacements})
    rows = [row for row in plan.replacements if row.undecided or budget is not None or weighted]
    options = [option for row in rows for option in row.options]

    def compute_values(row: Replacement) -> Tensor:
        metric = digest = None
        if statistics is not None:
            metric, digest = statistics.metric_of(row), statistics.digest_of(row)
        weight = weights.read(row.name)
        lookup = SpectrumLookup(weight, row.layout, compute, weights.device or weight.device, row.groups)
        try:
            return lookup.values(metric, digest)
        except SurgeryError as e:
            raise type(e)(f"{row.name}: {e}") from e

    values = {} if known is None else known
    new = [option for option in options if (option.name, option.kind) not in values]
    needs = [decomposition_bytes(row, weights.widths[row.name], weighted=weighted) for row in new]
    found = compute.in_order(compute_values, new, needs)
    values.update(zip(((row.name, row.kind) for row in new), found, strict=True))

    def values_of(row: Replacement) -> Tensor:
        return values[row.name, row.kind]

    in_loss = statistics is not None and statistics.has_gradients
    groups: list[Group] = []
    if budget is not None:
        if share and statistics is not None and in_loss and budget.kind != "time":
            groups = _find_groups(plan, weights, compute, statistics)
        plan = apply_budget(plan, budget, values_of, weights, statistics, groups)
    else:
        plan = decide_all(plan, values_of, in_loss=in_loss)
    if not in_loss:
        return plan
    predicted = {group.rows[0].name: group.values for group in groups}

    def loss_of(row: Replacement) -> float | None:
        """Of a group until its layers are known, the loss of all is that of the first."""
        if row.joint is not None and not row.leads:
            return None
        return second_order(values_of(row) if row.joint is None else predicted[row.name], row.rank or 0)

    return plan.with_rows({row.name: replace(row, predicted_loss=loss_of(row)) for row in plan.replacements})


@dataclass(frozen=True)
class Group:
    """Layers that may share one v, in the order of the model, and the values that they have together."""

    rows: tuple[Replacement, ...]
    values: Tensor


def _find_groups(plan: Plan, weights: Weights, compute: Compute, statistics: Statistics) -> list[Group]:
    rows = {row.name: row for row in plan.replacements if not row.others and row.name not in weights.alone}
    order = {name: number for number, name in enumerate(rows)}
    found: list[tuple[Replacement, ...]] = []
    for names in statistics.groups():
        held = [rows[name] for name in sorted((name for name in names if name in rows), key=order.__getitem__)]
        widths = {(weights.widths[row.name], weights.stored_widths[row.name], bool(row.bias)) for row in held}
        if len(held) > 1 and len(widths) == 1 and held[0].layout.shares_v:
            found.append(tuple(held))

    def compute_values(unit: tuple[Replacement, ...]) -> Tensor | None:
        dense = [weights.read(row.name) for row in unit]
        device = weights.device or dense[0].device
        metrics = [metric for row in unit if isinstance(metric := statistics.metric(row.name, row.kind), Metric)]
        if len(metrics) < len(unit) or any(metric.gradients is None for metric in metrics):
            return None  # the loss does not depend on one of them, so their errors do not compare
        digests = [statistics.digests.get(statistics.key(row.name, row.kind)) for row in unit]
        matrices = [row.layout.to_matrix(weight.to(device)) for row, weight in zip(unit, dense, strict=True)]
        try:
            return joint_lookup(dense, digests, compute, lambda: joint_values(matrices, metrics))
        except SurgeryError as e:
            raise type(e)(f"{', '.join(row.name for row in unit)}: {e}") from e

    needs = [decomposition_bytes(whole_of(unit), weights.widths[unit[0].name], weighted=True) for unit in found]
    every = zip(found, compute.in_order(compute_values, found, needs), strict=True)
    return [Group(unit, values) for unit, values in every if values is not None]


def apply_budget(
    plan: Plan,
    budget: Budget,
    values_of: Callable[[Replacement], Tensor],
    weights: Weights,
    statistics: Statistics | None = None,
    groups: Sequence[Group] = (),
) -> Plan:
    """Decide the schemes and ranks that minimise the total loss within a budget; layers may stay dense.

    `values_of` returns the singular values of a layer by one scheme, with statistics those in its metric. The loss of a
    rank is the predicted increase of the loss if the statistics have gradients, else the share of the layer's squared
    norm (in its metric, if there is one). Such shares say little about the loss, so ranks then stay near or above the
    uniform ones (`LEAST`). Layers of `groups` share one v where that loses less.

    Raises BudgetError that gives the smallest feasible budget.
    """
    rows = plan.replacements
    layers = [_make_layer(budget, row, values_of, weights, statistics) for row in rows]
    whole = sum(layer.dense_cost for layer in layers)
    if rows and not whole:
        raise BudgetError(
            f"budget {budget}: no layer received calibration input, so {UNITS[budget.kind]} is unknown; calibrate with"
            " other data"
        )
    total = {"params": weights.parameters, "bytes": weights.stored_bytes}.get(budget.kind, whole)
    if budget.stored is not None:
        total += whole - sum(weights.stored_widths[row.name] * row.matrices * row.rows * row.columns for row in rows)
    if budget.of == "model" and budget.kind in ("flops", "time"):
        raise BudgetError(f"budget {budget}: {UNITS[budget.kind]} is counted for the layers only; remove --budget-of")
    rest = total - whole if budget.of == "model" else 0  # cost of parameters in no planned layer
    asked = budget.amount if budget.kind == "bytes" else budget.amount * (rest + whole)
    if budget.kind == "bytes" and asked < total:  # then layers get pivots, whose orders are int32
        pivoted = [row for row in rows if row.side is not None]  # what is tied to a layer has a copy of its order
        rest += sum(4 * (1 + len(row.tied)) * (row.rows if row.side == "rows" else row.columns) for row in pivoted)
    share = max(1e-9, min(1.0, (asked - rest) / whole))
    if statistics is not None:
        layers = [
            layer if statistics.use(row).positions else _keep_share(row, layer, share)
            for row, layer in zip(rows, layers, strict=True)
        ]
    if statistics is None or not statistics.has_gradients:
        least_share = LEAST["none" if statistics is None else "activations"]
        layers = _keep_near_uniform(layers, share, least_share, asked - rest)
    least = rest + cheapest(layers)
    if asked < least:
        amount = str(least) if budget.kind == "bytes" else f"{_round_up(least / (rest + whole)):g}"
        smallest = amount if budget.kind == "params" else f"{budget.kind}:{amount}"
        raise BudgetError(f"budget {budget}: out of reach; the smallest that can be met is {smallest}")
    stacked = [_stack(budget, group, weights, statistics) for group in groups]
    found = allocate_groups(layers, stacked, asked - rest)
    choices = dict(found.choices)
    decided: dict[str, Replacement | Kept] = {}
    for group in (groups[number] for number in sorted(found.together)):
        choice = choices[group.rows[0].name]
        choices |= dict.fromkeys(row.name for row in group.rows)
        if choice is not None:
            decided |= {row.name: row for row in join_rows(group.rows, choice.rank)}
    for row, layer in zip(rows, layers, strict=True):
        if row.name in decided:
            continue
        choice = choices[row.name]
        if choice is None:
            reason = DENSE if any(curve.ranks for curve in layer.curves) else "no rank saves parameters"
            decided[row.name] = Kept(row.name, row.kind, row.shape, row.parameters, reason)
        else:
            decided[row.name] = replace(row.options[choice.curve], rank=choice.rank)
    return plan.with_rows(decided)


def _stack(budget: Budget, group: Group, weights: Weights, statistics: Statistics | None) -> tuple[list[str], Layer]:
    """The names of a group, and the layer that it is together."""
    whole = whole_of(group.rows)
    layer = _make_layer(budget, whole, lambda row: group.values, weights, statistics)
    if (
        budget.kind == "bytes" and whole.side is not None
    ):  # orders of the layers' rows in the place of those it replaces
        more = sum(4 * (row.rows - (row.rows if row.side == "rows" else row.columns)) for row in group.rows)
        layer = replace(
            layer, curves=tuple(replace(c, costs=[max(1, cost + more) for cost in c.costs]) for c in layer.curves)
        )
    return [row.name for row in group.rows], layer


def _keep_near_uniform(layers: list[Layer], share: float, least: float, limit: float) -> list[Layer]:
    """Drop ranks below `least` of the uniform one, which keeps `share` of the layer's cost; below less if need be."""
    for part in (1.0, 0.95, 0.9, 0.75, 0.5, 0.25):
        near = [
            replace(layer, curves=tuple(curve.at_least(part * share * layer.dense_cost) for curve in layer.curves))
            for layer in layers
        ]
        if part <= least and cheapest(near) <= limit:
            return near
    return layers


def _round_up(share: float) -> float:
    """Round up to four digits, so that the reported budget is feasible."""
    digits = 10.0 ** (3 - math.floor(math.log10(share)))
    return math.ceil(share * digits) / digits


def _costs(
    budget: Budget, row: Replacement, ranks: Sequence[int], statistics: Statistics | None, weights: Weights
) -> tuple[int, list[int]]:
    """In the unit of the budget, what the dense matrix costs and what each of these ranks does."""
    if budget.kind in ("params", "bytes"):
        width = 1 if budget.kind == "params" else weights.stored_widths[row.name]
        if budget.stored is not None and row.kind in NARROW and row.name not in weights.heads:
            return _int8_bytes(row, ranks, width) if budget.stored == "int8" else _nf4_bytes(row, ranks)
        return width * row.matrices * row.rows * row.columns, [width * row.cost(rank) for rank in ranks]
    if statistics is None and not row.layout.takes_tokens:
        raise BudgetError(
            f"budget {budget}: the number of positions of a convolution is unknown; add --calibration, or use a share"
            " of the parameters"
        )
    use = None if statistics is None else statistics.use(row)
    outputs, positions = (row.active, row.active) if use is None else (use.outputs, use.positions)
    if budget.kind == "time":
        assert weights.timer is not None
        times = weights.timer(row, ranks)
        tokens = outputs / row.active
        return round(tokens * times.dense * PICO), [round(tokens * each * PICO) for each in times.ranks]
    if row.layout.lookup:
        return outputs * row.flops, [outputs * row.flops_at(rank) for rank in ranks]
    saving = 0 if row.side is None else 1  # a pivoted layer has as many positions in v as in u
    each = [row.groups * r * (outputs * row.rows + positions * row.columns - r * outputs * saving) for r in ranks]
    return outputs * row.flops // row.active, [2 * cost for cost in each]  # of experts, outputs are those of each


def _int8_bytes(row: Replacement, ranks: Sequence[int], width: int) -> tuple[int, list[int]]:
    """Bytes of a layer whose linear layers are int8, with a scale and a zero point a row: dense, and at each rank."""
    one = width + 1
    dense = row.rows * row.columns
    dense = width * dense if row.kind == "conv1d" else dense + one * row.rows  # torchao leaves Conv1D as it is
    lines = (row.rows if row.side == "rows" else row.rows + rank for rank in ranks)
    return dense, [row.cost(rank) + one * rows for rank, rows in zip(ranks, lines, strict=True)]


def _nf4_bytes(row: Replacement, ranks: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of a layer in bitsandbytes' nf4, at most: half a byte an entry, an fp32 scale for 64; dense, at each rank.

    Each packed weight is rounded up to a byte and to a block, and has its own account (`NF4_ACCOUNT`).
    """

    def packed(entries: int, weights: int) -> int:
        return (entries + weights) // 2 + 4 * (entries // NF4_BLOCK + weights) + NF4_ACCOUNT * weights

    factors = 2 if row.joint is None or row.leads else 1
    return packed(row.rows * row.columns, 1), [packed(row.cost(rank), factors) for rank in ranks]


def _make_layer(
    budget: Budget,
    row: Replacement,
    values_of: Callable[[Replacement], Tensor],
    weights: Weights,
    statistics: Statistics | None,
) -> Layer:
    curves, dense_cost = [], 0
    for option in row.options:
        tails = losses(values_of(option), in_loss=statistics is not None and statistics.has_gradients)
        most = min(break_even_rank(option.rows, option.columns, pivoted=option.side is not None), option.full_rank)
        step = option.multiple_of(budget.multiple_of)
        ranks = range(step, most + 1, step)
        dense_cost, costs = _costs(budget, option, ranks, statistics, weights)
        curves.append(Curve(ranks, costs, tails))
    return Layer(row.name, dense_cost, tuple(curves))


def _keep_share(row: Replacement, layer: Layer, share: float) -> Layer:
    """The one rank that keeps this share of the parameters, for a layer without calibration input."""
    uniform = ParameterShare(share).rank_of(row.rows, row.columns, pivoted=row.side is not None)
    first = layer.curves[0]
    below = max(1, sum(rank <= uniform for rank in first.ranks))
    only = Curve(first.ranks[below - 1 : below], first.costs[below - 1 : below], torch.zeros_like(first.tails))
    return replace(layer, curves=(only,))
