"""`--min-speedup`: the decision on made-up timings, the table between runs. What a clock shows is never asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import zoo
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import lrsurgery
from lrsurgery.cli.app import app
from lrsurgery.errors import PlanError, SurgeryError
from lrsurgery.surgery import speed
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.plan import Plan, SurgeryOptions, decide_all, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept, Replacement
from lrsurgery.surgery.speed import SpeedTable, make_refusal, measure_speedup

CPU = torch.device("cpu")
LAYERS: dict[str, tuple[nn.Module, str]] = {
    "linear": (nn.Linear(24, 40), "linear"),
    "linear without bias": (nn.Linear(24, 40, bias=False), "linear"),
    "conv1d": (Conv1D(40, 24), "conv1d"),
    "channel, stride 2": (nn.Conv2d(3, 8, 3, stride=2, padding=1), "conv2d-channel"),
    "channel, patches": (nn.Conv2d(3, 8, 8, stride=8), "conv2d-channel"),
    "1-d, stride 2": (nn.Conv1d(3, 8, 5, stride=2, padding=2), "conv1d-channel"),
    "3-d, patches": (nn.Conv3d(3, 8, (2, 8, 8), stride=(2, 8, 8)), "conv3d-channel"),
    "spatial, dilated": (nn.Conv2d(4, 8, (3, 5), dilation=2, padding="same"), "conv2d-spatial"),
    "spatial, huge kernel": (nn.Conv2d(4, 8, 31), "conv2d-spatial"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own for each test."""
    made = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRSURGERY_CACHE", str(made))
        yield made


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.tall = nn.Linear(64, 64), nn.Linear(128, 32), nn.Linear(32, 256)
        self.conv = nn.Conv2d(16, 32, 3, stride=2)


def fake(dense: Any, spec: Spec) -> float:
    """A device on which only the rank costs: 32 / rank times as fast."""
    return 32 / spec.rank


def plan_at(model: nn.Module, rank: Any, least: float, speedup: speed.Speedup = fake) -> Plan:
    refuse = make_refusal(model, "channel", least, CPU, speedup)
    return make_plan(model, SurgeryOptions(target=parse_rank(rank), allow_larger=True), refuse=refuse)


@pytest.mark.parametrize(
    ("least", "dense"),
    [
        (0.5, {}),
        (
            1.0,
            {
                "square": "2.00x slower at rank 64 on cpu",
                "wide": "1.50x slower at rank 48 on cpu",
            },
        ),
        (
            1.5,
            {
                "square": "2.00x slower at rank 64 on cpu",
                "wide": "1.50x slower at rank 48 on cpu",
                "tall": "1.00x as fast, under 1.5x, at rank 32 on cpu",
            },
        ),
    ],
)
def test_slow_layers_stay_dense_and_say_why(least: float, dense: dict[str, str]) -> None:
    model = Few()
    model.wide = nn.Linear(128, 48)
    found = plan_at(model, ["64", "wide=48", "tall=32", "conv=4"], least)
    assert {row.name: row.reason for row in found.rows if isinstance(row, Kept)} == dense


@pytest.mark.process
@given(least=st.floats(0.1, 20), more=st.floats(1, 4), rank=st.integers(1, 32))
def test_a_higher_bar_only_leaves_more_dense(least: float, more: float, rank: int) -> None:
    def times(dense: Any, spec: Spec) -> float:
        return float(dense.weight.numel()) / (spec.rank * sum(dense.weight.shape[:2]))

    model = Few()
    names = []
    for bar in (least, least * more):
        try:
            found = plan_at(model, [str(rank), "conv=1"], bar, times)
        except PlanError:
            names.append(set())
            continue
        names.append({row.name for row in found.replacements})
        modules = dict(model.named_modules())
        for row in found.rows:
            spec = Spec(row.kind, 1 if row.name == "conv" else min(rank, *row.shape[:2]))
            fast = times(modules[row.name], spec) >= bar
            assert isinstance(row, Replacement) == fast, row
    assert names[1] <= names[0]


@pytest.mark.parametrize("rank", ["energy:0.9", "stable"])
def test_ranks_that_come_late_are_judged_when_they_come(rank: str) -> None:
    torch.manual_seed(0)
    model = Few()
    asked: list[int] = []

    def noted(dense: Any, spec: Spec) -> float:
        asked.append(spec.rank)
        return 0.5

    def values_of(row: Replacement) -> torch.Tensor:
        return torch.linalg.svdvals(dict(model.named_modules())[row.name].weight.detach().flatten(1))

    waiting = plan_at(model, rank, 1.0, noted)
    assert waiting.needs_spectra
    assert not asked
    settled = decide_all(waiting, values_of)
    assert len(asked) == len(waiting.replacements) == 4
    assert not settled.replacements
    free = decide_all(make_plan(model, SurgeryOptions(target=parse_rank(rank), allow_larger=True)), values_of)
    assert [row.rank for row in free.replacements] == asked


@pytest.mark.parametrize("layer", [name for name, (dense, kind) in LAYERS.items() if kind != "conv2d-spatial"])
def test_the_form_that_is_stored_is_measured(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, kind = LAYERS[layer]
    timed: list[Any] = []
    calls = speed.Workload.calls
    monkeypatch.setattr(speed.Workload, "calls", lambda module, x: (timed.append(module), calls(module, x))[1])
    rows, columns = KINDS[kind].matrix_shape(dense.weight.shape)  # type: ignore[arg-type]
    for side in (None, *KINDS[kind].sides(dense)):
        timed.clear()
        assert 0 < measure_speedup(dense, Spec(kind, 2, side), CPU, torch.float32) < math.inf
        assert timed[0].side == side
        assert timed[0].u.weight.numel() + timed[0].v.weight.numel() == 2 * (rows + columns - (2 if side else 0))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_is_measured(layer: str) -> None:
    dense, kind = LAYERS[layer]
    before = torch.get_rng_state()
    found = measure_speedup(dense, Spec(kind, 3), CPU, torch.float32)
    assert 0 < found < math.inf
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.zeros(KINDS[kind].sample_input(dense, speed.POSITIONS))
    positions = dense(x).numel() // (8 if isinstance(dense, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 40)
    assert positions == (1 if layer == "spatial, huge kernel" else pytest.approx(speed.POSITIONS, rel=0.25))


def count_measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def measured(dense: nn.Module, spec: Spec, device: torch.device, dtype: torch.dtype) -> float:
        asked.append(f"{dense} {spec} {dtype}")
        return 1.25

    monkeypatch.setattr(speed, "measure_speedup", measured)
    return asked


def test_alike_layers_are_measured_once_and_never_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = count_measurements(monkeypatch)
    for _ in range(2):
        table = SpeedTable(CPU)
        assert {table(nn.Linear(8, 6), Spec("linear", 2)) for _ in range(3)} == {1.25}
    assert len(asked) == 1
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["format_version"] == speed.FORMAT_VERSION


def test_whatever_changes_the_time_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_measurements(monkeypatch)
    table = SpeedTable(CPU)
    table(nn.Linear(8, 6), Spec("linear", 2))
    table(nn.Linear(8, 6), Spec("linear", 3))
    table(nn.Linear(6, 8), Spec("linear", 2))
    table(nn.Linear(8, 6, bias=False), Spec("linear", 2))
    table(nn.Linear(8, 6).bfloat16(), Spec("linear", 2))
    SpeedTable(CPU, torch.float64)(nn.Linear(8, 6), Spec("linear", 2))
    conv = nn.Conv2d(3, 4, 3)
    table(conv, Spec("conv2d-channel", 2))
    table(conv, Spec("conv2d-spatial", 2))
    table(conv, Spec("conv2d-channel", 2, "rows"))
    table(nn.Linear(8, 6), Spec("linear", 2, "rows"))
    table(nn.Linear(8, 6), Spec("linear", 2, "columns"))
    table(nn.Conv2d(3, 4, 3, stride=2), Spec("conv2d-channel", 2))
    table(nn.Conv2d(3, 4, 3, dilation=2), Spec("conv2d-channel", 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    SpeedTable(CPU)(nn.Linear(8, 6), Spec("linear", 2))
    assert len(asked) == 14


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 1, "speedups": {"a": "?"}}', '{"format_version": 99, "speedups": {}}']
)
def test_a_damaged_table_is_started_anew(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    asked = count_measurements(monkeypatch)
    (folder / "speed.json").write_text(text)
    for _ in range(2):
        assert SpeedTable(CPU)(nn.Linear(8, 6), Spec("linear", 2)) == 1.25
    assert len(asked) == 1


def test_without_a_folder_it_lasts_for_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = count_measurements(monkeypatch)
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("LRSURGERY_CACHE", str(tmp_path / "taken"))
    table = SpeedTable(CPU)
    for _ in range(2):
        assert table(nn.Linear(8, 6), Spec("linear", 2)) == 1.25
    assert len(asked) == 1


@pytest.mark.process
def test_processes_side_by_side_find_the_same() -> None:
    code = (
        "import torch; from torch import nn; from lrsurgery.surgery.layers import Spec;"
        "from lrsurgery.surgery.speed import SpeedTable;"
        "print(SpeedTable(torch.device('cpu'))(nn.Linear(96, 64), Spec('linear', 8)))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert first == second
    assert 0 < float(first) < math.inf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny-llama"
    zoo.save_transformers("llama", made)
    return made


def factorise(*arguments: object) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SECONDS", 0.0)
        return CliRunner().invoke(app, ["factorise", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.process
def test_the_program_measures_once_and_records_it(model: Path, tmp_path: Path, folder: Path) -> None:
    """A bar so low that every layer passes it, whatever the clock shows."""
    made = factorise(model, "--rank", "0.4", "--min-speedup", "1e-9", "--output", tmp_path / "out", "--json")
    report = json.loads(made.stdout)
    assert report["options"]["min_speedup"] == 1e-9
    file = folder / "speed.json"
    shapes = {(tuple(row["shape"]), row["rank"]) for row in report["layers"] if row["status"] == "factorised"}
    assert len(json.loads(file.read_text())["speedups"]) == len(shapes)
    written = file.stat().st_mtime_ns
    assert factorise(model, "--rank", "0.4", "--min-speedup", "1e-9", "--dry-run").exit_code == 0
    assert file.stat().st_mtime_ns == written


@pytest.mark.process
def test_the_run_and_the_dry_run_agree_on_late_ranks(model: Path, tmp_path: Path, folder: Path) -> None:
    """A table filled by hand: every second entry says slower."""
    arguments = (model, "--rank", "energy:0.7", "--json", "--min-speedup")
    factorise(*arguments, "1e-9", "--dry-run")
    file = folder / "speed.json"
    body = json.loads(file.read_text())
    body["speedups"] = {key: 0.5 + number % 2 for number, key in enumerate(body["speedups"])}
    file.write_text(json.dumps(body))
    planned = json.loads(factorise(*arguments, "1.0", "--dry-run").stdout)["layers"]
    made = json.loads(factorise(*arguments, "1.0", "--output", tmp_path / "out").stdout)["layers"]
    assert [(r["name"], r["rank"], r["reason"]) for r in planned] == [(r["name"], r["rank"], r["reason"]) for r in made]
    assert any((row["reason"] or "").startswith("2.00x slower at rank ") for row in made)
    assert any(row["status"] == "factorised" for row in made)


def test_a_model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_speedup", lambda dense, spec, device, dtype: dense.weight.numel() / 5000)
    model = Few()
    lrsurgery.factorise_(model, rank=4, min_speedup=1.0, device="cpu")
    assert set(factorised_layers(model)) == {"tall"}  # 8192 numbers; the others have less than 5000


@pytest.mark.process
def test_a_bar_that_nothing_reaches_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing to factorise at rank 0\.4: .* at rank \d+ on cpu"):
        factorise(model, "--rank", "0.4", "--min-speedup", "1e9", "--output", tmp_path / "out")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_bar_that_cannot_be_is_refused(model: Path, value: str) -> None:
    with pytest.raises(SurgeryError, match=r"min speedup .*: write a number above 0"):
        factorise(model, "--rank", "0.4", "--min-speedup", value, "--dry-run")


@pytest.mark.parametrize("value", ["0", "fast"])
def test_refused_in_one_line(model: Path, value: str) -> None:
    command = [sys.executable, "-m", "lrsurgery", "factorise", str(model), "--rank", "0.4", "--min-speedup", value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "number" in done.stderr
    assert done.stderr.count("\n") == 1
