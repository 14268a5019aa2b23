"""What several kinds of layers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.layers import Dense, FactorisedLayer, outline

CONV_SCHEMES = ("auto", "channel", "spatial")
AUTO, CHANNEL, SPATIAL = CONV_SCHEMES
OWN = frozenset(vars(nn.Module()))  # attributes of every module


def on_meta(layer: Dense) -> dict[str, Any]:
    """Arguments that build a module on the meta device in the dtype of a layer."""
    return {"device": "meta", "dtype": outline(layer.weight).dtype}


def is_one_of(module: nn.Module, classes: set[tuple[str, str]]) -> bool:
    """Whether a module's class is one of these (module, qualified name), so that no library is imported."""
    return (type(module).__module__, type(module).__qualname__) in classes


def fan_in(shape: torch.Size) -> int:
    """Inputs per output of a dense weight whose first axis is the outputs."""
    return shape[1:].numel()


# the functions of kinds whose weight is its own matrix, (rows, columns) or several of them


def shape_of_matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1]


def keep(weight: Tensor) -> Tensor:
    return weight


def keep_matrix(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrix


def keep_factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    return factors.u.contiguous(), factors.v.contiguous()


def token_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield (x[mask] if mask is not None else x.reshape(-1, x.shape[-1])).float()


def token_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield (g[mask] if mask is not None else g.reshape(-1, g.shape[-1])).float()


def token_outputs(output: Tensor, counted: int) -> int:
    return counted


def copy_as(module: nn.Module, cls: type[nn.Module], parameters: Mapping[str, nn.Parameter | None]) -> Dense:
    """A module of a class with the settings of another, these parameters, and no children or hooks."""
    copy: Any = cls.__new__(cls)
    nn.Module.__init__(copy)
    held = {name: value for name, value in vars(module).items() if name not in OWN and name not in parameters}
    vars(copy).update({n: type(v)(v) if isinstance(v, list | dict | set) else v for n, v in held.items()})
    copy._parameters.update({"bias": None, **parameters})
    return copy
