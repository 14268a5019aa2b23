"""Whatever valid JSON stands in a report's files: every view can draw it, or one line names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd import mutations

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.spectrum import EffectiveRanks, Points
from lrsurgery.linalg.subspaces import Angles, Overlap, Shared
from lrsurgery.linalg.svd import spectral_factors
from lrsurgery.report.bench import BENCH_FILE, read_bench
from lrsurgery.report.rows import compared_row, measured_row
from lrsurgery.report.runs import METRICS, read_run
from lrsurgery.report.schema import FILE_NAME, Report, Row, Rung
from lrsurgery.report.views import render
from lrsurgery.surgery.rows import Replacement

RANKS, POINTS = EffectiveRanks(3.0, 2.5, 2.0, None), Points((1, 2, 4), (3.0, 2.0, 1.0))
VIEWS = ("terminal", "markdown", "csv", "html", "json")
COUNT = 250  # of mutations


def report() -> Report:
    first = Row(
        *("h.0.a", "linear", (8, 4), "factorised", None, 4, 2, 40, 32),
        energy_kept=0.9,
        relative_error=0.3,
        spectral_error=0.2,
        before=RANKS,
        after=RANKS,
        flops_before=64,
        flops_after=48,
        spectrum_before=POINTS,
        spectrum_after=POINTS,
        overlap=Overlap(Angles(30.0, 10.0), Angles(20.0, 5.0), (Shared(1, 0.9, 0.8),)),
        ladder=(Rung("params:0.5", 2, 32, 0.9, 0.3, 0.4),),
        predicted_loss=0.1,
    )
    second = Row("h.1.a", "conv2d-channel", (8, 4, 3, 3), "factorised", None, 8, 2, 288, 88, before=RANKS)
    kept = Row("head", "linear", (8, 4), "dense", "the output head", None, None, 32, 32)
    return Report(
        (first, second, kept),
        400,
        300,
        1600,
        1200,
        source={"reference": "gpt2", "digest": "ab"},
        command="lrsurgery factorise gpt2",
        options={"rank": "0.5", "include": ["*"]},
        versions={"torch": "2"},
        notes=("a note",),
        name="gpt2",
        ladder=(Rung("0.5", 2, 200, 0.9, 0.3, 0.4),),
        calibration={"metric": "fisher", "samples": 4, "tokens": 8, "scored_in": "token", "data": "x"},
        loss_check={"measured": True, "text": "3.1 -> 3.2"},
    )


BENCH = {
    "format_version": 1,
    "command": "lrsurgery bench",
    "versions": {"torch": "2"},
    "machine": {"processor": "x", "cores": 2},
    "options": {"batch": [1]},
    "task": "causal-lm",
    "model": {"name": "a", "parameters": 10, "bytes": 40, "peak_memory": None},
    "against": {"name": "b", "parameters": 20, "bytes": 80, "peak_memory": 100},
    "runs": [
        {
            "work": "prefill",
            "batch": 1,
            "length": 8,
            "unit": "tokens",
            "flops": 100,
            "median_ms": 1.0,
            "p95_ms": 1.5,
            "throughput": 8.0,
            "speedup": 1.2,
            "interval": [1.1, 1.3],
            "confidence": 0.95,
            "rounds": 9,
            "reached": True,
            "ideal": 1.5,
            "against": {"flops": 150, "median_ms": 1.2, "p95_ms": 1.8, "throughput": 7.0},
        }
    ],
    "layers": [
        {
            "names": ["h.0.a"],
            "kind": "linear",
            "shape": [8, 4],
            "rank": 2,
            "input": [1, 8, 4],
            "dense_ms": 1.0,
            "factorised_ms": 0.5,
            "slower": False,
            "speedup": 2.0,
            "interval": [1.9, 2.1],
            "confidence": 0.95,
            "rounds": 9,
            "reached": True,
        }
    ],
    "notes": ["a note"],
}
LAYER = {"nuclear_rank": 3.0, "entropy_rank": 2.0, "stable_rank": 1.5, "frobenius_norm": 2.0, "spectral_norm": 1.0}
RECORDS = [
    {"step": 0, "stage": "dense", "eval": {"loss": 3.0, "perplexity": 20.1, "scored": 10}},
    {"step": 0, "stage": "factorised", "eval": {"loss": 4.0}, "layers": {"a": LAYER, "b": LAYER}},
    {"step": 1, "stage": "factorised", "loss": 3.5, "learning_rate": 0.1},
    {
        "step": 2,
        "stage": "factorised",
        "eval": {"loss": 3.2},
        "layers": {"a": {**LAYER, "spectrum": {"index": [1, 2], "value": [2.0, None]}}, "b": LAYER},
    },
]
RECIPE = {"model": "gpt2", "data": "x", "rank": ["0.5"], "lr": 0.1, "decay": "l2", "decay_strength": 0.1, "steps": 2}


def read_report_of(folder: Path, body: Any) -> Report:
    (folder / FILE_NAME).write_text(json.dumps(body))
    return Report.read(folder)


def read_bench_of(folder: Path, body: Any) -> Report:
    (folder / BENCH_FILE).write_text(json.dumps(body))
    return Report((), 0, None, about="runs", name="bench", bench=read_bench(folder))


def read_run_of(folder: Path, body: Any) -> Report:
    records, recipe = body if isinstance(body, list) and len(body) == 2 else ([body], {})
    lines = records if isinstance(records, list) else [records]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # YAML too
    runs = (read_run(folder),)
    return Report((), 0, None, about="runs", name="run", training=(*runs, *runs))


FILES: dict[str, tuple[Callable[[Path, Any], Report], Any]] = {
    "rank_report.json": (read_report_of, json.loads(report().to_json())),
    "bench.json": (read_bench_of, BENCH),
    "metrics.jsonl and recipe.yaml": (read_run_of, [RECORDS, RECIPE]),
}


@pytest.mark.parametrize("name", FILES)
def test_odd_values_are_drawn_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    read, body = FILES[name]
    assert render(read(tmp_path, body), "terminal")
    drawn, refusals = 0, []
    for changed, odd in mutations(body, COUNT):
        try:
            found = read(tmp_path, odd)
        except SurgeryError as e:
            refusals.append(str(e))
            continue
        drawn += 1
        for view in VIEWS if drawn % 5 == 0 else VIEWS[:2]:
            try:
                text = render(found, view)
            except Exception as e:
                raise AssertionError(f"{changed}: {view}") from e
            if view == "json":
                json.loads(text, parse_constant=pytest.fail)
    assert min(drawn, len(refusals)) > COUNT // 20
    assert [line for line in refusals if not line.startswith(str(tmp_path)) or "\n" in line] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [0, 0]}, "layers.0.shape.0: input should be greater than 0, not 0"),
        ({"kind": "linear", "shape": [8, 4, 3, 3]}, "shape 8x4x3x3 is of no 'linear' layer"),
        ({"kind": "invented"}, "shape 8x4 is of no 'invented' layer"),
        ({"full_rank": 5}, "full rank 5 is above that of 8x4"),
        ({"rank": 5}, "rank 5 is above full rank, 4"),
        ({"parameters_before": -1}, "layers.0.parameters_before: input should be greater than or equal to 0"),
        ({"spectrum_before": {"index": [], "value": []}}, "a spectrum whose values"),
        ({"relative_error": None}, None),
    ],
)
def test_what_a_row_says_fits_together(change: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    body = json.loads(report().to_json())
    body["layers"][0] |= change
    if words is None:
        assert read_report_of(tmp_path, body).rows[0].relative_error is None
        return
    with pytest.raises(SurgeryError) as found:
        read_report_of(tmp_path, body)
    assert words in str(found.value)


@pytest.mark.parametrize("size", [1e38, 3e38, 1e-38], ids=["large", "largest", "small"])
def test_a_report_of_extreme_weights_has_the_figures_of_fp64(size: float) -> None:
    torch.manual_seed(0)
    weight = torch.rand(24, 16) * size
    row = Replacement("a", "linear", (24, 16), 24, 16, 4, 0)
    found = spectral_factors(weight, 4)
    measured = measured_row(row, weight, found.factors, found)
    values = torch.linalg.svdvals(weight.double())
    tail = float(values[4:].norm() / values.norm())
    assert measured.relative_error == pytest.approx(tail, rel=1e-3)
    assert measured.before is not None
    assert measured.after is not None
    assert measured.before.stable == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-4)
    assert measured.spectrum_before is not None
    assert measured.spectrum_before.value == pytest.approx(values.tolist(), rel=1e-3)
    assert measured.balance == pytest.approx(0, abs=1e-4)
    compared = compared_row(measured, weight, Factors(*found.factors))
    assert compared.relative_error == pytest.approx(tail, rel=1e-3)
    assert compared.spectral_error == pytest.approx(float(values[4] / values[0]), rel=1e-2)
    assert "?" not in render(Report((compared,), 384, 160), "terminal")
