"""Objects in front of parameters: what a module's own code finds under the name of one of its weights.

The parameter itself stays where it is, so that loaders and hooks which look for it find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class Shadow:
    """What stands in front of a parameter of a module."""

    def __init__(self, holder: nn.Module, key: str) -> None:
        self._holder, self._key = holder, key

    @property
    def weight(self) -> Tensor:
        weight = self._holder._parameters[self._key]
        assert weight is not None
        return weight


@contextmanager
def in_front(holder: nn.Module, shadows: Mapping[str, Shadow]) -> Iterator[None]:
    """Put shadows in front of the parameters of these names within this context."""
    try:
        vars(holder).update(shadows)
        yield
    finally:
        for key in shadows:
            vars(holder).pop(key, None)
