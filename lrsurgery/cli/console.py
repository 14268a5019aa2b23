"""What a person sees: progress, tables, errors. JSON goes to stdout, all else to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lrsurgery.progress import Listener, TrainingStep
from lrsurgery.report.views.columns import HARNESS, HARNESS_HEADINGS, HEADINGS, PIPED_WIDTH, QUALITY

if TYPE_CHECKING:
    from lrsurgery.files.json import Json


class Screen:
    """Where a command's words go: `--quiet` leaves only errors, `--json` keeps stdout for one object."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.out = Console(stderr=as_json, highlight=False)
        if not self.out.is_terminal:
            self.out.width = PIPED_WIDTH

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def show(self, *things: RenderableType) -> None:
        """A command's result for people; nothing with `--json`."""
        if not (self.quiet or self.as_json):
            for thing in things:
                self.out.print(thing, markup=False) if isinstance(thing, str) else self.out.print(thing)

    def emit(self, body: Json) -> None:
        """A command's result for programs: one JSON object, only with `--json`."""
        if self.as_json:
            from lrsurgery.files.json import json_text

            sys.stdout.write(json_text(body))

    def follow(self, verb: str) -> LiveListener:
        """A listener to hand to a job, as a context: it draws bars on a terminal, and prints lines anywhere."""
        return LiveListener(self, verb)


class LiveListener(Listener):
    """Shows what a job reports: live bars on a terminal; a line for each note, stage and evaluation anywhere."""

    def __init__(self, screen: Screen, verb: str) -> None:
        self._screen, self._verb = screen, verb
        self._live = screen.err.is_terminal and not screen.quiet
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._bar = Progress(*columns, console=screen.err, transient=True, disable=not self._live)
        self._job: TaskID | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._begun, self._first = 0.0, 0

    def __enter__(self) -> LiveListener:
        if self._live:  # rich's bars, even disabled, leave an empty line
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def note(self, text: str) -> None:
        self._screen.say(f"Note: {text}")

    def progress(self, name: str, done: int, total: int) -> None:
        if self._job is None:
            self._job = self._bar.add_task(self._verb, total=total, facts=name)
        self._bar.update(self._job, completed=done, total=total, facts=name)

    def stage(self, name: str, step: int, total: int) -> None:
        self._begun, self._first = time.monotonic(), step
        what = {"dense": "training dense", "factorised": "training low rank"}[name]
        self._screen.say(f"{what}, step {step} to {total}")
        if self._training is not None:
            self._bar.remove_task(self._training)
        self._training = self._bar.add_task(what, total=total, completed=step, facts="")

    def step(self, at: TrainingStep) -> None:
        if self._training is not None:
            self._bar.update(self._training, completed=at.step, facts=self._facts(at))

    def evaluating(self, batch: int, total: int) -> None:
        if self._evaluating is None:
            self._evaluating = self._bar.add_task("evaluating", total=total, facts="")
        self._bar.update(self._evaluating, completed=batch, total=total)

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if self._evaluating is not None:
            self._bar.remove_task(self._evaluating)
            self._evaluating = None
        at = f"step {step}/{total}" if total else "before"
        self._screen.say(f"{at}  {stage}  {quality_text(values)}")

    def _facts(self, at: TrainingStep) -> str:
        done, spent = at.step - self._first, time.monotonic() - self._begun
        rate = f"{done * at.units_per_step / spent:,.0f} {at.unit}/s" if done and spent else ""
        return "  ".join([f"loss {at.logged['loss']:.4f}" if "loss" in at.logged else "", rate]).strip()


def quality_text(values: Mapping[str, float]) -> str:
    """Figures of one evaluation in one line."""
    return "  ".join(
        f"{HEADINGS[name]} {form.format(values[name])}" for name, form in QUALITY.items() if name in values
    )


def quality_table(rows: Sequence[tuple[str, int | None, int | None, Mapping[str, float]]]) -> Table:
    """(name, parameters, bytes, figures) of several models side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    forms, headings = dict([*QUALITY.items(), *HARNESS.items()]), dict([*HEADINGS.items(), *HARNESS_HEADINGS.items()])
    known = [name for name in forms if any(name in values for *_, values in rows)]
    sized = any(size is not None for _, _, size, _ in rows)
    for header in ("parameters", *(("bytes",) if sized else ()), *(headings[name] for name in known)):
        table.add_column(header, justify="right", no_wrap=True)
    for name, parameters, size, values in rows:
        numbers = [parameters, *([size] if sized else [])]
        figures = [forms[key].format(values[key]) if key in values else "" for key in known]
        table.add_row(name, *("" if number is None else f"{number:,}" for number in numbers), *figures)
    return table
