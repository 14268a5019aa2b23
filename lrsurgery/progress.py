"""Progress of jobs: one listener protocol, silent by default.

A job calls its listener; the console draws bars and lines, a test records the calls. An exception raised in a listener
stops the job as Ctrl-C does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """The state of a training run after an optimizer step."""

    step: int
    total: int
    units_per_step: int = 0
    unit: str = ""  # tokens, sentences or images
    logged: Mapping[str, float] = field(default_factory=dict)  # the latest loss, learning rate and the like


class Listener:
    """Base class that ignores every event; override the methods of interest."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""

    def progress(self, name: str, done: int, total: int) -> None:
        """`done` of `total` items (layers, batches, blocks, runs) are done; `name` is the latest item or the next."""

    def stage(self, name: str, step: int, total: int) -> None:
        """The training stage `name`, "dense" or "factorised", begins after `step` of `total` optimizer steps."""

    def step(self, at: TrainingStep) -> None:
        """An optimizer step is done, or a loss is logged."""

    def evaluating(self, batch: int, total: int) -> None:
        """`batch` of `total` batches of an evaluation are done."""

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """An evaluation within a training run is done; `total` is 0 for one before the first step."""


SILENT = Listener()
