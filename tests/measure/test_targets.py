"""Targets and curves against `evaluate` of written folders, and of what `factorise --budget` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from support import checks, tiny

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.factorise import calibrate
from lrsurgery.measure.targets import choose, curve, goals, search, trials
from lrsurgery.measure.targets.goals import Goal, SizeLimit, parse_goal
from lrsurgery.report.schema import Report
from lrsurgery.report.targets.schema import Point
from lrsurgery.surgery import speed


def train_language_model(folder: Path, text: Path, steps: int = 100) -> None:
    """Until its loss on the text is about 2 nats, of 5.8 at the start."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.tensor(tf.AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    batch = ids[: len(ids) // tiny.BLOCK * tiny.BLOCK].view(-1, tiny.BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained language model of two blocks, a classifier of images, and their data."""
    folder = tmp_path_factory.mktemp("targets")
    train, valid = tiny.write_text(folder)
    # of the text that it is trained on, since on other text a model this small is no better than word counts
    valid.write_text("\n\n".join(tiny.documents()[:2]))
    (folder / "test.txt").write_text("\n\n".join(tiny.documents()[2:4]))
    train_language_model(tiny.save_gpt2(folder / "gpt2", dropout=0.0), train)
    tiny.save_timm(folder / "timm-fresh")
    tiny.write_images(folder / "images", size=32)
    words = ("--dense", "--data", folder / "images", "--steps", "12", "--lr", "0.003", "--output", folder / "timm")
    assert tiny.run("finetune", folder / "timm-fresh", *words, "--quiet") == 0
    return folder


@pytest.fixture(autouse=True, scope="module")
def coarse_grid() -> Iterator[None]:
    """Fewer points: the grid's step is 0.01."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (search, choose, curve):
            patch.setattr(module, "STEPS", 100)
        yield


def chosen(folder: Path) -> Mapping[str, Any]:
    choice = Report.read(folder).choice
    assert choice is not None
    return choice


def words_for(shop: Path) -> tuple[object, ...]:
    return ("--calibration", shop / "train.txt", "--samples", "16", "--eval-data", shop / "valid.txt", "--quiet")


# the model that is found


@pytest.fixture(scope="module")
def found(shop: Path) -> Path:
    """Within 10% of the dense loss; its statistics are in `statistics`."""
    words = ("--save-statistics", shop / "statistics", "--test-data", shop / "test.txt", "--output", shop / "found")
    assert tiny.run("factorise", shop / "gpt2", "--max-loss", "10%", *words_for(shop), *words) == 0
    return shop / "found"


def test_the_model_found_meets_the_target_and_the_next_smaller_does_not(shop: Path, found: Path) -> None:
    dense = lrsurgery.evaluate(shop / "gpt2", shop / "valid.txt").values["loss"]
    loss = lrsurgery.evaluate(found, shop / "valid.txt").values["loss"]
    choice = chosen(found)
    assert choice["bound"] == pytest.approx(1.1 * dense, rel=1e-6)
    assert choice["values"]["loss"] == loss <= 1.1 * dense
    size = sum(p.numel() for p in lrsurgery.load_model(found).parameters())
    smaller = [point for point in choice["points"] if point["parameters"] < size]
    assert smaller
    assert max(smaller, key=lambda point: point["parameters"])["values"]["loss"] > 1.1 * dense
    place = round(float(choice["budget"]) * search.STEPS)
    assert search.budget_at(place - 1) in {point["budget"] for point in choice["points"]}  # down to the grid's step


def test_files_are_those_of_the_budget_found(shop: Path, found: Path, tmp_path: Path) -> None:
    words = ("--budget", chosen(found)["budget"], "--statistics", shop / "statistics", "--output", tmp_path / "again")
    assert tiny.run("factorise", shop / "gpt2", *words, "--quiet") == 0
    for name in ("model.safetensors", "config.json"):
        assert (found / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_data_that_chose_is_named_and_other_data_measures_afresh(shop: Path, found: Path) -> None:
    choice = chosen(found)
    afresh = {"dense": shop / "gpt2", "factorised": found}
    assert choice["test"] == {
        name: lrsurgery.evaluate(model, shop / "test.txt").values for name, model in afresh.items()
    }
    card = (found / "README.md").read_text()
    for name in ("valid.txt", "test.txt", "times 1.1"):
        assert name in card
    assert str(shop) not in "".join(choice["lines"])  # a card is public


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_copy_in_memory_computes_what_is_written(shop: Path, tmp_path: Path, dtype: str | None) -> None:
    """In a narrow dtype too: factors, what stays dense and running statistics are rounded."""
    words = () if dtype is None else ("--dtype", dtype)
    form = ("--form", "pivoted")
    data = ("--eval-data", shop / "images", "--eval-split", "train", "--quiet")
    target = ("--min-accuracy", "-20%", *data, "--output", tmp_path / "out")
    assert tiny.run("factorise", shop / "timm", *target, *words, *form) == 0
    choice = chosen(tmp_path / "out")
    point = next(point for point in choice["points"] if point["budget"] == choice["budget"])
    assert point["values"]["loss"] == pytest.approx(choice["values"]["loss"], rel=1e-5)
    assert choice["values"]["top1"] >= choice["dense"]["top1"] - 0.2
    written = sum(file["bytes"] for file in _tensors(tmp_path / "out"))
    assert point["bytes"] == written


def _tensors(folder: Path) -> list[dict[str, int]]:
    from safetensors.torch import load_file

    return [{"bytes": t.numel() * t.element_size()} for t in load_file(folder / "model.safetensors").values()]


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("size", [170_000, 190_000])
def test_files_are_no_larger_than_the_size_asked_for(shop: Path, tmp_path: Path, size: int, form: str) -> None:
    words = ("--max-size", size, "--statistics", shop / "statistics", "--form", form, "--output", tmp_path / "out")
    assert (shop / "statistics").is_dir() or tiny.run(
        "factorise", shop / "gpt2", "--budget", "0.5", *words_for(shop)[:4], "--save-statistics", shop / "statistics",
        "--output", tmp_path / "first", "--quiet",
    ) == 0  # fmt: skip
    assert tiny.run("factorise", shop / "gpt2", *words, "--quiet") == 0
    took = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size - 12_000 < took <= size  # not much is given away either
    assert chosen(tmp_path / "out")["target"] == f"--max-size {size // 1000}KB"


@pytest.mark.process
def test_a_speedup_is_that_of_bench(shop: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a copy are made up, the faster the smaller; the written model is timed by bench itself."""
    real, speeds = trials.Trials.time, []

    def time(self: trials.Trials, model: torch.nn.Module, timing: trials.Timing) -> Any:
        found = real(self, model, trials.Timing(precision=0.5, seconds=0.1))
        share = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in self.subject.model.parameters())
        speeds.append(1 / share)
        return trials.Timings(found.seconds, found.rounds, True, 1 / share, (1 / share, 1 / share))

    # layers of any real size are as fast as they have parameters; these are too small for that
    monkeypatch.setattr(speed, "measure_speedup", lambda dense, spec, *_: dense.weight.numel() / (spec.rank * 100))
    monkeypatch.setattr(speed, "measure_seconds", lambda dense, *_: 1e-9 * dense.weight.numel())
    monkeypatch.setenv("LRSURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trials.Trials, "time", time)
    monkeypatch.setattr(choose, "BenchOptions", partial(choose.BenchOptions, seconds=0.5))
    words = ("--speedup", "1.3", "--statistics", shop / "statistics", "--output", tmp_path / "out", "--quiet")
    assert tiny.run("factorise", shop / "gpt2", *words) == 0
    choice = chosen(tmp_path / "out")
    taken = max((point for point in choice["points"] if point["speedup"] >= 1.3), key=lambda point: point["share"])
    assert taken["budget"] == choice["budget"]
    assert choice["budget"].startswith("time:")
    assert min(point["speedup"] for point in choice["points"] if point["share"] > taken["share"]) < 1.3
    assert choice["values"]["at least"] <= choice["values"]["speedup"] <= choice["values"]["at most"]


def test_healed_points_are_what_finetune_gives(shop: Path, tmp_path: Path) -> None:
    heal = ("--heal", "5", "--output", tmp_path / "out")
    assert tiny.run("factorise", shop / "gpt2", "--max-loss", "8%", *words_for(shop), *heal) == 0
    choice = chosen(tmp_path / "out")
    point = next(point for point in choice["points"] if point["budget"] == choice["budget"])
    command = choice["next"].split()
    assert command[0] == "lrsurgery"
    assert tiny.run(*command[1:], "--quiet") == 0
    healed = lrsurgery.evaluate(tmp_path / "out-healed", shop / "valid.txt").values["loss"]
    assert point["values"]["loss"] == pytest.approx(healed, rel=1e-4)
    assert healed <= choice["bound"]
    unhealed = lrsurgery.evaluate(tmp_path / "out", shop / "valid.txt").values["loss"]
    assert point["unhealed"]["loss"] == pytest.approx(unhealed, rel=1e-5)
    assert choice["values"]["loss"] == unhealed
    card = (tmp_path / "out" / "README.md").read_text()
    assert choice["next"].replace(f"{tmp_path}/", "") in card.replace("\\", "")  # Markdown escapes some letters


# interruptions


def test_an_interrupted_search_goes_on_with_its_statistics_and_points(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("factorise", shop / "gpt2", "--max-loss", "10%", *words_for(shop), "--output", tmp_path / "out")
    real, budgets = trials.Trials.measure, list[str]()

    def measure(self: trials.Trials, budget: str, *args: Any) -> Point:
        if len(budgets) == 3:
            raise KeyboardInterrupt
        budgets.append(budget)
        return real(self, budget, *args)

    monkeypatch.setattr(trials.Trials, "measure", measure)
    assert tiny.run(*words) == 130
    assert "the statistics and the measured points are kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    again = list[str]()
    monkeypatch.setattr(
        trials.Trials, "measure", lambda self, budget, *args: (again.append(budget), real(self, budget, *args))[1]
    )
    monkeypatch.setattr(calibrate, "collect", lambda *_, **__: pytest.fail("the statistics are collected again"))
    assert tiny.run(*words, "--resume") == 0
    assert again
    assert not {*budgets} & {*again}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {point["budget"] for point in chosen(tmp_path / "out")["points"]} == {*budgets, *again}


def test_another_target_does_not_go_on_with_the_points_of_one(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> Point:
        raise KeyboardInterrupt

    words = ("factorise", shop / "gpt2", *words_for(shop), "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(trials.Trials, "measure", stop)
        assert tiny.run(*words, "--max-loss", "10%") == 130
    assert tiny.run(*words, "--max-loss", "20%", "--resume") == 2
    assert "the interrupted job had another target" in capsys.readouterr().err


def test_a_written_model_that_misses_the_target_is_not_published(
    shop: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next best is written then: rounding may separate a copy in memory from its file."""
    real, seen = choose.evaluate, list[str]()

    def evaluate(model: str, *args: Any, **options: Any) -> Any:
        found = real(model, *args, **options)
        seen.append(model)
        if len(seen) == 1:
            found.values["loss"] = 99.0
        return found

    monkeypatch.setattr(choose, "evaluate", evaluate)
    words = ("--max-loss", "10%", "--statistics", shop / "statistics", "--eval-data", shop / "valid.txt", "--quiet")
    assert tiny.run("factorise", shop / "gpt2", *words, "--output", tmp_path / "out") == 0
    choice = chosen(tmp_path / "out")
    budgets = sorted(float(p["budget"]) for p in choice["points"] if p["values"]["loss"] <= choice["bound"])
    assert float(choice["budget"]) == budgets[1]
    assert len(seen) == 2


# bad input


LINES = {
    "two targets": (["--max-loss", "2%", "--max-size", "1MB"], "--max-loss and --max-size are given together"),
    "a rank too": (["--max-loss", "2%", "--rank", "0.5"], "--rank and --max-loss are given together"),
    "a budget too": (["--speedup", "1.5", "--budget", "0.5"], "--budget and --speedup are given together"),
    "no data": (["--max-loss", "2%"], "--max-loss needs data to measure on; add --eval-data DATA"),
    "an odd loss": (["--max-loss", "two"], "--max-loss 'two' is not readable; write 2%"),
    "a negative loss": (["--max-loss", "-1%"], "--max-loss '-1%' is not readable"),
    "an accuracy in percent": (["--min-accuracy", "90"], "--min-accuracy '90' is not readable; write 0.90, 90%"),
    "no speedup": (["--speedup", "0.9"], "--speedup '0.9' is not readable; write a number above 1"),
    "no size": (["--max-size", "0"], "--max-size '0' is not readable; write a size such as 200MB"),
    "a size of headers": (["--max-size", "60KB"], "the files' headers alone take"),
    "a size that no rank gives": (["--max-size", "90KB"], "the smallest that can be met is bytes:"),
    "data alone": (["--rank", "0.5", "--eval-data", "{valid}"], "--eval-data: for a target; add one of --max-loss"),
    "a test alone": (["--max-size", "1MB", "--test-data", "{valid}"], "add --eval-data DATA"),
    "a dry run": (["--max-loss", "2%", "--eval-data", "{valid}", "--dry-run"], "--dry-run measures nothing"),
    "a scope": (["--max-loss", "2%", "--eval-data", "{valid}", "--budget-of", "model"], "--budget-of belongs to"),
    "healing of a size": (["--max-size", "1MB", "--eval-data", "{valid}", "--heal", "5"], "--heal trains on"),
    "missed by dense": (["--max-loss", "0.5", "--eval-data", "{valid}"], "the dense model misses it itself"),
    "from scratch": (["--max-loss", "2%", "--eval-data", "{valid}", "--from-scratch"], "leaves no pretrained weights"),
    "another split": (["--max-size", "1MB", "--eval-split", "test"], "--eval-split test: of no data"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_bad_input_is_one_line_and_nothing_is_written(
    shop: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, line = LINES[case]
    given_words = [str(shop / "valid.txt") if word == "{valid}" else word for word in words]
    calibration = () if case == "from scratch" else ("--importance", "none")
    code = tiny.run("factorise", shop / "gpt2", *given_words, *calibration, "--output", tmp_path / "out", "--quiet")
    told = capsys.readouterr().err
    assert code == 2
    assert line in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_target_out_of_reach_names_the_nearest_figure(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--max-loss", "900%", "--importance", "none", "--eval-data", shop / "valid.txt", "--quiet")
    assert tiny.run("factorise", shop / "gpt2", *words, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err
    budget = told.partition("--budget ")[2].partition(";")[0]
    words = ("--budget", budget, "--importance", "none", "--output", tmp_path / "it", "--quiet")
    assert tiny.run("factorise", shop / "gpt2", *words) == 0
    loss = lrsurgery.evaluate(tmp_path / "it", shop / "valid.txt").values["loss"]
    assert f"loss {loss:.4f} at --budget {budget}" in told


def test_a_head_without_classes_has_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=1, problem_type="regression")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "label": 0.1 * len(t)}) + "\n" for t in "abcd"))
    words = ("--min-accuracy", "0.9", "--eval-data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--quiet")
    assert tiny.run("factorise", model, *words) == 2
    assert "there is no top-1 of this model" in capsys.readouterr().err


def test_data_that_is_used_twice_is_named(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(shop / "train.txt", tmp_path / "copy.txt")
    words = ("--calibration", shop / "train.txt", "--samples", "4", "--eval-data", shop / "train.txt")
    more = ("--test-data", shop / "train.txt", "--max-loss", "20%", "--output", tmp_path / "out")
    assert tiny.run("factorise", shop / "gpt2", *words, *more) == 0
    told = capsys.readouterr().err
    assert "train.txt: both --calibration and --eval-data" in told
    assert "train.txt: has been used already, so --test-data measures nothing afresh" in told


def test_readings_are_told_apart() -> None:
    dense = {"loss": 3.0, "top1": 0.8}
    assert parse_goal(max_loss="3.2") == Goal(option="--max-loss", text="3.2", amount=3.2)
    cases = {"2%": 3.06, "3.2": 3.2, "0%": 3.0}
    for text, bound in cases.items():
        goal = parse_goal(max_loss=text)
        assert isinstance(goal, Goal)
        assert goal.bound(dense) == pytest.approx(bound)
    for text, bound in {"0.75": 0.75, "75%": 0.75, "-1%": 0.79}.items():
        goal = parse_goal(min_accuracy=text)
        assert isinstance(goal, Goal)
        assert goal.bound(dense) == pytest.approx(bound)
        assert goal.meets({"top1": bound + 1e-9}, dense)
        assert not goal.meets({"top1": bound - 1e-3}, dense)
        assert not goal.meets({}, dense)  # of a wreck, whose figures are not finite
    assert parse_goal(max_size="1MiB") == SizeLimit(2**20)
    assert parse_goal() is None


# the search by itself


@given(
    losses=st.lists(st.floats(0.5, 9), min_size=30, max_size=30),
    bound=st.floats(1, 8),
    lowest=st.integers(1, 98),
)
def test_the_best_of_the_measured_points_is_taken(losses: list[float], bound: float, lowest: int) -> None:
    """Of any course of losses, which real ones are not: what is returned meets the bound, and is the smallest such."""
    goal = Goal(option=goals.LOSS, text="x", amount=bound)
    seen: dict[int, float] = {}

    def measure(place: int) -> Point:
        seen[place] = losses[place % len(losses)]
        return Point(budget=str(place), layers=1, parameters=place, share=0.5, bytes=1, values={"loss": seen[place]})

    run = search.Search(goal, {"loss": 0.4}, measure, lowest).run
    try:
        found = run()
    except SurgeryError:
        found = []
    if not found:
        assert seen.get(lowest, bound + 1) <= bound or all(loss > bound for loss in seen.values())
        return
    assert found[0]["parameters"] == min(place for place, loss in seen.items() if loss <= bound)
    assert len(seen) <= 9


def test_a_goal_that_no_point_meets_names_the_nearest() -> None:
    def measure(place: int) -> Point | None:
        values = {"loss": 3 + 1 / place}
        return Point(budget=f"0.{place}", layers=1, parameters=place, share=0.5, bytes=1, values=values)

    goal = Goal(option=goals.LOSS, text="0%", amount=0.0, relative=True)
    with pytest.raises(SurgeryError, match=r"no budget meets it.*the nearest measured is loss 3.0101 at --budget 0.99"):
        search.Search(goal, {"loss": 3.0}, measure, 5).run()
    fast = Goal(option=goals.SPEEDUP, text="9", amount=9.0)
    with pytest.raises(SurgeryError, match=r"no budget meets it.*; write a lower one"):
        search.Search(fast, {}, measure, 5).run()


# curves


@pytest.fixture(scope="module")
def report(shop: Path) -> Report:
    words = ("--calibration", shop / "train.txt", "--samples", "16", "--eval-data", shop / "valid.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "SHORT", trials.Timing(precision=0.5, seconds=0.1))
        return Report.from_dict(checks.run("report", shop / "gpt2", *words))


def test_the_points_of_a_curve_are_evaluations_of_written_folders(shop: Path, report: Report, tmp_path: Path) -> None:
    assert report.curve is not None
    *points, dense = report.curve["points"]
    assert len(points) == 9
    assert dense["values"] == lrsurgery.evaluate(shop / "gpt2", shop / "valid.txt").values
    for point in points[::4]:
        budget = point["budget"]
        words = ("--budget", budget, "--calibration", shop / "train.txt", "--samples", "16", "--quiet")
        assert tiny.run("factorise", shop / "gpt2", *words, "--output", tmp_path / str(budget)) == 0
        found = lrsurgery.evaluate(tmp_path / str(budget), shop / "valid.txt")
        assert point["values"] == pytest.approx(found.values, rel=1e-4)
        assert point["parameters"] == found.parameters
        assert point["interval"] is not None
    assert [point["parameters"] for point in points] == sorted(point["parameters"] for point in points)


def test_the_knee_is_the_point_farthest_below_the_chord(report: Report) -> None:
    """By the distance of points from a line in the plane, after both axes are scaled."""
    assert report.curve is not None
    points = report.curve["points"]
    xs = torch.tensor([float(point["parameters"]) for point in points], dtype=torch.float64)
    ys = torch.tensor([point["values"]["loss"] for point in points], dtype=torch.float64)
    x, y = ((v - v.min()) / (v.max() - v.min()) for v in (xs, ys))
    ends = torch.stack([x, y], -1)[[0, -1]]
    along = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
    across = torch.stack([along[1], -along[0]])
    signed = (torch.stack([x, y], -1) - ends[0]) @ across
    assert along[0] > 0
    assert report.curve["knee"] == int(signed.argmax())


def test_a_line_or_a_hump_has_no_knee() -> None:
    def points(losses: list[float]) -> list[Point]:
        return [
            Point(budget="x", layers=1, parameters=i + 1, share=1, bytes=1, values={"loss": loss})
            for i, loss in enumerate(losses)
        ]

    assert curve.knee_of(points([4, 3, 2, 1])) is None
    assert curve.knee_of(points([4, 3.9, 3.5, 1])) is None
    assert curve.knee_of(points([9, 2, 1.5, 1])) == 1
    assert curve.knee_of(points([4, 1])) is None


def test_a_curve_is_of_one_dense_model(shop: Path, found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--eval-data", shop / "valid.txt", "--quiet")
    assert tiny.run("report", found, *data) == 2
    assert "is factorised already; targets and curves are for a dense model" in capsys.readouterr().err
    assert tiny.run("report", shop / "gpt2", "--calibration", shop / "train.txt", "--quiet") == 2
    assert "--calibration: about a measured curve; add --eval-data DATA" in capsys.readouterr().err
