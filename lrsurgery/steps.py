"""Jobs as generators: an event a step, the result in the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """One of `total` things was dealt with: a layer, a batch, a block."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """Something that the person at the keyboard should know before it goes on."""

    text: str


def result_of(steps: Generator[Any, None, Result], show: Callable[[Any], None] = lambda event: None) -> Result:
    """Runs a job to its end, with `show` called on each event."""
    while True:
        try:
            show(next(steps))
        except StopIteration as stop:
            found: Result = stop.value
            return found
