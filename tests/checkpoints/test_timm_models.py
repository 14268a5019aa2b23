"""`lrsurgery.timm`: timm's options on factorised folders, against timm's own adaptation of the dense product."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import torch
from support.warm import program
from torch import Tensor, nn

import lrsurgery
import lrsurgery.timm
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import factorised_layers

MODELS = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_byobnet"]


def write(folder: Path, name: str, form: str = "pivoted", **options: Any) -> tuple[Path, Path]:
    """A factorised folder, and the dense one that holds its products."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=6).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    lrsurgery.factorise_(model, rank=0.5, **options)
    lrsurgery.save_model(model, folder / "low", form=form)
    dense = copy.deepcopy(model)
    lrsurgery.densify_(dense)
    lrsurgery.save_model(dense, folder / "dense")
    return folder / "low", folder / "dense"


def both(low: Path, dense: Path, **options: Any) -> tuple[Any, Any]:
    """Ours, and timm's of the dense folder."""
    torch.manual_seed(1)
    found = lrsurgery.timm.create_model(low, **options)
    torch.manual_seed(1)
    wanted = timm.create_model(f"local-dir:{dense}", pretrained=True, **options)
    assert found.training
    assert type(found) is type(wanted)
    return found.eval(), wanted.eval()


def outputs(model: Any, channels: int = 3, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found = model(torch.randn(2, channels, size, size, generator=generator))
    return found if isinstance(found, list) else [found]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


SIZE = {"test_vit": 160}


@pytest.mark.parametrize("name", MODELS)
def test_new_head(tmp_path: Path, name: str) -> None:
    low, dense = write(tmp_path, name)
    count = len(factorised_layers(lrsurgery.load_model(low)))
    for options in ({}, {"num_classes": 5}, {"num_classes": 0}):
        found, wanted = both(low, dense, **options)
        assert len(factorised_layers(found)) == count
        if options.get("num_classes") == 5:
            head = found.get_classifier()
            assert type(head) is nn.Linear
            assert head.out_features == 5
            wanted.get_classifier().load_state_dict(head.state_dict())
        close(outputs(found, size=SIZE.get(name, 64)), outputs(wanted, size=SIZE.get(name, 64)))
        assert found.pretrained_cfg == {**wanted.pretrained_cfg, "file": str(low)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(tmp_path: Path, name: str, channels: int) -> None:
    low, dense = write(tmp_path, name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, wanted = both(low, dense, in_chans=channels)
    close(outputs(found, channels, SIZE.get(name, 64)), outputs(wanted, channels, SIZE.get(name, 64)))
    before = factorised_layers(lrsurgery.load_model(low))
    lost = before.keys() - factorised_layers(found).keys()
    lines = [str(each.message) for each in told if "stays dense" in str(each.message)]
    assert len(lines) == len(lost) <= 1
    assert all(line.partition(":")[0] in lost for line in lines)
    if channels == 5:
        assert not lost


@pytest.mark.parametrize("name", MODELS)
def test_features(tmp_path: Path, name: str) -> None:
    low, dense = write(tmp_path, name)
    found, wanted = both(low, dense, features_only=True)
    kept = [key for key in wanted.state_dict() if key.endswith("weight")]
    assert 1 < len(factorised_layers(found)) <= len(kept)
    close(outputs(found, size=SIZE.get(name, 64)), outputs(wanted, size=SIZE.get(name, 64)))
    smaller = sum(p.numel() for p in found.parameters()) / sum(p.numel() for p in wanted.parameters())
    whole = [sum(p.numel() for p in lrsurgery.load_model(each).parameters()) for each in (low, dense)]
    assert smaller < 1.15 * whole[0] / whole[1]


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "fx", "getter"])
def test_every_kind_of_feature_extractor(tmp_path: Path, kind: str) -> None:
    low, dense = write(tmp_path, "test_efficientnet" if kind in ("hook", "getter") else "test_resnet")
    found, wanted = both(low, dense, features_only=True, feature_cls=kind, out_indices=(1, 2))
    assert len(factorised_layers(found)) > 5
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        answers = [model(x) for model in (found, wanted)]
    lists = [list(each.values()) if isinstance(each, dict) else list(each) for each in answers]
    close(*lists)


def test_another_image_size(tmp_path: Path) -> None:
    low, dense = write(tmp_path, "test_vit")
    found, wanted = both(low, dense, img_size=96, num_classes=0)
    close(outputs(found, size=96), outputs(wanted, size=96))
    assert len(factorised_layers(found)) == len(factorised_layers(lrsurgery.load_model(low)))


def test_weights_that_a_class_computes(tmp_path: Path) -> None:
    """A factorised layer of a standardised convolution holds what its class computed."""
    torch.manual_seed(0)
    model = timm.create_model("nf_resnet26", num_classes=6, depths=(1, 1), channels=(32, 48), stem_chs=16).eval()
    lrsurgery.factorise_(model, rank=0.5)
    lrsurgery.save_model(model, tmp_path / "low")
    loaded = lrsurgery.load_model(tmp_path / "low")
    assert any(layer.folded for layer in factorised_layers(loaded).values())
    stem: Any = lrsurgery.timm.create_model(tmp_path / "low", in_chans=5).stem.conv
    first = next(iter(factorised_layers(loaded).values()))
    adapted = first.weight[:, [0, 1, 2, 0, 1]] * 3 / 5  # as timm repeats channels
    torch.testing.assert_close(stem.weight + 0, adapted, rtol=1e-4, atol=1e-5)
    made = lrsurgery.timm.create_model(tmp_path / "low", num_classes=0).eval()
    assert {name for name, layer in factorised_layers(made).items() if layer.folded}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(made.forward_features(x), loaded.forward_features(x), rtol=1e-3, atol=1e-3)


def test_an_adapted_model_is_saved(tmp_path: Path) -> None:
    low, _ = write(tmp_path, "test_resnet")
    made = lrsurgery.timm.create_model(low, num_classes=4, in_chans=1).eval()
    lrsurgery.save_model(made, tmp_path / "again")
    close(outputs(lrsurgery.load_model(tmp_path / "again"), 1), outputs(made, 1))
    features = lrsurgery.timm.create_model(low, features_only=True).eval()
    lrsurgery.save_model(features, tmp_path / "features")
    other = timm.create_model("test_resnet", features_only=True).eval()
    lrsurgery.load_into_(other, tmp_path / "features")
    close(outputs(other), outputs(features))


def test_a_dense_folder_is_timms(tmp_path: Path) -> None:
    _, dense = write(tmp_path, "test_resnet")
    found = lrsurgery.timm.create_model(dense, num_classes=0).eval()
    wanted = timm.create_model(f"local-dir:{dense}", pretrained=True, num_classes=0).eval()
    assert torch.equal(*(outputs(each)[0] for each in (found, wanted)))


@pytest.mark.parametrize("where", ["folder", "file"])
def test_load_checkpoint(tmp_path: Path, where: str) -> None:
    low, dense = write(tmp_path, "test_resnet")
    path = low if where == "folder" else low / "model.safetensors"
    model = timm.create_model("test_resnet", num_classes=6).eval()
    lrsurgery.timm.load_checkpoint(model, str(path))
    close(outputs(model), outputs(lrsurgery.load_model(low)))
    model = timm.create_model("test_resnet", num_classes=6).eval()
    lrsurgery.timm.load_checkpoint(model, str(dense / "model.safetensors"))
    close(outputs(model), outputs(lrsurgery.load_model(dense)))
    with pytest.raises(SourceError, match="fc"):
        lrsurgery.timm.load_checkpoint(timm.create_model("test_resnet", num_classes=5), str(path))


def test_what_is_refused(tmp_path: Path) -> None:
    low, _ = write(tmp_path, "test_resnet")
    with pytest.raises(SourceError, match="takes no pretrained, since weights and config are the folder's"):
        lrsurgery.timm.create_model(low, pretrained=False)
    with pytest.raises(SourceError, match=r"timm cannot create this model .*nonsense"):
        lrsurgery.timm.create_model(low, nonsense=1)


SCRIPT = """
import argparse
from timm.models import create_model, load_checkpoint
import torch
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--checkpoint", default="")
given = parser.parse_args()
model = create_model(given.model, pretrained=given.pretrained, num_classes=None if given.pretrained else 6).eval()
if given.checkpoint:
    load_checkpoint(model, given.checkpoint, False)
print(sum(p.numel() for p in model.parameters()), float(model(torch.ones(1, 3, 64, 64)).double().sum()))
"""


@pytest.mark.process
def test_a_script_of_timms(tmp_path: Path) -> None:
    """As timm's validate.py loads its model."""
    low, _ = write(tmp_path, "test_resnet")
    (tmp_path / "validate.py").write_text(SCRIPT)
    loaded = lrsurgery.load_model(low)
    parameters = sum(p.numel() for p in loaded.parameters())
    wanted = float(loaded(torch.ones(1, 3, 64, 64)).double().sum())
    for arguments in (
        ["--model", f"local-dir:{low}", "--pretrained"],
        ["--model", "test_resnet", "--checkpoint", low / "model.safetensors"],
    ):
        done = program(sys.executable, "-m", "lrsurgery.timm", tmp_path / "validate.py", *arguments)
        assert done.returncode == 0, done.stderr
        count, total = done.stdout.split()
        assert int(count) == parameters
        assert abs(float(total) - wanted) < 1e-3


def test_timm_alone_says_one_line(tmp_path: Path) -> None:
    """As its scripts load: `validate.py --model local-dir:DIR --pretrained`, and with `--checkpoint`."""
    import lrsurgery.checkpoints.pretrained.refusal

    low, dense = write(tmp_path, "test_resnet")
    with pytest.raises(SourceError, match="has low-rank layers, which timm alone does not build; run its scripts"):
        timm.create_model(f"local-dir:{low}", pretrained=True)
    plain = timm.create_model(f"local-dir:{dense}", pretrained=True)
    for load in (timm.models.load_checkpoint, timm.models._helpers.load_checkpoint):
        with pytest.raises(SourceError, match=r"python -m lrsurgery\.timm SCRIPT"):
            load(plain, str(low / "model.safetensors"))
    timm.models.load_checkpoint(plain, str(dense / "model.safetensors"))
    assert factorised_layers(lrsurgery.timm.create_model(low))
