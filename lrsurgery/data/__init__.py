"""Tasks and their examples, as the checkpoint itself wants them.

The names below load on first use, so that options can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrsurgery.data.datasets import open_data as open_data
    from lrsurgery.data.labels import match_labels as match_labels
    from lrsurgery.data.labels import read_labels as read_labels

_HOME = {
    "match_labels": "lrsurgery.data.labels",
    "open_data": "lrsurgery.data.datasets",
    "read_labels": "lrsurgery.data.labels",
}

__all__ = ["match_labels", "open_data", "read_labels"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lrsurgery.data' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
