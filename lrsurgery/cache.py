"""The folder for what is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LRSURGERY_CACHE`, or `lrsurgery` in the user's cache folder. It need not exist."""
    own = os.environ.get("LRSURGERY_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lrsurgery").expanduser()
