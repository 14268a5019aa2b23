"""The change of layers in a model from one form to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrsurgery.linalg.factors import Factors, balance
from lrsurgery.linalg.pivot import Side
from lrsurgery.modules import Unfilled
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.fill import dense_bias, fill_
from lrsurgery.surgery.layers import (
    PARTS,
    FactorisedLayer,
    build_dense,
    factor_weights,
    side_for,
)
from lrsurgery.surgery.parameters.matrix import MatrixWeight
from lrsurgery.surgery.ranks import BALANCED, PIVOTED
from lrsurgery.surgery.shared.forms import (
    can_pivot,
    reform_group_,
)
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.surgery.tables.embedding import Projection
from lrsurgery.surgery.tables.ties import share_


def pivot_layers_(model: nn.Module) -> None:
    """Put every factorised layer below full rank into the pivoted form, which stores rank^2 numbers less.

    The layers stay the same modules, with new `u` and `v`; the outputs are the same up to rounding. Layers of kinds
    without that form, and layers that have it, stay as they are. Create optimizers afterwards.
    """
    for layer in factorised_layers(model).values():
        side = side_in(layer, PIVOTED)
        if side != layer.side:
            reform_(layer, side)


def balance_layers_(model: nn.Module) -> None:
    """Put every factorised layer into the balanced form, u^T u = v v^T; see `pivot_layers_`."""
    for layer in factorised_layers(model).values():
        if layer.side is not None:
            reform_(layer, None)


def side_in(layer: FactorisedLayer, form: str) -> Side | None:
    """The side of the pivots that a layer has in a form; None where it is balanced, also for want of another."""
    if form == BALANCED:
        return None
    if layer.tied and layer.tied[0] is not layer:
        return side_in(layer.tied[0], form)
    if isinstance(layer, SharedLinear):
        return "rows" if can_pivot(layer.group) else None
    if layer.side is not None or layer.rank == min(layer.matrix_shape):
        return layer.side
    with Unfilled():
        return side_for(layer.layout, build_dense(layer), layer.matrix_shape)


@contextmanager
def in_form(model: nn.Module, form: str) -> Iterator[None]:
    """Put the layers of a model into a form, and afterwards back: the same `u` and `v` as before, untouched.

    A layer whose `u` or `v` is another tool's module (quantised, with an adapter, pruned) stays as it is.
    """
    undo: list[Callable[[], None]] = []
    try:
        for layer in factorised_layers(model).values():
            alike = layer.group if isinstance(layer, SharedLinear) else layer.tied or (layer,)
            side = side_in(layer, form) if all(map(_is_plain, alike)) else layer.side
            if side != layer.side:
                undo += [_restore(each) for each in alike]
                reform_(layer, side)
        yield
    finally:
        for restore in undo:
            restore()


def _restore(layer: FactorisedLayer) -> Callable[[], None]:
    """What gives a layer the modules and the form that it has now."""
    held, order, side = dict(layer._modules), layer.order, layer.side
    pivots = layer.spec.pivots

    def restore() -> None:
        layer._modules.update(held)
        if isinstance(layer, SharedLinear):
            layer.set_pivots(pivots, order)
        else:
            layer.order, layer.side = order, side

    return restore


def _is_plain(layer: FactorisedLayer) -> bool:
    return all(
        (isinstance(part, nn.Embedding) or type(part) in (*PARTS, MatrixWeight, Projection))
        and type(part.weight) is nn.Parameter
        and part.weight.is_floating_point()
        for part in (layer.u, layer.v)
    )


@torch.no_grad()
def reform_(layer: FactorisedLayer, side: Side | None) -> None:
    """Give a layer another form in place: pivots on a side, or balanced (None). Works in fp64 and rounds once.

    A layer that shares its v takes the whole group along, one that is tied to others those.
    """
    if layer.tied and layer.tied[0] is not layer:
        layer = layer.tied[0]
    if isinstance(layer, SharedLinear):
        reform_group_(layer.group, [dense_bias(each) for each in layer.group], pivoted=side is not None)
        return
    held, bias = layer.u.weight, dense_bias(layer)
    wide = Factors(*(factor.double() for factor in layer.factors))
    with Unfilled():
        dense = build_dense(layer)
        new = layer.layout.make(dense, layer.rank, side)
    stored = factor_weights(layer.layout, dense.weight, balance(wide) if side is None else wide, side)  # type: ignore[arg-type]
    fill_(new, stored, bias, held.requires_grad)
    layer.u, layer.v, layer.order, layer.side = new.u, new.v, stored.order, side
    layer.train(layer.training)
    for other in layer.tied[1:]:
        with Unfilled():
            new = other.layout.make(build_dense(other), other.rank, side)
        if other.bias is not None:
            new.u.bias = other.u.bias
        other.u, other.v, other.side = new.u, new.v, side
        share_(layer, other)
        other.train(other.training)
