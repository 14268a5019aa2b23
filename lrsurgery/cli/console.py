"""What a person sees: progress, tables, errors. JSON goes to stdout, all else to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lrsurgery.progress import Listener, TrainingStep
from lrsurgery.report.views.columns import HARNESS, HARNESS_HEADINGS, HEADINGS, PIPED_WIDTH, QUALITY
from lrsurgery.report.views.terminal import Paper
from lrsurgery.units import duration_text

if TYPE_CHECKING:
    from lrsurgery.files.json import Json

EVERY = 30  # seconds between two lines of a long job where no bar is drawn


class Screen:
    """Where a command's words go: `--quiet` leaves only errors, `--json` keeps stdout for one object."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.err = Paper(stderr=True, soft_wrap=True)
        self.out = Paper(stderr=as_json)
        if not self.out.is_terminal:
            self.out.width = PIPED_WIDTH

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            self.err.print(text)

    def show(self, *things: RenderableType) -> None:
        """A command's result for people; nothing with `--json`."""
        if not (self.quiet or self.as_json):
            for thing in things:
                self.out.print(thing)

    def emit(self, body: Json) -> None:
        """A command's result for programs: one JSON object, only with `--json`."""
        if self.as_json:
            from lrsurgery.files.json import json_text

            sys.stdout.write(json_text(body))

    def follow(self, verb: str) -> LiveListener:
        """A listener to hand to a job, as a context: it draws bars on a terminal, and prints lines anywhere."""
        return LiveListener(self, verb)


class Heartbeat:
    """Says when a line about a long job is due, and how long the rest of it will take."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said = self._begun = clock()
        self._job = ("", 0)
        self._first = 0

    def text(self, job: str, done: int, total: int, facts: str) -> str | None:
        """`step 40/100  loss 3.2, about 3 min left`, where `EVERY` seconds went by since the last; else None."""
        now = self._clock()
        if (job, total) != self._job or done < self._first:  # another job begins
            self._job, self._begun, self._first = (job, total), now, done
        if now - self._said < EVERY:
            return None
        self._said, passed = now, done - self._first
        left = (now - self._begun) / passed * (total - done) if passed else 0
        return f"{job} {done}/{total}{f'  {facts}' if facts else ''}" + (
            f", about {duration_text(left)} left" if left else ""
        )


class LiveListener(Listener):
    """Shows what a job reports: live bars on a terminal; a line for each note, stage and evaluation anywhere.

    Where no bar is drawn a line comes every `EVERY` seconds, so that a long job in a log is not silent.
    """

    def __init__(self, screen: Screen, verb: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen, self._verb = screen, verb
        self._live = screen.err.is_terminal and not screen.quiet
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self._bar = Progress(*columns, console=screen.err, transient=True, disable=not self._live)
        self._job: TaskID | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._begun, self._first = 0.0, 0
        self._beat = Heartbeat(clock)

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
        self._log(self._verb, done, total, name)

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
            self._log("step", at.step, at.total, self._facts(at))

    def evaluating(self, batch: int, total: int) -> None:
        if self._evaluating is None:
            self._evaluating = self._bar.add_task("evaluating", total=total, facts="")
        self._bar.update(self._evaluating, completed=batch, total=total)
        self._log("evaluating batch", batch, total)

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if self._evaluating is not None:
            self._bar.remove_task(self._evaluating)
            self._evaluating = None
        at = f"step {step}/{total}" if total else "before"
        self._screen.say(f"{at}  {stage}  {quality_text(values)}")

    def _log(self, job: str, done: int, total: int, facts: str = "") -> None:
        if not self._live and (text := self._beat.text(job, done, total, facts)) is not None:
            self._screen.say(text)

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
