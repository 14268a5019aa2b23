"""The cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LRSURGERY_CACHE`, or `lrsurgery` in the user's cache folder. The folder may not exist yet."""
    import platformdirs

    own = os.environ.get("LRSURGERY_CACHE")
    return Path(own).expanduser() if own else platformdirs.user_cache_path("lrsurgery", appauthor=False)
