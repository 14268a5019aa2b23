"""What blocks are given and return, kept in memory or on disk, and the parts of it that are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.calibration.blockwise import copy_of
from lrsurgery.modules import tensors_of

Masks: TypeAlias = "tuple[Tensor | None, ...]"  # of a batch, 0 at padding: that of its inputs, that of a decoder's


class Given(NamedTuple):
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Cache:
    """A list of values with tensors in them: in memory up to `room` bytes, what comes later in files of a folder.

    Without a folder all stay in memory.
    """

    def __init__(self, folder: Path | None, room: int) -> None:
        self._folder, self._room = folder, room
        self._held: list[Any] = []  # values, or the files that hold them

    def append(self, value: Any) -> None:
        size = sum(tensor.nbytes for tensor in tensors_of(value))
        if self._folder is None or size <= self._room:
            self._room -= size
            self._held.append(value)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{len(self._held):05d}.pt"
        torch.save(value, file)
        self._held.append(file)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Any:
        value = self._held[number]
        # written by this process a moment ago: whatever a block is given has to come back, whatever its class
        return torch.load(value, weights_only=False) if isinstance(value, Path) else value

    def clear(self) -> None:
        """Drop all values and their files."""
        for value in self._held:
            if isinstance(value, Path):
                value.unlink(missing_ok=True)
        self._held.clear()


def outputs_of(value: Any) -> list[Tensor]:
    """The floating-point tensors that a block returns: hidden states, as a rule one."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def run(block: nn.Module, given: Given) -> list[Tensor]:
    """The outputs of a block on copies of the arguments, which some blocks change in place."""
    args, kwargs = copy_of(tuple(given))
    return outputs_of(block(*args, **kwargs))


def fitting(masks: Masks, shape: torch.Size) -> Tensor | None:
    """The first mask of this shape (batch, positions), as booleans; None if there is none."""
    return next((mask.bool() for mask in masks if mask is not None and mask.shape == shape), None)
