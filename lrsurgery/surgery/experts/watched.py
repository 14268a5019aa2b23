"""The products of dense fused experts, seen one by one while a model runs: inputs and outputs by expert.

An object in front of the parameter answers the code of the experts. Transformers' functions for all experts
at once are switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.errors import CalibrationError
from lrsurgery.surgery.parameters.shadow import Shadow, in_front

# expert, inputs (positions, in), outputs (positions, out) -> the outputs to go on with
See: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
PRODUCTS = ("matmul", "__matmul__", "mm")


@contextmanager
def watch_products(holder: nn.Module, seen: Mapping[str, See], mask: Callable[[], Tensor | None]) -> Iterator[None]:
    """Show every product of these parameters of a module of experts within this context.

    `mask` returns the positions of the batch (batch, tokens) that count, None for all; the experts do not work on the
    others, whose outputs are 0.
    """
    config: Any = getattr(holder, "config", None)
    asked = getattr(config, "_experts_implementation", None)
    hidden = _Masking(mask)
    handles = [
        holder.register_forward_pre_hook(hidden.leave_out, with_kwargs=True),
        holder.register_forward_hook(hidden.put_back),
    ]
    try:
        if asked is not None:
            config._experts_implementation = "eager"
        with in_front(holder, {key: _WatchedBank(holder, key, see) for key, see in seen.items()}):
            yield
    finally:
        if asked is not None:
            config._experts_implementation = asked
        for handle in handles:
            handle.remove()


class _Masking:
    """Hooks that keep masked positions from the experts and give them outputs of 0."""

    def __init__(self, mask: Callable[[], Tensor | None]) -> None:
        self._mask = mask
        self._left_out: Tensor | None = None

    def leave_out(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = self._mask()
        given = [*args, *kwargs.values()]
        self._left_out = None
        if mask is None or not given or len(given[0]) % mask.numel():
            return None
        # some families repeat the tokens for every expert
        keep = self._left_out = mask.to(given[0].device).flatten().repeat(len(given[0]) // mask.numel())

        def kept(value: Any) -> Any:
            return value[keep] if isinstance(value, Tensor) and value.ndim and len(value) == len(keep) else value

        return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}

    def put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        keep, self._left_out = self._left_out, None
        if keep is None:
            return None
        whole = output.new_zeros(len(keep), *output.shape[1:])
        whole[keep] = output
        return whole


class _WatchedBank(Shadow):
    """What stands before a parameter (experts, ...) in the code of its experts."""

    def __init__(self, holder: nn.Module, key: str, see: See) -> None:
        super().__init__(holder, key)
        self._see = see

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "size", "dim", "is_floating_point"):
            return getattr(self.weight, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.ndim:
            raise _unknown("an index of several experts")
        return _WatchedMatrix(self.weight[index], int(index), self._see)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("bmm", "matmul", "__matmul__") or len(args) != 2 or not isinstance(args[1], _WatchedBank):
            raise _unknown(name)
        x, bank = args
        outputs = func(x, bank.weight)
        return torch.stack([bank._see(number, x[number], each) for number, each in enumerate(outputs)])


class _WatchedMatrix:
    """The weight of one expert in its code."""

    def __init__(self, weight: Tensor, expert: int, see: See) -> None:
        self.weight, self._expert, self._see = weight, expert, see

    def to(self, *args: Any, **kwargs: Any) -> _WatchedMatrix:
        return _WatchedMatrix(self.weight.to(*args, **kwargs), self._expert, self._see)

    def float(self) -> _WatchedMatrix:
        return self.to(torch.float32)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, x, matrix = getattr(func, "__name__", ""), args[0], args[1] if len(args) > 1 else None
        if not isinstance(matrix, _WatchedMatrix) or not (func is F.linear or name in PRODUCTS):
            raise _unknown(name)
        if func is not F.linear:
            return matrix._see(matrix._expert, x, func(x, matrix.weight))
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        output = matrix._see(matrix._expert, x, F.linear(x, matrix.weight))
        return output if bias is None else output + bias


def _unknown(what: str) -> CalibrationError:
    return CalibrationError(
        f"these experts work on their weights by {what}, which calibration does not follow; add --exclude '*.experts.*'"
    )
