"""All uses of timm's undocumented interface; tests/checkpoints/test_upstream.py shows what depends on each."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lrsurgery.files.json import Json


def config_for_hub(model: nn.Module) -> Json:
    """The config.json that timm writes for one of its models."""
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, f"{folder}/config.json")
        config: Json = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return config


def download(url: str) -> Path:
    """Download a weight file to timm's cache, unless it is there. Raises OSError."""
    from timm.models._hub import download_cached_file

    return Path(download_cached_file(url))


def checkpoint_filter(model: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]] | None:
    """The function that converts older layouts of a model's weights; None if its module has none."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def adapted_to_channels(weight: Tensor, channels: int) -> Tensor | None:
    """The weight (out, in, height, width) of an input convolution for images of other channels; None if timm has none.

    timm repeats or sums over the channels, so of a product u v it changes v alone.
    """
    from timm.models._manipulate import adapt_input_conv

    try:
        found: Tensor = adapt_input_conv(channels, weight.detach(), weight.shape[1])
    except (NotImplementedError, ValueError, AssertionError):
        return None
    return found
