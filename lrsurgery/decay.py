"""Frobenius decay: weight decay of the product U V, which the factors' own decay is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg import working_dtype
from lrsurgery.surgery import factorised_layers


def frobenius_gradients(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (1/2) ||U V||_F^2: U (V V^T) and (U^T U) V, in O((m + n) r^2), the product never formed.

    `u`, `v` are the weights of a factorised layer of any kind: `u` (out, rank, ...), `v` (rank, ...). Computed in fp32
    or wider and returned so, in the weights' shapes.

    Source: Khodak et al. 2021 (arXiv 2105.01029); Kamalakara et al. 2022 (arXiv 2209.13569).
    """
    wide = working_dtype(u.dtype)
    # (positions, out, rank): FSDP2 shards `out` unevenly, so it is not flattened with anything
    rows = (u.flatten(2) if u.ndim > 2 else u.unsqueeze(2)).detach().to(wide).permute(2, 0, 1)
    columns = v.detach().to(wide).flatten(1)
    of_u = rows @ (columns @ columns.T)
    of_v = (rows.mT @ rows).sum(0) @ columns
    return of_u.permute(1, 2, 0).view_as(u), of_v.view_as(v)


class FrobeniusDecay:
    """Decays (strength / 2) ||U V||_F^2 of every factorised layer, at every step of any `torch.optim.Optimizer`.

    Decoupled, as AdamW decays: before the step each factor moves by lr * strength * gradient, with the lr of its own
    parameter group. Coupled, as Khodak et al.: strength * gradient is added to the factor's `.grad`, and the optimizer
    does with it what it does with the loss's. A factor without a gradient rests, as in torch's own decay. A step that
    GradScaler skips decays nothing. Under FSDP2 each rank decays its own shards. Give the factors `weight_decay=0` in
    the optimizer, or they decay twice.

        decay = FrobeniusDecay(model, 0.01).attach(optimizer)
        ...
        decay.detach()

    Raises SurgeryError for a negative strength, a module without factorised layers, or an optimizer that holds none of
    their factors.
    """

    def __init__(self, module: nn.Module, strength: float, *, decoupled: bool = True) -> None:
        if not 0 <= strength < float("inf"):
            raise SurgeryError(f"decay strength {strength}: write a number of at least 0")
        self.strength, self.decoupled = strength, decoupled
        self._layers = list(factorised_layers(module).values())
        if not self._layers:
            raise SurgeryError("Frobenius decay: the model has no factorised layers; factorise it first")
        self._handle: RemovableHandle | None = None

    def attach(self, optimizer: Optimizer) -> FrobeniusDecay:
        """Hooks the optimizer; returns self, so that it can be detached later."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(factor.weight) in held for layer in self._layers for factor in (layer.u, layer.v)):
            raise SurgeryError("Frobenius decay: the optimizer holds no factor of this model; factorise, then build it")
        self.detach()
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        return self

    def detach(self) -> None:
        """Lets go of the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # GradScaler hands its scale and verdict to fused optimizers, and calls the others only where all is finite
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for layer in self._layers:
            u, v = layer.u.weight, layer.v.weight
            factors = [f for f in (u, v) if f.grad is not None and id(f) in rates]
            if not factors:
                continue
            of_u, of_v = frobenius_gradients(u, v)
            for factor, gradient in ((u, of_u), (v, of_v)):
                if not any(factor is f for f in factors):
                    continue
                if self.decoupled:
                    # in the gradient's width, so that a small decay of a bf16 factor is rounded once
                    factor.copy_(factor - rates[id(factor)] * self.strength * gradient)
                else:
                    assert factor.grad is not None
                    factor.grad.add_((self.strength * gradient * (1 if scale is None else scale)).to(factor.grad.dtype))
