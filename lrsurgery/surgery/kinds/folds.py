"""Dense weights that a module computes from stored tensors: standardised, with or without a gain, and weight norm.

The factorised layer of such a module is plain: it has the weight that the module applies, and none of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from lrsurgery.linalg.factors import working_dtype
from lrsurgery.surgery.kinds.common import copy_as, is_one_of
from lrsurgery.surgery.layers import Dense

BASES: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d),
)
STANDARDISED = {
    ("timm.layers.std_conv", "StdConv2d"),
    ("timm.layers.std_conv", "StdConv2dSame"),
    ("transformers.models.bit.modeling_bit", "WeightStandardizedConv2d"),
}
SCALED = {("timm.layers.std_conv", "ScaledStdConv2d"), ("timm.layers.std_conv", "ScaledStdConv2dSame")}


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How the dense weight of a module follows from the tensors that it stores."""

    matches: Callable[[Dense], bool]
    parts: tuple[str, ...]  # names of the tensors within the module; the last has the shape of the weight
    compute: Callable[[Dense, Sequence[Tensor]], Tensor]  # module, parts -> weight, in the dtype of the parts
    # module, weight -> parts that give it; None where some weights have none
    store: Callable[[Dense, Tensor], tuple[Tensor, ...]] | None = None


def fold_of(module: nn.Module) -> Fold | None:
    """The fold of a module; None if its weight is stored as it is applied."""
    if type(module) in BASES and not module._forward_pre_hooks:  # most layers of a model
        return None
    return next((fold for fold in FOLDS if fold.matches(module)), None)


def plain_of(module: Dense) -> Dense:
    """The plain layer with the dense weight of a module, on the meta device; the module itself if it has no fold."""
    fold = fold_of(module)
    if fold is None:
        return module
    base = next(base for base in BASES if isinstance(module, base))
    stored = part_of(module, fold.parts[-1])
    weight = nn.Parameter(torch.empty_like(stored, device="meta"), requires_grad=stored.requires_grad)
    return copy_as(module, base, {"weight": weight, "bias": module.bias})


def weight_of(module: Dense) -> Tensor:
    """The dense weight that a module applies, detached."""
    fold = fold_of(module)
    if fold is None:
        return module.weight.detach()  # type: ignore[no-any-return]
    return folded(fold, module, [part_of(module, part).detach() for part in fold.parts])


def folded(fold: Fold, module: Dense, parts: Sequence[Tensor]) -> Tensor:
    """The dense weight of these parts, computed in fp32 or wider and rounded once to the dtype of the last."""
    wide = working_dtype(parts[-1].dtype)
    return fold.compute(module, [part.to(wide) for part in parts]).to(parts[-1].dtype)


def part_of(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    assert isinstance(found, Tensor), name
    return found


def explain_fold(module: Dense) -> str | None:
    """Why a module that computes its weight cannot be folded; None if it can, or computes none."""
    if is_one_of(module, STANDARDISED | SCALED) and _pads_by_size(module):
        return f"{type(module).__name__} that pads by the size of its input"
    return None


def _pads_by_size(module: Dense) -> bool:
    dynamic = getattr(module, "same_pad", False) or getattr(module, "pad", None) is not None
    return dynamic and any(k > 1 for k in module.kernel_size)  # a kernel of 1 needs no padding at any size


def _is_standardised(module: Dense) -> bool:
    return is_one_of(module, STANDARDISED) and not _pads_by_size(module)


def _is_scaled(module: Dense) -> bool:
    return is_one_of(module, SCALED) and not _pads_by_size(module)


def _standardise(module: Dense, weight: Tensor, gain: Tensor | None = None) -> Tensor:
    rows = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=module.eps).reshape_as(weight)


def _standardised(module: Dense, parts: Sequence[Tensor]) -> Tensor:
    return _standardise(module, parts[0])


def _scaled(module: Dense, parts: Sequence[Tensor]) -> Tensor:
    gain, weight = parts
    return _standardise(module, weight, (gain * module.scale).view(-1))


def _is_weight_norm(module: Dense) -> bool:
    held = getattr(module, "parametrizations", None)
    if held is None or set(held) != {"weight"} or len(held["weight"]) != 1 or len(module._modules) != 1:
        return False
    return (
        type(held["weight"][0]) is torch.nn.utils.parametrizations._WeightNorm
        and type_before_parametrizations(module) in BASES
    )


def _weight_norm(module: Dense, parts: Sequence[Tensor]) -> Tensor:
    return _normalise(parts, module.parametrizations["weight"][0].dim)


def _store_weight_norm(module: Dense, weight: Tensor) -> tuple[Tensor, ...]:
    return _norms(weight, module.parametrizations["weight"][0].dim)


def _is_hooked_weight_norm(module: Dense) -> bool:
    return type(module) in BASES and _hook_of(module) is not None


def _hooked_weight_norm(module: Dense, parts: Sequence[Tensor]) -> Tensor:
    return _normalise(parts, _dim_of(module))


def _store_hooked(module: Dense, weight: Tensor) -> tuple[Tensor, ...]:
    return _norms(weight, _dim_of(module))


def _dim_of(module: Dense) -> int:
    return int(_hook_of(module).dim)  # type: ignore[union-attr]


def _hook_of(module: nn.Module) -> Dense | None:
    """The hook of torch.nn.utils.weight_norm, the older form, on a module's weight."""
    hooks = module._forward_pre_hooks.values()
    found = (h for h in hooks if type(h) is WeightNorm and h.name == "weight")
    return next(found, None)


def _normalise(parts: Sequence[Tensor], dim: int) -> Tensor:
    norms, weight = parts
    return torch._weight_norm(weight, norms, dim)


def _norms(weight: Tensor, dim: int) -> tuple[Tensor, ...]:
    wide = weight.to(working_dtype(weight.dtype))
    return torch.norm_except_dim(wide, 2, dim).to(weight.dtype), weight


FOLDS = (
    Fold(matches=_is_standardised, parts=("weight",), compute=_standardised),
    Fold(matches=_is_scaled, parts=("gain", "weight"), compute=_scaled),
    Fold(
        matches=_is_weight_norm,
        parts=("parametrizations.weight.original0", "parametrizations.weight.original1"),
        compute=_weight_norm,
        store=_store_weight_norm,
    ),
    Fold(
        matches=_is_hooked_weight_norm,
        parts=("weight_g", "weight_v"),
        compute=_hooked_weight_norm,
        store=_store_hooked,
    ),
)
