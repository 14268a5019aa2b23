"""Jobs as generators: an event a step, the result in the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

Result = TypeVar("Result")


def result_of(steps: Generator[Any, None, Result], show: Callable[[Any], None] = lambda event: None) -> Result:
    """Runs a job to its end, with `show` called on each event."""
    while True:
        try:
            show(next(steps))
        except StopIteration as stop:
            found: Result = stop.value
            return found
