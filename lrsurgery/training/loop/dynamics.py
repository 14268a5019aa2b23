"""What training does to the factors: effective ranks, norms and the reach of decay, computed from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from lrsurgery.linalg.factors import Factors, product_values
from lrsurgery.linalg.spectrum import Points, entropy_rank, nuclear_rank, stable_rank
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.training.recipe import Recipe

POINTS = 16  # of a spectrum, at each evaluation


class SpectrumPoints(TypedDict):
    """Some singular values: `value[i]` is the `index[i]`-th, counted from 1."""

    index: tuple[int, ...]
    value: tuple[float, ...]


class LayerDynamics(TypedDict):
    """A factorised layer at one evaluation, as metrics.jsonl holds it. Ranks, norms and spectrum are those of U V."""

    nuclear_rank: float
    entropy_rank: float
    stable_rank: float
    frobenius_norm: float
    spectral_norm: float
    u_norm: float  # Frobenius, of U alone
    v_norm: float
    spectrum: SpectrumPoints


@torch.no_grad()
def layer_dynamics(model: nn.Module) -> dict[str, LayerDynamics]:
    """The dynamics of every factorised layer, in O((m + n) r^2) each: the product is never formed.

    Gathers the shards of FSDP2, so every process has to call it.
    """
    found: dict[str, LayerDynamics] = {}
    for name, layer in factorised_layers(model).items():
        u, v = (whole(factor) for factor in layer.factors)
        values = product_values(Factors(u, v)).double().cpu()
        points = asdict(Points.of(values, points=POINTS))
        found[name] = LayerDynamics(
            nuclear_rank=nuclear_rank(values),
            entropy_rank=entropy_rank(values),
            stable_rank=stable_rank(values),
            frobenius_norm=float(values.norm()),
            spectral_norm=float(values[0]),
            u_norm=float(u.double().norm()),
            v_norm=float(v.double().norm()),
            spectrum=SpectrumPoints(index=points["index"], value=points["value"]),
        )
    return found


@torch.no_grad()
def steepest_decay(model: nn.Module) -> tuple[str, float]:
    """(layer, largest squared singular value of any factor). Frobenius decay scales that factor by 1 - lr strength s^2.

    A step of decoupled decay overshoots zero where lr strength s^2 is above 1, and diverges where it is above 2.
    """
    worst, square = "", 0.0
    for name, layer in factorised_layers(model).items():
        for factor in _decayed(layer):
            short = whole(factor).float()
            gram = short @ short.mT if short.shape[-2] < short.shape[-1] else short.mT @ short
            top = float(torch.linalg.eigvalsh(gram).max())
            if top > square:
                worst, square = name, top
    return worst, square


def _decayed(layer: FactorisedLayer) -> Iterator[Tensor]:
    """The factors of a layer; those that share a v are stacked, as its decay is that of all of them."""
    if not isinstance(layer, SharedLinear):
        yield from layer.factors
    elif layer.leader is layer:
        yield torch.cat([whole(each.factors.u) for each in layer.group])
        yield layer.factors.v


def overshoot(model: nn.Module, recipe: Recipe, lr: float) -> str | None:
    """A warning with the bound, where the first step of Frobenius decay alone would carry a factor past zero."""
    drives = recipe.decay == "frobenius" and (not recipe.decay_coupled or recipe.optimizer == "sgd")
    if not drives or not factorised_layers(model):
        return None
    layer, square = steepest_decay(model)
    reach = lr * recipe.decay_strength * square
    if reach <= 1:
        return None
    return (
        f"decay_strength {recipe.decay_strength:g} overshoots: lr * strength * sigma_max^2 is {reach:.3g} at"
        f" {layer.removeprefix('body.')}, and must stay below 1; write at most {1 / (lr * square):.2g}"
    )


def steepest_gradient(model: nn.Module) -> str:
    """The parameter with the largest gradient, and its norm; one that is not finite beats every other."""
    sizes = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = float(parameter.grad.detach().float().norm())
            sizes[name.removeprefix("body.")] = norm if math.isfinite(norm) else math.inf
    worst = max(sizes, key=lambda name: sizes[name], default="no parameter")
    return f"{worst} (norm {sizes[worst]:.3g})" if worst in sizes else worst


def whole(tensor: Tensor) -> Tensor:
    """A parameter as one tensor, gathered where FSDP2 has sharded it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()
