"""Studies: what a recipe means, and real runs in processes of their own, stopped, sharded, failing and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import tiny, warm

from lrsurgery.errors import Interrupted, RecipeError, StudyError
from lrsurgery.files.locks import alive
from lrsurgery.measure.findings import Findings, Spread, cells, findings_of, spread_text
from lrsurgery.measure.study import _prepare, run_study
from lrsurgery.measure.study_recipe import Study, parse_shard, read_study
from lrsurgery.progress import Listener

SETTINGS = {
    "model": "gpt2",
    "from_scratch": True,
    "data": "train.txt",
    "eval_data": "valid.txt",
    "block_size": 32,
    "batch_size": 2,
    "steps": 3,
    "eval_steps": 3,
    "log_steps": 1,
    "rank": 0.5,
}


def write(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    body = {"settings": SETTINGS, "grid": {"decay": ["none", "l2"], "seed": [0, 1]}, **more}
    file.write_text(yaml.safe_dump({key: value for key, value in body.items() if value is not None}, sort_keys=False))
    return file


def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return warm.program(*tiny.PROGRAM, "study", *arguments)


# recipes


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    ways = {"fast": {"lr": 0.1}, "slow": {"lr": 0.01}}
    grid = [{"decay": ["none"], "seed": [0, 1]}, {"way": ways, "rank": [4, "params:0.5"]}]
    study = read_study(write(tmp_path, grid=grid))
    assert [run.name for run in study.runs] == [
        "decay-none_seed-0",
        "decay-none_seed-1",
        "way-fast_rank-4",
        "way-fast_rank-params-0.5",
        "way-slow_rank-4",
        "way-slow_rank-params-0.5",
    ]
    assert study.axes == ["decay", "seed", "way", "rank"]
    assert study.runs[3].axes == {"way": "fast", "rank": "params:0.5"}
    assert (study.runs[3].settings["lr"], study.runs[3].settings["rank"]) == (0.1, "params:0.5")
    assert study.runs[0].fingerprint != study.runs[1].fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grdi": {}}, "unknown key 'grdi'; did you mean 'grid'?"),
        ({"grid": {"decya": ["none"]}}, "unknown setting 'decya'; did you mean 'decay'?"),
        ({"grid": {"decay": "none"}}, "grid: decay: write a list of values, or names with their settings"),
        ({"grid": {"decay": []}}, "grid: decay: has no values"),
        ({"grid": {"decay": ["strong"]}}, "unknown decay 'strong'; known: frobenius, l2, none"),
        ({"grid": {"way": {"a": {"lr": -1}}}}, "lr -1.0: write a number above 0"),
        ({"grid": {"lr": [0.1, "0.1"]}}, "two runs are lr-0.1"),
        ({"table": {"rows": ["width"]}}, "'width' is no axis of the grid; its axes: decay, seed"),
        ({"table": {"column": "decay"}}, "unknown table's 'column'; did you mean 'columns'?"),
        ({"prepare": [{"run": ["python"]}]}, "prepare: each step is 'creates: FILE' and 'run: "),
        ({"settings": {**SETTINGS, "from_scratch": False, "config": {"n_embd": 8}}}, "config: changes the model's"),
    ],
)
def test_a_recipe_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = write(tmp_path, **change)
    with pytest.raises(RecipeError) as error:
        read_study(file)
    assert str(error.value).startswith(f"{file}: {words}")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_one_of_several(text: str) -> None:
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(RecipeError, match="write I/N"):
        parse_shard(text)


def test_a_preparation_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    """A file that a killed command left half-written is made again; one that the user put there stays."""
    step = {"creates": "x.txt", "run": ["python", "-c", "open('x.txt', 'w').write('whole')"]}
    study = read_study(write(tmp_path, prepare=[step]))
    (tmp_path / "x.txt").write_text("the user's own")
    _prepare(study, study.prepare[0], tmp_path)
    assert (tmp_path / "x.txt").read_text() == "the user's own"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".x.txt.preparing").write_text(f"{socket.gethostname()} {ended.pid}")
    _prepare(study, study.prepare[0], tmp_path)
    assert (tmp_path / "x.txt").read_text() == "whole"
    assert not (tmp_path / ".x.txt.preparing").exists()


def test_a_study_permits_nothing(tmp_path: Path) -> None:
    """Its command line does, for all of its runs."""
    for more in ({"trust_remote_code": True}, {"report_to": "wandb"}, {"set": {"deepspeed": "x.json"}}):
        with pytest.raises(RecipeError, match=r"study\.yaml: .*leave it out"):
            read_study(write(tmp_path, settings={**SETTINGS, **more}))


def test_every_small_recipe_of_the_examples_is_right() -> None:
    folder = Path(__file__).parents[2] / "examples" / "studies"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        study = read_study(file)
        assert len(study.runs) > 5, file
        assert "seed" in study.axes


def test_spreads_are_means_and_sample_deviations() -> None:
    values = [10.0, 10.5, 11.25]
    spread = Spread(mean=statistics.mean(values), std=statistics.stdev(values), n=3)
    assert spread_text(spread) == "10.58 ± 0.63 (3)"
    assert spread_text(Spread(mean=12.3456789, std=None, n=1)) == "12.346"
    assert spread_text(Spread(mean=691674.0, std=0.0, n=3)) == "691,674 (3)"


# real runs


class Done(Listener):
    """Keeps what it hears of progress."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def progress(self, name: str, done: int, total: int) -> None:
        self.told.append((name, done, total))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    return folder


@pytest.fixture(scope="module")
def taken(root: Path) -> tuple[Study, Path, Findings]:
    """A study with a run that cannot work (no layer has this name), and what the command told of it."""
    grid = [
        {"decay": ["none", "frobenius"], "seed": [0, 1]},
        {"decay": {"broken": {"rank": ["*.no_such_layer=4"]}}, "seed": [0]},
    ]
    plot = {"x": "decay", "y": "loss"}
    file = write(root, grid=grid, about="A <b>small</b> study", table={"measures": ["loss", "entropy_rank"]}, plot=plot)
    done = program(file, "--output", root / "out", "--json", "--jobs", 2)
    assert done.returncode == 2, done.stderr
    assert "1 run refused what it was given" in done.stderr.splitlines()[-1]
    return read_study(file), root / "out", json.loads(done.stdout)


@pytest.mark.process
def test_a_failed_run_is_told_and_stops_no_other(taken: tuple[Study, Path, Findings]) -> None:
    study, out, told = taken
    assert (told["asked"], told["finished"]) == (5, 4)
    (failed,) = told["failed"]
    assert failed["name"] == "decay-broken_seed-0"
    assert "no_such_layer" in failed["error"]
    for run in study.runs[:4]:
        folder = out / "runs" / run.name
        assert {"recipe.yaml", "metrics.jsonl", "rank_report.json", "result.json"} <= {f.name for f in folder.iterdir()}
        assert not (folder / "model").exists()
    assert {f.name for f in out.iterdir()} == {
        ".lrsurgery.json",
        "study.yaml",
        "runs",
        "study.json",
        "table.md",
        "index.html",
        "plot.svg",
        "plot.png",
    }


@pytest.mark.process
def test_the_table_is_what_the_runs_measured(taken: tuple[Study, Path, Findings]) -> None:
    study, out, told = taken
    for row in told["table"]:
        decay = row["axes"]["decay"]
        losses, ranks = [], []
        for seed in (0, 1):
            text = (out / "runs" / f"decay-{decay}_seed-{seed}" / "metrics.jsonl").read_text()
            last = [json.loads(line) for line in text.splitlines() if '"eval"' in line][-1]
            losses.append(last["eval"]["loss"])
            ranks.append(statistics.mean(layer["entropy_rank"] for layer in last["layers"].values()))
        assert row["runs"] == 2
        assert row["measures"]["loss"] == pytest.approx(
            {"mean": statistics.mean(losses), "std": statistics.stdev(losses), "n": 2}
        )
        assert row["measures"]["entropy_rank"]["mean"] == pytest.approx(statistics.mean(ranks))
        assert losses[0] != losses[1]
    headers, body = cells(study, told)
    assert headers == ["decay", "loss", "entropy_rank"]
    page = (out / "index.html").read_text()
    for line in body:
        assert all(f"<td>{cell}</td>" in page for cell in line)
        assert f"| {' | '.join(line)} |" in (out / "table.md").read_text()
    assert "A &lt;b&gt;small" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


@pytest.mark.process
def test_going_on_repeats_no_finished_run(taken: tuple[Study, Path, Findings]) -> None:
    study, out, told = taken
    results = {run.name: out / "runs" / run.name / "result.json" for run in study.runs}
    before = {name: file.stat().st_mtime_ns for name, file in results.items()}
    with pytest.raises(StudyError, match="continue it with --resume"):
        run_study(study, out)
    done = Done()
    again = run_study(study, out, resume=True, listener=done)
    assert done.told == [("decay-broken_seed-0", 5, 5)]  # tried again, and failed again
    after = {name: file.stat().st_mtime_ns for name, file in results.items()}
    assert {name for name in before if before[name] != after[name]} == {"decay-broken_seed-0"}
    assert [result.to_dict() for result in again] == [json.loads(file.read_text()) for file in results.values()]
    assert findings_of(study, again, out)["table"] == told["table"]


@pytest.mark.process
def test_a_killed_study_goes_on_with_the_shard_that_is_left(root: Path, taken: tuple[Study, Path, Findings]) -> None:
    _, _, told = taken
    paths = {key: str(root / str(SETTINGS[key])) for key in ("model", "data", "eval_data")}
    file = write(root / "again", settings={**SETTINGS, **paths}, grid={"decay": ["none"], "seed": [0, 1]})
    out = root / "killed"
    process = subprocess.Popen(
        [*tiny.PROGRAM, "study", str(file), "--output", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = out / "runs" / "decay-none_seed-0"
    deadline = time.monotonic() + 120
    while not (first / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = out / "runs" / "decay-none_seed-1" / ".model.lock"
    while not (second.exists() and second.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = int(second.read_text().split()[1])
    os.kill(left, signal.SIGSTOP)
    process.kill()
    process.wait()
    refused = program(file, "--output", out, "--resume")  # not two at one run
    assert refused.returncode == 2, refused.stderr
    assert f"decay-none_seed-1/model: process {left} on " in refused.stderr
    os.kill(left, signal.SIGKILL)
    while alive(str(left)) and time.monotonic() < deadline:  # its memory takes a moment to be given back
        time.sleep(0.05)
    assert (first / "result.json").exists()
    kept = (first / "result.json").stat().st_mtime_ns
    whole = program(file, "--output", out, "--shard", "2/2", "--json")
    assert whole.returncode == 0, whole.stderr
    found = json.loads(whole.stdout)
    assert (found["finished"], (first / "result.json").stat().st_mtime_ns) == (2, kept)
    # the same runs as the other study's: a run does not depend on what was done around it
    mine = {run["name"]: run["measures"]["loss"] for run in found["runs"]}
    theirs = {run["name"]: run["measures"]["loss"] for run in told["runs"] if run["measures"]}
    assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=1e-6)  # threads differ


@pytest.mark.process
def test_a_process_that_nobody_waited_for_is_not_at_work() -> None:
    """A killed study's run is its parent's to bury; in a container that may be nobody."""
    assert alive(str(os.getpid()))
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(str(process.pid))
    process.wait()
    assert not alive(str(process.pid))


@pytest.mark.process
def test_an_interrupted_study_keeps_what_its_run_has_saved(root: Path) -> None:
    """With a model that the study reshapes, and Ctrl-C in the middle of a run."""
    settings = {key: str(root / str(SETTINGS[key])) for key in ("model", "data", "eval_data")}
    settings = {**SETTINGS, **settings, "config": {"n_embd": 16}, "save_steps": 2}
    settings |= {"steps": 4000, "eval_steps": 4000, "lr": 1e-3}  # a rate of its own would take 40 steps to find
    out = root / "stopped" / "out"
    command = [*tiny.PROGRAM, "study", str(write(out.parent, settings=settings, grid={"seed": [0]})), "--output", out]
    run = out / "runs" / "seed-0" / "model.run"

    def saved() -> int:
        """The last step that is saved whole."""
        marks = run.glob("*/checkpoint-*/complete")
        return max((int(mark.parent.name.rpartition("-")[2]) for mark in marks), default=0)

    def stopped_later(number: signal.Signals, *more: str) -> tuple[int, str]:
        """(exit code, what it said) of the study, stopped once it has saved more than before."""
        than, deadline = saved(), time.monotonic() + 120
        process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)
        while saved() <= than:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    code, said = stopped_later(signal.SIGINT)
    assert (code, said.count("\n")) == (130, 1)
    assert "0 of 1 runs are finished" in said
    assert "continue with the same command and --resume" in said
    stopped_later(signal.SIGTERM, "--resume")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))  # it continued, and did not start over


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"grid": {"seed": list(range(1001)), "steps": list(range(1, 1001))}},
            "grid: has 1,001,000 runs, over the 100,000 of a study",
        ),
        ({"settings": {"config": [1], "from_scratch": True}}, "config: write it as 'NAME: value' lines"),
        ({"plot": {"log": 5}}, "unknown scale of plot: log: '5'"),
        ({"prepare": [{"creates": "a", "run": []}]}, "prepare: each step is"),
        ({"grid": 5}, "grid: write it as 'NAME: value' lines"),
    ],
    ids=["size", "config", "scale", "command", "grid"],
)
def test_a_recipe_is_checked_before_its_first_run(body: dict[str, object], words: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    settings = {"model": "a", "data": "b", **body.pop("settings", {})}  # type: ignore[dict-item]
    file.write_text(json.dumps({"settings": settings, **body}))  # YAML too
    with pytest.raises(RecipeError, match=re.escape(words)):
        read_study(file)


@pytest.mark.parametrize("text", ["²/³", "1/0", "0/1", "x", "1/" + "9" * 5000, "-1/2"])
def test_a_shard_is_two_numbers(text: str) -> None:
    with pytest.raises(RecipeError, match="write I/N"):
        parse_shard(text)


def test_a_second_interrupt_says_what_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrsurgery.measure.study._run", twice)
    with pytest.raises(Interrupted, match=r"^interrupted; finished runs are kept; continue with --resume$"):
        run_study(read_study(write(root)), tmp_path / "out")
