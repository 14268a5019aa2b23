"""Spectron: updates of factors that bound the spectral norm of the update of their product.

Source: "Stabilizing Native Low-Rank LLM Pretraining" (arXiv 2602.12429), by the account of its Algorithms 1 and 3 in
NVIDIA's Emerging-Optimizers, not by its own text; here the factors are the parameters:

    M_u, M_v      running means of the gradients of U and V (beta1)
    O_u, O_v      M_u, M_v orthogonalised by five Newton-Schulz steps (Muon's)
    s_u, s_v      spectral norms of U and V, by one step of power iteration each, on from the last one's vector
    U, V          minus O_u, O_v times lr / (s_u + s_v + 1)

The update of W = U V is -(O_u V + U O_v) rate + O_u O_v rate^2, of spectral norm at most lr (rate < 1) for singular
values of O up to 1. Muon's Newton-Schulz gives up to about 1.2. All other parameters get AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors, working_dtype
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedConv, FactorisedLayer, FactorisedLinear
from lrsurgery.surgery.shared.modules import SharedLinear

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's quintic Newton-Schulz
ITERATIONS = 5
FIRST = 20  # power iterations of the first step, whose vector is random


def spectral_layers(model: nn.Module) -> dict[str, FactorisedLayer]:
    """The layers that Spectron updates: one balanced product of two factors that are no other layer's, in one piece."""
    return {name: layer for name, layer in factorised_layers(model).items() if _fits(layer)}


def others_note(model: nn.Module) -> str | None:
    """A note on the factorised layers that get AdamW; None where there are none."""
    others = factorised_layers(model).keys() - spectral_layers(model).keys()
    if not others:
        return None
    return (
        f"spectron: {len(others)} factorised layers, such as {min(others)}, are no plain product of two factors of"
        " their own, and get AdamW"
    )


def _fits(layer: FactorisedLayer) -> bool:
    simple = isinstance(layer, FactorisedLinear | FactorisedConv) and not isinstance(layer, SharedLinear)
    alone = layer.side is None and layer.groups == 1 and not layer.tied and not layer.layout.parameter
    return simple and alone and type(layer.u.weight) is type(layer.v.weight) is nn.Parameter


class Spectron(torch.optim.Optimizer):
    """Spectron for the factors of these layers, AdamW for all other parameters of the groups.

    The bound of the spectral norm of a product's update is the group's `lr` times `scale`. `weight_decay` of a group is
    decoupled, with its `lr`, for factors too. The running means of factors have AdamW's name, `exp_avg`.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        layers: Sequence[FactorisedLayer],
        *,
        scale: float = 1.0,
        **adamw: Any,
    ) -> None:
        self._adamw = torch.optim.AdamW(groups, **adamw)  # type: ignore[arg-type]
        super().__init__(self._adamw.param_groups, self._adamw.defaults)
        self.scale = scale
        self._layers = [(layer, layer.weight.shape) for layer in layers]  # the shape of the dense weight

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        done: list[tuple[Tensor, Tensor]] = []
        for layer, shape in self._layers:
            factors: list[Tensor] = [layer.u.weight, layer.v.weight]
            if all(id(p) in groups and p.grad is not None for p in factors):
                self._update_(layer, shape, groups[id(factors[0])])
                done += [(p, p.grad) for p in factors if p.grad is not None]
        for parameter, _ in done:
            parameter.grad = None
        # loading a state dict replaces both
        self._adamw.param_groups, self._adamw.state = self.param_groups, self.state
        self._adamw.step()
        for parameter, gradient in done:
            parameter.grad = gradient
        return loss

    def _update_(self, layer: FactorisedLayer, shape: torch.Size, group: Mapping[str, Any]) -> None:
        weights = (layer.u.weight, layer.v.weight)
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(weight)
            mean = state["exp_avg"]
            mean.lerp_(weight.grad.to(mean.dtype), 1 - group["betas"][0])
        means = layer.layout.to_matrices(*(self.state[weight]["exp_avg"] for weight in weights))
        u, v = layer.layout.to_matrices(*weights)
        norms = self._norm(weights[0], u) + self._norm(weights[1], v.mT)
        rate = group["lr"] * self.scale / (norms + 1)
        steps = layer.layout.to_weights(Factors(orthogonalised(means.u), orthogonalised(means.v)), shape)
        for weight, step in zip(weights, steps, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_((step * rate).to(weight.dtype))

    def _norm(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """The spectral norm of a factor's matrix (long, rank), from below; the vector is kept with the weight."""
        state, matrix = self.state[weight], matrix.to(working_dtype(matrix.dtype))
        vector, times = state.get("vector"), 1
        if vector is None:  # of its own generator, so that every process has the same
            vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
            times = FIRST
        for _ in range(times):
            vector = torch.nn.functional.normalize(matrix.mT @ (matrix @ vector), dim=0)
        state["vector"] = vector
        norm: Tensor = (matrix @ vector).norm()
        return norm


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of 1, roughly: theirs are 0.7 to 1.2, but for tiny ones of the matrix.

    Five quintic Newton-Schulz steps with Muon's coefficients (Jordan et al. 2024), in fp32 or wider.
    """
    x: Tensor = matrix.to(working_dtype(matrix.dtype))
    x = x / (x.norm() + 1e-12)
    turned = x.shape[0] > x.shape[1]
    x = x.mT if turned else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if turned else x
