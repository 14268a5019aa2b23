"""Factorised layers: two ordinary modules, `v` then `u`, in place of one.

Ordinary modules, so that quantisers, LoRA, pruning, tensor parallelism, compilers and exporters meet what they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg.factors import Factors, working_dtype

# a dense module of some kind: what its attributes are, the kind's functions know
Dense: TypeAlias = Any


def _one_to_one(module: Dense) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All that is special to one kind of layer; `kinds.KINDS` holds one entry for each.

    The matrix of a layer is (rows, columns): rows belong to its outputs, columns to its inputs. Every function that
    maps between weights and matrices is a view or reshape of its input. Functions have names (no lambdas), so that
    models can be pickled.
    """

    name: str
    matches: Callable[[nn.Module, str], bool]  # module, convolution scheme -> whether it is of this kind
    weight_axes: int  # of the dense weight
    matrix_shape: Callable[[torch.Size], tuple[int, int]]  # of the dense weight's shape
    to_matrix: Callable[[Tensor], Tensor]  # dense weight -> (rows, columns)
    to_weight: Callable[[Tensor, FactorisedLayer], Tensor]  # (rows, columns) -> dense weight
    to_matrices: Callable[[Tensor, Tensor], Factors]  # u.weight, v.weight -> u (rows, rank), v (rank, columns)
    to_weights: Callable[[Factors, torch.Size], tuple[Tensor, Tensor]]  # factors, dense shape -> u.weight, v.weight
    build: Callable[[Dense, int], FactorisedLayer]  # dense layer, rank -> factorised layer on the meta device
    build_dense: Callable[[FactorisedLayer], nn.Module]  # the reverse, on the meta device
    fan_in: Callable[[torch.Size], int]  # inputs that an output is a sum of
    # calibration: module, input x, mask of the positions that count -> inputs (positions, columns) in fp32, in parts
    inputs: Callable[[Dense, Tensor, Tensor | None], Iterator[Tensor]]
    # module, shape of the input, gradient of the output, mask -> output gradients (positions, rows) in fp32, in parts
    gradients: Callable[[Dense, torch.Size, Tensor, Tensor | None], Iterator[Tensor]]
    outputs: Callable[[Tensor, int], int]  # output, counted inputs -> positions of the output
    sample_input: Callable[[Dense, int], tuple[int, ...]]  # dense layer, positions -> shape of an input to time
    v_per_u: Callable[[Dense], int] = _one_to_one  # positions of v's output for each of u's
    takes_tokens: bool = True  # applied once a token: padding can be masked, and FLOPs of a token are known
    no_form: Callable[[Dense], str | None] | None = None  # why a module of this kind has no factorised form
    plain_product: bool = False  # weight @ x may be computed as u @ (v @ x)


class FactorisedLayer(nn.Module):
    """A layer whose dense weight is the product of `u` and `v`.

    Attributes: `u`, `v` (modules; `u` carries the bias), `rank`, `kind` (a key of `KINDS`), `weight` (read only: the
    product in the dense layer's own orientation and dtype) and `bias`.
    """

    u: nn.Linear | nn.Conv2d
    v: nn.Linear | nn.Conv2d

    def __init__(self, layout: Kind, v: nn.Module, u: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.v = v  # type: ignore[assignment]
        self.u = u  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))  # type: ignore[no-any-return]

    @property
    def kind(self) -> str:
        return self.layout.name

    @property
    def rank(self) -> int:
        return self.v.weight.shape[0]

    @property
    def factors(self) -> Factors:
        """The factors as matrices, u (rows, rank), v (rank, columns), as `layout.to_matrix` lays the dense weight."""
        return self.layout.to_matrices(self.u.weight, self.v.weight)

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

    def extra_repr(self) -> str:
        return f"{self.kind}, rank={self.rank}"


def _multiplied(layer: FactorisedLayer) -> Tensor:
    u, v = layer.factors
    return layer.layout.to_weight(u @ v, layer)


class Product(Tensor):
    """The dense weight of a layer, multiplied out by whatever computes with it; shape, dtype and device are free."""

    layer: FactorisedLayer

    @staticmethod
    def __new__(cls, layer: FactorisedLayer) -> Product:
        u, v = layer.factors
        rows_columns = torch.empty(u.shape[0], v.shape[1], device="meta")
        made: Product = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            layer.layout.to_weight(rows_columns, layer).shape,
            dtype=u.dtype,
            device=u.device,
            requires_grad=u.requires_grad or v.requires_grad,
        )
        made.layer = layer
        return made

    def __init__(self, layer: FactorisedLayer) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in MATMULS and type(args[0]) is cls and args[0].layer.layout.plain_product and not kwargs:
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

    u: nn.Conv2d
    v: nn.Conv2d

    @property
    def in_channels(self) -> int:
        return self.v.in_channels

    @property
    def out_channels(self) -> int:
        return self.u.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        return (self.v.kernel_size[0], max(self.v.kernel_size[1], self.u.kernel_size[1]))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"


def factor_weights(kind: Kind, weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """The tensors `u.weight`, `v.weight` that store `factors` for a dense `weight`, in its dtype and on its device.

    For a `weight` on the meta device they stay where the factors are.
    """
    u, v = kind.to_weights(factors, weight.shape)
    device = factors.u.device if weight.is_meta else weight.device
    return u.to(device, weight.dtype), v.to(device, weight.dtype)


def dense_weight(layer: FactorisedLayer) -> Tensor:
    """The dense weight, multiplied in fp32 or wider and rounded once to the layer's dtype."""
    u, v = layer.factors
    wide = working_dtype(u.dtype)
    return layer.layout.to_weight(u.detach().to(wide) @ v.detach().to(wide), layer).to(u.dtype).contiguous()


def build_dense(layer: FactorisedLayer) -> nn.Module:
    """The dense layer that a factorised one stands for, on the meta device."""
    return layer.layout.build_dense(layer)
