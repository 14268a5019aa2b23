"""Bisection over budgets for the model that meets a goal: the smallest that is good enough, the largest that is fast.

Budgets lie on a grid, so that the one found is a short number. Losses are not perfectly monotone in the budget: the
best of all measured points that meet the goal is taken, not the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lrsurgery.errors import SurgeryError
from lrsurgery.measure.targets.goals import LOSS, SPEEDUP, Figures, Goal
from lrsurgery.report.targets.schema import Point

NONE, ALL = "no budget meets it", "the smallest model meets it already"
STEPS = 500  # of the grid: budgets are multiples of 0.002
Measure: TypeAlias = Callable[[int], Point | None]  # place on the grid -> point; None where every layer stays dense


def budget_at(place: int, *, timed: bool = False) -> str:
    """The budget at a place of the grid, as --budget takes it."""
    return f"{'time:' if timed else ''}{place / STEPS:g}"


def figures_of(point: Point) -> dict[str, float]:
    """All measured figures of a point, with its speedup."""
    speedup = point.get("speedup")
    return point["values"] if speedup is None else {**point["values"], "speedup": speedup}


def title_of(point: Point) -> str:
    """What progress calls a point: its budget, and its speedup where that was measured."""
    speedup = point.get("speedup")
    return f"budget {point['budget']}" + ("" if speedup is None else f"  speedup {speedup:.2f}")


@dataclass
class Search:
    """The search for one goal among the budgets of one model."""

    goal: Goal
    dense: Figures
    measure: Measure
    lowest: int  # place of the smallest budget that can be met

    def run(self) -> list[Point]:
        """The measured points that meet the goal, the best first.

        Raises SurgeryError with the nearest figure measured if the smallest model meets it already, or none does.
        """
        measured: dict[int, Point | None] = {}

        def meets(place: int) -> bool:
            if place not in measured:
                measured[place] = self.measure(place)
            point = measured[place]
            # where every layer stays dense, the model is as good as the dense one, and no faster
            return self.goal.wants_small if point is None else self.goal.meets(figures_of(point), self.dense)

        # the ends differ, so neither has to be measured: dense is good enough and not fast enough, the smallest model
        # the other way round
        low, high = self.lowest, STEPS
        while high - low > 1:
            middle = (low + high) // 2
            if meets(middle) == self.goal.wants_small:
                high = middle
            else:
                low = middle
        if self.goal.wants_small and high == self.lowest + 1 and meets(self.lowest):
            raise self._missed(measured, ALL)
        if not self.goal.wants_small and low == self.lowest:
            meets(self.lowest)
        found = [p for p in measured.values() if p is not None and self.goal.meets(figures_of(p), self.dense)]
        if not found:
            raise self._missed(measured, NONE)
        return sorted(found, key=lambda point: point["parameters"], reverse=not self.goal.wants_small)

    def _missed(self, measured: Mapping[int, Point | None], why: str) -> SurgeryError:
        """The error of a goal that cannot be met, with the nearest figure and the remedy."""
        bound, name = self.goal.bound(self.dense), self.goal.figure
        known = [p for p in measured.values() if p is not None and name in figures_of(p)]
        more = (self.goal.option == LOSS) == (why == NONE)
        remedy = f"write a {'higher' if more else 'lower'} one"
        if not known:
            return SurgeryError(f"{self.goal}: {why}, {self.goal.reading(self.dense)}; {remedy}")
        nearest = min(known, key=lambda point: abs(figures_of(point)[name] - bound))
        figure = self.goal.written(figures_of(nearest)[name])
        return SurgeryError(
            f"{self.goal}: {why} ({self.goal.reading(self.dense)}); the nearest measured is {name} {figure} at --budget"
            f" {nearest['budget']}; {remedy}"
        )


def lowest_place(reachable: Callable[[int], bool]) -> int:
    """The smallest place of the grid that can be met, given that all above it can."""
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if reachable(middle):
            high = middle
        else:
            low = middle
    return high


def check_dense(goal: Goal, dense: Figures) -> None:
    """Raise SurgeryError for a goal about a figure that the task does not have, or that dense misses itself."""
    if goal.option == SPEEDUP:
        return
    if goal.figure not in dense:
        known = ", ".join(name for name in dense if name != "scored")
        raise SurgeryError(
            f"{goal}: there is no top-1 of this model, whose head is not for one class of several; it is measured by"
            f" {known}; take --max-loss"
        )
    if not goal.meets(dense, dense):
        own, remedy = goal.written(dense[goal.figure]), f"write a {'higher' if goal.option == LOSS else 'lower'} one"
        raise SurgeryError(f"{goal}: the dense model misses it itself, with {goal.figure} {own}; {remedy}")
