"""Random inputs that models of either library take, by their configs, and all that a model returns for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.modules import tensors_of

TOKENS, SAMPLES, PIXELS = 8, 4000, 224  # of a text, of a sound, of an image whose size no config gives


def sample_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """Inputs to try, the fullest first: some models take texts and images, but not any text with any image."""
    config: Any = getattr(model, "config", None)
    if config is None:
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        return [{"x": _noise(*cfg.get("input_size", (3, PIXELS, PIXELS)))}]
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    vocabulary = _find(config, "vocab_size")
    found: dict[str, Tensor] = {}
    if vocabulary is not None:
        ids = torch.randint(int(vocabulary), (1, TOKENS), generator=torch.Generator().manual_seed(0))
        decodes = getattr(config, "is_encoder_decoder", False)
        names = ("input_ids", "decoder_input_ids") if decodes else ("input_ids",)
        found |= {name: ids for name in names if name in takes}
    if "pixel_values" in takes:
        size = _find(config, "image_size") or PIXELS
        height, width = (size, size) if isinstance(size, int) else (_side(size, "height", 0), _side(size, "width", 1))
        found["pixel_values"] = _noise(int(_find(config, "num_channels") or 3), height, width)
    if "input_values" in takes:
        found["input_values"] = _noise(SAMPLES)
    if "input_features" in takes and _find(config, "num_mel_bins"):
        found["input_features"] = _noise(
            _find(config, "num_mel_bins"), 2 * (_find(config, "max_source_positions") or 50)
        )
    own = {name: value for name, value in found.items() if name in (main, "decoder_input_ids")}
    return [found] if own.keys() == found.keys() else [found, own]


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every floating-point tensor that the model returns; the same random numbers are drawn in each call."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(inputs["x"]) if "x" in inputs else model(**inputs)
    return [tensor.float() for tensor in tensors_of(result) if tensor.is_floating_point()]


def _noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _find(config: Any, name: str) -> Any:
    """The value of a config's attribute, or of the first config in it that has one."""
    value = getattr(config, name, None)
    inner = [each for each in vars(config).values() if hasattr(each, "to_dict")] if value is None else []
    return next((found for each in inner if (found := _find(each, name)) is not None), value)


def _side(size: Any, name: str, index: int) -> int:
    return int(size[name] if isinstance(size, Mapping) else size[index])
