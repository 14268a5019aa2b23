"""What a person sees: progress, tables, errors. JSON goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lrsurgery.progress import Note, Result, result_of

if TYPE_CHECKING:
    from lrsurgery.training.callbacks import Event

PIPED_WIDTH = 160  # lines of a pipe or a file need not fold at rich's 80


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

    def show(self, *things: Any) -> None:
        """A command's result for people; nothing with `--json`."""
        if not (self.quiet or self.as_json):
            for thing in things:
                self.out.print(thing, markup=False) if isinstance(thing, str) else self.out.print(thing)

    def emit(self, body: dict[str, Any]) -> None:
        """A command's result for programs: one JSON object, only with `--json`."""
        if self.as_json:
            sys.stdout.write(json.dumps(body, indent=2) + "\n")

    def follow(self, steps: Generator[Any, None, Result], verb: str) -> Result:
        """Runs a job under a live bar (layer, done/total, time left), shown on a terminal only."""
        if self.quiet or not self.err.is_terminal:
            return result_of(steps, self._note)
        columns = (
            TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[layer]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(verb, total=None, layer="reading")

            def show(event: Any) -> None:
                self._note(event)
                if not isinstance(event, Note):
                    bar.update(task, completed=event.done, total=event.total, layer=event.name)

            return result_of(steps, show)

    def _note(self, event: Any) -> None:
        if isinstance(event, Note):
            self.say(f"Note: {event.text}")


class TrainingScreen:
    """What a run tells, as it goes: a live bar on a terminal; a line for each stage, evaluation and note anywhere."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._live = screen.err.is_terminal and not screen.quiet
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=screen.err, transient=True, disable=not self._live)
        self._training: Any = None
        self._evaluating: Any = None
        self._begun, self._first = 0.0, 0

    def __enter__(self) -> Callable[[Event], None]:
        if self._live:  # rich's bars, even disabled, leave an empty line
            self._bar.start()
        return self.tell

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def tell(self, event: Event) -> None:
        """One thing that happened."""
        if event.kind == "note":
            self._screen.say(f"Note: {event.text}")
        elif event.kind == "stage":
            self._begun, self._first = time.monotonic(), event.step
            what = {"dense": "training dense", "factorised": "training low rank"}[event.stage]
            self._screen.say(f"{what}, step {event.step} to {event.total}")
            if self._training is not None:
                self._bar.remove_task(self._training)
            self._training = self._bar.add_task(what, total=event.total, completed=event.step, facts="")
        elif event.kind == "step" and self._training is not None:
            self._bar.update(self._training, completed=event.step, facts=self._facts(event))
        elif event.kind == "evaluating":
            if self._evaluating is None:
                self._evaluating = self._bar.add_task("evaluating", total=event.total, facts="")
            self._bar.update(self._evaluating, completed=event.step, total=event.total)
        elif event.kind == "evaluated":
            if self._evaluating is not None:
                self._bar.remove_task(self._evaluating)
                self._evaluating = None
            at = f"step {event.step}/{event.total}" if event.total else "before"
            self._screen.say(f"{at}  {event.stage}  {quality_text(event.values)}")

    def _facts(self, event: Event) -> str:
        done, spent = event.step - self._first, time.monotonic() - self._begun
        rate = f"{done * event.per_step / spent:,.0f} {event.unit}/s" if done and spent else ""
        return "  ".join([f"loss {event.values['loss']:.4f}" if "loss" in event.values else "", rate]).strip()


QUALITY = {"loss": "{:.4f}", "perplexity": "{:.3f}", "top1": "{:.2%}", "top5": "{:.2%}"}
HEADINGS = {"loss": "loss", "perplexity": "perplexity", "top1": "top-1", "top5": "top-5"}


def quality_text(values: Mapping[str, float]) -> str:
    """Figures of one evaluation in one line."""
    return "  ".join(
        f"{HEADINGS[name]} {form.format(values[name])}" for name, form in QUALITY.items() if name in values
    )


def quality_table(rows: Sequence[tuple[str, int | None, int | None, Mapping[str, float]]]) -> Table:
    """(name, parameters, bytes, figures) of several models side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    known = [name for name in QUALITY if any(name in values for *_, values in rows)]
    sized = any(size is not None for _, _, size, _ in rows)
    for header in ("parameters", *(("bytes",) if sized else ()), *(HEADINGS[name] for name in known)):
        table.add_column(header, justify="right", no_wrap=True)
    for name, parameters, size, values in rows:
        numbers = [parameters, *([size] if sized else [])]
        figures = [QUALITY[key].format(values[key]) if key in values else "" for key in known]
        table.add_row(name, *("" if number is None else f"{number:,}" for number in numbers), *figures)
    return table
