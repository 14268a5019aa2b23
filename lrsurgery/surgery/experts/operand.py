"""What stands for the weight of a bank in the code of a model: x @ W is computed as two products.

The experts of every family, and transformers' functions for all of them, take a parameter of three axes as a tensor:
they index it by expert and hand it to a product. An `Operand` answers both, so that activations, biases, clamps and
router weights stay the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

Product: TypeAlias = Callable[..., Tensor]
GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # torch's, and transformers' own where torch's is not
ALIGNED = 16  # bytes that the strides of a grouped product are multiples of


class Operand:
    """The product u v of u (..., out, rank), v (..., rank, in), or its transpose if `turned`.

    Indexing the leading axis, exchanging the last two and converting the dtype give another `Operand`. Products with a
    tensor are two products; any other computation forms the product.
    """

    def __init__(self, u: Tensor, v: Tensor, *, turned: bool) -> None:
        self.u, self.v, self.turned = u, v, turned

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Tensors a (..., rows, rank), b (..., rank, columns) with a @ b the tensor that this stands for."""
        return (self.v.mT, self.u.mT) if self.turned else (self.u, self.v)

    def tensor(self) -> Tensor:
        """The product itself."""
        a, b = self.pair
        return a @ b

    @property
    def shape(self) -> torch.Size:
        a, b = self.pair
        return torch.Size((*a.shape[:-1], b.shape[-1]))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return self.u.ndim

    def dim(self) -> int:
        return self.u.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def requires_grad(self) -> bool:
        return self.u.requires_grad or self.v.requires_grad

    def is_floating_point(self) -> bool:
        return self.u.is_floating_point()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if self.ndim > 2 and not isinstance(index, tuple) and index is not None and index is not Ellipsis:
            return Operand(self.u[index], self.v[index], turned=self.turned)
        return self.tensor()[index]

    @property
    def mT(self) -> Operand:
        return Operand(self.u, self.v, turned=not self.turned)

    @property
    def T(self) -> Any:
        return self.mT if self.ndim == 2 else self.tensor().T

    def t(self) -> Any:
        return self.T

    def transpose(self, one: int, other: int) -> Any:
        last = {self.ndim - 2, self.ndim - 1}
        return self.mT if {one % self.ndim, other % self.ndim} == last else self.tensor().transpose(one, other)

    def to(self, *args: Any, **kwargs: Any) -> Operand:
        return Operand(self.u.to(*args, **kwargs), self.v.to(*args, **kwargs), turned=self.turned)

    def float(self) -> Operand:
        return self.to(torch.float32)

    def contiguous(self) -> Operand:
        return self

    def __matmul__(self, other: Any) -> Tensor:
        return _from_left(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _from_right(torch.matmul, other, self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.linear:
            return _linear(*args, **kwargs)
        if name in ("matmul", "__matmul__", "bmm", "mm") and not kwargs and len(args) == 2:
            product = torch.bmm if name == "bmm" else torch.matmul
            one, other = args
            if not isinstance(one, Operand):
                return _from_right(product, one, other)
            if not isinstance(other, Operand):
                return _from_left(product, one, other)
        if name in GROUPED and len(args) >= 2 and isinstance(args[1], Operand):
            return _grouped(func, *args, **kwargs)
        args, kwargs = tree_map_only(Operand, Operand.tensor, (args, kwargs))
        return func(*args, **kwargs)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Operand):  # the operand is the input
        return F.linear(x.tensor(), weight, bias)
    a, b = weight.pair
    return F.linear(F.linear(x, b), a, bias)


def _from_right(product: Product, x: Tensor, operand: Operand) -> Tensor:
    a, b = operand.pair
    return product(product(x, a), b)


def _from_left(product: Product, operand: Operand, x: Tensor) -> Tensor:
    a, b = operand.pair
    return product(a, product(b, x))


def _grouped(func: Product, x: Tensor, operand: Operand, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Two grouped products: rows of x (positions, rows) that belong to an expert times its matrix (rows, columns).

    Kernels refuse strides of no multiple of 16 bytes, which a rank of no multiple of 8 can give: those products are
    done by expert.
    """
    if offs is not None and operand.v.shape[-2] * operand.u.element_size() % ALIGNED:
        from transformers.integrations import moe  # noqa: F401  (defines the operator)

        func, kwargs = torch.ops.transformers.grouped_mm_fallback, {}  # transformers sets neither bias nor dtype
    for part in operand.pair:
        x = func(x, part, offs=offs, **kwargs)
    return x
