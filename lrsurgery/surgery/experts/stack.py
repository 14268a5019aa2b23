"""The matrices of a bank whose weights are on disk, read one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stack:
    """A dense bank that is read expert by expert, as often as it is gone through; it takes the place of its tensor."""

    shape: torch.Size  # (experts, ...)
    dtype: torch.dtype
    read: Callable[[int], Tensor]
    device: torch.device = CPU

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(number) for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        return self.read(number)

    def whole(self) -> Tensor:
        """The tensor itself."""
        return torch.stack(list(self))

    def slices(self) -> Iterator[Tensor]:
        """Its elements in order, flat, those of an expert at a time."""
        return (part.flatten() for part in self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def mT(self) -> Stack:
        shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        return replace(self, shape=shape, read=lambda number: self.read(number).mT)

    def to(self, device: torch.device) -> Stack:
        return replace(self, device=device, read=lambda number: self.read(number).to(device))

    def double(self) -> Stack:
        return replace(self, dtype=torch.float64, read=lambda number: self.read(number).double())


def slices_of(weight: Tensor | Stack) -> Iterator[Tensor]:
    """The elements of a dense weight in order, on the CPU: all at once, or expert by expert."""
    return (part.cpu() for part in ([weight] if isinstance(weight, Tensor) else weight))
