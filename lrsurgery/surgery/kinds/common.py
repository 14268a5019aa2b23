"""What several kinds of layers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrsurgery.surgery.layers import Dense

CONV_SCHEMES = ("auto", "channel", "spatial")
AUTO, CHANNEL, SPATIAL = CONV_SCHEMES
OWN = frozenset(vars(nn.Module()))  # attributes of every module


def on_meta(layer: Dense) -> dict[str, Any]:
    """Arguments that build a module on the meta device in the dtype of a layer."""
    return {"device": "meta", "dtype": layer.weight.dtype}


def is_one_of(module: nn.Module, classes: set[tuple[str, str]]) -> bool:
    """Whether a module's class is one of these (module, qualified name), so that no library is imported."""
    return (type(module).__module__, type(module).__qualname__) in classes


def fan_in(shape: torch.Size) -> int:
    """Inputs per output of a dense weight whose first axis is the outputs."""
    return shape[1:].numel()


def copy_as(module: nn.Module, cls: type[nn.Module], parameters: Mapping[str, nn.Parameter | None]) -> Dense:
    """A module of a class with the settings of another, these parameters, and no children or hooks."""
    copy: Any = cls.__new__(cls)
    nn.Module.__init__(copy)
    held = {name: value for name, value in vars(module).items() if name not in OWN and name not in parameters}
    vars(copy).update({n: type(v)(v) if isinstance(v, list | dict | set) else v for n, v in held.items()})
    copy._parameters.update({"bias": None, **parameters})
    return copy
