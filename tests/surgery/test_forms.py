"""The two forms of a factorised layer: one matrix, fewer numbers, the same outputs, gradients and decay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lrsurgery
from lrsurgery.linalg.factors import balance_of
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.surgery.forms.change import balance_layers_, pivot_layers_
from lrsurgery.surgery.layers import FactorisedLayer, dense_weight


def _conv1d(outputs: int, inputs: int) -> nn.Module:
    return Conv1D(outputs, inputs)  # type: ignore[no-any-return]


# name -> (layer, shape of an input, side of its pivots)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "wide linear": (lambda: nn.Linear(20, 12), (3, 5, 20), "rows"),
    "tall linear": (lambda: nn.Linear(12, 20), (3, 5, 12), "columns"),
    "without bias": (lambda: nn.Linear(20, 12, bias=False), (20,), "rows"),
    "tall without bias": (lambda: nn.Linear(12, 20, bias=False), (7, 12), "columns"),
    "conv1d": (lambda: _conv1d(20, 12), (3, 5, 12), "columns"),
    "wide conv1d": (lambda: _conv1d(12, 20), (3, 5, 20), "rows"),
    "convolution": (lambda: nn.Conv2d(4, 20, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 4, 9, 11), "rows"),
    "convolution of one image": (lambda: nn.Conv2d(4, 20, 3, padding="same", bias=False), (4, 9, 9), "rows"),
    "1-d": (lambda: nn.Conv1d(4, 20, 3, 2, 1), (2, 4, 9), "rows"),
    "pointwise 1-d": (lambda: nn.Conv1d(12, 20, 1), (2, 12, 9), "columns"),
    "3-d": (lambda: nn.Conv3d(4, 20, (2, 3, 3), (2, 1, 1), (0, 1, 1)), (2, 4, 4, 5, 6), "rows"),
    "pointwise 3-d": (lambda: nn.Conv3d(12, 20, 1), (2, 12, 3, 4, 5), "columns"),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(20, 4, 6, 3, 1, 2), (2, 20, 5), "columns"),
    "transposed 2-d": (lambda: nn.ConvTranspose2d(20, 4, (3, 2), 2, (1, 0), bias=False), (2, 20, 4, 5), "columns"),
    "reflected": (lambda: nn.Conv2d(4, 20, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9), "rows"),
    "1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 5, 4), "columns"),
    "1x1 with stride": (lambda: nn.Conv2d(12, 20, 1, stride=2), (2, 12, 5, 4), "rows"),
    "1x1 with padding": (lambda: nn.Conv2d(12, 20, 1, padding=1), (2, 12, 5, 4), "rows"),
}
NAMES = list(LAYERS)


def both(
    name: str, rank: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[FactorisedLayer, FactorisedLayer, Tensor]:
    """The balanced layer, the pivoted one, an input."""
    torch.manual_seed(0)
    make, shape, _ = LAYERS[name]
    model = nn.Sequential(make()).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p)
    lrsurgery.factorise_(model, rank=7, conv="channel", allow_larger=True)
    pivoted = copy.deepcopy(model)
    pivot_layers_(pivoted)
    (first,), (second,) = (factorised_layers(each).values() for each in (model, pivoted))
    return first, second, torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_pivoted_layer_is_the_balanced_one_in_fewer_numbers(name: str) -> None:
    balanced, pivoted, x = both(name)
    assert (balanced.form, pivoted.form, pivoted.side) == ("balanced", "pivoted", LAYERS[name][2])
    rows, columns = balanced.matrix_shape
    assert pivoted.matrix_shape == (rows, columns)
    assert pivoted.rank == 7
    numbers = pivoted.u.weight.numel() + pivoted.v.weight.numel()
    assert numbers == 7 * (rows + columns - 7)
    torch.testing.assert_close(pivoted(x), balanced(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pivoted.weight + 0, balanced.weight + 0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_weight(pivoted), dense_weight(balanced), rtol=1e-9, atol=1e-9)
    assert pivoted.weight.shape == balanced.weight.shape
    if balanced.bias is None:
        assert pivoted.bias is None
    else:
        torch.testing.assert_close(pivoted.bias, balanced.bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_back_to_balanced_and_to_dense(name: str) -> None:
    balanced, pivoted, x = both(name)
    again = nn.Sequential(copy.deepcopy(pivoted))
    balance_layers_(again)
    (layer,) = factorised_layers(again).values()
    assert layer.form == "balanced"
    assert layer.order is None
    assert balance_of(layer.factors) < 1e-9
    torch.testing.assert_close(layer(x), balanced(x), rtol=1e-9, atol=1e-9)
    assert layer.state_dict().keys() == balanced.state_dict().keys()
    dense = nn.Sequential(copy.deepcopy(pivoted))
    lrsurgery.densify_(dense)
    assert not factorised_layers(dense)
    torch.testing.assert_close(dense(x), balanced(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dense_weight(name: str) -> None:
    """By autograd through the product, which is made of the same parts in another way."""
    _, pivoted, x = both(name)
    x.requires_grad_()
    upstream = torch.randn_like(pivoted(x))
    parts = list(pivoted.parameters())
    ours = torch.autograd.grad(pivoted(x), [x, *parts], upstream)
    weight, bias = pivoted.weight + 0, pivoted.bias
    if x.ndim > 2 and "conv" in pivoted.kind and pivoted.kind != "conv1d":
        dense: Any = LAYERS[name][0]().double()
        y = torch.func.functional_call(dense, {"weight": weight} | ({} if bias is None else {"bias": bias}), (x,))
    else:
        y = F.linear(x, weight.T if pivoted.kind == "conv1d" else weight, bias)
    theirs = torch.autograd.grad(y, [x, *parts], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("name", ["wide linear", "conv1d", "convolution", "1x1"])
def test_decay_is_of_the_whole_product(name: str, decoupled: bool) -> None:
    _, pivoted, _ = both(name)
    model = nn.ModuleList([pivoted, copy.deepcopy(pivoted)])  # two alike, which are batched
    weights = [pivoted.u.weight, pivoted.v.weight]
    wanted = torch.autograd.grad((pivoted.weight + 0).square().sum() / 2, weights)
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    FrobeniusDecay(model, 0.1, decoupled=decoupled).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer in factorised_layers(model).values():
        for part, was, gradient in zip((layer.u.weight, layer.v.weight), before, wanted, strict=True):
            torch.testing.assert_close(part, was - 0.5 * 0.1 * gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["wide linear", "tall linear", "convolution", "1x1"])
def test_state_dicts_autocast_and_checkpointing(name: str) -> None:
    balanced, pivoted, x = both(name, dtype=torch.float32)
    other = both(name, dtype=torch.float32)[1]
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(pivoted.state_dict())
    assert torch.equal(other(x), pivoted(x))
    assert pivoted.state_dict()["order"].dtype == torch.int32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pivoted(x).float(), balanced(x).float(), rtol=0.05, atol=0.3)
    pivoted(x).square().sum().backward()
    direct = [p.grad for p in pivoted.parameters()]
    for p in pivoted.parameters():
        p.grad = None
    checkpoint(pivoted, x, use_reentrant=False).square().sum().backward()
    for p, gradient in zip(pivoted.parameters(), direct, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_what_has_no_pivoted_form_stays_balanced() -> None:
    """Spatial convolutions, and layers at full rank, which would have nothing to mix."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 6))
    lrsurgery.factorise_(model, rank=["*=4", "2=6"], conv="spatial", allow_larger=True)
    pivot_layers_(model)
    assert {layer.form for layer in factorised_layers(model).values()} == {"balanced"}


def test_frozen_layers_and_modes_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(20, 12)).requires_grad_(False).eval()
    lrsurgery.factorise_(model, rank=4)
    pivot_layers_(model)
    (layer,) = factorised_layers(model).values()
    assert layer.form == "pivoted"
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.u.training
    assert not layer.v.training
