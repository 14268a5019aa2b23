"""Progress of jobs: one listener protocol, silent by default but for notebooks, where it draws bars.

A job calls its listener; the console draws bars and lines, a test records the calls. An exception raised in a listener
stops the job as Ctrl-C does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel: Jupyter, Colab, VS Code and the like."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None else None
    return any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__)


class NotebookListener(Listener):
    """Draws tqdm's bars in a notebook, and prints notes and evaluations; ignores every event anywhere else.

    It is what jobs call unless they are given another listener.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def note(self, text: str) -> None:
        self._say(f"Note: {text}")

    def progress(self, name: str, done: int, total: int) -> None:
        self._draw("layers", done, total, name)

    def stage(self, name: str, step: int, total: int) -> None:
        self._say(f"training {'low rank' if name == 'factorised' else name}, step {step} to {total}")

    def step(self, at: TrainingStep) -> None:
        self._draw("steps", at.step, at.total, f"loss {at.logged['loss']:.4f}" if "loss" in at.logged else "")

    def evaluating(self, batch: int, total: int) -> None:
        self._draw("evaluation", batch, total)

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"{stage}, {f'step {step}/{total}' if total else 'before'}: {figures}")

    def _say(self, text: str) -> None:
        if in_notebook():
            from tqdm.auto import tqdm

            tqdm.write(text)

    def _draw(self, job: str, done: int, total: int, facts: str = "") -> None:
        """A bar for each job, which closes when all is done; a job of another length, or begun anew, gets another."""
        if not in_notebook():
            return
        from tqdm.auto import tqdm

        bar = self._bars.get(job)
        if bar is not None and (bar.total != total or done < bar.n):
            bar.close()
            bar = None
        if bar is None:
            bar = self._bars[job] = tqdm(total=total, desc=job)
        bar.set_postfix_str(facts, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(job).close()


USUAL = NotebookListener()
