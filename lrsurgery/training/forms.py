"""The form that layers train in, and the one that they are published in.

Balanced factors train better (both have the scale of the square root of the product), pivoted ones are smaller. The
change is exact up to rounding, so a pivoted model is balanced for its training, and pivoted again at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.apply import factorised_layers, reform_


def to_train_(model: nn.Module, form: str) -> dict[str, Side]:
    """Balance the pivoted layers by a recipe's `train_form`; return the side that each had.

    With "auto" those that are no larger than dense then.
    """
    changed: dict[str, Side] = {}
    for name, layer in factorised_layers(model).items():
        rows, columns = layer.matrix_shape
        smaller = layer.rank * (rows + columns) <= rows * columns
        if layer.side is not None and (form == "balanced" or (form == "auto" and smaller)):
            changed[name] = layer.side
            reform_(layer, None)
    return changed


def to_publish_(model: nn.Module, sides: Mapping[str, Side]) -> None:
    """Pivot these layers again."""
    layers = factorised_layers(model)
    for name, side in sides.items():
        reform_(layers[name], side)


def describe(model: nn.Module, sides: Mapping[str, Side]) -> str | None:
    """A note on what trains in which form; None for a model without pivoted layers."""
    layers = factorised_layers(model)
    left = sum(layer.side is not None for layer in layers.values())
    rest = f"{left} pivoted layers train as they are" if left else None
    if not sides:
        return rest
    trained = sum(parameter.numel() for parameter in model.parameters())
    stored = trained - sum(layers[name].rank ** 2 for name in sides)
    text = (
        f"{len(sides)} pivoted layers train balanced, in {trained:,} parameters of the model, and are pivoted again at"
        f" the end, in {stored:,}"
    )
    return text + (f"; {rest}" if rest else "")
