"""Layers that have one weight, as a table of tokens and the head tied to it: the same u and v in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lrsurgery.errors import PlanError
from lrsurgery.linalg.pivot import Side
from lrsurgery.modules import Unfilled
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.layers import Dense, FactorisedLayer


def leaders_of_tied(layers: Mapping[str, FactorisedLayer]) -> dict[str, str]:
    """Layer -> the layer before it, in the order of the model, that stores its u and v, of those that are tied."""
    names = {id(layer): name for name, layer in layers.items()}
    return {
        name: names[id(layer.tied[0])]
        for name, layer in layers.items()
        if layer.tied and layer.tied[0] is not layer and layer.u.weight is layer.tied[0].u.weight
    }


def tie_(layers: Mapping[str, FactorisedLayer], leaders: Mapping[str, str]) -> None:
    """Give layers the `u` and `v` of those whose weight is theirs, too: layer -> the layer that stores them.

    Raises PlanError for layers that cannot have the same.
    """
    groups: dict[str, list[FactorisedLayer]] = {}
    for name, leader in leaders.items():
        if leader not in layers:
            raise PlanError(f"{name}: tied to {leader}, which is no factorised layer")
        first, layer = layers[leader], layers[name]
        shapes = [(each.u.weight.shape, each.v.weight.shape, each.side) for each in (first, layer)]
        if shapes[0] != shapes[1]:
            raise PlanError(f"{name}: its shape, rank or form is not that of {leader}, to which it is tied")
        groups.setdefault(leader, [first]).append(layer)
        share_(first, layer)
    for group in groups.values():
        for layer in group:
            layer.tied = tuple(group)


def make_partner(dense: Dense, kind: str, rank: int, side: Side | None) -> FactorisedLayer:
    """The factorised layer of a kind for one with another's weight, on the meta device but for its own bias."""
    with Unfilled():
        made = KINDS[kind].make(dense, rank, side)
    if not KINDS[kind].lookup:
        made.u.bias = dense.bias
    return made


def share_(first: FactorisedLayer, layer: FactorisedLayer) -> None:
    """Give a layer the tensors of another."""
    layer.u.weight, layer.v.weight = first.u.weight, first.v.weight
    # a copy: libraries tie parameters and no buffers
    layer.order = None if first.order is None else first.order.clone()


def copy_orders_(layers: Iterable[FactorisedLayer]) -> None:
    """Give layers the order of the layer that they are tied to, which a file of a model without a head lacks."""
    for layer in layers:
        if layer.tied and layer is not layer.tied[0]:
            share_(layer.tied[0], layer)
