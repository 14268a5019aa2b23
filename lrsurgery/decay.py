"""Frobenius decay: weight decay of the product U V, which the factors' own decay is not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg import working_dtype
from lrsurgery.surgery import factorised_layers

# Layers with at most this many numbers in both factors go through one batched product with those of their shape.
# Measured in fp32 on two cores, 48 layers, against a loop: 2.4 to 5.6 times as fast from 128 to 18,000 numbers, 1.3
# times at 33,000, 0.95 times at 74,000, where the products outweigh the calls and stacking only copies the factors.
GROUPED = 32768

Pair: TypeAlias = "tuple[Tensor, Tensor]"


def frobenius_gradients(u: Tensor, v: Tensor) -> Pair:
    """Gradients of (1/2) ||U V||_F^2: U (V V^T) and (U^T U) V, in O((m + n) r^2), the product never formed.

    `u`, `v` are the weights of a factorised layer of any kind: `u` (out, rank, ...), `v` (rank, ...). Computed in fp32
    or wider and returned so, in the weights' shapes.

    Source: Khodak et al. 2021 (arXiv 2105.01029); Kamalakara et al. 2022 (arXiv 2209.13569).
    """
    return _in_shape(*_products(_rows(u), _columns(v)), u, v)


def _rows(u: Tensor) -> Tensor:
    """(out, rank), or (positions, out, rank) of a spatial conv: FSDP2 shards `out` unevenly, so it stays an axis."""
    wide = u.detach().to(working_dtype(u.dtype))
    return wide.flatten(1) if wide.shape[2:].numel() == 1 else wide.flatten(2).permute(2, 0, 1)


def _columns(v: Tensor) -> Tensor:
    return v.detach().to(working_dtype(v.dtype)).flatten(1)


def _products(rows: Tensor, columns: Tensor) -> Pair:
    """Both gradients of rows ([positions,] [layers,] out, rank) and columns ([layers,] rank, in), in their shapes."""
    of_u = rows @ (columns @ columns.mT)
    inner = rows.mT @ rows
    return of_u, (inner.sum(0) if rows.ndim > columns.ndim else inner) @ columns


def _in_shape(of_u: Tensor, of_v: Tensor, u: Tensor, v: Tensor) -> Pair:
    return (of_u if of_u.ndim == 2 else of_u.permute(1, 2, 0)).view_as(u), of_v.view_as(v)


def _gradients(pairs: Sequence[Pair]) -> list[Pair]:
    """`frobenius_gradients` of layers of the same shapes, in one batch."""
    if len(pairs) == 1:
        return [frobenius_gradients(*pairs[0])]
    rows = torch.stack([_rows(u) for u, _ in pairs], -3)
    of_us, of_vs = _products(rows, torch.stack([_columns(v) for _, v in pairs]))
    return [_in_shape(a, b, *pair) for a, b, pair in zip(of_us.unbind(-3), of_vs.unbind(), pairs, strict=True)]


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
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
        for pairs in self._alike(groups):
            for factors, gradients in zip(zip(*pairs, strict=True), zip(*_gradients(pairs), strict=True), strict=True):
                group = groups.get(id(factors[0]))
                if group is None:
                    continue
                if self.decoupled:
                    _add_(factors, gradients, -group["lr"] * self.strength)
                else:
                    _add_([f.grad for f in factors], gradients, self.strength * (1 if scale is None else scale))

    def _alike(self, groups: dict[int, dict[str, Any]]) -> list[list[Pair]]:
        """(u, v) of every layer with a factor that moves, those together that are computed together."""
        alike: dict[Hashable, list[Pair]] = {}
        for number, layer in enumerate(self._layers):
            u, v = layer.u.weight, layer.v.weight
            of_u, of_v = groups.get(id(u)), groups.get(id(v))
            if of_u is None and of_v is None:
                continue
            batched = u.numel() + v.numel() <= GROUPED and type(u.data) is type(v.data) is Tensor  # no DTensor
            shapes = (u.shape, v.shape, u.dtype, v.dtype, u.device, v.device, id(of_u), id(of_v))
            alike.setdefault(shapes if batched else number, []).append((u, v))
        return list(alike.values())


def _add_(targets: Sequence[Any], gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Adds factor * gradient to each target. In the gradient's width, so that a small part of bf16 is rounded once."""
    if isinstance(factor, Tensor):  # a learning rate or a scale on the device; reading it would wait for the device
        gradients, factor = [g * factor.to(g.device) for g in gradients], 1.0
    torch._foreach_add_(list(targets), list(gradients), alpha=factor)
