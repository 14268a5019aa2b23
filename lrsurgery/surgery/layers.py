"""Factorised layers: two ordinary modules, `v` then `u`, in place of one.

`u` and `v` are plain nn.Linear or nn.Conv2d modules, so quantisers, LoRA, pruning, tensor parallelism, compilers and
exporters support them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg.factors import Factors, working_dtype

# a dense module of some kind; only the functions of its kind know its attributes
Dense: TypeAlias = Any


def _one_to_one(module: Dense) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The properties of one kind of layer; `kinds.KINDS` holds one entry per kind.

    The matrix of a layer is (rows, columns): rows are outputs, columns are inputs. Functions between weights and
    matrices only view or reshape. No field is a lambda, so that models can be pickled.
    """

    name: str
    matches: Callable[[nn.Module, str], bool]  # module, convolution scheme -> whether the module is of this kind
    weight_axes: int  # of the dense weight
    matrix_shape: Callable[[torch.Size], tuple[int, int]]  # of the dense weight's shape
    to_matrix: Callable[[Tensor], Tensor]  # dense weight -> (rows, columns)
    to_weight: Callable[[Tensor, FactorisedLayer], Tensor]  # (rows, columns) -> dense weight
    to_matrices: Callable[[Tensor, Tensor], Factors]  # u.weight, v.weight -> u (rows, rank), v (rank, columns)
    to_weights: Callable[[Factors, torch.Size], tuple[Tensor, Tensor]]  # factors, dense shape -> u.weight, v.weight
    build: Callable[[Dense, int], FactorisedLayer]  # dense layer, rank -> factorised layer on the meta device
    build_dense: Callable[[FactorisedLayer], nn.Module]  # the reverse, on the meta device
    fan_in: Callable[[torch.Size], int]  # dense shape -> inputs per output
    # calibration: module, input x, mask of counted positions -> inputs (positions, columns) in fp32, in parts
    inputs: Callable[[Dense, Tensor, Tensor | None], Iterator[Tensor]]
    # module, shape of the input, gradient of the output, mask -> output gradients (positions, rows) in fp32, in parts
    gradients: Callable[[Dense, torch.Size, Tensor, Tensor | None], Iterator[Tensor]]
    outputs: Callable[[Tensor, int], int]  # output, counted inputs -> positions of the output
    sample_input: Callable[[Dense, int], tuple[int, ...]]  # dense layer, positions -> shape of an input to time
    v_per_u: Callable[[Dense], int] = _one_to_one  # output positions of v per output position of u
    takes_tokens: bool = True  # applied once per token: padding can be masked, and FLOPs per token are known
    no_form: Callable[[Dense], str | None] | None = None  # why a module of this kind cannot be factorised, or None
    plain_product: bool = False  # weight @ x may be computed as u @ (v @ x)


class FactorisedLayer(nn.Module):
    """A layer whose dense weight is the product of `u` and `v`.

    Attributes: `u`, `v` (modules; `u` has the bias), `rank`, `kind` (a key of `KINDS`), `weight` (read-only: the
    product in the orientation and dtype of the dense layer) and `bias`.
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
        """The factors as matrices u (rows, rank), v (rank, columns); their product is the matrix of the weight."""
        return self.layout.to_matrices(self.u.weight, self.v.weight)

    @property
    def weight(self) -> Tensor:
        # Some model code reads `layer.weight` (GPT-2's init, Mamba's dt_proj, nn.MultiheadAttention), often for its
        # dtype alone (T5, flash attention), so the product is lazy. Compilers drop an unused product by themselves;
        # they get a plain tensor, and so do factors that are no plain parameters (sharded, quantised).
        plain = type(self.u.weight) is type(self.v.weight) is nn.Parameter
        if not plain or torch.compiler.is_compiling() or torch._C._is_tracing():
            return _multiply(self)
        return Product(self)

    @property
    def bias(self) -> Tensor | None:
        return self.u.bias

    def extra_repr(self) -> str:
        return f"{self.kind}, rank={self.rank}"


def _multiply(layer: FactorisedLayer) -> Tensor:
    u, v = layer.factors
    return layer.layout.to_weight(u @ v, layer)


class Product(Tensor):
    """The lazy dense weight of a layer: any computation forms the product; shape, dtype and device cost nothing."""

    layer: FactorisedLayer

    @staticmethod
    def __new__(cls, layer: FactorisedLayer) -> Product:
        u, v = layer.factors
        rows_columns = torch.empty(u.shape[0], v.shape[1], device="meta")
        product: Product = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            layer.layout.to_weight(rows_columns, layer).shape,
            dtype=u.dtype,
            device=u.device,
            requires_grad=u.requires_grad or v.requires_grad,
        )
        product.layer = layer
        return product

    def __init__(self, layer: FactorisedLayer) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in MATMULS and type(args[0]) is cls and args[0].layer.layout.plain_product and not kwargs:
            u, v = args[0].layer.factors  # Mamba applies its dt_proj this way
            return u @ (v @ args[1])
        args, kwargs = tree_map_only(cls, lambda product: _multiply(product.layer), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} got the lazy weight of a factorised layer; pass (layer.weight + 0) instead")


FREE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class FactorisedLinear(FactorisedLayer):
    """A factorised `nn.Linear` or transformers `Conv1D`: `v` (in -> rank, no bias), then `u` (rank -> out)."""

    @property
    def in_features(self) -> int:
        return self.v.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.u.out_features  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class FactorisedConv2d(FactorisedLayer):
    """A factorised `nn.Conv2d`: kh x kw then 1 x 1 (channel), or kh x 1 then 1 x kw (spatial)."""

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

    For a `weight` on the meta device they stay on the device of the factors.
    """
    u, v = kind.to_weights(factors, weight.shape)
    device = factors.u.device if weight.is_meta else weight.device
    return u.to(device, weight.dtype), v.to(device, weight.dtype)


def dense_weight(layer: FactorisedLayer) -> Tensor:
    """The dense weight: the product in fp32 or wider, rounded once to the layer's dtype."""
    u, v = layer.factors
    wide = working_dtype(u.dtype)
    return layer.layout.to_weight(u.detach().to(wide) @ v.detach().to(wide), layer).to(u.dtype).contiguous()


def build_dense(layer: FactorisedLayer) -> nn.Module:
    """Build the dense layer that a factorised one replaced, on the meta device."""
    return layer.layout.build_dense(layer)
