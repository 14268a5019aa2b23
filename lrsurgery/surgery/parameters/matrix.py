"""Matrices that a module holds as a parameter and hands to a function of torch, dense or factorised.

`nn.LSTM`, `nn.GRU`, `nn.RNN` and `nn.MultiheadAttention` call one function of ATen with all their weights. The factors
of such a weight take its place, and its name, in the module, whose class and forward stay the same. Any function of
torch that gets the factors is given their product, so these layers save parameters and no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg.pivot import Side
from lrsurgery.modules import FILLS
from lrsurgery.surgery.layers import FactorisedLayer, Kind

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
READERS: tuple[Any, ...] = (*RECURRENT, nn.MultiheadAttention)  # classes that read such parameters
OF_RECURRENT = ("weight_ih_", "weight_hh_")  # what names of weights begin with
OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class MatrixWeight(nn.Module):
    """One factor of a matrix: `weight`, which is read and never called, so no tool may take it for a linear layer."""

    def __init__(self, rows: int, columns: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class DenseMatrix(nn.Module):
    """A view of one parameter (rows, columns) of a module as a layer: `weight` is the parameter itself."""

    bias = None

    def __init__(self, weight: nn.Parameter, *, recurrent: bool) -> None:
        super().__init__()
        self.weight, self.recurrent = weight, recurrent

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows), as the layer is timed."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class FactorisedMatrix(FactorisedLayer):
    """The factors of a parameter (rows, columns) of a module, without a bias: that stays a parameter of the module.

    It stands for its product wherever torch takes it as a tensor, and has the attributes of one.
    """

    u: MatrixWeight  # type: ignore[assignment]
    v: MatrixWeight  # type: ignore[assignment]
    axis = -1

    def __init__(self, layout: Kind, v: MatrixWeight, u: MatrixWeight, side: Side | None = None) -> None:
        super().__init__(layout, v, u, side)
        self._is_hf_initialized = True  # the initialisation of the module finds no parameter to fill

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows), as the layer is timed: with the product formed, as on every call."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        rows, columns = self.matrix_shape
        return f"{rows}, {columns}, rank={self.rank}{self._form_repr()}"

    # what code asks a parameter for

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.weight, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.matrix[index]

    def __len__(self) -> int:
        return self.matrix_shape[0]

    def __matmul__(self, other: Any) -> Tensor:
        product: Tensor = self.matrix @ other
        return product

    def __rmatmul__(self, other: Any) -> Tensor:
        return other @ self.matrix  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in FILLS:  # the initialisation of a model: factors have values of their own
            return args[0] if args else (kwargs or {})["tensor"]
        args, kwargs = tree_map_only(FactorisedMatrix, _product_of, (args, kwargs or {}))
        return func(*args, **kwargs)


def _product_of(layer: FactorisedMatrix) -> Tensor:
    return layer.matrix


def matrices_in(module: nn.Module) -> Iterator[tuple[str, DenseMatrix]]:
    """The parameters of a module that can be factorised in their place, by their names in it, as layers.

    A module with a forward of its own may do anything with its weights, so it has none.
    """
    if not _has_known_forward(module):
        return
    names: tuple[str, ...] = OF_ATTENTION
    if isinstance(module, nn.RNNBase):  # not the parts of a weight norm, whose names go on
        names = tuple(name for name in module._flat_weights_names if name.startswith(OF_RECURRENT))
    for key, parameter in module.named_parameters(recurse=False):
        if key in names:
            yield key, DenseMatrix(parameter, recurrent=isinstance(module, nn.RNNBase))


def explain_parameter(holder: nn.Module, key: str) -> str | None:
    """Why a matrix of a recurrent or attention module is none of `matrices_in`; None for other modules."""
    name = type(holder).__name__
    if isinstance(holder, nn.RNNCellBase):
        return f"{name}, a single step, at each of which a product of factors would be formed"
    base = next((cls for cls in READERS if isinstance(holder, cls)), None)
    if base is None:
        return None
    if not _has_known_forward(holder):
        return f"subclass {name} of {base.__name__} with a forward of its own"
    if key.startswith("weight_hr_"):
        return "projection of the hidden states of an LSTM (proj_size)"
    if base is not nn.MultiheadAttention or key.startswith(OF_ATTENTION):
        return f"part of a weight of {base.__name__} that is parametrised"
    return None


def _has_known_forward(module: nn.Module) -> bool:
    own = getattr(type(module), "forward", None)
    return any(own is cls.forward for cls in READERS) and "forward" not in vars(module)
