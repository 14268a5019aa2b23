"""Healing, measuring and timing models whose layers share one v."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers, specs_of
from lrsurgery.training.forms import to_publish_, to_train_
from lrsurgery.training.loop.dynamics import steepest_decay


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharing")
    source = tiny.save_alike(folder / "dense")
    how = lrsurgery.Calibration(data=str(source / "train.txt"), samples=16)
    for form in ("balanced", "pivoted"):
        lrsurgery.factorise_checkpoint(source, folder / form, budget=0.4, calibration=how, form=form, loss_check=False)
    return folder


def led(model: Any) -> dict[str, str | None]:
    return {name: spec.v_of for name, spec in specs_of(model).items() if spec.v_of is not None}


def test_groups_train_balanced_and_are_pivoted_again(root: Path) -> None:
    model: Any = lrsurgery.load_model(root / "pivoted")
    ids = torch.arange(2, 34).reshape(2, 16)
    before, wanted = specs_of(model), model(ids).logits
    assert led(model)
    sides = to_train_(model, "balanced")
    assert {layer.form for layer in factorised_layers(model).values()} == {"balanced"}
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    to_publish_(model, sides)
    after = specs_of(model)
    assert [spec._replace(pivots=None) for spec in after.values()] == [s._replace(pivots=None) for s in before.values()]
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_the_steepest_decay_is_that_of_the_stacked_product(root: Path, form: str) -> None:
    model = lrsurgery.load_model(root / form)
    layers = factorised_layers(model)
    found = 0.0
    for layer in layers.values():
        alike = [other for other in layers.values() if other.v is layer.v]
        stacked = torch.cat([other.factors.u for other in alike])
        found = max(found, *(float(torch.linalg.svdvals(f)[0]) ** 2 for f in (stacked, layer.factors.v)))
    assert steepest_decay(model)[1] == pytest.approx(found, rel=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_finetune_heals_and_keeps_the_groups(root: Path, form: str) -> None:
    asked = {"model": str(root / form), "data": str(root / "dense" / "train.txt"), "block_size": 16, "batch_size": 2}
    asked |= {"eval_data": str(root / "dense" / "valid.txt"), "steps": 6, "save_steps": 3, "decay": "frobenius"}  # type: ignore[dict-item]
    for name in ("healed", "again"):
        outcome = lrsurgery.finetune(asked, root / f"{form}-{name}", keep_checkpoints=True)
        assert outcome.report.factorised
    healed: Any = lrsurgery.load_model(root / f"{form}-healed")
    start: Any = lrsurgery.load_model(root / form)
    assert led(healed) == led(start)
    assert {layer.form for layer in factorised_layers(healed).values()} == {form}
    ids = torch.arange(2, 34).reshape(2, 16)
    assert not torch.allclose(healed(ids).logits, start(ids).logits, atol=1e-3)
    again: Any = lrsurgery.load_model(root / f"{form}-again")
    torch.testing.assert_close(again(ids).logits, healed(ids).logits)
    report = lrsurgery.rank_report(healed)
    written = json.loads((root / f"{form}-healed" / "rank_report.json").read_text())
    assert (
        written["totals"]["parameters_after"] == report.parameters_after == sum(p.numel() for p in healed.parameters())
    )


@pytest.mark.process
def test_evaluate_bench_and_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = root / "dense" / "valid.txt"
    assert tiny.run("evaluate", root / "pivoted", "--data", data, "--block-size", 16, "--quiet") == 0
    options = ["--batch", 1, "--length", 8, "--seconds", 0.2, "--layers"]
    assert tiny.run("bench", root / "pivoted", *options, "--quiet") == 0
    capsys.readouterr()
    assert tiny.run("report", root / "pivoted", "--format", "markdown") == 0
    text = capsys.readouterr().out
    assert "| v of |" in text
    assert "q\\_proj |" in text
