"""Options of refinement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from lrsurgery.errors import CalibrationError
from lrsurgery.files.json import Json

MOST_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How blocks are fitted. Raises CalibrationError for a value that no model could make right."""

    steps: int = 400  # of Adam, in each block; 0 leaves it at the closed form
    batch: int = 16  # samples of a step
    lr: float = 5e-3  # reached at the first look; falls along a half cosine to 0
    # the closed form before the steps. None: where there are no steps, or the cut did not know the gradients of a loss,
    # since what fisher has cut is a better place to begin, and the closed form a better one than a plain SVD
    anchored: bool | None = None
    seed: int = 0  # of the order of samples

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= MOST_STEPS:
            raise CalibrationError(f"--refine-steps {self.steps}: write 0 to {MOST_STEPS:,}")
        if self.batch < 1:
            raise CalibrationError(f"--refine-batch {self.batch}: write at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise CalibrationError(f"--refine-lr {self.lr}: write a number above 0")
        if not self.steps and self.anchored is False:
            raise CalibrationError("--refine-steps 0 without the closed form changes nothing; leave one of them on")

    def after(self, importance: str | None) -> Refinement:
        """The refinement of a model that was cut by this importance, with `anchored` decided."""
        anchored = not self.steps or importance != "fisher" if self.anchored is None else self.anchored
        return replace(self, anchored=anchored)

    def recorded(self) -> Json:
        """The values, as JSON."""
        return asdict(self)


def refinement_of(steps: int | None, seed: int) -> Refinement:
    """The refinement of so many steps, the usual number without one. Raises CalibrationError."""
    return Refinement(seed=seed) if steps is None else Refinement(steps=steps, seed=seed)
