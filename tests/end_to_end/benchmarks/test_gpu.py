"""The benchmark of the GPU rows, at tiny sizes on the CPU: every section has rows, and what has none says why."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.warm import program

pytestmark = pytest.mark.process

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
SECTIONS = ["decompositions", "factorise", "training", "calibration", "prefill and decode"]


def test_tiny_fills_every_section() -> None:
    done = program(sys.executable, SCRIPT, "--tiny", "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["left_out"], body["failed"]) == (0, 0), [row["note"] for row in body["rows"]]
    assert list(dict.fromkeys(row["section"] for row in body["rows"])) == SECTIONS
    for row in body["rows"]:
        figures = {name: value for name, value in row.items() if isinstance(value, int | float)}
        assert figures["ms"] > 0, row
        assert all(math.isfinite(value) and value > 0 for value in figures.values()), row
    assert _variants(body, "prefill and decode") >= {"dense", "params:0.5", "params:0.25 pivoted"}
    assert _variants(body, "calibration") == {"forward", "forward and backward", "activations", "fisher"}
    assert {"dense", "params:0.25, Frobenius decay"} < _variants(body, "training")
    # fewer numbers, fewer operations
    ideal = [row["ideal"] for row in body["rows"] if row["ideal"] is not None]
    assert min(ideal) > 1
    errors = [row["error"] for row in body["rows"] if row["error"] is not None and "fast" not in row["variant"]]
    assert all(abs(error - 1) < 1e-4 for error in errors)


def _variants(body: dict[str, Any], section: str) -> set[str]:
    return {row["variant"] for row in body["rows"] if row["section"] == section}


def test_what_time_leaves_out_is_said() -> None:
    done = program(sys.executable, SCRIPT, "--tiny", "--json", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert [row["section"] for row in body["rows"]] == SECTIONS
    assert all(row["note"].startswith("left out for want of time") for row in body["rows"])
    assert body["left_out"] == len(SECTIONS)
    assert f"{len(SECTIONS)} left out" in done.stderr


def test_without_a_card() -> None:
    done = program(sys.executable, SCRIPT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_a_cell_that_fails_leaves_the_others(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> list[dict[str, Any]]:
        raise RuntimeError("CUDA out of memory\nfree some")

    cells = [
        gpu.Cell(name="first", run=fails, kind="a", guess=0),
        gpu.Cell(name="second", run=lambda: [gpu.row("second", "dense", ms=1.0)], kind="b", guess=0),
        gpu.Cell(name="third", run=fails, kind="c", guess=1e6),
    ]
    gpu.work_through("some", cells, time.time() + 100)
    planned, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert planned["cells"] == ["first", "second", "third"]
    first, second, third = [line["rows"][0] for line in lines]
    assert first["note"] == "failed: RuntimeError: CUDA out of memory ... free some"
    assert (second["ms"], second["note"]) == (1.0, None)
    assert third["note"].startswith("left out for want of time")
    assert all(tuple(row) == gpu.COLUMNS for row in (first, second, third))
