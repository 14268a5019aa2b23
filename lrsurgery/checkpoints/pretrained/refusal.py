"""What timm's own loading says of a factorised folder: one line, where it would list the keys that do not fit.

timm has no registry of formats, so `timm.create_model("local-dir:DIR", pretrained=True)` and `load_checkpoint`, as its
scripts call them, cannot be taught the layers. Importing this wraps the two functions that read weights from a path.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models._builder as builder
import timm.models._helpers as helpers

from lrsurgery.checkpoints.format import METHOD

READERS = ((builder, "load_state_dict_from_path"), (helpers, "load_state_dict"))


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return config["quantization_config"]["quant_method"] == METHOD  # type: ignore[no-any-return]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _wrap(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def refuse_or_read(path: Any, *args: Any, **options: Any) -> Any:
        place = Path(path)
        folder = place if place.is_dir() else place.parent
        if _is_ours(folder):
            from lrsurgery.errors import SourceError

            raise SourceError(
                f"{folder}: has low-rank layers, which timm alone does not build; run its scripts as python -m"
                f" lrsurgery.timm SCRIPT --model local-dir:{folder} --pretrained, or call lrsurgery.timm.create_model"
            )
        return read(path, *args, **options)

    refuse_or_read.lrsurgery = True  # type: ignore[attr-defined]
    return refuse_or_read


for module, name in READERS:
    reader = getattr(module, name, None)
    if reader is not None and not hasattr(reader, "lrsurgery"):
        setattr(module, name, _wrap(reader))
