"""A kind of layer is one entry: one for a class of this file alone goes through everything, with nothing else told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.checks import run
from timm.models import register_model, save_for_hf
from torch import Tensor, nn

import lrsurgery
from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.kinds.linear import LINEAR
from lrsurgery.surgery.kinds.table import KINDS, kind_of
from lrsurgery.surgery.layers import FactorisedLayer, Kind
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank


class Folded(nn.Module):
    """y = W x with W (out, in) stored as (in / 2, out, 2): a layout that no other kind has."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs // 2, outputs, 2, **options) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs, **options))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, unfold(self.weight), self.bias)


def unfold(weight: Tensor) -> Tensor:
    return weight.permute(1, 0, 2).flatten(1)


def fold(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrix.unflatten(1, (-1, 2)).permute(1, 0, 2)


def matches(module: nn.Module, conv: str) -> bool:
    return type(module) is Folded


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[1], shape[0] * shape[2]


def to_weights(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    return factors.u.contiguous(), factors.v.contiguous()


def build(dense: Any, rank: int) -> FactorisedLayer:
    rows, columns = matrix_shape(dense.weight.shape)
    meta: dict[str, Any] = {"device": "meta", "dtype": dense.weight.dtype}
    return FactorisedLayer(FOLDED, nn.Linear(columns, rank, bias=False, **meta), nn.Linear(rank, rows, **meta))


def build_dense(layer: FactorisedLayer) -> nn.Module:
    u, v = layer.factors
    return Folded(v.shape[1], u.shape[0], device="meta", dtype=u.dtype)


def fan_in(shape: torch.Size) -> int:
    return shape[0] * shape[2]


def sample_input(dense: Any, positions: int) -> tuple[int, ...]:
    return positions, matrix_shape(dense.weight.shape)[1]


FOLDED = Kind(
    name="folded",
    matches=matches,
    weight_axes=3,
    matrix_shape=matrix_shape,
    to_matrix=unfold,
    to_weight=fold,
    to_matrices=Factors,
    to_weights=to_weights,
    build=build,
    build_dense=build_dense,
    fan_in=fan_in,
    inputs=LINEAR.inputs,
    gradients=LINEAR.gradients,
    outputs=LINEAR.outputs,
    sample_input=sample_input,
)


class FoldedClassifier(nn.Module):
    """A model that timm can make: images of 3 x 8 x 8 in, classes out."""

    def __init__(self, num_classes: int = 3, **_: Any) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 96
        self.body = nn.Sequential(Folded(192, 48), nn.ReLU(), Folded(48, 96), nn.ReLU())
        self.fc = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x.flatten(1)))  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        return self.fc


@register_model
def folded_classifier(pretrained: bool = False, **options: Any) -> FoldedClassifier:
    model: Any = FoldedClassifier(options.get("num_classes", 3))
    model.pretrained_cfg = {
        "architecture": "folded_classifier",
        "input_size": (3, 8, 8),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": options.get("num_classes", 3),
    }
    model.default_cfg = model.pretrained_cfg
    return model  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    KINDS[FOLDED.name] = FOLDED
    yield
    del KINDS[FOLDED.name]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("folded_classifier"), tmp_path / "dense", safe_serialization=True)
    return tmp_path / "dense"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from support.tiny import write_images

    return write_images(tmp_path / "images", size=8)


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return found


def test_plan_and_calibration_in_memory() -> None:
    torch.manual_seed(0)
    model = FoldedClassifier()
    assert kind_of(model.body[0], "channel") is FOLDED
    plan = make_plan(model, SurgeryOptions(target=parse_rank(10)))
    assert [(row.name, row.kind, row.rows, row.columns) for row in plan.replacements] == [
        ("body.0", "folded", 48, 192),
        ("body.2", "folded", 96, 48),
    ]
    x = torch.randn(20, 3, 8, 8)
    moments = lrsurgery.collect_statistics(model, [x], importance="activations").moments("body.0")
    flat = x.flatten(1)
    torch.testing.assert_close(moments.inputs, flat.T @ flat / len(flat))


def test_from_checkpoint_to_checkpoint_and_back(dense: Path, images: Path, tmp_path: Path) -> None:
    wanted = logits(lrsurgery.load_model(dense))
    run("factorise", dense, "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = lrsurgery.load_model(tmp_path / "full")
    assert {layer.kind for layer in factorised_layers(full).values()} == {"folded"}
    torch.testing.assert_close(logits(full), wanted, atol=1e-5, rtol=1e-5)

    command = ("factorise", dense, "--budget", "0.5", "--calibration", images, "--samples", "16")
    told = run(*command, "--output", tmp_path / "half")
    layers = {row["name"]: row for row in told["layers"] if row["status"] == "factorised"}
    assert {row["kind"] for row in layers.values()} == {"folded"}
    half = lrsurgery.load_model(tmp_path / "half")
    for name, layer in factorised_layers(half).items():
        original = unfold(lrsurgery.load_model(dense).get_submodule(name).weight)  # type: ignore[arg-type]
        u, v = layer.factors
        error = float((original - u @ v).norm() / original.norm())
        assert layers[name]["relative_error"] == pytest.approx(error, rel=1e-4)
        assert layers[name]["rank"] == layer.rank

    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["quantization_config"]["layers"] == {
        name: {"kind": "folded", "rank": layer.rank, "form": "balanced"}
        for name, layer in factorised_layers(half).items()
    }
    compared = run("report", tmp_path / "half", "--against", dense)
    assert {row["name"]: row["rank"] for row in compared["layers"] if row["status"] == "factorised"} == {
        name: layer.rank for name, layer in factorised_layers(half).items()
    }

    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    back: Any = lrsurgery.load_model(tmp_path / "back")
    assert {type(module) for module in back.body} == {Folded, nn.ReLU}
    torch.testing.assert_close(logits(back), logits(half), atol=1e-5, rtol=1e-5)


def test_a_model_in_memory_is_saved_and_loaded(dense: Path, tmp_path: Path) -> None:
    model = lrsurgery.load_model(dense)
    lrsurgery.factorise_(model, rank=12)
    lrsurgery.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(lrsurgery.load_model(tmp_path / "saved")), logits(model))
    lrsurgery.densify_(model)
    assert not factorised_layers(model)
