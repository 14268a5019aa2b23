"""The form that layers train in, and the one that they are published in.

Balanced factors train better (both have the scale of the square root of the product), pivoted ones are smaller. The
change is exact up to rounding, so a pivoted model is balanced for its training, and pivoted again at the end. Layers
that a run makes itself train and are published in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.change import reform_, side_in
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.surgery.plan import Plan
from lrsurgery.surgery.shared.modules import SharedLinear, is_led
from lrsurgery.surgery.tables.ties import leaders_of_tied
from lrsurgery.training.recipe import Recipe


def trains_balanced(rank: int, rows: int, columns: int, form: str) -> bool:
    """Whether a pivoted layer trains balanced by a recipe's `train_form`; "auto": where it is no larger than dense."""
    return form == "balanced" or (form == "auto" and rank * (rows + columns) <= rows * columns)


def to_train_(model: nn.Module, form: str) -> dict[str, Side | None]:
    """Balance the pivoted layers that train so by a recipe's `train_form`; return the side that each had."""
    changed: dict[str, Side | None] = {
        name: layer.side
        for name, layer in factorised_layers(model).items()
        if layer.side is not None and trains_balanced(layer.rank, *_whole_shape(layer), form)
    }
    to_publish_(model, dict.fromkeys(changed))
    return changed


def _whole_shape(layer: FactorisedLayer) -> tuple[int, int]:
    """(rows, columns) of a layer, together with those that share its v."""
    rows, columns = layer.matrix_shape
    return sum(each.out_features for each in layer.group) if isinstance(layer, SharedLinear) else rows, columns


def in_training(plan: Plan, form: str) -> Plan:
    """A plan with its layers in the form that they train in by a recipe's `train_form`, at the same ranks."""
    pivoted = [row for row in plan.replacements if row.pivots]
    return plan.with_rows(
        {
            row.name: replace(row, side=None)
            for row in pivoted
            if trains_balanced(row.rank or 0, row.rows, row.columns, form)
        }
    )


def published_sides(model: nn.Module, recipe: Recipe, read: Mapping[str, Side | None]) -> dict[str, Side | None]:
    """The side of the pivots that each layer is published with, of those that train in another form; None: balanced.

    `read` are the sides of layers that were read pivoted and train balanced.
    """
    form = recipe.form or ("pivoted" if recipe.rank else None)
    if form is None:
        return dict(read)
    sides = {name: (side_in(layer, form), layer.side) for name, layer in factorised_layers(model).items()}
    changed = {name: after for name, (after, before) in sides.items() if after != before}
    return changed if form == "balanced" else {**changed, **read}


def to_publish_(model: nn.Module, sides: Mapping[str, Side | None]) -> None:
    """Put these layers into the form that they are published in."""
    layers = factorised_layers(model)
    for name, side in sides.items():
        if layers[name].side != side:  # or a layer that shares its v has taken it along
            reform_(layers[name], side)


def describe(model: nn.Module, sides: Mapping[str, Side | None]) -> str | None:
    """A note on what trains in which form; None for a model whose layers are balanced throughout."""
    layers = factorised_layers(model)
    follow = {name for name, layer in layers.items() if is_led(layer)} | leaders_of_tied(layers).keys()
    left = sum(layer.side is not None and name not in sides for name, layer in layers.items())
    trained = sum(parameter.numel() for parameter in model.parameters())
    stored = trained - sum(
        (1 if side else -1) * layers[name].rank ** 2 for name, side in sides.items() if name not in follow
    )
    pivoted, balanced = sum(side is not None for side in sides.values()), sum(not side for side in sides.values())
    said = []
    if pivoted:
        said.append(
            f"{pivoted} pivoted layers train balanced, in {trained:,} parameters of the model, and are pivoted at the"
            f" end, in {stored:,}"
        )
    if balanced:
        said.append(f"{balanced} layers train pivoted, and are balanced at the end")
    if left:
        said.append(f"{left} pivoted layers train as they are")
    return "; ".join(said) or None
