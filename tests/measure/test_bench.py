"""`bench`: intervals on noise of a known ratio, operations by hand, and the program on tiny models."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from support import tiny
from support.warm import program
from torch import nn

import lrsurgery
from lrsurgery.cli.app import main
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.files.writing import replace_file
from lrsurgery.measure import bench as module
from lrsurgery.measure.bench import BenchOptions, bench
from lrsurgery.measure.workloads import DECODE, FORWARD, PREFILL, count_flops, make_workload
from lrsurgery.report.bench import Bench, read_bench
from lrsurgery.report.views.speed import bench_layer_table, size_table, speed_table
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.layout import prepare_for_inference_
from lrsurgery.timing import Workload, compare, median_interval, percentile

CPU = torch.device("cpu")
QUICK = BenchOptions(batch=(2,), length=(16,), new_tokens=4, seconds=0.3, device="cpu", threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny.save_gpt2(folder / "gpt2")
    lrsurgery.factorise_checkpoint(folder / "gpt2", folder / "quarter", rank=0.25)
    tiny.save_timm(folder / "resnet")
    lrsurgery.factorise_checkpoint(folder / "resnet", folder / "small", rank=0.25, include=["layer3*", "layer4*"])
    tiny.save_bert(folder / "body", "BertModel")
    return folder


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda request: (None, f"no memory of {request.reference}"))


class Machine:
    """A clock that work moves on, each call by its own seconds."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def work(self, seconds: Callable[[int], float]) -> Workload:
        def run(_: object) -> Iterator[None]:
            self.now += seconds(self.calls)
            self.calls += 1
            yield

        return Workload(run)

    def clock(self) -> float:
        return self.now


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """Noise with a tail: every tenth call is disturbed, some of them for a long time."""
    draw = random.Random(0)

    def noisy(seconds: float) -> Callable[[int], float]:
        return lambda _: seconds * math.exp(draw.gauss(0, 0.04)) * (1 + (draw.random() < 0.1) * draw.expovariate(1))

    held, count = 0, 400
    for _ in range(count):
        machine = Machine()
        pair = [machine.work(noisy(0.02)), machine.work(noisy(0.026))]
        found = compare(pair, precision=0.03, seconds=math.inf, device=CPU, clock=machine.clock)
        assert found.interval is not None
        assert found.reached
        assert found.rounds >= 7
        low, high = found.interval
        assert math.sqrt(high / low) - 1 <= 0.03
        held += low <= 1.3 <= high
    assert 0.93 <= held / count < 1


def test_even_drift_cancels() -> None:
    machine = Machine()
    pair = [machine.work(lambda i: 0.02 * (1 + i / 10)), machine.work(lambda i: 0.03 * (1 + i / 10))]
    found = compare(pair, precision=0.03, seconds=5, device=CPU, clock=machine.clock)
    assert found.ratio == pytest.approx(1.5, rel=1e-9)


def test_time_ends_a_comparison_that_noise_keeps_open() -> None:
    machine, draw = Machine(), random.Random(0)
    pair = [machine.work(lambda _: draw.uniform(0.02, 0.2)) for _ in range(2)]
    found = compare(pair, precision=1e-6, seconds=3, device=CPU, clock=machine.clock)
    assert not found.reached
    assert 3 <= machine.now < 5


@pytest.mark.parametrize("n", [6, 7, 8, 20, 1500])
def test_order_statistics_are_the_narrowest_that_hold_the_median(n: int) -> None:
    low, high = median_interval([float(i) for i in random.Random(0).sample(range(n), n)])
    assert low == n - 1 - high

    def coverage(k: int) -> float:  # of the interval from the k-th smallest to the k-th largest, k from 1
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n if n < 1000 else _normal(n, k)

    assert coverage(int(low) + 1) >= 0.95 > coverage(int(low) + 2)


def _normal(n: int, k: int) -> float:
    return math.erf((n / 2 - (k - 0.5)) / math.sqrt(n / 4) / math.sqrt(2))


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([float(i) for i in range(100, 0, -1)], 0.95) == 95


def test_operations_are_two_for_each_weight_and_row() -> None:
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 8, bias=False))
    workload = make_workload(model, torch.randn(5, 7, 24), FORWARD)
    assert workload is not None
    assert count_flops(workload) == 2 * sum(p.numel() for p in model.parameters()) * 5 * 7


def test_operations_of_recurrence_are_counted_with_the_products_that_are_formed() -> None:
    model = nn.Sequential(nn.LSTM(24, 16, bias=False)).eval()
    lrsurgery.factorise_(low := copy.deepcopy(model), rank=4)
    found = []
    for each in (model, low):
        workload = make_workload(each, torch.randn(7, 5, 24), FORWARD)
        assert workload is not None
        found.append(count_flops(workload))
    assert torch.backends.mkldnn.enabled
    weights = [p.numel() for p in model.parameters()]
    assert found == [2 * sum(weights) * 5 * 7, 2 * sum(weights) * (5 * 7 + 4)]


@pytest.fixture(scope="module")
def benched(models: Path) -> Bench:
    """The program's JSON on a factorised GPT-2 against the dense one."""
    words = "--batch 1,64 --length 16 --new-tokens 4 --seconds 0.3 --threads 1 --device cpu --layers --save --json"
    done = program(*tiny.PROGRAM, "bench", models / "quarter", "--against", models / "gpt2", *words.split())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.process
def test_the_program_measures_and_saves_what_it_prints(models: Path, benched: Bench) -> None:
    assert read_bench(models / "quarter") == benched
    assert read_bench(models / "gpt2") is None
    settings = [(run["work"], run["batch"], run["length"]) for run in benched["runs"]]
    assert settings == [(work, b, 16) for b in (1, 64) for work in ("prefill", "token by token")]
    for run in benched["runs"]:
        ours, others = run, run["against"]
        low, high = run["interval"]
        assert low <= run["speedup"] <= high
        assert run["rounds"] >= 7
        assert ours["median_ms"] <= ours["p95_ms"]
        assert run["ideal"] == pytest.approx(others["flops"] / ours["flops"])
        assert run["ideal"] > 1
        units = run["batch"] * (16 if run["work"] == "prefill" else 1)
        assert ours["throughput"] == pytest.approx(1e3 * units / ours["median_ms"])
    assert benched["machine"]["threads"] == 1
    for body, name in ((benched["model"], "quarter"), (benched["against"], "gpt2")):
        assert body["name"] == str(models / name)
        assert body["bytes"] == (models / name / "model.safetensors").stat().st_size
        if sys.platform == "linux":
            widest = 64 * 16 * 128 * 4  # bytes of what the activation takes in and gives out
            assert body["bytes"] + 2 * widest < body["peak_memory"] < 50e6
    dense = lrsurgery.load_model(models / "gpt2")
    assert benched["against"]["parameters"] == sum(p.numel() for p in dense.parameters())


@pytest.mark.process
def test_equal_layers_are_timed_once_on_what_the_model_gives_them(benched: Bench) -> None:
    groups = {row["names"][0].removeprefix("transformer.h.0."): row for row in benched["layers"]}
    shapes = {
        "attn.c_attn": ([32, 96], [1, 16, 32]),
        "attn.c_proj": ([32, 32], [1, 16, 32]),
        "mlp.c_fc": ([32, 128], [1, 16, 32]),
        "mlp.c_proj": ([128, 32], [1, 16, 128]),
    }
    assert {name: (row["shape"], row["input"]) for name, row in groups.items()} == shapes
    for row in groups.values():
        assert (row["kind"], row["rank"], len(row["names"])) == ("conv1d", 8, 2)
        assert row["slower"] == (row["interval"][1] < 1)


@pytest.mark.process
def test_tables_fit_a_terminal_of_80_columns(benched: Bench) -> None:
    console = Console(width=80, record=True)
    body = json.loads(json.dumps(benched))
    for name in ("model", "against"):
        body[name] |= {"parameters": 70_553_706_496, "bytes": 141 * 10**9, "peak_memory": 152 * 10**9}
    for run in body["runs"]:
        run |= {"batch": 256, "length": 32768, "median_ms": 12345.6, "p95_ms": 12345.6, "throughput": 1234567.8}
        run["against"]["median_ms"], run["reached"] = 98765.4, False
    for row in body["layers"]:
        row |= {
            "shape": [16384, 53248],
            "rank": 13107,
            "input": [256, 4096, 16384],
            "dense_ms": 12345.6,
            "reached": False,
        }
    console.print(size_table(body), speed_table(body), bench_layer_table(body))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.process
@pytest.mark.usefixtures("in_one_process")
def test_a_model_against_itself_is_as_fast(models: Path) -> None:
    """At 95% each interval may miss; a comparison that favours one side misses every time."""
    reference = str(models / "gpt2")
    missed = {PREFILL: 0, DECODE: 0}
    for _ in range(4):
        for run in bench(reference, reference, QUICK)["runs"]:
            assert run["ideal"] == 1
            assert run["interval"] is not None
            low, high = run["interval"]
            missed[run["work"]] += not low <= 1 <= high
    assert max(missed.values()) < 4


@pytest.mark.usefixtures("in_one_process")
def test_an_image_model_gets_images_of_its_size(models: Path) -> None:
    options = BenchOptions(batch=(3,), seconds=0.3, device="cpu", threads=1, layers=True)
    body = bench(str(models / "small"), options=options)
    (run,) = body["runs"]
    pixels = timm.get_pretrained_cfg("test_resnet").input_size[-1]
    assert (run["work"], run["batch"], run["length"], run["unit"]) == ("forward", 3, pixels, "images")
    assert run["throughput"] == pytest.approx(3e3 / run["median_ms"])
    assert (run["against"], run["speedup"], run["interval"], run["ideal"]) == (None,) * 4
    named = [name for row in body["layers"] for name in row["names"]]
    assert set(named) == set(factorised_layers(lrsurgery.load_model(models / "small")))
    assert all(len(row["input"]) == 4 and row["input"][0] == 3 for row in body["layers"])
    assert body["notes"] == [f"no memory of {models / 'small'}"]


@pytest.mark.usefixtures("in_one_process")
def test_both_models_and_dense_layers_can_be_prepared(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[nn.Module] = []

    def seen(module: nn.Module) -> list[str]:
        given.append(module)
        return prepare_for_inference_(module)

    monkeypatch.setattr("lrsurgery.measure.workloads.prepare_for_inference_", seen)
    options = BenchOptions(batch=(1,), length=(8,), new_tokens=0, seconds=0.3, device="cpu", layers=True, prepare=True)
    body = bench(str(models / "quarter"), str(models / "gpt2"), options)
    assert len(given) == 2 + len(body["layers"])
    assert body["options"]["prepare"] is True
    assert body["notes"][-1].startswith("--prepare: measured after prepare_for_inference_")
    body = bench(str(models / "resnet"), options=BenchOptions(batch=(1,), seconds=0.3, device="cpu", prepare=True))
    assert body["notes"][-1] == "--prepare changed nothing: every linear layer lies so already, or is not on a CPU"


@pytest.mark.usefixtures("in_one_process")
def test_a_model_that_does_not_compile_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> Any:
        def call(*_: object, **__: object) -> None:
            raise RuntimeError("no compiler here\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    options = BenchOptions(batch=(1,), seconds=0.3, device="cpu", compile=True)
    with pytest.raises(SurgeryError, match=r"small: torch\.compile fails: no compiler here; leave --compile out$"):
        bench(str(models / "small"), options=options)


BAD = {
    "device": ("{gpt2}", "--device tpu", "unknown device 'tpu'"),
    "dtype": ("{gpt2}", "--dtype int8", "'--dtype': 'int8' is not one of 'keep', 'float32', 'bfloat16', 'float16'"),
    "batch": ("{gpt2}", "--batch 0", "batch 0: write integers of at least 1"),
    "words": ("{gpt2}", "--batch many", "--batch many: write integers with commas"),
    "length": ("{gpt2}", "--length 16,33", "length 33: over the 32 positions"),
    "pixels": ("{resnet}", "--length 32", "takes inputs of its own size"),
    "threads": ("{gpt2}", "--threads 0", "threads 0: write an integer from 1 to"),
    "seconds": ("{gpt2}", "--seconds 0", "seconds 0: write a number above 0"),
    "precision": ("{gpt2}", "--precision 0", "precision 0: write a number between 0 and 1"),
    "task": ("{gpt2}", "--task chess", "'--task': 'chess' is not one of 'causal-lm', "),
    "hub": ("openai-community/gpt2", "--save", "--save writes into a model's local folder"),
    "no head": ("{body}", "", "BertModel is for none of"),
    "tasks": ("{gpt2}", "--against {resnet}", "is for image-classification"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_gets_one_line(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, words, wanted = BAD[name]
    line = f"{model} {words}".format(**{name: models / name for name in ("gpt2", "resnet", "body")})
    monkeypatch.setattr(sys, "argv", ["lrsurgery", "bench", *line.split()])
    for place in ("signal.signal", "atexit.register", "warnings.filterwarnings"):  # what a program does to its process
        monkeypatch.setattr(place, lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert wanted in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: keep, float32, bfloat16, float16"),
        ({"task": "chess"}, "unknown task 'chess'; known: causal-lm, "),
        ({"length": ()}, "length of nothing: write integers of at least 1"),
        ({"new_tokens": -1}, "new tokens -1: write an integer from 0 to"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SurgeryError, match=f"^{re.escape(words)}"):
        BenchOptions(**options)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format_version": 99}', '{"format_version": 1, "runs": {}}'],
    ids=["empty", "cut", "list", "bare", "newer", "runs of the wrong kind"],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(SourceError, match=r"bench\.json: "):
        read_bench(tmp_path)


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bench.json"
    file.write_text("old")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace_file(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]
    assert file.read_text() == "old"
