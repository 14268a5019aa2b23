"""One budget for the whole model: which rank each layer takes so that the sum of losses is least.

Every layer has options (cost, loss), one for each rank and one for staying dense, and takes exactly one of them: a
multiple-choice knapsack. `allocate` solves it as Pisinger (1995) does: first the linear relaxation, along the lower
convex hulls of the options, then a search of what the relaxation's bound leaves open.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lrsurgery.errors import BudgetError
from lrsurgery.units import finite, size_of, size_text

READABLE = (
    "a share of the parameters such as 0.5, a share of the FLOPs such as flops:0.5, or a size such as bytes:500MB"
)
SCOPES = ("layers", "model")  # that a share is of
LOOKED_AT = 5_000_000  # states: past these the search stops at the best choice so far, after a second or two

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """What may be kept: a share in (0, 1] of the parameters or FLOPs, or so many bytes of weights.

    A share is of the layers that may be factorised or of the whole model, as `of` says; bytes are always of the model.
    Raises BudgetError for an amount outside its bounds.
    """

    kind: str  # params, flops or bytes
    amount: float
    of: str = "layers"  # or model
    multiple_of: int = 1  # of every rank that it chooses

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise BudgetError(f"multiple of {self.multiple_of}: write a positive integer")
        assert self.kind in {"params", "flops", "bytes"}, self.kind
        if self.of not in SCOPES:
            raise BudgetError(f"a budget of the {self.of} is not known; it is of the layers or of the model")
        if self.kind == "bytes":
            assert self.of == "model", self
            if not (self.amount >= 1 and math.isfinite(self.amount)):
                raise BudgetError(f"budget bytes:{self.amount:g}: a size is at least 1 byte; write one such as 500MB")
        elif not 0 < self.amount <= 1:
            prefix, what = ("flops:", "FLOPs") if self.kind == "flops" else ("", "parameters")
            raise BudgetError(
                f"budget {prefix}{self.amount:g}: the share of {what} lies in (0, 1]; write bytes:500MB for a size"
            )

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        return f"budget {self}"

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"bytes:{size_text(self.amount)}"
        share = f"flops:{self.amount!r}" if self.kind == "flops" else repr(self.amount)
        return share + (" of the model" if self.of == "model" else "")


def parse_budget(text: str, of: str = "layers", multiple_of: int = 1) -> Budget:
    """Read `0.5`, `flops:0.5` or `bytes:500MB` (KB to TB are decimal, KiB to TiB binary; no unit means bytes).

    Raises BudgetError with what is readable.
    """
    kind, colon, number = text.strip().partition(":")
    try:
        if not colon:
            return Budget("params", finite(kind), of, multiple_of)
        if kind == "flops":
            return Budget("flops", finite(number), of, multiple_of)
        if kind == "bytes":
            return Budget("bytes", float(round(size_of(number))), "model", multiple_of)
    except BudgetError:
        raise
    except (ValueError, OverflowError):
        pass
    raise BudgetError(f"budget '{text}' is not readable; write {READABLE}")


@dataclass(frozen=True)
class Layer:
    """What one layer may choose from: to stay dense at no loss, or one of `ranks`, ascending and possibly none.

    `tails` (full rank + 1,) is float64 and non-increasing: entry r is the loss of keeping rank r, in any unit that adds
    up over layers. `dense_cost` and `rank_cost`, of each rank, are in the unit of the budget.
    """

    name: str
    dense_cost: int
    rank_cost: int
    ranks: Sequence[int]
    tails: Tensor


def cheapest(layers: Sequence[Layer]) -> int:
    """The smallest budget that can be met: every layer at its lowest rank, or dense where that costs less."""
    return sum(min([layer.dense_cost, *(rank * layer.rank_cost for rank in layer.ranks[:1])]) for layer in layers)


def allocate(layers: Sequence[Layer], budget: float) -> dict[str, int | None]:
    """The rank of each layer, None where it stays dense: the least sum of losses with a sum of costs in the budget.

    The linear relaxation gives a bound that no choice can beat, and greedy choices near it. A dynamic programme over
    undominated states, kept small by the bound, closes what is left between the two. The choice is optimal, to
    rounding, unless the search had to stop after `LOOKED_AT` states; even then it loses no more above the optimum than
    the one hull edge that did not fit would have saved. The same layers give the same choice: of options that lose the
    same the cheapest stays, and equal gains go to the earlier layer. Raises BudgetError with the smallest budget, in
    the unit of the costs, where no choice is within this one.
    """
    least = cheapest(layers)
    if not least <= budget:
        raise BudgetError(f"budget {budget:,.15g}: the cheapest choice of ranks costs {least:,}; write at least that")
    if not layers:
        return {}
    menus = [_menu(layer) for layer in layers]
    limit = math.floor(min(budget, sum(int(menu.costs[-1]) for menu in menus)))
    chosen, price, split = _relaxed(menus, limit)
    if split is not None:
        start = _started(menus, chosen, split, limit)
        chosen = _filled(menus, _searched(menus, chosen, price, start, limit), limit)
    return {layer.name: menu.ranks[at] for layer, menu, at in zip(layers, menus, chosen, strict=True)}


class _Menu(NamedTuple):
    """The undominated options of a layer, by ascending cost and descending loss, and which are on their lower hull."""

    ranks: list[int | None]
    costs: Ints  # (options,)
    losses: Floats  # (options,)
    hull: list[int]
    gains: list[float]  # loss saved per cost along each edge of the hull, non-increasing

    def only(self, at: int) -> _Menu:
        return _Menu(self.ranks[at : at + 1], self.costs[at : at + 1], self.losses[at : at + 1], [0], [])


def _menu(layer: Layer) -> _Menu:
    ranks = np.array(layer.ranks, dtype=np.int64)
    tails = layer.tails.detach().cpu().double().numpy()
    costs = np.concatenate([[layer.dense_cost], ranks * layer.rank_cost])
    losses = np.concatenate([[0.0], tails[ranks].clip(min=0)])
    kept = _undominated(costs, losses)
    names = [None, *layer.ranks]
    return _Menu(
        [names[i] for i in kept], costs[kept], losses[kept], *_hull(costs[kept].tolist(), losses[kept].tolist())
    )


def _undominated(costs: Ints, losses: Floats) -> Ints:
    """Indices, by ascending cost, of the points that no other matches in both; the first of equal ones."""
    order = np.lexsort((losses, costs))
    return order[np.diff(np.minimum.accumulate(losses[order]), prepend=np.inf) < 0]


def _hull(costs: list[int], losses: list[float]) -> tuple[list[int], list[float]]:
    """Indices of the lower convex hull of points by ascending cost and descending loss, and its edges' gains."""
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


def _relaxed(menus: list[_Menu], limit: int) -> tuple[list[int], float, int | None]:
    """The linear relaxation: options along the hulls' best edges (Sinha & Zoltners 1979), multiplier, split layer.

    The first edge that does not fit belongs to the split layer, and its gain is the multiplier, the price of a unit of
    cost. Where every edge fits there is no split, and the price is 0.
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


def _filled(menus: list[_Menu], chosen: list[int], limit: int) -> list[int]:
    """These options, raised by whatever still fits, best gain per cost first."""
    chosen = list(chosen)
    left = limit - _cost(menus, chosen)
    waiting = [(-math.inf, layer) for layer in range(len(menus))]
    while waiting:
        _, layer = heapq.heappop(waiting)
        costs, losses, at = menus[layer].costs, menus[layer].losses, chosen[layer]
        stop = int(np.searchsorted(costs, costs[at] + left, side="right"))
        if stop == at + 1:
            continue  # what is left only shrinks
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


def _started(menus: list[_Menu], base: list[int], split: int, limit: int) -> list[int]:
    """The better of two greedy choices: without the split layer's edge that did not fit, and with it."""
    without = _filled(menus, base, limit)
    taken = menus[split].hull[menus[split].hull.index(base[split]) + 1]
    rest = [*menus[:split], menus[split].only(taken), *menus[split + 1 :]]
    if _cost(rest, [0] * len(rest)) > limit:
        return without
    having = _filled(rest, _relaxed(rest, limit)[0], limit)
    having[split] = taken
    return min(without, having, key=lambda chosen: _loss(menus, chosen))


class _Moves(NamedTuple):
    """The options of a layer as moves from its relaxed one."""

    layer: int
    costs: Ints  # (options,) what each adds
    regrets: Floats  # (options,) loss + price * cost, from the relaxed option's, which is the least
    up: float  # the best loss saved per cost added, at most the price
    down: float  # the least loss added per cost saved, at least the price


def _moves(layer: int, menu: _Menu, at: int, price: float) -> _Moves:
    costs = menu.costs - menu.costs[at]
    # differences first: the sums would round away digits that near regrets differ in
    regrets = ((menu.losses - menu.losses[at]) + price * costs).clip(min=0)
    edge = menu.hull.index(at)
    up = menu.gains[edge] if edge < len(menu.gains) else 0.0
    return _Moves(layer, costs, regrets, up, menu.gains[edge - 1] if edge else math.inf)


def _searched(menus: list[_Menu], base: list[int], price: float, chosen: list[int], limit: int) -> list[int]:
    """The best options within the limit, or the best found after `LOOKED_AT` states; `chosen` where none is better.

    A state has moved some layers from their relaxed options. By how much it exceeds the relaxation's bound is the sum
    of its regrets and the price of what it leaves of the limit. A state is dropped when another costs and loses no more
    (Nemhauser & Ullmann 1969), and when the layers still to move cannot bring it below the least excess found; those
    that could do so at the best rates move first (Pisinger 1995).
    """
    room = limit - _cost(menus, base)
    bound = max(0.0, _loss(menus, base) - price * room)
    moves = [_moves(layer, menu, at, price) for layer, (menu, at) in enumerate(zip(menus, base, strict=True))]
    least = price * (limit - _cost(menus, chosen)) + math.fsum(float(m.regrets[chosen[m.layer]]) for m in moves)
    moves.sort(key=lambda m: min(price - m.up, m.down - price))
    ups, downs = [0.0], [math.inf]  # the best rates after each layer, last to first; after the last none can move
    for m in reversed(moves[1:]):
        ups.append(max(ups[-1], m.up))
        downs.append(min(downs[-1], m.down))

    costs, regrets = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[int, Ints, Ints]] = []  # layer, each state's parent, and its option
    found: tuple[int, int, int, int] | None = None  # length of the trail, parent, layer, option
    looked_at = 0
    for m, up, down in zip(moves, reversed(ups), reversed(downs), strict=True):
        near = np.flatnonzero(m.regrets < least - 1e-14 * (bound + least))
        if len(near) <= 1:
            continue  # only the relaxed option
        looked_at += len(costs) * len(near)
        if looked_at > LOOKED_AT or not len(costs):
            break
        costs = np.add.outer(costs, m.costs[near]).ravel()
        regrets = np.add.outer(regrets, m.regrets[near]).ravel()
        left = room - costs
        excess = np.where(left >= 0, regrets + price * left, np.inf)
        best = int(excess.argmin())
        if excess[best] < least:
            least = float(excess[best])
            found = len(trail), best // len(near), m.layer, int(near[best % len(near)])
        lowest = regrets + left * np.where(left >= 0, price - up, price - down)
        kept = np.flatnonzero(lowest < least - 1e-14 * (bound + least))
        kept = kept[_undominated(costs[kept], (regrets - price * costs)[kept])]
        costs, regrets = costs[kept], regrets[kept]
        trail.append((m.layer, kept // len(near), near[kept % len(near)]))
    if found is None:
        return chosen
    length, state, layer, option = found
    options = list(base)
    options[layer] = option
    for layer, parents, taken in reversed(trail[:length]):
        options[layer], state = int(taken[state]), int(parents[state])
    return options
