"""The learning rate range test: the curve against a loop by hand, what it leaves behind, and runs that use it."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import tiny
from support.warm import program

import lrsurgery
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.batches import Examples
from lrsurgery.data.examples import open_rows, prepare_subject, training_examples
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import RecipeError
from lrsurgery.progress import SILENT
from lrsurgery.training.finetune import finetune
from lrsurgery.training.loop.range_test import LEAST, SHARE, Curve, range_test, test_length
from lrsurgery.training.recipe import Recipe

# a process that kills itself after a step of the run
KILLED = """
import os, signal, sys
from lrsurgery.training.loop import callbacks
from lrsurgery.cli import app as cli
original, at = callbacks.RunCallback.on_step_end, int(sys.argv[1])
def rigged(self, args, state, control, **facts):
    if state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **facts)
callbacks.RunCallback.on_step_end = rigged
sys.argv = ["lrsurgery", *sys.argv[2:]]
cli.main()
"""

test_length.__test__ = False  # type: ignore[attr-defined]  # no test, by its name
STEPS = LEAST * SHARE  # of the shortest run with a range test


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    tiny.write_text(folder)
    for name, dropout in (("model", 0.1), ("calm", 0.0)):
        tiny.save_gpt2(folder / name, dropout=dropout)
        lrsurgery.factorise_checkpoint(folder / name, folder / f"{name}-half", rank=0.5)
    tiny.save_timm(folder / "timm")
    tiny.write_images(folder / "images")
    words = (folder / "train.txt").read_text().split()
    (folder / "few.txt").write_text(" ".join(words[:90]))
    return folder


def parts_of(recipe: Recipe) -> tuple[Subject, Examples]:
    source = resolve(str(recipe.model))
    task = "image-classification" if "timm" in str(recipe.model) else "causal-lm"
    rows = open_rows(str(recipe.data), task, recipe)
    subject = prepare_subject(source, recipe, rows)
    return subject, training_examples(subject, rows, recipe, seed=recipe.seed, augment=False)


def test_the_curve_is_that_of_a_loop_by_hand(bench: Path) -> None:
    """On data of a single batch: torch's own SGD and gradient clipping, the rates as the paper raises them."""
    given: dict[str, Any] = {"model": str(bench / "calm-half"), "data": str(bench / "few.txt"), "decay": "none"}
    given |= {
        "set": {"max_grad_norm": 0.1}
    }  # every gradient is longer, so that transformers' scale of the loss is none
    recipe = Recipe().merged({**given, "weight_decay": 0.0, "optimizer": "sgd", "block_size": 16, "device": "cpu"})
    subject, train = parts_of(recipe)
    batch = train.collate([train.dataset[i] for i in range(len(train.dataset))])
    found = range_test(subject, recipe.merged({"batch_size": len(train.dataset)}), train, None, 9)
    model = lrsurgery.load_model(bench / "calm-half").train()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    losses = [model(**batch).loss.item()]
    for rate in np.geomspace(1e-3, 10, 9):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(model(**batch).loss.item())
    assert len(found.losses) >= 6
    assert found.before == pytest.approx(losses[0], rel=1e-5)
    assert found.losses == pytest.approx(losses[1 : 1 + len(found.losses)], rel=1e-4)
    assert found.rates == pytest.approx(np.geomspace(1e-3, 10, 9)[: len(found.losses)])


@pytest.mark.parametrize("name", ["model-half", "timm"], ids=["dropout", "batch norm"])
def test_the_test_leaves_no_trace(bench: Path, name: str) -> None:
    data = "images" if name == "timm" else "train.txt"
    recipe = Recipe().merged({"model": str(bench / name), "data": str(bench / data), "batch_size": 4, "device": "cpu"})
    subject, train = parts_of(recipe)
    subject.model.train()
    torch.manual_seed(5)
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    curve = range_test(subject, recipe, train, None, 8)
    assert len(set(curve.losses)) == len(curve.losses)  # it did step
    assert [*map(id, subject.model.parameters()), *map(id, subject.model.buffers())] == [*map(id, tensors)]
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert all(module.training for module in subject.model.modules())


RATES = tuple(float(rate) for rate in np.geomspace(1e-4, 1e-1, 13))


@pytest.mark.parametrize("best", [4e-4, 2.2e-3, 3.1e-2])
def test_the_found_rate_is_a_fraction_of_the_best(best: float) -> None:
    """A parabola over the logarithm of the rate has its lowest point where it was put, between the rates as well."""
    losses = tuple(2 + 0.1 * math.log(rate / best) ** 2 for rate in RATES)
    assert Curve(9.0, RATES, losses).found == pytest.approx(best, rel=0.04)  # it has two digits


def test_curves_without_a_lowest_point() -> None:
    falling, rising = tuple(5 - 0.1 * i for i in range(13)), tuple(5 + 0.1 * i for i in range(13))
    assert Curve(5.0, RATES, falling).found == pytest.approx(RATES[-1], rel=0.03)
    assert Curve(5.0, RATES, rising).found == RATES[0]  # nothing helped
    wrecked = Curve(5.0, RATES[:4], (4.9, 4.8, 4.7, math.nan))
    assert wrecked.found == pytest.approx(RATES[2], rel=0.03)
    assert Curve(5.0, RATES[:2], (math.inf, math.nan)).found == RATES[0]


def test_the_test_costs_a_tenth() -> None:
    for total in (1, STEPS - 1, STEPS, 1000, 10**6):
        steps = test_length(total)
        assert steps * 4 / 3 <= total / 9
        assert (steps == 0) == (total < STEPS)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> None:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


def arguments(bench: Path, output: str, *more: object) -> list[str]:
    data = ["--data", bench / "train.txt", "--eval-data", bench / "valid.txt"]
    length = f"--steps {STEPS} --save-steps 20 --eval-steps {STEPS} --log-steps 24 --batch-size 4".split()
    return list(map(str, ["finetune", bench / "model-half", *data, *length, "--output", bench / output, *more]))


@pytest.fixture(scope="module")
def whole(bench: Path) -> Path:
    """A run with a range test that nothing interrupts."""
    done = program(*tiny.PROGRAM, *arguments(bench, "whole"))
    assert done.returncode == 0, done.stderr
    assert f"by a range test of {LEAST} steps" in done.stderr
    return bench / "whole"


def lr_of(output: Path) -> Any:
    return yaml.safe_load((output / "recipe.yaml").read_text())["lr"]


@pytest.mark.process
def test_a_run_is_that_of_the_rate_it_found(bench: Path, whole: Path) -> None:
    lr = lr_of(whole)
    assert isinstance(lr, float)
    assert lr != 1e-3
    done = program(*tiny.PROGRAM, *arguments(bench, "given", "--lr", lr))
    assert done.returncode == 0, done.stderr
    assert "range test" not in done.stderr
    same_weights(whole, bench / "given")
    assert records(bench / "given") == records(whole)
    report = json.loads((whole / "rank_report.json").read_text())
    assert any(f"the learning rate is {lr:g}, by a range test" in note for note in report["notes"])
    assert f"learning rate {lr:g}" in (whole / "README.md").read_text()


@pytest.mark.process
@pytest.mark.parametrize("more", [(), ("--lr", "auto")], ids=["", "asked again"])
def test_a_resumed_run_keeps_the_rate(bench: Path, whole: Path, more: tuple[str, ...]) -> None:
    output = f"stopped-{len(more)}"
    stopped = program(sys.executable, "-c", KILLED, 31, *arguments(bench, output))
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    resumed = program(*tiny.PROGRAM, "finetune", "--resume", "--output", bench / output, *more)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-20" in resumed.stderr
    assert resumed.stderr.count("range test") == 1  # the note of before, at the end
    same_weights(whole, bench / output)
    assert lr_of(bench / output) == lr_of(whole)


def test_a_run_without_its_rate_is_refused(bench: Path, tmp_path: Path) -> None:
    """A checkpoint whose run names no rate was edited: the weights are no longer those of a test."""
    run = tmp_path / "out.run"
    stopped = program(sys.executable, "-c", KILLED, 25, *arguments(bench, str(run)[:-4]))
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "found_lr": None}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "lr": "auto"}))
    with pytest.raises(RecipeError, match="names no learning rate that was found"):
        finetune({}, tmp_path / "out", resume=True, listener=SILENT)


def test_a_short_run_takes_the_usual_rate(bench: Path, tmp_path: Path) -> None:
    given = {"model": str(bench / "model-half"), "data": str(bench / "train.txt"), "steps": 3, "batch_size": 4}
    short = finetune(given, tmp_path / "short", listener=SILENT)
    assert "a run of 3 steps is too short for a range test" in " ".join(short.report.notes)
    finetune({**given, "lr": 1e-3}, tmp_path / "given", listener=SILENT)
    same_weights(tmp_path / "short", tmp_path / "given")


BOTH = """
import os, sys
from lrsurgery.training import finetune as training
found, file = training._Run._find_lr, sys.argv[1]
def told(self, parts):
    recipe = found(self, parts)
    rank = os.environ["RANK"]
    open(f"{file}-{rank}", "w").write(repr(recipe.lr))
    return recipe
training._Run._find_lr = told
from lrsurgery.cli import app as cli
sys.argv = ["lrsurgery", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.process
def test_two_processes_find_one_rate(bench: Path, tmp_path: Path) -> None:
    """Each has its own batches; the rate is that of one process with both, and of both processes to the last bit."""
    script = tmp_path / "both.py"
    script.write_text(BOTH)

    def command(output: str, batch: int) -> list[str]:
        words = arguments(bench, output, "--batch-size", batch)
        words[1] = str(bench / "calm-half")
        return words

    both = program(*tiny.TORCHRUN, script, tmp_path / "rate", *command("both", 2))
    assert both.returncode == 0, both.stderr
    rates = [float((tmp_path / f"rate-{rank}").read_text()) for rank in (0, 1)]
    assert rates[0] == rates[1] == lr_of(bench / "both")
    alone = program(*tiny.PROGRAM, *command("alone", 4))
    assert alone.returncode == 0, alone.stderr
    assert rates[0] == pytest.approx(lr_of(bench / "alone"), rel=0.2)  # measured on other batches
