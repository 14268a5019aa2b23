"""The reach of models: every parameter counts once, and what is not within reach has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny, zoo
from torch import nn

import lrsurgery
from lrsurgery.report.dense.reach import VECTORS, reach_of
from lrsurgery.surgery.plan import SurgeryOptions, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_every_parameter_counts_once(name: str) -> None:
    model = zoo.build_transformers(name)
    found = reach_of(model)
    stored = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert found.parameters == sum(stored.values())
    assert sum(part.parameters for part in (*found.within, *found.rest)) == found.parameters
    assert 0.5 < found.share <= 1, found.rest


def test_what_is_within_reach_is_what_surgery_takes() -> None:
    torch.manual_seed(0)
    model: Any = zoo.build_transformers("gpt2")
    found = {part.what.partition(" ")[0]: part for part in reach_of(model).within}
    usual = [
        row
        for row in plan_rows(model, SurgeryOptions(target=RankSpec(FractionRank(0.5))))
        if row.reason is None or "break-even" in row.reason
    ]
    assert found["layers"].layers == len(usual)
    table = model.transformer.wte.weight.numel()
    assert found["tables"].parameters == table
    lrsurgery.factorise_(model, rank=0.5, embeddings=True, form="pivoted")
    assert len(lrsurgery.factorised_layers(model)) == found["layers"].layers + 2  # the table, and the head tied to it


def test_reasons_stand_beside_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 1), nn.LSTM(64, 64))
    found = reach_of(model)
    rest = {part.what: part.parameters for part in found.rest}
    assert rest["depthwise convolution"] == 32 * 9 + 32
    assert rest[VECTORS] == 64 + 64 + 2 * 4 * 64  # the norm, the bias of the second, those of the recurrent layer
    assert found.share == (64 * 32 + 2 * 256 * 64) / found.parameters


def test_the_command_reads_no_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_gpt2(tmp_path / "m")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    capsys.readouterr()
    assert tiny.run("report", folder, "--reach", "--json") == 0
    body = json.loads(capsys.readouterr().out)["models"][str(folder)]
    assert body["parameters"] == sum(p.numel() for p in model.parameters())
    assert tiny.run("report", folder, "--reach") == 0
    text = capsys.readouterr().out
    assert f"within reach: {body['share']:.1%}" in text
    assert "embedding of positions or types" in text


def test_a_factorised_folder_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_gpt2(tmp_path / "m")
    options = ["--rank", "params:0.5", "--no-loss-check", "--quiet"]
    assert tiny.run("factorise", folder, "--output", tmp_path / "low", *options) == 0
    assert tiny.run("report", tmp_path / "low", "--reach") == 2
    assert "is factorised; --reach looks at a dense model" in " ".join(capsys.readouterr().err.split())
