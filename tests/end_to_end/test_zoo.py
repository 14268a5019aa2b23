"""Every promised architecture: factorised by the CLI, loaded by its own library, compared with the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support import zoo
from support.checks import assert_close, assert_same_layers, load, run
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lrsurgery.checkpoints.pretrained.refusal  # as where the package is installed
import lrsurgery.checkpoints.quantizer.method
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import factorised_layers, specs_of

pytestmark = pytest.mark.process  # no processes, but minutes

EVERYTHING = ("--include-embeddings", "--include-heads")  # other tests leave these out


def assert_tripwire(monkeypatch: pytest.MonkeyPatch, cls: Any, folder: Path) -> None:
    """As in a process that never imported lrsurgery.hf."""
    with monkeypatch.context() as patch:
        patch.delitem(AUTO_QUANTIZER_MAPPING, "lrsurgery")
        patch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lrsurgery")
        with pytest.raises(RuntimeError, match="mismatch"):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_transformers_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo.TRANSFORMERS[name]
    cls = getattr(transformers, case.cls)
    zoo.save_transformers(name, tmp_path / "dense")
    dense = load(cls, tmp_path / "dense")
    wanted = zoo.outputs(dense, case.inputs)

    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", *EVERYTHING, "--output", tmp_path / "full")
    full = load(cls, tmp_path / "full")
    assert_same_layers(full, dense)
    assert_close(zoo.outputs(full, case.inputs), wanted, 1e-3)

    report = run("factorise", tmp_path / "dense", "--rank", "0.5", *EVERYTHING, "--output", tmp_path / "half")
    half = load(cls, tmp_path / "half")
    told = {name for name, spec in specs_of(half).items() if spec.tied_to is None}
    assert told == {r["name"] for r in report["layers"] if r["status"] == "factorised"}
    found = zoo.outputs(half, case.inputs)
    in_memory = load(cls, tmp_path / "dense")
    lrsurgery.factorise_(in_memory, rank="0.5", form="pivoted", embeddings=True, heads=True)
    assert_close(found, zoo.outputs(in_memory, case.inputs), 1e-5)  # a head of two rows rounds as it lies in memory
    assert report["totals"]["parameters_after"] == half.num_parameters() <= dense.num_parameters()
    assert report["totals"]["parameters_before"] == dense.num_parameters()
    assert_tripwire(monkeypatch, cls, tmp_path / "half")

    for saved, model in {"again": half, "memory": in_memory}.items():
        model.save_pretrained(tmp_path / saved)
        again = load(cls, tmp_path / saved)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert_close(zoo.outputs(again, case.inputs), zoo.outputs(model, case.inputs), 1e-5)
        assert_tripwire(monkeypatch, cls, tmp_path / saved)

    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    with monkeypatch.context() as patch:
        patch.delitem(AUTO_QUANTIZER_MAPPING, "lrsurgery")
        back = load(cls, tmp_path / "back")
    assert not factorised_layers(back)
    assert_close(zoo.outputs(back, case.inputs), found, 1e-4)
    with (
        safe_open(tmp_path / "dense/model.safetensors", "pt") as before,
        safe_open(tmp_path / "back/model.safetensors", "pt") as after,
    ):
        # fused experts are written as the model has them
        fused = any(layer.layout.stacked for layer in factorised_layers(half).values())
        assert fused or set(before.keys()) == set(after.keys())


# of these only the patches' convolution could be split by its axes, as that of vit_tiny_patch16_224 is
PATCHES = ("deit_tiny_patch16_224", "mixer_s16_224", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize(
    ("name", "conv"), [(n, c) for n in zoo.TIMM for c in ("channel", "spatial") if c == "channel" or n not in PATCHES]
)
def test_timm_model(name: str, conv: str, tmp_path: Path) -> None:
    import timm

    zoo.save_timm(name, tmp_path / "dense")
    pixels = zoo.images(name)
    dense = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()

    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            out = model(pixels)
        return out.logits if hasattr(out, "logits") else out  # type: ignore[no-any-return]

    common = ("--conv", conv, "--include-heads", "--output")
    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", *common, tmp_path / "full")
    full = lrsurgery.load_model(tmp_path / "full")
    assert_same_layers(full, dense)
    assert_close(logits(full), logits(dense), 1e-3)

    report = run("factorise", tmp_path / "dense", "--rank", "0.5", *common, tmp_path / "half")
    half = lrsurgery.load_model(tmp_path / "half")
    assert type(half) is type(dense)
    in_memory = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    lrsurgery.factorise_(in_memory, rank="0.5", conv=conv, form="pivoted", heads=True)
    assert torch.equal(logits(half), logits(in_memory))
    count = sum(p.numel() for p in half.parameters())
    assert report["totals"]["parameters_after"] == count <= sum(p.numel() for p in dense.parameters())
    with pytest.raises(SourceError, match="timm alone does not build"):
        timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)

    wrapper = load(transformers.AutoModelForImageClassification, tmp_path / "half")
    # same weights to the bit; the convolution's rounding hangs on where in memory they lie
    unwrapped = {key.removeprefix("timm_model."): value for key, value in wrapper.state_dict().items()}
    assert unwrapped.keys() == half.state_dict().keys()
    assert all(torch.equal(unwrapped[key], value) for key, value in half.state_dict().items())
    assert_close(logits(wrapper), logits(half), 1e-4)
    wrapper.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(lrsurgery.load_model(tmp_path / "again")), logits(half))

    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert not factorised_layers(back)
    assert_close(logits(back), logits(half), 1e-4)
    assert_close(logits(load(transformers.AutoModelForImageClassification, tmp_path / "back")), logits(back), 1e-4)
