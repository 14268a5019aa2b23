"""All that is asked of timm beyond its documented interface; tests/checkpoints/test_upstream.py says what breaks."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lrsurgery.files import Json


def config_for_hub(model: nn.Module) -> Json:
    """The config.json that timm writes for a model that it made."""
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, f"{folder}/config.json")
        found: Json = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return found


def download(url: str) -> Path:
    """A weight file in timm's cache, fetched if it is not there. Raises OSError."""
    from timm.models._hub import download_cached_file

    return Path(download_cached_file(url))


def checkpoint_filter(model: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]] | None:
    """What turns older layouts of a model's weights into its own; None where its module has no such function."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
