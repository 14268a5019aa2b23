"""Models with recurrent modules and nn.MultiheadAttention, from files and back: EnCodec, SigLIP, timm's Sequencer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file
from support.checks import assert_close, assert_same_layers, load, multiplied_out, run
from support.tiny import write_images
from torch import Tensor, nn

import lrsurgery
import lrsurgery.hf
from lrsurgery.surgery.apply import factorised_layers

SMALL: dict[str, Any] = {
    "layers": [1, 2],
    "patch_sizes": [4, 2],
    "embed_dims": [24, 32],
    "hidden_sizes": [12, 16],
    "mlp_ratios": [3, 3],
    "num_classes": 3,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def encodec(folder: Path) -> Any:
    config = tf.EncodecConfig(
        num_filters=8, hidden_size=32, upsampling_ratios=[4, 2], num_lstm_layers=2, codebook_size=16, codebook_dim=32
    )
    tf.EncodecModel(config).save_pretrained(folder)
    return tf.EncodecModel


def siglip(folder: Path) -> Any:
    tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)).save_pretrained(folder)
    return tf.SiglipVisionModel


def sequencer(folder: Path) -> Any:
    from timm.models import save_for_hf

    model = timm.create_model("sequencer2d_s", **SMALL)
    save_for_hf(model, folder, safe_serialization=True, model_args=SMALL)
    return None


MODELS = {"encodec": encodec, "siglip": siglip, "sequencer": sequencer}


def save(name: str, folder: Path) -> Any:
    """The class with which plain transformers loads the folder; None for a timm model."""
    torch.manual_seed(0)
    return MODELS[name](folder)


def outputs(model: nn.Module) -> Tensor:
    anything: Any = model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if isinstance(model, tf.EncodecModel):
            return anything.decoder(anything.encoder(torch.randn(1, 1, 640, generator=generator)))  # type: ignore[no-any-return]
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        found = anything(pixels)
        return found if isinstance(found, Tensor) else found.pooler_output  # type: ignore[no-any-return]


SECOND = """
import sys, torch
import lrsurgery.hf, transformers as tf
torch.save(getattr(tf, sys.argv[2]).from_pretrained(sys.argv[1]).state_dict(), sys.argv[3])
"""


@pytest.mark.parametrize(
    ("name", "form"),
    [("encodec", "pivoted"), ("siglip", "pivoted"), ("sequencer", "balanced")],
)
def test_from_files_and_back(name: str, form: str, tmp_path: Path) -> None:
    cls = save(name, tmp_path / "dense")
    dense = lrsurgery.load_model(tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = lrsurgery.load_model(tmp_path / "full")
    assert_same_layers(full, dense)
    assert_close(outputs(full), outputs(dense), 1e-4)

    how = ["--rank", 0.5, "--form", form, "--check"]
    report = run("factorise", tmp_path / "dense", *how, "--output", tmp_path / "low")
    low = lrsurgery.load_model(tmp_path / "low")
    assert report["totals"]["parameters_after"] == sum(p.numel() for p in low.parameters())
    assert report["totals"]["parameters_before"] == sum(p.numel() for p in dense.parameters())
    rows = {row["name"]: row for row in report["layers"]}
    stored = load_file(tmp_path / "low" / "model.safetensors")
    layers = {k: x for k, x in factorised_layers(low).items() if x.kind in ("recurrent", "in-proj")}
    own = ("weight_ih", "weight_hh", "in_proj_weight")
    weights = {key for key, _ in dense.named_parameters() if key.rpartition(".")[2].startswith(own)}
    assert layers.keys() == weights, "every such weight is factorised"
    for key, layer in layers.items():
        weight = dense.get_parameter(key)
        assert (layer.form, rows[key]["form"]) == (form, form)
        assert rows[key]["flops_after"] == rows[key]["flops_before"]
        wanted = multiplied_out(stored, key, *weight.shape)
        torch.testing.assert_close(layer.weight.detach().double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
    in_memory = lrsurgery.load_model(tmp_path / "dense")
    lrsurgery.factorise_(in_memory, rank=0.5, form=form)
    assert_close(outputs(low), outputs(in_memory), 1e-5)

    lrsurgery.save_model(in_memory, tmp_path / "saved", form=form)
    assert torch.equal(outputs(lrsurgery.load_model(tmp_path / "saved")), outputs(in_memory))
    other = "pivoted" if form == "balanced" else "balanced"
    run("export", tmp_path / "low", "--form", other, "--output", tmp_path / "other")
    assert_close(outputs(lrsurgery.load_model(tmp_path / "other")), outputs(low), 1e-4)
    run("export", tmp_path / "low", "--to", "dense", "--output", tmp_path / "back")
    if cls is None:
        back = lrsurgery.load_model(tmp_path / "back")
    else:
        back = load(cls, tmp_path / "back")
        subprocess.run(
            [sys.executable, "-c", SECOND, str(tmp_path / "low"), cls.__name__, str(tmp_path / "state")], check=True
        )
        found = torch.load(tmp_path / "state")
        assert found.keys() == low.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in low.state_dict().items())
        again = load(cls, tmp_path / "low")
        assert torch.equal(outputs(again), outputs(low))
        again.save_pretrained(tmp_path / "again")  # type: ignore[operator]
        assert torch.equal(outputs(load(cls, tmp_path / "again")), outputs(low))
    assert not factorised_layers(back)
    assert_close(outputs(back), outputs(low), 1e-4)


def test_a_load_without_this_package_fails(tmp_path: Path) -> None:
    save("encodec", tmp_path / "dense")
    include = ["--include", "*.lstm.*"]
    run("factorise", tmp_path / "dense", "--rank", 0.5, *include, "--output", tmp_path / "low")
    plain = "import sys, transformers as tf; tf.EncodecModel.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", plain, str(tmp_path / "low")]
    off = {**os.environ, "LRSURGERY_AUTOLOAD": "0"}
    found = subprocess.run(command, env=off, check=False, capture_output=True, text=True)
    assert found.returncode != 0
    assert "ignore_mismatched_sizes" in found.stderr


def test_reach(tmp_path: Path) -> None:
    save("encodec", tmp_path / "dense")
    reach = run("report", tmp_path / "dense", "--reach")["models"][str(tmp_path / "dense")]
    assert reach["share"] > 0.95


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save("sequencer", tmp_path / "dense")
    folder: Path = write_images(tmp_path / "images", size=32)
    return folder


def test_calibrated_budgets_and_healing(images: Path, tmp_path: Path) -> None:
    dense, where = tmp_path / "dense", ["--device", "cpu"]
    how = ["--calibration", images, "--samples", 12, *where]
    report = run("factorise", dense, "--budget", 0.5, *how, "--output", tmp_path / "low")
    rows = [row for row in report["layers"] if row["kind"] == "recurrent"]
    assert len(rows) == 3 * 2 * 4
    low = {row["name"]: row for row in rows if row["status"] == "factorised"}
    assert low
    assert all(row["predicted_loss"] is not None and row["predicted_loss"] >= 0 for row in low.values())
    statistics = json.loads((tmp_path / "low" / "rank_report.json").read_text())
    assert statistics["totals"]["parameters_after"] < 0.6 * statistics["totals"]["parameters_before"]
    run("finetune", tmp_path / "low", "--data", images, "--output", tmp_path / "healed", "--steps", 3, *where)
    before, after = (lrsurgery.load_model(tmp_path / each) for each in ("low", "healed"))
    assert factorised_layers(before).keys() == factorised_layers(after).keys()
    changed = [
        not torch.equal(layer.weight.detach(), factorised_layers(before)[key].weight.detach())
        for key, layer in factorised_layers(after).items()
        if layer.kind == "recurrent"
    ]
    assert changed
    assert all(changed)


def test_dense_steps_first(images: Path, tmp_path: Path) -> None:
    how = ["--steps", 4, "--dense-steps", 2, "--rank", 0.5, "--decay", "frobenius", "--device", "cpu"]
    run("finetune", tmp_path / "dense", "--data", images, "--output", tmp_path / "out", *how)
    kinds = {layer.kind for layer in factorised_layers(lrsurgery.load_model(tmp_path / "out")).values()}
    assert "recurrent" in kinds
