"""Subclasses of plain layers that compute the same: found out by a run on random weights and inputs, not by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.surgery.kinds.common import OWN, copy_as
from lrsurgery.surgery.layers import Dense, packing_of

LARGEST = 1 << 26  # entries of a weight that is tried: 256 MB
SIDE = 256  # rows and columns of the copy of a linear layer that has no settings of its own
SEED = 0
PLAIN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults are
_verdicts: dict[Any, bool] = {}


def behaves_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module is of the class `base` (nn.Linear or a convolution), or of a subclass that computes the same.

    A subclass must have the parameters of `base`, nothing else that is stored, and a forward with no further argument.
    Its verdict is that of a copy with random weights on the CPU, kept for modules with the same class and settings.
    """
    if type(module) is base:
        return True
    if not isinstance(module, base) or not _holds_the_same(module) or _is_too_large(module):
        return False
    if packing_of(module.weight) is not None:  # type: ignore[arg-type]
        return False
    key = _settings(module)
    if key is None:
        return _computes_the_same(module, base)
    if key not in _verdicts:
        _verdicts[key] = _computes_the_same(module, base)
    return _verdicts[key]


def _holds_the_same(module: Dense) -> bool:
    """Whether nothing is stored but the parameters of the plain layer."""
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    own = "weight" in names <= {"weight", "bias"} and "forward" not in vars(module)
    return own and not module._buffers and not module._modules


def explain_subclass(module: Dense, base: type[nn.Module]) -> str:
    """Why a module of a subclass of `base` is not taken for one of its own."""
    name = f"subclass {type(module).__name__} of {base.__name__}"
    if _holds_the_same(module) and _is_too_large(module):
        return f"{name}, too large to try whether it computes the same"
    return f"{name} that computes something else"


def _is_too_large(module: Dense) -> bool:
    return module.weight.numel() > LARGEST and not _is_sized_alone(module)


def _is_sized_alone(module: Dense) -> bool:
    """Whether the sizes of a linear layer are all its settings, so that a small copy shows how it computes."""
    return isinstance(module, nn.Linear) and vars(module).keys() <= OWN | {"in_features", "out_features"}


def _small(module: Dense) -> Dense:
    """A linear layer with smaller sides on the meta device."""
    out_features, in_features = (min(size, SIDE) for size in module.weight.shape)
    small = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
    return copy_as(small, type(module), small._parameters)


def _settings(module: Dense) -> Any:
    """What decides how a module computes, hashable; None if it holds an object whose meaning is unknown."""
    found: list[object] = [type(module), *(tuple(p.shape) for p in module._parameters.values() if p is not None)]
    for name, value in sorted(vars(module).items()):
        if name in OWN:
            continue
        if not _is_plain(value):
            return None
        found.append((name, repr(value)))
    return tuple(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _computes_the_same(module: Dense, base: type[nn.Module]) -> bool:
    taken, known = (len(inspect.signature(cls.forward).parameters) for cls in (type(module), base))
    if taken > known:  # a further argument changes what it computes
        return False
    if _is_sized_alone(module):
        module = _small(module)
    generator = torch.Generator("cpu").manual_seed(SEED)
    parameters: dict[str, nn.Parameter | None] = {
        name: nn.Parameter(_random(parameter.shape, generator), requires_grad=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for x in _inputs(module, generator):
                wanted = copy_as(module, base, parameters)(x)
                for training in (True, False):
                    found = copy_as(module, type(module), parameters).train(training)(x)
                    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
                        return False
                    if not bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max()):
                        return False
    except Exception:  # its code may raise anything
        return False
    return True


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values that repeat in memory, with another stride along each axis, so that a large weight costs little."""
    strides = (1, 3, 5, 7, 11)[: len(shape)]
    length = 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
    return torch.randn(max(1, length), generator=generator, **PLAIN).as_strided(shape, strides)


def _inputs(module: Dense, generator: torch.Generator) -> Iterator[Tensor]:
    """Inputs of every shape that may make a difference, small and large in value."""
    if isinstance(module, nn.Linear):
        for shape in ((3,), (2, 2)):
            for scale in (1.0, 1000.0):
                yield scale * torch.randn(*shape, module.weight.shape[1], generator=generator, **PLAIN)
        return
    windows = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    for more in range(max(module.stride) + 1):  # padding that hangs on the size shows at one of these
        size = [d * (k - 1) + 1 + s + more for k, s, d in windows]
        for scale in (1.0, 1000.0):
            yield scale * torch.randn(2, module.in_channels, *size, generator=generator, **PLAIN)
