"""Frobenius decay: weight decay of the product U V, in place of weight decay of each factor."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import working_dtype
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.tables.ties import leaders_of_tied

# Layers of equal shape with at most this many parameters in both factors are batched into one product.
# Measured in fp32 on two cores (examples/benchmarks/decay.py), 48 layers, against a loop: 3 to 9 times as fast at 500
# and 2,000 parameters, 0.8 to 1.7 times at 18,000, slower above, where stacking only copies the factors.
GROUPED = 16384

Pair: TypeAlias = "tuple[Tensor, Tensor]"


def frobenius_gradients(
    u: Tensor, v: Tensor, side: Side | None = None, *, turned: bool = False, stacked: bool = False
) -> Pair:
    """Gradients of (1/2) ||U V||_F^2: U (V V^T) and (U^T U) V, in O((m + n) r^2) without forming the product.

    `u` (out, rank, ...) and `v` (rank, ...) are the weights of a factorised layer of any kind, `v` (groups rank, ...)
    of a grouped one; where `turned`, `u` is (rank, out, ...). Computes and returns fp32 or wider, in the shapes of the
    weights.

    `stacked` weights of experts have their number in front, and each expert's product its own square.

    Of a pivoted layer the product holds the kept part beside U V. On the side of the rows that is V, so its square is
    ||V||_F^2 + ||U V||_F^2 and U^T U + 1 takes the place of U^T U; of the columns it is U, and V V^T + 1.

    Source: Khodak et al. 2021 (arXiv 2105.01029); Kamalakara et al. 2022 (arXiv 2209.13569).
    """
    if turned:
        of_u, of_v = _gradients(u.transpose(0, 1), v, 0, side)
        return of_u.transpose(0, 1), of_v
    if not stacked and len(v) > (rank := u.shape[1]):  # of a grouped layer
        groups = len(v) // rank
        by_group = [weight.reshape(groups, -1, *weight.shape[1:]) for weight in (u, v)]
        found = _gradients(by_group[0], by_group[1], 1, side)
        return found[0].flatten(0, 1), found[1].flatten(0, 1)
    return _gradients(u, v, int(stacked), side)


def _gradients(u: Tensor, v: Tensor, stacked: int, side: Side | None = None) -> Pair:
    """As `frobenius_gradients`, for weights with `stacked` leading batch axes (0 or 1)."""
    columns = v.detach().to(working_dtype(v.dtype)).flatten(stacked + 1)
    rows = u.detach().to(working_dtype(u.dtype))
    # (positions, ..., out, rank) of a spatial conv: FSDP2 shards `out` unevenly, so `out` stays an axis of its own
    spatial = u.shape[stacked + 2 :].numel() > 1
    rows = rows.flatten(stacked + 2).movedim(-1, 0) if spatial else rows.flatten(stacked + 1)
    of_u = rows @ _plus_one(columns @ columns.mT, side == "columns")
    inner = rows.mT @ rows
    of_v = _plus_one(inner.sum(0) if spatial else inner, side == "rows") @ columns
    return (of_u.movedim(0, -1) if spatial else of_u).view_as(u), of_v.view_as(v)


def _plus_one(square: Tensor, wanted: bool) -> Tensor:
    return square + torch.eye(square.shape[-1], dtype=square.dtype, device=square.device) if wanted else square


class FrobeniusDecay:
    """Decay of (strength / 2) ||U V||_F^2 for every factorised layer, at every step of any `torch.optim.Optimizer`.

    Decoupled, as in AdamW: before the step each factor moves by -lr * strength * gradient, with the lr of its parameter
    group. Coupled, as in Khodak et al. (2021): strength * gradient is added to the factor's `.grad`. A factor without a
    gradient is not decayed, as in torch's own weight decay. A step that GradScaler skips decays nothing. Under FSDP2
    each rank decays its own shards. Set `weight_decay=0` for the factors in the optimizer, or they decay twice.

        decay = FrobeniusDecay(model, 0.01).attach(optimizer)
        ...
        decay.detach()

    Raises SurgeryError for a negative strength, for a module without factorised layers, or for an optimizer that holds
    none of their factors.
    """

    def __init__(self, module: nn.Module, strength: float, *, decoupled: bool = True) -> None:
        if not 0 <= strength < float("inf"):
            raise SurgeryError(f"decay strength {strength}: write a number of at least 0")
        self.strength, self.decoupled = strength, decoupled
        layers = factorised_layers(module)
        tied = leaders_of_tied(layers)
        self._layers = [layer for name, layer in layers.items() if name not in tied]  # one product, one decay
        if not self._layers:
            raise SurgeryError("Frobenius decay: the model has no factorised layers; factorise it first")
        self._handle: RemovableHandle | None = None

    def attach(self, optimizer: Optimizer) -> FrobeniusDecay:
        """Register the hook of the optimizer; return self, so that it can be detached later.

        Of an optimizer that accelerate or others wrapped, the innermost gets it: that one takes the steps.
        """
        optimizer = _innermost(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(factor.weight) in held for layer in self._layers for factor in (layer.u, layer.v)):
            raise SurgeryError(
                "Frobenius decay: the optimizer holds no factor of this model; factorise first, then create it"
            )
        self.detach()
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        return self

    def detach(self) -> None:
        """Remove the hook of the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # GradScaler passes its scale and its check to fused optimizers; it skips other optimizers unless all is finite
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"] if p.grad is not None}

        def apply(factors: list[Tensor], of_factors: list[Tensor]) -> None:
            group = groups.get(id(factors[0]))
            if group is None:
                return
            if self.decoupled:
                _add_(factors, of_factors, -group["lr"] * self.strength)
            else:
                _add_([f.grad for f in factors], of_factors, self.strength * (1 if scale is None else scale))

        for us, v, side, _ in self._units():
            if len(us) > 1 and any(id(factor) in groups for factor in (*us, v)):
                found = [frobenius_gradients(u, v, side) for u in us]
                of_v = torch.stack([each for _, each in found]).sum(0)
                if side == "rows":  # the kept part is that of all of them, and counts once
                    of_v -= (len(us) - 1) * v.detach().to(of_v.dtype)
                for factor, gradient in ((v, of_v), *zip(us, (each for each, _ in found), strict=True)):
                    apply([factor], [gradient])
        banks = self._banks()
        for us, vs, side, turned in self._group_alike(groups, banks):
            if len(us) == 1:
                of_u, of_v = frobenius_gradients(us[0], vs[0], side, turned=turned, stacked=id(vs[0]) in banks)
                gradients = [[of_u], [of_v]]
            else:
                gradients = [list(g.unbind()) for g in _gradients(torch.stack(us), torch.stack(vs), 1, side)]
            for factors, of_factors in zip((us, vs), gradients, strict=True):
                apply(factors, of_factors)

    def _units(self) -> Iterator[tuple[list[Tensor], Tensor, Side | None, bool]]:
        """The factors u of the layers that have one v, the v, the side of their pivots, and whether u is turned."""
        together: dict[int, tuple[list[Tensor], Tensor, Side | None, bool]] = {}
        for layer in self._layers:
            us, *_ = together.setdefault(id(layer.v), ([], layer.v.weight, layer.side, layer.layout.u_turned))
            us.append(layer.u.weight)
        yield from together.values()

    def _banks(self) -> set[int]:
        """The factors v of fused experts, by number."""
        return {id(layer.v.weight) for layer in self._layers if layer.layout.stacked}

    def _group_alike(
        self, groups: dict[int, dict[str, Any]], banks: set[int]
    ) -> list[tuple[list[Tensor], list[Tensor], Side | None, bool]]:
        """Group the factors u and v of layers with a gradient in either, so that each group is one batched product."""
        alike: dict[Hashable, tuple[list[Tensor], list[Tensor], Side | None, bool]] = {}
        for number, (factors, v, side, turned) in enumerate(self._units()):
            if len(factors) > 1:
                continue
            u = factors[0]
            of_u, of_v = groups.get(id(u)), groups.get(id(v))
            if of_u is None and of_v is None:
                continue
            # sharded factors (DTensor) are not batched, nor are those of several matrices, which are batches
            batched = type(u) is type(v) is nn.Parameter and u.numel() + v.numel() <= GROUPED
            batched = batched and not turned and id(v) not in banks and len(v) == u.shape[1]
            shapes = (u.shape, v.shape, u.dtype, v.dtype, u.device, v.device, id(of_u), id(of_v), side)
            us, vs, *_ = alike.setdefault(shapes if batched else number, ([], [], side, turned))
            us.append(u)
            vs.append(v)
        return list(alike.values())


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a wrapper, such as accelerate's, calls; an AcceleratedOptimizer takes no hooks itself."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, Optimizer) else optimizer


def _add_(targets: list[Any], gradients: list[Tensor], factor: float | Tensor) -> None:
    """Add factor * gradient to each target, in the gradient's width, so that a bf16 target is rounded once."""
    if isinstance(factor, Tensor):  # a learning rate or scale on the device; reading it would synchronise
        gradients, factor = [g * factor.to(g.device) for g in gradients], 1.0
    torch._foreach_add_(targets, gradients, alpha=factor)
