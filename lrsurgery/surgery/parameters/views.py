"""Every layer of a model by name, those among them that are a parameter of another module, and their replacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lrsurgery.modules import References
from lrsurgery.surgery.experts.banks import DenseBank, FactorisedBank, banks_in, reroute, view_of
from lrsurgery.surgery.layers import Dense
from lrsurgery.surgery.parameters.matrix import DenseMatrix, FactorisedMatrix, matrices_in

VIEWS = (DenseBank, DenseMatrix)
IN_PLACE = (FactorisedBank, FactorisedMatrix)  # what takes the place of a parameter


def views_in(module: nn.Module) -> Iterator[tuple[str, DenseBank | DenseMatrix]]:
    """The parameters that a module holds itself and that are layers, by their names in it."""
    for key, parameter in banks_in(module):
        yield key, view_of(module, parameter)
    yield from matrices_in(module)


def dense_layers(model: nn.Module) -> dict[str, Dense]:
    """Every module of a model by name, and a view of every parameter that is a layer by that of the parameter."""
    layers: dict[str, Dense] = {}
    for name, module in model.named_modules():
        layers[name] = module
        for key, view in views_in(module):
            layers[f"{name}.{key}".lstrip(".")] = view
    return layers


def replace_layer_(model: nn.Module, references: References, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of a layer; of one that is a parameter, in that of the parameter, or the reverse.

    Raises PlanError that names a place where that is impossible.
    """
    if not isinstance(old, (*VIEWS, *IN_PLACE)):
        references.replace_(old, new)
        return
    new.train(old.training)
    for module in model.modules():
        if isinstance(module, (*VIEWS, *IN_PLACE)):
            continue
        held: Mapping[str, Any] = module._modules if isinstance(old, IN_PLACE) else module._parameters
        wanted = old if isinstance(old, IN_PLACE) else old.weight
        for key in [key for key, each in held.items() if each is wanted]:
            delattr(module, key)
            setattr(module, key, new.weight if isinstance(new, VIEWS) else new)
            if isinstance(new, FactorisedBank):
                reroute()
