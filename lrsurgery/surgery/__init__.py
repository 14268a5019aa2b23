"""Kinds of layers, ranks, budgets and plans, and their application to a model in memory.

The name below loads on first use, so that ranks and options can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrsurgery.surgery.apply import factorised_layers as factorised_layers

__all__ = ["factorised_layers"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from lrsurgery.surgery import apply

        return getattr(apply, name)
    raise AttributeError(f"module 'lrsurgery.surgery' has no attribute '{name}'")
