"""Work is in proportion to layers: no line of this package runs four times as often for twice as many of them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import tiny

import lrsurgery
from lrsurgery.report.read import read_report
from lrsurgery.report.views.terminal import report_parts
from lrsurgery.runtime import Compute

PACKAGE = str(Path(lrsurgery.__file__).parent)
BLOCKS = (6, 12)  # of four layers each


@contextlib.contextmanager
def counted() -> Iterator[Counter[tuple[str, int]]]:
    """How often each line of the package runs, in every thread; each round of a comprehension counts."""
    runs: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        runs[frame.f_code.co_filename, frame.f_lineno] += 1
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        yield runs
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]


def show(models: list[str], against: str | None = None) -> None:
    found = read_report(models, Compute(device=torch.device("cpu"), jobs=1, cache=False), against=against)
    report_parts(found, 100)
    found.to_json()


def in_memory(dense: str) -> None:
    model = lrsurgery.load_model(dense)
    lrsurgery.factorise_(model, rank=4)
    lrsurgery.rank_report(model)
    lrsurgery.densify_(model)


WORK: dict[str, Callable[[str, str, Path], object]] = {
    "factorise": lambda dense, low, out: lrsurgery.factorise_checkpoint(dense, out, rank=4, cache=False),
    "export": lambda dense, low, out: lrsurgery.export_dense(low, out),
    "load": lambda dense, low, out: lrsurgery.load_model(low),
    "save": lambda dense, low, out: lrsurgery.save_model(lrsurgery.load_model(low), out),
    "report of a dense model": lambda dense, low, out: show([dense]),
    "report of a factorised one": lambda dense, low, out: show([low]),
    "report --against": lambda dense, low, out: show([low], dense),
    "in memory": lambda dense, low, out: in_memory(dense),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linear")
    for blocks in BLOCKS:
        tiny.save_gpt2(root / f"dense-{blocks}", blocks=blocks)
        lrsurgery.factorise_checkpoint(root / f"dense-{blocks}", root / f"low-{blocks}", rank=4, cache=False)
    return root


@pytest.mark.parametrize("what", list(WORK))
def test_no_line_runs_out_of_proportion(what: str, models: Path, tmp_path: Path) -> None:
    runs = []
    for blocks in BLOCKS:
        with counted() as lines:
            WORK[what](str(models / f"dense-{blocks}"), str(models / f"low-{blocks}"), tmp_path / f"out-{blocks}")
        runs.append(lines)
    few, many = runs
    # four layers a block: what is done once for each of their pairs is done 576 times and then 2,304 times
    steep = {place: (few[place], times) for place, times in many.items() if times > 2.5 * few[place] + 50}
    assert not steep, "\n".join(f"{file}:{line}: {times}" for (file, line), times in steep.items())
