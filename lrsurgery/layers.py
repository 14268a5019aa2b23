"""Factorised layers, and the kinds of layer that can become one.

A factorised layer holds two ordinary modules, `v` then `u`, so that quantisers, LoRA, pruning, tensor parallelism,
compilers and exporters meet what they know. To add a kind: one `Kind` in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg import Factors, working_dtype


class FactorisedLayer(nn.Module):
    """A layer whose dense weight is the product of `u` and `v`.

    Attributes: `u`, `v` (modules; `u` carries the bias), `rank`, `kind` (a key of `KINDS`), `weight` (read only: the
    product in the dense layer's own orientation and dtype) and `bias`.
    """

    u: nn.Linear | nn.Conv2d
    v: nn.Linear | nn.Conv2d

    def __init__(self, kind: str, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.v = v  # type: ignore[assignment]
        self.u = u  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        return self.v.weight.shape[0]

    @property
    def factors(self) -> Factors:
        """The factors as matrices, u (out, rank), v (rank, in), as `KINDS[kind].matrix` lays the dense weight out."""
        return KINDS[self.kind].to_matrices(self.u.weight, self.v.weight)

    @property
    def weight(self) -> Tensor:
        # Model code reads `layer.weight` in places (GPT-2's init, Mamba's dt_proj, nn.MultiheadAttention), often for
        # its dtype alone (T5, flash attention). Compilers drop a product that nothing uses; they, and factors that are
        # not plain tensors (sharded, quantised), get it as it is.
        plain = type(self.u.weight) is type(self.v.weight) is nn.Parameter
        if not plain or torch.compiler.is_compiling() or torch._C._is_tracing():
            return _multiplied(self)
        return Product(self)

    @property
    def bias(self) -> Tensor | None:
        return self.u.bias


def _multiplied(layer: FactorisedLayer) -> Tensor:
    u, v = layer.factors
    return KINDS[layer.kind].to_weight(u @ v, layer)


class Product(Tensor):
    """The dense weight of a layer, multiplied out by whatever computes with it; shape, dtype and device are free."""

    layer: FactorisedLayer

    @staticmethod
    def __new__(cls, layer: FactorisedLayer) -> Product:
        u, v = layer.factors
        rows_columns = torch.empty(u.shape[0], v.shape[1], device="meta")
        made: Product = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, KINDS[layer.kind].to_weight(rows_columns, layer).shape, dtype=u.dtype, device=u.device,
            requires_grad=u.requires_grad or v.requires_grad,
        )  # fmt: skip
        made.layer = layer
        return made

    def __init__(self, layer: FactorisedLayer) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in MATMULS and type(args[0]) is cls and args[0].layer.kind == "linear" and not kwargs:
            u, v = args[0].layer.factors  # as Mamba applies its dt_proj
            return u @ (v @ args[1])
        args, kwargs = tree_map_only(cls, lambda product: _multiplied(product.layer), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} met the weight of a factorised layer as it is; take (layer.weight + 0)")


FREE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class FactorisedLinear(FactorisedLayer):
    """A `nn.Linear` or transformers `Conv1D` as `v` (in -> rank, no bias) and `u` (rank -> out)."""

    @property
    def in_features(self) -> int:
        return self.v.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.u.out_features  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class FactorisedConv2d(FactorisedLayer):
    """A `nn.Conv2d` as two: kh x kw then 1x1 (channel), or kh x 1 then 1 x kw (spatial)."""

    @property
    def in_channels(self) -> int:
        return self.v.in_channels  # type: ignore[return-value]

    @property
    def out_channels(self) -> int:
        return self.u.out_channels  # type: ignore[return-value]

    @property
    def kernel_size(self) -> tuple[int, int]:
        v: Any = self.v
        u: Any = self.u
        return (v.kernel_size[0], max(v.kernel_size[1], u.kernel_size[1]))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"


@dataclass(frozen=True)
class Kind:
    """How one kind of layer maps to a matrix and back. Every function is a pure view or reshape of its input."""

    matrix_shape: Callable[[torch.Size], tuple[int, int]]  # of the dense weight
    to_matrix: Callable[[Tensor], Tensor]  # dense weight -> (out, in)
    to_weight: Callable[[Tensor, FactorisedLayer], Tensor]  # (out, in) -> dense weight
    to_matrices: Callable[[Tensor, Tensor], Factors]  # u.weight, v.weight -> u (out, rank), v (rank, in)
    to_weights: Callable[[Factors, torch.Size], tuple[Tensor, Tensor]]  # factors, dense shape -> u.weight, v.weight
    build: Callable[[Any, str, int], FactorisedLayer]  # the dense layer, the kind's name, rank -> on the meta device


def _build_linear(layer: Any, kind: str, rank: int) -> FactorisedLayer:
    out_features, in_features = KINDS[kind].matrix_shape(layer.weight.shape)
    meta: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    v = nn.Linear(in_features, rank, bias=False, **meta)
    return FactorisedLinear(kind, v, nn.Linear(rank, out_features, bias=layer.bias is not None, **meta))


def _build_conv_channel(layer: nn.Conv2d, kind: str, rank: int) -> FactorisedLayer:
    meta: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    v = nn.Conv2d(
        layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
        bias=False, padding_mode=layer.padding_mode, **meta,
    )  # fmt: skip
    return FactorisedConv2d(kind, v, nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None, **meta))


def _build_conv_spatial(layer: nn.Conv2d, kind: str, rank: int) -> FactorisedLayer:
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    # "same" pads each axis by its own kernel, so it splits by itself
    down, across = (
        (layer.padding,) * 2 if isinstance(layer.padding, str) else ((layer.padding[0], 0), (0, layer.padding[1]))
    )
    common: dict[str, Any] = {"padding_mode": layer.padding_mode, "device": "meta", "dtype": layer.weight.dtype}
    v = nn.Conv2d(layer.in_channels, rank, (kh, 1), (sh, 1), down, (dh, 1), bias=False, **common)
    u = nn.Conv2d(rank, layer.out_channels, (1, kw), (1, sw), across, (1, dw), bias=layer.bias is not None, **common)
    return FactorisedConv2d(kind, v, u)


def _spatial_weights(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    out, channels, kh, kw = dense
    rank = factors.v.shape[0]
    u = factors.u.reshape(out, kw, rank).permute(0, 2, 1).unsqueeze(2)
    return u.contiguous(), factors.v.reshape(rank, channels, kh, 1).contiguous()


KINDS: dict[str, Kind] = {
    "linear": Kind(
        matrix_shape=lambda s: (s[0], s[1]),
        to_matrix=lambda w: w,
        to_weight=lambda m, _: m,
        to_matrices=Factors,
        to_weights=lambda f, _: (f.u.contiguous(), f.v.contiguous()),
        build=_build_linear,
    ),
    # transformers' Conv1D keeps (in, out)
    "conv1d": Kind(
        matrix_shape=lambda s: (s[1], s[0]),
        to_matrix=lambda w: w.T,
        to_weight=lambda m, _: m.T,
        to_matrices=Factors,
        to_weights=lambda f, _: (f.u.contiguous(), f.v.contiguous()),
        build=_build_linear,
    ),
    "conv2d-channel": Kind(
        matrix_shape=lambda s: (s[0], s[1] * s[2] * s[3]),
        to_matrix=lambda w: w.flatten(1),
        to_weight=lambda m, layer: m.reshape(-1, *layer.v.weight.shape[1:]),
        to_matrices=lambda u, v: Factors(u.flatten(1), v.flatten(1)),
        to_weights=lambda f, s: (
            f.u[:, :, None, None].contiguous(),
            f.v.reshape(-1, s[1], s[2], s[3]).contiguous(),
        ),
        build=_build_conv_channel,
    ),
    # (out kw, in kh): rows (o, w), columns (i, h); a bare reshape would mix the axes
    "conv2d-spatial": Kind(
        matrix_shape=lambda s: (s[0] * s[3], s[1] * s[2]),
        to_matrix=lambda w: w.permute(0, 3, 1, 2).flatten(2).flatten(0, 1),
        to_weight=lambda m, layer: m.reshape(
            layer.u.weight.shape[0], layer.u.weight.shape[3], layer.v.weight.shape[1], layer.v.weight.shape[2]
        ).permute(0, 2, 3, 1),
        to_matrices=lambda u, v: Factors(u.squeeze(2).permute(0, 2, 1).flatten(0, 1), v.flatten(1)),
        to_weights=_spatial_weights,
        build=_build_conv_spatial,
    ),
}


# classes known by name, so that neither library is imported for them
NAMED_KINDS = {
    ("timm.layers.linear", "Linear"): "linear",  # a forward of its own for torchscript's sake
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): "linear",  # x @ W.T, then + b
    ("transformers.pytorch_utils", "Conv1D"): "conv1d",
}


def kind_of(module: nn.Module, conv: str) -> str | None:
    """The kind that this module would be factorised as, or None. Unknown subclasses may compute something else."""
    cls = type(module)
    if cls is nn.Linear:
        return "linear"
    if cls is nn.Conv2d:
        return "conv2d-channel" if module.kernel_size == (1, 1) else f"conv2d-{conv}"
    return NAMED_KINDS.get((cls.__module__, cls.__qualname__))


def factor_weights(kind: str, weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """The tensors `u.weight`, `v.weight` that store `factors` for a dense `weight`, in its dtype and on its device.

    For a `weight` on the meta device they stay where the factors are.
    """
    u, v = KINDS[kind].to_weights(factors, weight.shape)
    device = factors.u.device if weight.is_meta else weight.device
    return u.to(device, weight.dtype), v.to(device, weight.dtype)


def dense_weight(layer: FactorisedLayer) -> Tensor:
    """The dense weight, multiplied in fp32 or wider and rounded once to the layer's dtype."""
    u, v = layer.factors
    wide = working_dtype(u.dtype)
    return KINDS[layer.kind].to_weight(u.detach().to(wide) @ v.detach().to(wide), layer).to(u.dtype).contiguous()


def build_dense(layer: FactorisedLayer) -> nn.Module:
    """The dense layer that a factorised one stands for, on the meta device."""
    dtype, bias = layer.u.weight.dtype, layer.bias is not None
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if isinstance(layer, FactorisedConv2d):
        u: Any = layer.u
        v: Any = layer.v
        if layer.kind == "conv2d-channel":
            stride, padding, dilation = v.stride, v.padding, v.dilation
        else:
            stride, dilation = (v.stride[0], u.stride[1]), (v.dilation[0], u.dilation[1])
            padding = v.padding if isinstance(v.padding, str) else (v.padding[0], u.padding[1])
        return nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride, padding, dilation,
            bias=bias, padding_mode=v.padding_mode, **meta,
        )  # fmt: skip
    assert isinstance(layer, FactorisedLinear)
    if layer.kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(layer.out_features, layer.in_features).to(dtype)  # type: ignore[no-any-return]
    return nn.Linear(layer.in_features, layer.out_features, bias=bias, **meta)
