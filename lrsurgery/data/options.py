"""How data become examples: the settings that calibration, `evaluate` and `finetune` share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrsurgery.errors import RecipeError

TASKS = ("causal-lm", "masked-lm", "sequence-classification", "image-classification")


@dataclass(frozen=True)
class DataOptions:
    """How text or images become examples; `finetune` and `evaluate` share these."""

    task: str | None = None  # from the checkpoint's architecture where it is not named
    subset: str | None = None  # of a hub dataset that has several
    text_column: str | None = None  # two for sentence pairs, with a comma between
    label_column: str | None = None
    image_column: str | None = None
    block_size: int | None = None  # tokens; the model's maximum where it is not named
    image_size: int | None = None  # pixels; the checkpoint's own where it is not named

    def check(self) -> None:
        """Raises RecipeError for a value that no data could make right."""
        check_choice("task", self.task, (None, *TASKS))
        check_at_least("block_size", self.block_size, 2)
        check_at_least("image_size", self.image_size, 1)


def check_choice(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    """Raises RecipeError that lists the known values."""
    if value not in known:
        raise RecipeError(f"unknown {name} '{value}'; known: {', '.join(k for k in known if k)}")


def check_at_least(name: str, value: float | None, bound: int) -> None:
    """Raises RecipeError for a value below a bound; None is no value."""
    if value is not None and value < bound:
        raise RecipeError(f"{name} {value}: write at least {bound}")


def check_finite(name: str, value: float, *, positive: bool) -> None:
    """Raises RecipeError for NaN, an infinity, or a number below the bound."""
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise RecipeError(f"{name} {value}: write a number {'above 0' if positive else 'of at least 0'}")
