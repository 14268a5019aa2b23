"""How weights lie in memory: as a CPU reads them fastest where a product is bound by that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.surgery.kinds.common import is_one_of
from lrsurgery.surgery.kinds.linear import CONV1D_CLASSES


@torch.no_grad()
def prepare_for_inference_(module: nn.Module) -> list[str]:
    """Lay the weights of linear layers, factorised or not, out along their longer side, in place, if on a CPU.

    On one token a layer is a matrix times a vector and takes as long as its weight takes to read. BLAS reads a matrix
    of more outputs than inputs, such as u of a factorised layer and an output head, 1.3 to 3 times faster by columns.
    Values, parameters and forms stay as they are, and `state_dict` of `module` gives tensors in the usual layout: a
    prepared model saves, trains and loads weights as before. torch's `fully_shard` wants contiguous parameters, so it
    refuses a prepared model. A table of tokens tied to a head is laid out for the head. Weights that are quantised,
    sharded or on another device stay as they are.

    Returns the names of the weights that it laid out anew.
    """
    changed: list[str] = []
    for name, layer in module.named_modules():
        # of no other class: one of its own may count on a layout
        weight = layer._parameters.get("weight") if type(layer) is nn.Linear or _is_conv1d(layer) else None
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.numel() == 0:
            continue
        if weight.stride(_longer_axis(weight)) != 1:
            weight.data = _along_longer_axis(weight.data)
            changed.append(f"{name}.weight" if name else "weight")
    if changed:
        module.register_state_dict_post_hook(_give_usual_layout)  # type: ignore[no-untyped-call]
    return changed


def _give_usual_layout(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Make the weights of a state dict contiguous, for safetensors; tied ones stay one tensor, as savers ask."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(prefix) and isinstance(tensor, Tensor) and tensor.dim() == 2 and not tensor.is_contiguous():
            place = (tensor.data_ptr(), tensor.shape)
            made.setdefault(place, tensor.contiguous())
            state[key] = made[place]


def _is_conv1d(layer: nn.Module) -> bool:
    return is_one_of(layer, CONV1D_CLASSES)


def _longer_axis(weight: Tensor) -> int:
    """0 or 1: of a square matrix the last, as usual."""
    return 0 if weight.shape[0] > weight.shape[1] else 1


def _along_longer_axis(weight: Tensor) -> Tensor:
    axes = (1, 0) if _longer_axis(weight) == 0 else (0, 1)
    return weight.permute(axes).contiguous().permute(axes)
