"""Goals: what a user asks of the model, parsed once from text, and whether measured figures meet it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lrsurgery.data.options import DataOptions
from lrsurgery.errors import SurgeryError
from lrsurgery.units import finite, size_of, size_text

Figures: TypeAlias = Mapping[str, float]  # of `evaluate`, and "speedup"

LOSS, ACCURACY, SIZE, SPEEDUP = "--max-loss", "--min-accuracy", "--max-size", "--speedup"
FIGURE = {LOSS: "loss", ACCURACY: "top1", SPEEDUP: "speedup"}  # option -> the measured figure that it bounds
READABLE = {
    LOSS: "2% (above the dense loss) or a loss in nats such as 3.2",
    ACCURACY: "0.90, 90% or -1% (a point below the dense model)",
    SIZE: "a size such as 200MB",
    SPEEDUP: "a number above 1, such as 1.5",
}


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """Data to measure on, and how it is read: as `evaluate` reads it with the same options."""

    data: str
    split: str | None = None
    how: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one measured figure: at most for a loss, at least for an accuracy or a speedup.

    The bound is `amount`, or relative to the dense model's figure: a loss is scaled by 1 + amount, an accuracy has the
    amount taken off.
    """

    option: str  # LOSS, ACCURACY or SPEEDUP
    text: str  # as the user wrote it
    amount: float
    relative: bool = False

    @property
    def figure(self) -> str:
        """The name of the figure that is bounded."""
        return FIGURE[self.option]

    @property
    def wants_small(self) -> bool:
        """Whether the smallest model that meets the goal is sought; of those that are fast enough, the largest is."""
        return self.option != SPEEDUP

    def bound(self, dense: Figures) -> float:
        """The bound, in the unit of the figure."""
        if not self.relative:
            return self.amount
        return dense["loss"] * (1 + self.amount) if self.option == LOSS else dense["top1"] - self.amount

    def meets(self, figures: Figures, dense: Figures) -> bool:
        """Whether a model with these figures meets the goal; one without the figure does not."""
        found, bound = figures.get(self.figure), self.bound(dense)
        if found is None:
            return False
        return found <= bound if self.option == LOSS else found >= bound

    def reading(self, dense: Figures) -> str:
        """The bound in words: which of its readings was taken."""
        bound = self.written(self.bound(dense))
        if self.option == SPEEDUP:
            return f"at least {bound} times as fast as the dense model"
        if not self.relative:
            return f"loss at most {bound} nats" if self.option == LOSS else f"top-1 at least {bound}"
        own = self.written(dense[self.figure])
        if self.option == LOSS:
            return f"loss at most {bound}, the dense {own} times {1 + self.amount:g}"
        return f"top-1 at least {bound}, the dense {own} less {self.amount:.4g}"

    def written(self, figure: float) -> str:
        """A figure as text."""
        return f"{figure:.2f}" if self.option == SPEEDUP else f"{figure:.4f}"

    def __str__(self) -> str:
        return f"{self.option} {self.text}"


@dataclass(frozen=True)
class SizeLimit:
    """The most bytes that the weight files may take."""

    bytes: int

    def __str__(self) -> str:
        return f"{SIZE} {size_text(self.bytes)}"


def parse_goal(
    *,
    max_loss: str | None = None,
    min_accuracy: str | None = None,
    max_size: str | None = None,
    speedup: str | None = None,
    others: Mapping[str, bool] | None = None,
) -> Goal | SizeLimit | None:
    """Parse the target, of which there is at most one; None where a rank or a budget is given in its place, or nothing.

    `others` are further options that choose ranks, and whether they are given. Raises SurgeryError that names the
    options which exclude each other, or lists the accepted forms.
    """
    texts = {LOSS: max_loss, ACCURACY: min_accuracy, SIZE: max_size, SPEEDUP: speedup}
    given = [option for option, text in texts.items() if text is not None]
    named = [*(name for name, is_given in (others or {}).items() if is_given), *given]
    if not given:
        return None
    if len(named) > 1:
        raise SurgeryError(f"{' and '.join(named)} are given together; each chooses every rank, so leave one")
    option = given[0]
    text = str(texts[option]).strip()
    try:
        if option == SIZE:
            return _size(text)
        return PARSERS[option](text)
    except (ValueError, OverflowError):
        raise SurgeryError(f"{option} '{text}' is not readable; write {READABLE[option]}") from None


def _size(text: str) -> SizeLimit:
    limit = int(size_of(text))
    if limit < 1:
        raise ValueError(text)
    return SizeLimit(limit)


def _loss(text: str) -> Goal:
    relative = text.endswith("%")
    amount = finite(text.removesuffix("%")) / (100 if relative else 1)
    if amount < 0:
        raise ValueError(text)
    return Goal(option=LOSS, text=text, amount=amount, relative=relative)


def _accuracy(text: str) -> Goal:
    amount = finite(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not -1 < amount <= 1:
        raise ValueError(text)
    return Goal(option=ACCURACY, text=text, amount=abs(amount), relative=text.startswith("-"))


def _speedup(text: str) -> Goal:
    amount = finite(text.removesuffix("x"))
    if amount <= 1:
        raise ValueError(text)
    return Goal(option=SPEEDUP, text=text, amount=amount)


PARSERS = {LOSS: _loss, ACCURACY: _accuracy, SPEEDUP: _speedup}


def check_measured(goal: Goal | SizeLimit, data: EvalData | None) -> None:
    """Raise SurgeryError for a target that needs data to measure on, and has none."""
    if data is None and isinstance(goal, Goal) and goal.option != SPEEDUP:
        raise SurgeryError(f"{goal.option} needs data to measure on; add --eval-data DATA")
