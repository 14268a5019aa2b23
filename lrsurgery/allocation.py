"""One budget over the layers of a plan: what each rank costs and loses, and which of them are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrsurgery.budget import Budget, Layer, allocate, cheapest
from lrsurgery.errors import BudgetError
from lrsurgery.moments import Statistics
from lrsurgery.plan import Kept, Plan, Replaced
from lrsurgery.ranks import ParameterShare, break_even_rank

DENSE = "worth its parameters dense, within the budget"


def share_out(
    plan: Plan, budget: Budget, values: Mapping[str, Tensor], statistics: Statistics | None = None, *, parameters: int,
    widths: Mapping[str, int], total_bytes: int,
) -> Plan:  # fmt: skip
    """The plan with the ranks that lose least within a budget, or layers left dense.

    `values` are singular values by layer, in its metric where there are statistics. What a rank loses is the second
    order of the loss where they hold gradients; else the share of the layer's squared norm, in its metric if there is
    one. `parameters` and `total_bytes` are the model's, `widths` bytes of a number of each layer as it is stored.

    Raises BudgetError with the smallest budget that can be met.
    """
    rows = plan.replaced
    costs = {row.name: _costs(budget, row, statistics, widths) for row in rows}
    whole = sum(dense for dense, _ in costs.values())
    if rows and not whole:
        raise BudgetError(f"budget {budget}: none of its layers saw calibration data, so what they cost is not known")
    total = {"params": parameters, "bytes": total_bytes, "flops": whole}[budget.kind]
    if budget.of == "model" and budget.kind == "flops":
        raise BudgetError(f"budget {budget}: FLOPs are counted of the layers alone; leave --budget-of out")
    rest = total - whole if budget.of == "model" else 0  # what is no layer's
    asked = budget.amount if budget.kind == "bytes" else budget.amount * (rest + whole)
    share = max(1e-9, min(1.0, (asked - rest) / whole))
    layers = [_layer(plan, row, *costs[row.name], values[row.name], statistics, share) for row in rows]
    least = rest + cheapest(layers)
    if asked < least:
        smallest = f"bytes:{least}" if budget.kind == "bytes" else f"{_up(least / (rest + whole)):g}"
        raise BudgetError(f"budget {budget}: out of reach; the smallest that can be met is {smallest}")
    ranks = allocate(layers, asked - rest)
    settled: dict[str, Replaced | Kept] = {}
    for row, layer in zip(rows, layers, strict=True):
        rank = ranks[row.name]
        if rank is None:
            reason = DENSE if layer.ranks else "no rank saves parameters"
            settled[row.name] = Kept(row.name, row.kind, row.shape, row.parameters, reason)
        else:
            settled[row.name] = replace(row, rank=rank)
    return plan.with_rows(settled)


def _up(share: float) -> float:
    """Rounded up to four digits, so that what is told can be met."""
    digits = 10.0 ** (3 - math.floor(math.log10(share)))
    return math.ceil(share * digits) / digits


def _costs(budget: Budget, row: Replaced, statistics: Statistics | None, widths: Mapping[str, int]) -> tuple[int, int]:
    """What the dense matrix costs, and each rank."""
    if budget.kind == "params":
        return row.rows * row.columns, row.rows + row.columns
    if budget.kind == "bytes":
        width = widths[row.name]
        return width * row.rows * row.columns, width * (row.rows + row.columns)
    if statistics is None and row.kind.startswith("conv2d"):
        raise BudgetError(
            f"budget {budget}: how often a convolution is applied is not known; give --calibration, or count params"
        )
    if statistics is None:
        return row.flops, 2 * (row.rows + row.columns)
    seen = statistics.seen[row.name]
    return seen.outputs * row.flops, 2 * (seen.outputs * row.rows + seen.positions * row.columns)


def _layer(
    plan: Plan, row: Replaced, dense_cost: int, rank_cost: int, values: Tensor, statistics: Statistics | None,
    share: float,
) -> Layer:  # fmt: skip
    squares = values.double().cpu().square()
    total = float(squares.sum())
    if total > 0 and not (statistics is not None and statistics.has_gradients):  # else layers compare as they are
        squares = squares / total
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    step = plan.spec.multiple_of
    most = min(break_even_rank(row.rows, row.columns), row.full_rank)
    ranks = list(range(step, most + 1, step)) if step <= most else []
    if statistics is not None and not statistics.seen[row.name].positions and ranks:
        # nothing is known of what its errors cost, so it takes the share that layers take on the whole
        rank = ParameterShare(share).rank_of(row.rows, row.columns)
        ranks, tails = [max(step, min(most, rank // step * step))], torch.zeros_like(tails)
    return Layer(row.name, dense_cost, rank_cost, ranks, tails)
