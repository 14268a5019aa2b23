"""Allocation of one budget over all layers: the ranks that minimise the sum of losses.

Every layer has options (cost, loss), one per scheme and rank and one for staying dense, of which exactly one is chosen.
This is a multiple-choice knapsack problem. `allocate` solves it as Pisinger (1995) does: first the linear relaxation
along the lower convex hulls of the options, then a dynamic programme over the states that the relaxation's bound leaves
open.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lrsurgery.errors import BudgetError
from lrsurgery.units import finite, size_of, size_text

READABLE = (
    "a share of the parameters such as 0.5, of the FLOPs such as flops:0.5 or of the time such as time:0.7, or a size"
    " such as bytes:500MB, or bytes:500MB:int8 or bytes:500MB:nf4 for what `export --quantise` makes of it"
)
QUANTISED = ("int8", "nf4")  # ways to store linear layers that bytes may be counted in
SCOPES = ("layers", "model")  # what a share refers to
SHARING = ("auto", "never")  # whether layers with the same inputs may have one v
TOGETHER, APART = SHARING
UNITS = {"params": "parameters", "flops": "FLOPs", "time": "time"}
STATE_LIMIT = 5_000_000  # states after which the search returns its best choice so far: one or two seconds

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """The size to keep: a share in (0, 1] of the parameters, FLOPs or measured time, or bytes of weights.

    A share refers to the layers that may be factorised or to the whole model (`of`); bytes always refer to the model.
    Raises BudgetError for an amount outside its bounds.
    """

    kind: str  # params, flops, time or bytes
    amount: float
    of: str = "layers"  # or model
    multiple_of: int | None = None  # of every chosen rank; see `ranks.multiple_for`
    stored: str | None = None  # of bytes: one of `QUANTISED` counts linear layers as quantised afterwards

    def __post_init__(self) -> None:
        if self.multiple_of is not None and self.multiple_of < 1:
            raise BudgetError(f"multiple of {self.multiple_of}: write a positive integer")
        assert self.kind in {*UNITS, "bytes"}, self.kind
        if self.of not in SCOPES:
            raise BudgetError(f"unknown budget scope '{self.of}'; known: {', '.join(SCOPES)}")
        if self.kind == "bytes":
            assert self.of == "model", self
            if not (self.amount >= 1 and math.isfinite(self.amount)):
                raise BudgetError(f"budget bytes:{self.amount:g}: a size is at least 1 byte; write one such as 500MB")
        elif not 0 < self.amount <= 1:
            prefix = "" if self.kind == "params" else f"{self.kind}:"
            raise BudgetError(
                f"budget {prefix}{self.amount:g}: the share of {UNITS[self.kind]} lies in (0, 1]; write bytes:500MB"
                " for a size"
            )

    @property
    def description(self) -> str:
        """The budget in words."""
        return f"budget {self}"

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"bytes:{size_text(self.amount)}" + (f":{self.stored}" if self.stored else "")
        share = repr(self.amount) if self.kind == "params" else f"{self.kind}:{self.amount!r}"
        return share + (" of the model" if self.of == "model" else "")


def parse_budget(text: str, of: str = "layers", multiple_of: int | None = None) -> Budget:
    """Parse `0.5`, `flops:0.5`, `time:0.7`, `bytes:500MB`, `bytes:500MB:int8` or `:nf4`.

    KB to TB are decimal, KiB to TiB binary, none is bytes.

    Raises BudgetError that lists the accepted forms.
    """
    kind, colon, number = text.strip().partition(":")
    try:
        if not colon:
            return Budget("params", finite(kind), of, multiple_of)
        if kind in ("flops", "time"):
            return Budget(kind, finite(number), of, multiple_of)
        if kind == "bytes":
            size, colon, stored = number.partition(":")
            if stored in (QUANTISED if colon else ("",)):
                return Budget("bytes", float(round(size_of(size))), "model", multiple_of, stored or None)
    except BudgetError:
        raise
    except (ValueError, OverflowError):
        pass
    raise BudgetError(f"budget '{text}' is not readable; write {READABLE}")


@dataclass(frozen=True)
class Curve:
    """The ranks that a layer may get by one scheme and form, ascending and possibly none, and what each costs.

    Costs are in the unit of the budget. `tails` (full rank + 1,) is float64 and non-increasing: entry r is the loss at
    rank r, in any unit that is additive over layers.
    """

    ranks: Sequence[int]
    costs: Sequence[int]  # of the ranks
    tails: Tensor

    def at_least(self, cost: float) -> Curve:
        """The ranks from the largest that costs at most `cost` on; all if none costs so little."""
        below = sum(each <= cost for each in self.costs)
        return replace(self, ranks=self.ranks[max(0, below - 1) :], costs=self.costs[max(0, below - 1) :])


@dataclass(frozen=True)
class Layer:
    """The options of one layer: to stay dense without loss, or a rank of one of its curves."""

    name: str
    dense_cost: int  # in the unit of the budget
    curves: tuple[Curve, ...]


class Choice(NamedTuple):
    """What a layer becomes: a rank of one of its curves."""

    curve: int
    rank: int


def cheapest(layers: Sequence[Layer]) -> int:
    """The smallest feasible budget: every layer at its lowest rank, or dense if that costs less."""
    return sum(min([layer.dense_cost, *(cost for curve in layer.curves for cost in curve.costs)]) for layer in layers)


def allocate(layers: Sequence[Layer], budget: float) -> dict[str, Choice | None]:
    """The choice for each layer (None: dense) that minimises the sum of losses, with the sum of costs in the budget.

    The linear relaxation gives a lower bound on the loss and greedy choices near it. A dynamic programme over
    undominated states, pruned by the bound, closes the gap. The choice is optimal up to rounding unless the search
    stops at `STATE_LIMIT` states. Its excess loss is then at most what the first hull edge that did not fit would have
    saved. The result is deterministic: of options with equal loss the cheapest is taken, and equal gains go to the
    earlier layer.

    Raises BudgetError that gives the smallest feasible budget, in the unit of the costs.
    """
    least = cheapest(layers)
    if not least <= budget:
        raise BudgetError(f"budget {budget:,.15g}: the cheapest choice of ranks costs {least:,}; write at least that")
    if not layers:
        return {}
    menus = [_menu(layer) for layer in layers]
    limit = math.floor(min(budget, sum(int(menu.costs[-1]) for menu in menus)))
    chosen, price, split = _relax(menus, limit)
    if split is not None:
        start = _greedy(menus, chosen, split, limit)
        chosen = _fill(menus, _search(menus, chosen, price, start, limit), limit)
    return {layer.name: menu.choices[at] for layer, menu, at in zip(layers, menus, chosen, strict=True)}


def price_of(layers: Sequence[Layer], budget: float) -> float:
    """The loss that one more unit of the budget would save by the linear relaxation; 0 if every option fits."""
    return _relax([_menu(layer) for layer in layers], math.floor(budget))[1]


class _Menu(NamedTuple):
    """The undominated options of a layer, by ascending cost and descending loss, and their lower convex hull."""

    choices: list[Choice | None]
    costs: Ints  # (options,)
    losses: Floats  # (options,)
    hull: list[int]  # indices of options
    gains: list[float]  # loss saved per cost along each edge of the hull, non-increasing

    def only(self, at: int) -> _Menu:
        return _Menu(self.choices[at : at + 1], self.costs[at : at + 1], self.losses[at : at + 1], [0], [])


def _menu(layer: Layer) -> _Menu:
    choices: list[Choice | None] = [None]
    all_costs, all_losses = [np.array([layer.dense_cost])], [np.zeros(1)]
    for index, curve in enumerate(layer.curves):
        tails = curve.tails.detach().cpu().double().numpy()
        choices += [Choice(index, rank) for rank in curve.ranks]
        all_costs.append(np.array(curve.costs, dtype=np.int64))
        all_losses.append(tails[np.array(curve.ranks, dtype=np.int64)].clip(min=0))
    costs, losses = np.concatenate(all_costs), np.concatenate(all_losses)
    kept = _drop_dominated(costs, losses)
    return _Menu(
        [choices[i] for i in kept], costs[kept], losses[kept], *_hull(costs[kept].tolist(), losses[kept].tolist())
    )


def _drop_dominated(costs: Ints, losses: Floats) -> Ints:
    """Indices, by ascending cost, of the undominated points; of equal points the first."""
    order = np.lexsort((losses, costs))
    return order[np.diff(np.minimum.accumulate(losses[order]), prepend=np.inf) < 0]


def _hull(costs: list[int], losses: list[float]) -> tuple[list[int], list[float]]:
    """Indices of the lower convex hull of points by ascending cost and descending loss, and the gains of its edges."""
    hull, gains = [0], list[float]()
    for i in range(1, len(costs)):
        gain = (losses[hull[-1]] - losses[i]) / (costs[i] - costs[hull[-1]])
        while gains and gain > gains[-1]:
            hull.pop()
            gains.pop()
            gain = (losses[hull[-1]] - losses[i]) / (costs[i] - costs[hull[-1]])
        hull.append(i)
        gains.append(gain)
    return hull, gains


def _cost(menus: list[_Menu], chosen: list[int]) -> int:
    return sum(int(menu.costs[at]) for menu, at in zip(menus, chosen, strict=True))


def _loss(menus: list[_Menu], chosen: list[int]) -> float:
    return math.fsum(float(menu.losses[at]) for menu, at in zip(menus, chosen, strict=True))


def _relax(menus: list[_Menu], limit: int) -> tuple[list[int], float, int | None]:
    """Solve the linear relaxation (Sinha & Zoltners 1979): chosen options, multiplier, split layer.

    Hull edges are taken by descending gain. The first that does not fit belongs to the split layer, and its gain is the
    multiplier, the price of a unit of cost. If every edge fits, there is no split layer and the price is 0.
    """
    owner = np.repeat(np.arange(len(menus)), [len(menu.gains) for menu in menus])
    costs = np.concatenate([np.diff(menu.costs[menu.hull]) for menu in menus])
    gains = np.concatenate([menu.gains for menu in menus])
    order = np.argsort(-gains, kind="stable")  # the edges of a layer stay in order
    fits = int(np.searchsorted(costs[order].cumsum(), limit - _cost(menus, [0] * len(menus)), side="right"))
    edges = np.bincount(owner[order[:fits]], minlength=len(menus)).tolist()
    base = [menu.hull[count] for menu, count in zip(menus, edges, strict=True)]
    if fits == len(order):
        return base, 0.0, None
    return base, float(gains[order[fits]]), int(owner[order[fits]])


def _fill(menus: list[_Menu], chosen: list[int], limit: int) -> list[int]:
    """Upgrade these options greedily within the limit, best gain per cost first."""
    chosen = list(chosen)
    left = limit - _cost(menus, chosen)
    waiting = [(-math.inf, layer) for layer in range(len(menus))]
    while waiting:
        _, layer = heapq.heappop(waiting)
        costs, losses, at = menus[layer].costs, menus[layer].losses, chosen[layer]
        stop = int(np.searchsorted(costs, costs[at] + left, side="right"))
        if stop == at + 1:
            continue  # nothing fits, and `left` only shrinks
        gains = (losses[at] - losses[at + 1 : stop]) / (costs[at + 1 : stop] - costs[at])
        best = int(gains.argmax())
        key = (-float(gains[best]), layer)
        if waiting and waiting[0] < key:
            heapq.heappush(waiting, key)
            continue
        chosen[layer] = at + 1 + best
        left -= int(costs[chosen[layer]] - costs[at])
        heapq.heappush(waiting, (-math.inf, layer))
    return chosen


def _greedy(menus: list[_Menu], base: list[int], split: int, limit: int) -> list[int]:
    """The better of two greedy choices: without the edge of the split layer that did not fit, and with it."""
    without = _fill(menus, base, limit)
    taken = menus[split].hull[menus[split].hull.index(base[split]) + 1]
    rest = [*menus[:split], menus[split].only(taken), *menus[split + 1 :]]
    if _cost(rest, [0] * len(rest)) > limit:
        return without
    having = _fill(rest, _relax(rest, limit)[0], limit)
    having[split] = taken
    return min(without, having, key=lambda chosen: _loss(menus, chosen))


class _Moves(NamedTuple):
    """The options of a layer as moves from its option in the relaxation."""

    layer: int
    costs: Ints  # (options,) change of the cost
    regrets: Floats  # (options,) change of loss + price * cost, which is minimal at the relaxed option
    up: float  # the best loss saved per cost added, at most the price
    down: float  # the least loss added per cost saved, at least the price


def _moves(layer: int, menu: _Menu, at: int, price: float) -> _Moves:
    costs = menu.costs - menu.costs[at]
    # subtract first: sums would round away the digits in which close regrets differ
    regrets = ((menu.losses - menu.losses[at]) + price * costs).clip(min=0)
    edge = menu.hull.index(at)
    up = menu.gains[edge] if edge < len(menu.gains) else 0.0
    return _Moves(layer, costs, regrets, up, menu.gains[edge - 1] if edge else math.inf)


def _search(menus: list[_Menu], base: list[int], price: float, chosen: list[int], limit: int) -> list[int]:
    """The best options within the limit, or the best within `STATE_LIMIT` states; `chosen` if none is better.

    A state moves some layers from their relaxed options. Its excess over the relaxation's bound is the sum of its
    regrets plus the price of the unused part of the limit. A state is dropped if another costs and loses no more
    (Nemhauser & Ullmann 1969), or if the remaining layers cannot bring it below the least excess so far. Layers with
    the best rates of exchange move first (Pisinger 1995).
    """
    room = limit - _cost(menus, base)
    bound = max(0.0, _loss(menus, base) - price * room)
    moves = [_moves(layer, menu, at, price) for layer, (menu, at) in enumerate(zip(menus, base, strict=True))]
    least = price * (limit - _cost(menus, chosen)) + math.fsum(float(m.regrets[chosen[m.layer]]) for m in moves)
    moves.sort(key=lambda m: min(price - m.up, m.down - price))
    ups, downs = [0.0], [math.inf]  # best rates of the layers after each one, last to first
    for m in reversed(moves[1:]):
        ups.append(max(ups[-1], m.up))
        downs.append(min(downs[-1], m.down))

    costs, regrets = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[int, Ints, Ints]] = []  # layer, each state's parent, and its option
    incumbent: tuple[int, int, int, int] | None = None  # length of the trail, parent, layer, option
    states = 0
    for m, up, down in zip(moves, reversed(ups), reversed(downs), strict=True):
        near = np.flatnonzero(m.regrets < least - 1e-14 * (bound + least))
        if len(near) <= 1:
            continue  # only the relaxed option
        states += len(costs) * len(near)
        if states > STATE_LIMIT or not len(costs):
            break
        costs = np.add.outer(costs, m.costs[near]).ravel()
        regrets = np.add.outer(regrets, m.regrets[near]).ravel()
        left = room - costs
        excess = np.where(left >= 0, regrets + price * left, np.inf)
        best = int(excess.argmin())
        if excess[best] < least:
            least = float(excess[best])
            incumbent = len(trail), best // len(near), m.layer, int(near[best % len(near)])
        lowest = regrets + left * np.where(left >= 0, price - up, price - down)
        kept = np.flatnonzero(lowest < least - 1e-14 * (bound + least))
        kept = kept[_drop_dominated(costs[kept], (regrets - price * costs)[kept])]
        costs, regrets = costs[kept], regrets[kept]
        trail.append((m.layer, kept // len(near), near[kept % len(near)]))
    if incumbent is None:
        return chosen
    length, state, layer, option = incumbent
    options = list(base)
    options[layer] = option
    for layer, parents, taken in reversed(trail[:length]):
        options[layer], state = int(taken[state]), int(parents[state])
    return options
