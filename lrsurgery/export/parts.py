"""A factorised checkpoint whose tensors are to be written anew: which tensor in its files is what."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lrsurgery.checkpoints.build import build_model, check_plain_factors
from lrsurgery.checkpoints.mapping import PARTS, KeyTargets, check_plain, is_transformers_model, key_map
from lrsurgery.checkpoints.output import (
    check_output,
)
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.checkpoints.tensors import TensorSource, check_weights, open_tensors
from lrsurgery.checkpoints.upstream.layouts import check_shape, missing
from lrsurgery.errors import SourceError
from lrsurgery.linalg.pivot import is_permutation
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.kinds.folds import Fold, fold_of
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.surgery.tables.ties import leaders_of_tied


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tensors in the files of a factorised checkpoint, by what they are."""

    source: Source
    model: nn.Module  # with factorised layers, on the meta device
    dense_keys: KeyTargets  # of the same model without them
    tensors: TensorSource
    modules: dict[str, FactorisedLayer]  # by every name that they have
    layers: dict[str, str]  # what the keys of a layer begin with -> its name in the model
    others: list[str]  # keys of tensors outside of factorised layers
    tripwires: list[str]
    copies: dict[str, str]  # keys of orders that a tied layer has beside the one it is tied to -> its name
    unused: list[str]  # keys among the others that the model class does not use
    folds: dict[str, tuple[nn.Module, Fold]]  # layer -> the module that computed its dense weight, and how


def open_parts(reference: str, output: Path, source_options: SourceOptions, *, overwrite: bool) -> Parts:
    """Open a factorised checkpoint that is to be written anew. Raises SourceError or OutputError."""
    source = source_options.resolve(reference)
    if not source.is_factorised:
        raise SourceError(f"{reference}: not a factorised checkpoint, so there is nothing to export")
    check_plain_factors(source)
    check_output(output, source, overwrite)
    check_weights(source.folder, source.files)
    model = build_model(source, device="meta", trust_remote_code=source_options.trust_remote_code)
    dense_keys = key_map(source, model)
    modules_before = model.named_modules(remove_duplicate=False)
    folds = {name: (module, fold) for name, module in modules_before if (fold := fold_of(module))}
    swap_(model, source.layers)
    if is_transformers_model(model):
        from lrsurgery.checkpoints.upstream.transformers import retie_

        retie_(model)
    tensors = open_tensors(list(source.files))
    every = model.named_modules(remove_duplicate=False)
    keys, modules = key_map(source, model), {name: m for name, m in every if isinstance(m, FactorisedLayer)}
    found = factorised_layers(model)
    tied = leaders_of_tied(found)
    weights = {module.layout.weight_key(name) for name, module in modules.items()}
    layers: dict[str, str] = {}
    others: list[str] = []
    tripwires: list[str] = []
    unused: list[str] = []
    copies: dict[str, str] = {}
    names = set(tensors.keys())
    places: set[str] = set()  # state-dict keys of factors and biases in the files
    for key in tensors.keys():  # noqa: SIM118
        dtype, shape = tensors.describe(key)
        place = keys.target(key)[0] or ""
        if place:
            check_plain(source, key, dtype, keys.state[place])
        layer, part = _split(place, modules)
        if layer is not None and (leader := tied.get(layer, layer)) != layer and part != "u.bias":
            # the files have the tensors of tied layers under one of their names, and orders under each
            if part == "order":
                copies[key] = layer
                continue
            layer, place = leader, f"{leader}.{part}"
        elif layer is not None and part == "order" and f"{key.removesuffix('order')}u.weight" not in names:
            copies[key] = layer
            places.add(place)
            continue
        if layer is not None:
            places.add(place)
            check_shape(source, key, shape, tuple(keys.state[place].shape))
            layers[key.removesuffix(f".{part}")] = layer
        elif shape == (0,) and (dense_keys.target(key)[0] or key) in weights:  # a fold has no tensor of that name
            tripwires.append(key)
        else:
            others.append(key)
            unused += [] if place else [key]
    names_of: dict[int, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(id(module), []).append(name)
    # of a bias that a head shares with another part of the model, as BERT's, the files may have that name alone
    stored = {keys.target(key)[0] for key in others}
    aliases: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for layer, module in found.items():
        for part in module.state_dict():
            own = (part.endswith(".bias") and aliases.get(f"{layer}.{part}") not in stored) or layer not in tied
            if own and not any(f"{name}.{part}" in places for name in names_of[id(module)]):
                raise missing(source, f"{layer}.{part}", ())
    return Parts(
        source=source,
        model=model,
        dense_keys=dense_keys,
        tensors=tensors,
        modules=modules,
        layers=layers,
        others=others,
        tripwires=tripwires,
        copies=copies,
        unused=unused,
        folds=folds,
    )


def _split(place: str, modules: dict[str, FactorisedLayer]) -> tuple[str | None, str]:
    """(layer, part) of a state-dict key inside a factorised layer; None for any other key."""
    for part in PARTS:
        layer = place.removesuffix(f".{part}")
        if layer != place and layer in modules:
            return layer, part
    return None, ""


def read_layer(parts: Parts, stem: str, *, whole: bool = False) -> FactorisedLayer:
    """A layer with the values of the files; `stem` is what its keys begin with. Raises SourceError.

    A layer that shares its v gets it from the layer that stores it; with `whole`, all layers of its group are read.
    """
    layer = parts.modules[parts.layers[stem]]
    held = copy.deepcopy(layer)
    if not isinstance(held, SharedLinear) or not isinstance(layer, SharedLinear):
        _read_into(parts, stem, held)
        return held
    stems = stems_of(parts)
    for each, original in zip(held.group, layer.group, strict=True):
        if whole or each is held or each is held.leader:
            _read_into(parts, stems[id(original)], each)
    return held


def stems_of(parts: Parts) -> dict[int, str]:
    """What the keys of each layer begin with, by the number of its module."""
    return {id(parts.modules[layer]): stem for stem, layer in parts.layers.items()}


def _read_into(parts: Parts, stem: str, layer: FactorisedLayer) -> None:
    layer.load_state_dict({part: parts.tensors.read(f"{stem}.{part}") for part in layer.state_dict()}, assign=True)
    if layer.order is not None and not is_permutation(layer.order):
        raise SourceError(f"{stem}.order is no permutation, so the file is damaged")
