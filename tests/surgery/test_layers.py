"""Factorised layers against the dense layer they replace, at full rank and below."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers, replace_module_
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.layers import FactorisedConv2d, FactorisedLayer, FactorisedLinear

GEOMETRIES = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d}
    for k, s, p, d in itertools.product(
        [(3, 3), (1, 5), (4, 2), (1, 1)], [(1, 1), (2, 1), (2, 3)], [(0, 0), (1, 2), "same"], [(1, 1), (2, 1)]
    )
    if not (p == "same" and s != (1, 1))
]


OTHER_DIMENSIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    *(
        (nn.Conv1d, (13,), {"kernel_size": k, "stride": s, "padding": p, "dilation": d})
        for k, s, p, d in itertools.product([1, 4, 5], [1, 3], [0, 2, "same"], [1, 2])
        if not (p == "same" and s > 1)
    ),
    *(
        (nn.Conv3d, (6, 7, 9), {"kernel_size": k, "stride": s, "padding": p, "dilation": d})
        for k, s, p, d in itertools.product(
            [(2, 3, 3), (1, 1, 1)], [(1, 1, 1), (2, 1, 3)], [(0, 0, 0), (1, 0, 2), "same"], [(1, 1, 1), (1, 2, 1)]
        )
        if not (p == "same" and s != (1, 1, 1))
    ),
    *(
        (conv, size, {"kernel_size": 3, "padding": 2, "padding_mode": mode})
        for conv, size in ((nn.Conv1d, (9,)), (nn.Conv3d, (5, 6, 7)))
        for mode in ("reflect", "replicate", "circular")
    ),
]


def sentence(geometry: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in geometry.items())


def factorised(layer: nn.Module, rank: object = 1.0, **options: Any) -> FactorisedLayer:
    model = nn.Sequential(layer)
    lrsurgery.factorise_(model, rank=rank, allow_larger=True, **options)  # type: ignore[arg-type]
    (found,) = factorised_layers(model).values()
    return found


@pytest.mark.parametrize("conv", ["channel", "spatial"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=sentence)
def test_conv_at_full_rank_is_the_dense_conv(geometry: dict[str, Any], conv: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(5, 7, bias=True, **geometry).double()
    layer = factorised(dense, conv=conv)
    x = torch.randn(2, 5, 13, 17, dtype=torch.float64)
    wanted = F.conv2d(x, dense.weight, dense.bias, dense.stride, dense.padding, dense.dilation)  # type: ignore[arg-type]
    assert layer(x).shape == wanted.shape
    assert torch.allclose(layer(x), wanted, atol=1e-10)
    assert torch.allclose(layer.weight, dense.weight, atol=1e-12)


@pytest.mark.parametrize(
    ("conv", "size", "options"), OTHER_DIMENSIONS, ids=[f"{c.__name__} {sentence(o)}" for c, _, o in OTHER_DIMENSIONS]
)
def test_convolutions_of_1_and_3_dimensions(conv: Any, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """At full rank the dense layer; below it that of the product, in both forms, also on one input without a batch."""
    torch.manual_seed(0)
    dense = conv(5, 7, **options).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    layer = factorised(dense)
    assert layer.kind == f"{conv.__name__.lower()}-channel"
    torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=1e-10)
    for form in ("balanced", "pivoted"):
        low = factorised(dense, rank=3, form=form)
        product = conv(5, 7, **options).double()
        product.load_state_dict({"weight": low.weight + 0, "bias": dense.bias})
        assert low.side == (None if form == "balanced" else lrsurgery_side(dense))
        torch.testing.assert_close(low(x), product(x), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(low(x[0]), product(x[0]), atol=1e-10, rtol=1e-10)
        # by Eckart and Young
        left_out = torch.linalg.svdvals(dense.weight.detach().flatten(1))[3:].norm()
        torch.testing.assert_close((low.weight - dense.weight).norm().detach(), left_out)


def lrsurgery_side(dense: Any) -> str:
    """Columns only where no position moves and the input has fewer channels."""
    moved = (
        dense.weight[0, 0].numel() > 1
        or set(dense.stride) != {1}
        or dense.padding not in ("same", (0,) * len(dense.stride))
    )
    return "columns" if not moved else "rows"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_padding_modes_carry_over(conv: str, mode: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode=mode, bias=False).double()
    layer = factorised(dense, conv=conv)
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    assert torch.allclose(layer(x), dense(x), atol=1e-10)


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_conv_below_full_rank_computes_its_weight(conv: str) -> None:
    """The two convolutions together are one with the product as its kernel, at any rank."""
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    layer = factorised(dense, rank=4, conv=conv)
    assert isinstance(layer, FactorisedConv2d)
    assert layer.rank == 4
    x = torch.randn(2, 6, 11, 12, dtype=torch.float64)
    wanted = F.conv2d(x, layer.weight, dense.bias, dense.stride, dense.padding, dense.dilation)  # type: ignore[arg-type]
    assert torch.allclose(layer(x), wanted, atol=1e-10)
    assert (layer.weight - dense.weight).norm() > 0.01 * dense.weight.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not (kind.parameter or kind.lookup)])
def test_every_kind_at_full_rank(kind: str, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense: Any = {
        "linear": lambda: nn.Linear(12, 20, bias=bias),
        "conv1d": lambda: Conv1D(20, 12),
        "conv1d-channel": lambda: nn.Conv1d(4, 6, 3, bias=bias),
        "conv2d-channel": lambda: nn.Conv2d(4, 6, 3, bias=bias),
        "conv2d-spatial": lambda: nn.Conv2d(4, 6, 3, bias=bias),
        "conv3d-channel": lambda: nn.Conv3d(4, 6, 3, bias=bias),
        "conv-transpose1d-channel": lambda: nn.ConvTranspose1d(4, 6, 3, bias=bias),
        "conv-transpose2d-channel": lambda: nn.ConvTranspose2d(4, 6, 3, bias=bias),
    }[kind]()
    dense.to(dtype)
    layer = factorised(dense, conv="spatial" if kind == "conv2d-spatial" else "channel")
    assert layer.kind == kind
    assert layer.u.weight.dtype == layer.v.weight.dtype == dtype
    assert layer.weight.shape == dense.weight.shape
    tolerance = 10 * torch.finfo(dtype).eps
    assert (layer.weight.double() - dense.weight.double()).norm() <= tolerance * dense.weight.double().norm()
    assert layer.bias is dense.bias
    if dtype in (torch.float32, torch.float64):
        x = (
            torch.randn(2, 5, 12, dtype=dtype)
            if dense.weight.ndim == 2
            else torch.randn(2, 4, *(8,) * (dense.weight.ndim - 2)).to(dtype)
        )
        assert torch.allclose(layer(x), dense(x), atol=100 * torch.finfo(dtype).eps)


def test_gradients_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    layer = factorised(nn.Linear(10, 14).double(), rank=3)
    x = torch.randn(6, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    u, v = (f.detach().clone().requires_grad_() for f in layer.factors)
    F.linear(x, u @ v, layer.bias).square().sum().backward()
    assert torch.allclose(layer.u.weight.grad, u.grad)  # type: ignore[arg-type]
    assert torch.allclose(layer.v.weight.grad, v.grad)  # type: ignore[arg-type]


def test_layer_takes_over_mode_and_frozen_weights() -> None:
    dense = nn.Linear(10, 14).eval().requires_grad_(False)
    layer = factorised(dense, rank=3)
    assert isinstance(layer, FactorisedLinear)
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert (layer.in_features, layer.out_features, layer.rank) == (10, 14, 3)


def test_weight_is_read_only() -> None:
    layer = factorised(nn.Linear(10, 14), rank=3)
    with pytest.raises((AttributeError, TypeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(14, 10))  # type: ignore[misc]


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_densify_gives_ordinary_layers_back(conv: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2)),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.Flatten(1),
        nn.LazyLinear(9),
        nn.Linear(9, 5),
    ).eval()
    x = torch.randn(2, 4, 9, 11)
    model(x)
    before = [type(m) for m in model]
    lrsurgery.factorise_(model, rank=3, conv=conv, allow_larger=True)
    wanted = model(x)
    assert len(factorised_layers(model)) == 4
    lrsurgery.densify_(model)
    assert [type(m) for m in model] == before
    assert torch.allclose(model(x), wanted, atol=1e-5)


LAYERS: dict[str, tuple[nn.Module, str]] = {
    "linear": (nn.Linear(8, 12), "channel"),
    "conv1d": (Conv1D(12, 8), "channel"),
    "channel": (nn.Conv2d(4, 6, (3, 2)), "channel"),
    "spatial": (nn.Conv2d(4, 6, (3, 2)), "spatial"),
    "1-d": (nn.Conv1d(4, 6, 3), "channel"),
    "3-d": (nn.Conv3d(4, 6, (1, 3, 2)), "channel"),
    "transposed": (nn.ConvTranspose2d(6, 4, (3, 2)), "channel"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_looking_at_the_weight_multiplies_nothing(name: str) -> None:
    """T5 asks for its dtype in every forward pass, and code for flash attention too."""
    dense, conv = LAYERS[name]
    layer = factorised(dense, 3, conv=conv)
    with FlopCounterMode(display=False) as counter:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.shape, weight.dtype, weight.device) == (dense.weight.shape, torch.float32, torch.device("cpu"))
        assert (weight.ndim, weight.dim(), weight.size(0)) == (dense.weight.ndim, dense.weight.ndim, len(dense.weight))
        assert (weight.numel(), weight.requires_grad) == (dense.weight.numel(), True)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_computing_with_the_weight_is_computing_with_the_product(name: str) -> None:
    dense, conv = LAYERS[name]
    layer = factorised(dense, 3, conv=conv).double()
    with torch.no_grad():
        layer.v.weight.mul_(3)  # it follows the factors
    wanted = layer.layout.to_weight(layer.factors.u @ layer.factors.v, layer)
    assert torch.equal(layer.weight, wanted)
    assert torch.equal(layer.weight.detach()[1:].mT, wanted.detach()[1:].mT)
    assert (layer.weight + 0).tolist() == wanted.tolist()
    assert repr(layer.weight) == repr(wanted)
    penalties = layer.weight.square().sum(), wanted.square().sum()
    found, expected = (torch.autograd.grad(p, (layer.u.weight, layer.v.weight)) for p in penalties)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_applying_the_weight_costs_no_product() -> None:
    """As Mamba applies its dt_proj: weight @ x, with x (batch, in, tokens)."""
    layer = factorised(nn.Linear(40, 60), 5).double()
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found = layer.weight @ x
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * (40 + 60)
    assert torch.allclose(found, (layer.u.weight @ layer.v.weight) @ x, atol=1e-14)


def test_a_compiler_sees_the_product_itself() -> None:
    layer = factorised(nn.Linear(8, 12), 3)
    compiled = torch.compile(lambda x: x.to(layer.weight.dtype) @ layer.weight.T, fullgraph=True, backend="eager")
    x = torch.randn(2, 8)
    assert torch.allclose(compiled(x), x @ (layer.weight + 0).T)


def test_t5_computes_what_its_factors_do() -> None:
    """Against the same model with bare pairs of layers, which have nothing to multiply out."""

    def operations() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**zoo.TRANSFORMERS["t5"].inputs)
        return int(counter.get_total_flops())

    model = zoo.build_transformers("t5")
    lrsurgery.factorise_(model, rank=2, allow_larger=True)
    found = operations()
    for layer in factorised_layers(model).values():
        bare: Any = nn.Sequential(layer.v, layer.u)
        bare.weight = layer.u.weight  # of the right dtype, which is all that T5 asks for
        replace_module_(model, layer, bare)
    assert found == operations()
