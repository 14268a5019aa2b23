"""Which groups of layers share one v: the ranks of a budget, with a group cut together where that loses less."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrsurgery.surgery.budget import Choice, Layer, allocate, price_of

ROUNDS = 2  # prices that groups are judged by: that of separate layers, then that of the groups it favours


@dataclass(frozen=True)
class Allocation:
    """The choices of a budget: those of a group that is cut together stand under the name of its first layer."""

    choices: Mapping[str, Choice | None]
    together: frozenset[int]  # numbers of the groups
    loss: float


def allocate_groups(
    layers: Sequence[Layer], groups: Sequence[tuple[Sequence[str], Layer]], budget: float
) -> Allocation:
    """The choices that lose least within a budget, with each group's layers separate or together.

    A group is the names of its layers and the stacked layer, under the name of the first. At the price of the budget
    (the multiplier of its relaxation), a group is cut together where its least loss + price * cost is lower so. The
    ranks are then allocated anew, and the best of all allocations is taken; see `surgery.budget.allocate`.
    """
    best = _solve(layers, groups, frozenset(), budget)
    tried, found = {best.together}, best
    for _ in range(ROUNDS):
        price = price_of(_joined(layers, groups, found.together), budget)
        together = _favoured(layers, groups, price)
        if together in tried:
            break
        tried.add(together)
        found = _solve(layers, groups, together, budget)
        best = min(best, found, key=lambda each: each.loss)
    return best


def _joined(
    layers: Sequence[Layer], groups: Sequence[tuple[Sequence[str], Layer]], together: frozenset[int]
) -> list[Layer]:
    """The layers, with the stacked one in the place of the first of each of these groups."""
    stacked = {groups[number][0][0]: groups[number][1] for number in together}
    gone = {name for number in together for name in groups[number][0]}
    return [stacked.get(layer.name, layer) for layer in layers if layer.name in stacked or layer.name not in gone]


def _solve(
    layers: Sequence[Layer],
    groups: Sequence[tuple[Sequence[str], Layer]],
    together: frozenset[int],
    budget: float,
) -> Allocation:
    joined = _joined(layers, groups, together)
    choices = allocate(joined, budget)
    return Allocation(choices, together, math.fsum(_loss(layer, choices[layer.name]) for layer in joined))


def _loss(layer: Layer, choice: Choice | None) -> float:
    return 0.0 if choice is None else max(0.0, float(layer.curves[choice.curve].tails[choice.rank]))


def _favoured(layers: Sequence[Layer], groups: Sequence[tuple[Sequence[str], Layer]], price: float) -> frozenset[int]:
    least = {layer.name: _least(layer, price) for layer in layers}
    return frozenset(
        number
        for number, (names, stacked) in enumerate(groups)
        if _least(stacked, price) < math.fsum(least[name] for name in names)
    )


def _least(layer: Layer, price: float) -> float:
    """The least loss + price * cost of a layer's options."""
    found = [price * layer.dense_cost]
    for curve in layer.curves:
        if len(curve.ranks):
            tails = curve.tails.detach().cpu().double().numpy()[np.array(curve.ranks)]
            found.append(float((tails.clip(min=0) + price * np.array(curve.costs, dtype=np.float64)).min()))
    return min(found)
