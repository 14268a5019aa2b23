"""What a job reports while it runs: one listener protocol, silent by default.

A job calls its listener and knows nothing of who listens: the console draws bars and lines, a notebook may do the same,
a test keeps what it was told. Raising in a listener stops the job as Ctrl-C would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Where a training run stands after an optimizer step."""

    step: int
    total: int
    units_per_step: int = 0
    unit: str = ""  # tokens, sentences or images
    logged: Mapping[str, float] = field(default_factory=dict)  # the latest loss, learning rate and the like


class Listener:
    """Silent. Override what is to be heard."""

    def note(self, text: str) -> None:
        """Something that the user should know before the job goes on."""

    def progress(self, name: str, done: int, total: int) -> None:
        """`done` of `total` things (layers, batches, blocks, runs) are dealt with; `name` is the latest, or the next."""

    def stage(self, name: str, step: int, total: int) -> None:
        """A stage of training, "dense" or "factorised", begins after `step` of `total` optimizer steps."""

    def step(self, at: TrainingStep) -> None:
        """An optimizer step was taken, or a loss logged."""

    def evaluating(self, batch: int, total: int) -> None:
        """`batch` of `total` batches of an evaluation are done."""

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """An evaluation within a run ended; `total` is 0 for one before the first step."""


SILENT = Listener()
