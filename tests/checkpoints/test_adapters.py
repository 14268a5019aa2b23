"""Names of what PEFT adapts, without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny
from torch import nn

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.hf import lora_targets
from lrsurgery.surgery.apply import specs_of


def test_a_shared_v_is_named_once(tmp_path: Path) -> None:
    source, low = tiny.save_alike(tmp_path / "dense"), tmp_path / "low"
    options = ["--budget", "0.5", "--calibration", source / "train.txt", "--importance", "fisher"]
    assert tiny.run("factorise", source, *options, "--output", low) == 0
    model = lrsurgery.load_model(low)
    name, leader = next((name, spec.v_of) for name, spec in specs_of(model).items() if spec.v_of is not None)
    assert lora_targets(model, [name]) == [f"{leader}.v", f"{name}.u"]
    assert set(lora_targets(model, [name, str(leader)])) == {f"{leader}.v", f"{name}.u", f"{leader}.u"}
    modules = dict(model.named_modules())
    every = lora_targets(model, "all-linear")
    assert len(every) == len(set(every))
    assert {name for name, m in modules.items() if isinstance(m, nn.Linear) and name != "lm_head"} == set(every)


def test_other_kinds() -> None:
    model = nn.Sequential(nn.Embedding(30, 12), nn.Conv1d(12, 12, 3), nn.LSTM(12, 12), nn.Linear(12, 12))
    lrsurgery.factorise_(model, rank=3, embeddings=True, allow_larger=True)
    assert lora_targets(model, ["0", "1"]) == ["0.u", "1.v", "1.u"]
    assert lora_targets(model, "all-linear") == ["3.v", "3.u"]
    with pytest.raises(SurgeryError, match=r"2\.weight_ih_l0: PEFT has no adapter for the parts of a"):
        lora_targets(model, ["weight_ih_l0"])


def test_unknown_names() -> None:
    model: Any = nn.Sequential(nn.Linear(12, 12))
    model.add_module("q_proj", nn.Linear(12, 12))
    with pytest.raises(SurgeryError, match="q_prof: no module of this Sequential has this name; similar: q_proj"):
        lora_targets(model, ["0", "q_prof"])
    with pytest.raises(SurgeryError, match="q_proj: write a list of names, or 'all-linear'"):
        lora_targets(model, "q_proj")


def test_a_formatted_layer_tells_of_it() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    lrsurgery.factorise_(model, rank=3)
    assert (
        f"{model[0]}"
        == f"{model[0]!r} (low rank; adapt its parts: target_modules=lrsurgery.hf.lora_targets(model, [...]))"
    )
    assert "lora_targets" not in f"{model}"
    assert "lora_targets" not in str(model[0])
