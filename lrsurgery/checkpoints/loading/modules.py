"""Loading into timm models and modules of one's own, by their state dicts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import (
    build_model,
    timm_tensors,
)
from lrsurgery.checkpoints.mapping import check_plain
from lrsurgery.checkpoints.pretrained.beside import remember_
from lrsurgery.checkpoints.source import Source, resolve_own
from lrsurgery.checkpoints.tensors import TensorSource, check_weights, open_tensors
from lrsurgery.checkpoints.upstream.layouts import check_shape, missing
from lrsurgery.errors import PlanError, SourceError
from lrsurgery.surgery.apply import check_orders, factorised_layers, swap_
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.text import expanded


def load_timm(source: Source, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the timm module of a factorised or dense timm folder.

    Raises SourceError that names a tensor which is missing, unexpected or of the wrong shape.
    """
    model = build_model(source, device="cpu")
    _fill_(model, source)
    if source.is_factorised and source.folder is not None:
        remember_(model, source.folder)
    return (model.to(dtype) if dtype is not None else model).eval()


def load_into_(module: nn.Module, folder: str | Path) -> None:
    """Load a folder that `save_model` wrote for a module of one's own into a new module of that class.

    The module is dense, as its class builds it; it gets the folder's factorised layers, on its own device and in the
    dtypes of the files. On an exception it stays as it was.

    Raises SourceError that names a tensor which is missing, unexpected or of the wrong shape; PlanError for a layer
    that the module does not have, or if it is factorised already.
    """
    fill_into_(module, resolve_own(expanded(folder)))


def fill_into_(module: nn.Module, source: Source) -> None:
    """As `load_into_`, of a source that is resolved: a module of one's own, or a timm model."""
    if factorised_layers(module):
        raise PlanError(f"{type(module).__name__}: already has factorised layers; load into a dense one, newly built")
    twin = _on_meta(module)
    _fill_(twin, source)
    devices = {name: tensor.device for name, tensor in module.state_dict().items() if not tensor.is_meta}
    usual = next(iter(devices.values()), torch.device("cpu"))
    if source.is_factorised:
        swap_(module, source.layers)
    moved: dict[int, Tensor] = {}  # one for each tensor, so that those of several names stay one
    state = twin.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in moved:
            on_device = tensor.detach().to(devices.get(name, usual))
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(on_device, tensor.requires_grad) if is_parameter else on_device
    module.load_state_dict({name: moved[id(tensor)] for name, tensor in state.items()}, assign=True)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module without its values."""
    memo: dict[int, Any] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.to("meta")
    return copy.deepcopy(module, memo)


def _fill_(model: nn.Module, source: Source) -> None:
    """Give a dense module the layers and tensors of a source; a tensor of several names stays one."""
    tensors, places = match_module(source, model)
    wanted = model.state_dict(keep_vars=True)
    read: dict[tuple[str, int], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, key in places.items():
        held = wanted[name]
        at = key, id(held)
        if at not in read:
            tensor = tensors.read(key).clone()
            read[at] = nn.Parameter(tensor, held.requires_grad) if isinstance(held, nn.Parameter) else tensor
        state[name] = read[at]
    for name in wanted.keys() - state.keys():
        state[name] = torch.zeros((), dtype=torch.long)
    model.load_state_dict(state, assign=True)
    check_orders(model)


def match_module(source: Source, model: nn.Module) -> tuple[TensorSource, dict[str, str]]:
    """Swap factorised layers in, and map the model's state-dict keys to those of the files.

    Old files lack batch counters, which are left out; a tensor with several names is stored under one at least.

    Raises SourceError that names a tensor which is missing, unexpected, quantised or of the wrong shape.
    """
    check_weights(source.folder, source.files)
    tensors = open_tensors(list(source.files))
    if source.is_factorised:
        swap_(model, source.layers)
    elif source.library == "timm":
        tensors = timm_tensors(source, model, tensors)
    every = model.named_modules(remove_duplicate=False)
    tripwires = {m.layout.weight_key(name) for name, m in every if isinstance(m, FactorisedLayer)}
    wanted, stored = model.state_dict(keep_vars=True), set(tensors.keys()) - tripwires
    same: dict[int, list[str]] = {}  # tensor -> its names
    for name, tensor in wanted.items():
        same.setdefault(id(tensor), []).append(name)
    places: dict[str, str] = {}
    for name, tensor in sorted(wanted.items()):
        key = next((key for key in (name, *same[id(tensor)]) if key in stored), None)
        if key is not None:
            places[name] = key
        elif not name.endswith("num_batches_tracked"):
            raise missing(source, name, stored)
    for key in sorted(stored):
        if key not in wanted:
            raise SourceError(
                f"{source.reference}: {key} has no place in {source.config.get('architecture') or type(model).__name__}"
            )
        dtype, shape = tensors.describe(key)
        check_plain(source, key, dtype, wanted[key])
        check_shape(source, key, shape, tuple(wanted[key].shape))
    return tensors, places
