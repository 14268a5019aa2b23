"""Layers that compute their dense weight from stored tensors, against the formulas of their papers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

import lrsurgery
from lrsurgery.errors import OutputError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept


def hooked(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer, dim=dim)  # type: ignore[no-any-return]


# name -> (layer, shape of an input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "standardised": (lambda: StdConv2d(6, 10, 3, stride=2, bias=True, eps=1e-3), (2, 6, 9, 8)),
    "standardised, same": (lambda: StdConv2dSame(6, 10, 3), (2, 6, 9, 8)),
    "standardised, same 1x1": (lambda: StdConv2dSame(12, 10, 1, stride=2), (2, 12, 9, 8)),
    "standardised, BiT": (lambda: WeightStandardizedConv2d(6, 10, 3, padding=None, eps=1e-3), (2, 6, 9, 8)),
    "scaled": (lambda: ScaledStdConv2d(6, 10, 3, gamma=1.7, eps=1e-3), (2, 6, 9, 8)),
    "scaled, same": (lambda: ScaledStdConv2dSame(6, 10, 3, gamma=1.7, bias=False), (2, 6, 9, 8)),
    "normed linear": (lambda: weight_norm(nn.Linear(12, 10)), (3, 12)),
    "normed by inputs": (lambda: weight_norm(nn.Linear(12, 10), dim=1), (3, 12)),
    "normed as a whole": (lambda: weight_norm(nn.Linear(12, 10), dim=None), (3, 12)),  # type: ignore[arg-type]
    "normed by places": (lambda: weight_norm(nn.Conv1d(6, 10, 4, padding=2), dim=2), (2, 6, 9)),
    "normed 3-d": (lambda: weight_norm(nn.Conv3d(3, 10, 2)), (2, 3, 4, 5, 6)),
    "hooked": (lambda: hooked(nn.Conv1d(6, 10, 4, stride=2)), (2, 6, 9)),
    "hooked by places": (lambda: hooked(nn.Conv2d(6, 10, (3, 2), padding="same"), 2), (2, 6, 9, 8)),
}
STORES = [name for name in LAYERS if "ormed" in name or "hooked" in name]


def make(name: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = nn.Sequential(build()).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        model(x)  # else the older weight norm holds a weight that cannot be copied
    return model.eval(), x


def truth(layer: Any) -> Tensor:
    """The dense weight, by the words of the papers."""
    held = {name.rpartition(".")[2]: p.detach() for name, p in layer.named_parameters()}
    if "weight" in held:
        w = held["weight"].flatten(1)
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, unbiased=False, keepdim=True) + layer.eps).sqrt()
        if "gain" in held:
            w = w * held["gain"].flatten(1) * 1.7 / w.shape[1] ** 0.5
        return w.reshape(held["weight"].shape)
    g, v = (held["original0"], held["original1"]) if "original0" in held else (held["weight_g"], held["weight_v"])
    kept = [axis for axis in range(v.ndim) if g.ndim == v.ndim and g.shape[axis] > 1]
    return g * v / v.square().sum([axis for axis in range(v.ndim) if axis not in kept], keepdim=True).sqrt()


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_that_is_applied_is_factorised(name: str, form: str) -> None:
    """At full rank the layer itself; below it the best of its weight, by Eckart and Young."""
    model, x = make(name)
    weight = truth(model[0])
    with torch.no_grad():
        wanted = model(x)
    full, low = copy.deepcopy(model), copy.deepcopy(model)
    lrsurgery.factorise_(full, rank=1.0, conv="channel", allow_larger=True)
    torch.testing.assert_close(full(x), wanted, rtol=1e-9, atol=1e-9)
    lrsurgery.factorise_(low, rank=4, conv="channel", form=form, allow_larger=True)
    (layer,) = factorised_layers(low).values()
    assert (layer.kind, layer.form, layer.rank) == (layer.kind, form, 4)
    left_out = torch.linalg.svdvals(weight.flatten(1))[4:].norm()
    torch.testing.assert_close((layer.weight - weight).norm().detach(), left_out, rtol=1e-6, atol=1e-9)
    names = {key.rpartition(".")[2] for key in low.state_dict()}
    assert names <= {"weight", "bias", "order"}  # the parts are gone
    lrsurgery.rank_report(low, against=model)
    (row,) = lrsurgery.rank_report(low, against=model).rows
    assert row.relative_error == pytest.approx(float(left_out / weight.norm()), rel=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_counts_match_the_model_after_surgery(name: str) -> None:
    model, _ = make(name)
    (row,) = make_plan(model, SurgeryOptions(target=parse_rank(3), conv="channel", allow_larger=True)).replacements
    assert row.parameters == sum(p.numel() for p in model.parameters())
    lrsurgery.factorise_(model, rank=3, conv="channel", allow_larger=True)
    assert row.factorised_parameters == sum(p.numel() for p in model.parameters())


def test_a_converted_dtype_is_that_of_the_parts() -> None:
    """The older weight norm keeps the weight of its last call, in the dtype of then."""
    model, x = make("hooked")
    model(x)
    model = model.float()
    wanted = truth(model[0])
    lrsurgery.factorise_(model, rank=1.0, allow_larger=True)
    (layer,) = factorised_layers(model).values()
    assert layer.u.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight + 0, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_the_plain_layer(name: str) -> None:
    model, x = make(name)
    model, x = model.float(), x.float()
    with torch.no_grad():
        model(x)
    plain = copy.deepcopy(model)
    lrsurgery.factorise_(plain, rank=1.0, conv="channel", allow_larger=True)
    lrsurgery.densify_(plain)
    assert type(plain[0]) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def loss(outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return outputs.square().sum() / 2, len(outputs)

    found, wanted = (lrsurgery.collect_statistics(m, [x], conv="channel", loss=loss) for m in (model, plain))
    for each in ("inputs", "gradients"):
        one, other = (getattr(statistics.moments("0"), each) for statistics in (found, wanted))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    lrsurgery.factorise_(model, rank=4, conv="channel", statistics=found, allow_larger=True)
    lrsurgery.factorise_(plain, rank=4, conv="channel", statistics=wanted, allow_larger=True)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-2, atol=1e-2)


def test_a_budget_takes_them() -> None:
    model = nn.Sequential(*(make(name)[0] for name in LAYERS))
    before = sum(p.numel() for p in model.parameters())
    lrsurgery.factorise_(model, budget=0.6, conv="channel", form="pivoted")
    assert factorised_layers(model)
    assert sum(p.numel() for p in model.parameters()) <= 0.61 * before


def test_padding_by_the_size_of_the_input_stays_dense() -> None:
    model = nn.Sequential(StdConv2dSame(6, 10, 3, stride=2), ScaledStdConv2dSame(10, 10, 2, stride=2), nn.Linear(9, 9))
    found = make_plan(model, SurgeryOptions(target=parse_rank(2)))
    assert {row.name: row.reason for row in found.rows if isinstance(row, Kept)} == {
        "0": "StdConv2dSame that pads by the size of its input",
        "1": "ScaledStdConv2dSame that pads by the size of its input",
    }


def test_a_layer_made_dense_is_not_saved_for_a_class_that_would_compute_another_weight(tmp_path: Path) -> None:
    import timm

    small = {"depths": (1,), "channels": (32,), "stem_chs": 16, "num_classes": 5}
    model = timm.create_model("nf_resnet26", **small)
    lrsurgery.factorise_(model, rank=0.3)
    lrsurgery.save_model(model, tmp_path / "factorised")
    lrsurgery.densify_(model)
    with pytest.raises(OutputError, match="ScaledStdConv2d"):
        lrsurgery.save_model(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
