"""What training does to the factors: effective ranks and norms, layer by layer, read off the factors alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors, product_values
from lrsurgery.linalg.spectrum import Points, entropy_rank, nuclear_rank, stable_rank
from lrsurgery.surgery.apply import factorised_layers

POINTS = 16  # of a spectrum, at each evaluation


@torch.no_grad()
def layer_dynamics(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Layer -> nuclear, entropy and stable rank of U V, its Frobenius and spectral norm, the norms of U and V.

    And "spectrum": some points of the singular values of U V, as {"index": positions from 1, "value": values}.

    In O((m + n) r^2) a layer; the product is never formed. Shards (FSDP2) are gathered, so every process calls.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, layer in factorised_layers(model).items():
        u, v = (whole(factor) for factor in layer.factors)
        values = product_values(Factors(u, v)).double().cpu()
        found[name] = {
            "nuclear_rank": nuclear_rank(values),
            "entropy_rank": entropy_rank(values),
            "stable_rank": stable_rank(values),
            "frobenius_norm": float(values.norm()),
            "spectral_norm": float(values[0]),
            "u_norm": float(u.double().norm()),
            "v_norm": float(v.double().norm()),
            "spectrum": asdict(Points.of(values, points=POINTS)),
        }
    return found


@torch.no_grad()
def steepest_decay(model: nn.Module) -> tuple[str, float]:
    """(layer, largest squared singular value of any factor): Frobenius decay scales a factor by 1 - lr strength that.

    Above 1 / (lr strength) a step of decoupled decay overshoots zero, above twice that it diverges.
    """
    worst, square = "", 0.0
    for name, layer in factorised_layers(model).items():
        for factor in layer.factors:
            short = whole(factor).float()
            gram = short @ short.T if short.shape[0] < short.shape[1] else short.T @ short
            top = float(torch.linalg.eigvalsh(gram)[-1])
            if top > square:
                worst, square = name, top
    return worst, square


def whole(tensor: Any) -> Tensor:
    """A parameter as one tensor, gathered where FSDP2 has sharded it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()
