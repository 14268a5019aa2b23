"""Random values for factorised layers, for a model that is built from a config and not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsurgery.checkpoints.quantizer.method import LowRankConfig, LowRankQuantizer, own_
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.kinds.folds import weight_of
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.surgery.parameters.views import dense_layers


def factorise_randomly_(model: PreTrainedModel, entry: Any) -> None:
    """Give a model with random dense weights the factorised layers of a `quantization_config`, random as well."""
    config = LowRankConfig(**(entry if isinstance(entry, dict) else entry.to_dict()))
    spreads = spreads_of(model)
    quantizer = LowRankQuantizer(config)
    quantizer._process_model_before_weight_loading(model)
    quantizer.shapes = {}  # nothing is loaded
    fill_randomly_(model, spreads)
    own_(model, quantizer)


Spread = tuple[float, torch.device]  # standard deviation of a dense weight, and its device


def spreads_of(model: nn.Module) -> dict[str, Spread]:
    """The standard deviation and the device of the weight of every dense layer of a model; 0 on the meta device."""
    found = {}
    for name, layer in dense_layers(model).items():
        if isinstance(getattr(layer, "weight", None), Tensor):
            weight = weight_of(layer).detach()
            found[name] = (0.0 if weight.is_meta else float(weight.float().std(correction=0)), weight.device)
    return found


@torch.no_grad()
def fill_randomly_(model: nn.Module, spreads: Mapping[str, Spread]) -> None:
    """Give the factorised layers of a model, which are on the meta device, random factors and biases of 0.

    The entries of a product have the standard deviation of the dense weight. A layer whose dense weight was on the meta
    device stays there, for a loader to fill.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # tensor on the meta device -> itself, what replaces it
    for name, layer in factorised_layers(model).items():
        spread, device = spreads[name]
        if device.type == "meta":
            continue
        for part, deviation in zip((layer.u, layer.v), _deviations(layer, spread), strict=True):
            for key, old in part.named_parameters():
                if id(old) not in made:
                    new = torch.zeros(old.shape, dtype=old.dtype, device=device)
                    new = new.normal_(0, deviation) if key == "weight" else new
                    made[id(old)] = (old, nn.Parameter(new, requires_grad=old.requires_grad))
                part._parameters[key] = made[id(old)][1]
        if layer.order is not None:
            layer.order = torch.arange(len(layer.order), dtype=torch.int32, device=device)


def _deviations(layer: FactorisedLayer, spread: float) -> tuple[float, float]:
    """Standard deviations of u and v that give the product's entries the standard deviation `spread`.

    The kept part of a pivoted layer is entries of the product themselves, and the mixing has as many terms as the rank.
    """
    terms = float(layer.rank)
    if layer.side is None:
        return spread**0.5 / terms**0.25, spread**0.5 / terms**0.25
    return (terms**-0.5, spread) if layer.side == "rows" else (spread, terms**-0.5)
