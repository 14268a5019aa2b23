"""Models whose layers compute their weights from others, from files and back: timm's NF-ResNets, BiT, Wav2Vec2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from support.checks import assert_close, load, run
from support.tiny import write_images
from torch import Tensor, nn
from typer.testing import CliRunner

import lrsurgery
import lrsurgery.hf
from lrsurgery.cli.app import app
from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.apply import factorised_layers

SMALL = {"depths": (1, 1), "channels": (32, 48), "stem_chs": 16, "num_classes": 5}


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("nf_resnet26", **SMALL)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            nn.init.uniform_(parameter, 0.5, 2.0)
    more = {"model_args": {**SMALL, "depths": [1, 1], "channels": [32, 48]}}
    save_for_hf(model, tmp_path / "dense", safe_serialization=True, model_args=more["model_args"])
    return tmp_path / "dense"


def logits(model: nn.Module) -> Tensor:
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Any = model.eval()(x)
    return found.logits if hasattr(found, "logits") else found  # type: ignore[no-any-return]


def layers_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["layers"] if row["status"] == "factorised"}


def test_scaled_convolutions_from_files(scaled: Path, tmp_path: Path) -> None:
    dense = lrsurgery.load_model(scaled)
    run("factorise", scaled, "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = lrsurgery.load_model(tmp_path / "full")
    assert_close(logits(full), logits(dense), 1e-4)
    assert not any("gain" in name for layer in factorised_layers(full).values() for name, _ in layer.named_parameters())

    report = run("factorise", scaled, "--rank", "0.4", "--check", "--output", tmp_path / "low")
    low = lrsurgery.load_model(tmp_path / "low")
    assert report["totals"]["parameters_after"] == sum(p.numel() for p in low.parameters())
    assert report["totals"]["parameters_before"] == sum(p.numel() for p in dense.parameters())
    in_memory = lrsurgery.load_model(scaled)
    lrsurgery.factorise_(in_memory, rank="0.4", form="pivoted")
    assert torch.equal(logits(low), logits(in_memory))
    for name, layer in factorised_layers(low).items():
        row = layers_of(report)[name]
        weight = layer.layout.to_matrix(true_weight(dense.get_submodule(name)))
        left_out = torch.linalg.svdvals(weight)[layer.rank :].norm() / weight.norm()
        assert row["relative_error"] == pytest.approx(float(left_out), rel=1e-3, abs=1e-5)
    wrapper = load(tf.AutoModelForImageClassification, tmp_path / "low")
    assert_close(logits(wrapper), logits(low), 1e-4)

    compared = layers_of(run("report", tmp_path / "low", "--against", scaled))
    for name, row in layers_of(report).items():
        assert compared[name]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-3, abs=1e-5)
    assert not any("not the model" in note for note in run("report", tmp_path / "low", "--against", scaled)["notes"])


def true_weight(module: Any) -> Tensor:
    w = module.weight.detach().flatten(1)
    w = (w - w.mean(1, keepdim=True)) / (w.var(1, unbiased=False, keepdim=True) + module.eps).sqrt()
    found: Tensor = (w * module.gain.detach().flatten(1) * module.scale).reshape(module.weight.shape)
    return found


def test_a_budget_with_calibration(scaled: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", size=32)
    told = run(
        *("factorise", scaled, "--budget", "0.5", "--calibration", images, "--samples", "16"),
        *("--output", tmp_path / "half"),
    )
    assert layers_of(told)
    assert told["calibration"]["metric"] == "fisher"
    half = lrsurgery.load_model(tmp_path / "half")
    assert told["totals"]["parameters_after"] == sum(p.numel() for p in half.parameters())


def test_layers_that_their_spectrum_leaves_dense_keep_their_parts(scaled: Path, tmp_path: Path) -> None:
    report = run("factorise", scaled, "--rank", "energy:0.999", "--output", tmp_path / "low")
    kept = [row["name"] for row in report["layers"] if row["status"] == "dense" and row["kind"].startswith("conv2d")]
    assert kept
    assert layers_of(report)
    low, dense = lrsurgery.load_model(tmp_path / "low"), lrsurgery.load_model(scaled)
    for name in kept:
        one, other = low.get_submodule(name).state_dict(), dense.get_submodule(name).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_standardised_weights_cannot_be_exported(scaled: Path, tmp_path: Path) -> None:
    run("factorise", scaled, "--rank", "0.4", "--output", tmp_path / "low")
    arguments = ["export", str(tmp_path / "low"), "--to", "dense", "--output", str(tmp_path / "back")]
    with pytest.raises(SurgeryError, match="a ScaledStdConv2d standardises its weight"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "back").exists()


def test_a_standardised_transformers_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.BitConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, num_labels=5)
    tf.BitForImageClassification(config).save_pretrained(tmp_path / "dense")
    dense = load(tf.BitForImageClassification, tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = load(tf.BitForImageClassification, tmp_path / "full")
    assert any("conv2d" in layer.kind for layer in factorised_layers(full).values())
    assert_close(logits(full), logits(dense), 1e-3)
    assert_close(logits(lrsurgery.load_model(tmp_path / "full")), logits(full), 1e-6)


@pytest.mark.parametrize("loaded", [False, True], ids=["factorised in memory", "loaded"])
def test_a_model_made_dense_is_not_saved_wrong(loaded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.BitConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, num_labels=5)
    model = tf.BitForImageClassification(config)
    lrsurgery.factorise_(model, rank=0.4)
    if loaded:
        model.save_pretrained(tmp_path / "low")
        model = load(tf.BitForImageClassification, tmp_path / "low")
    wanted = logits(model)
    lrsurgery.densify_(model)
    assert_close(logits(model), wanted, 1e-4)
    lrsurgery.factorise_(model, rank=0.3)
    model.save_pretrained(tmp_path / "lower")
    assert torch.equal(logits(load(tf.BitForImageClassification, tmp_path / "lower")), logits(model))
    lrsurgery.densify_(model)
    with pytest.raises(SurgeryError, match="was made dense, and the WeightStandardizedConv2d that loads it"):
        model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SurgeryError, match="was made dense"):
        lrsurgery.save_model(model, tmp_path / "dense too")
    assert not (tmp_path / "dense too").exists()


AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 24),
    "conv_stride": (4, 3),
    "conv_kernel": (8, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 1,
    "num_labels": 4,
    "classifier_proj_size": 16,
    "feat_extract_norm": "layer",
    "apply_spec_augment": False,
}


def heard(model: nn.Module) -> Tensor:
    x = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model.eval()(x).logits
    return found


@pytest.mark.parametrize("older", [False, True], ids=["today's names", "names of older torch"])
def test_weight_norm_from_files(older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**AUDIO)).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    state = load_file(file)
    names = {f"{name}.weight_g": "0", f"{name}.weight_v": "1"}
    kept = {f"{name}.parametrizations.weight.original{number}": old for old, number in names.items()}
    state = {
        kept.get(key, key) if older else {v: k for k, v in kept.items()}.get(key, key): t for key, t in state.items()
    }
    save_file(state, file, {"format": "pt"})
    cls = tf.Wav2Vec2ForSequenceClassification
    dense = load(cls, tmp_path / "dense")

    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = load(cls, tmp_path / "full")
    layer = factorised_layers(full)[name]
    assert layer.kind == "conv1d-channel"
    weight = dense.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
    assert (layer.weight - weight).norm() <= 1e-5 * weight.norm()
    assert_close(heard(full), heard(dense), 1e-3)

    report = run("factorise", tmp_path / "dense", "--rank", "0.4", "--check", "--output", tmp_path / "low")
    low = load(cls, tmp_path / "low")
    assert report["totals"]["parameters_after"] == sum(p.numel() for p in low.parameters())
    in_memory = load(cls, tmp_path / "dense")
    lrsurgery.factorise_(in_memory, rank="0.4", form="pivoted")
    assert torch.equal(heard(low), heard(in_memory))
    in_memory.save_pretrained(tmp_path / "saved")
    assert torch.equal(heard(load(cls, tmp_path / "saved")), heard(low))

    run("export", tmp_path / "low", "--to", "dense", "--output", tmp_path / "back")
    back = load(cls, tmp_path / "back")
    assert not factorised_layers(back)
    assert back.state_dict().keys() == dense.state_dict().keys()
    assert_close(heard(back), heard(low), 1e-4)
