"""The names and the version of the checkpoint format, which code may need that loads nothing else of it."""

from __future__ import annotations

from typing import Any

METHOD = "lrsurgery"  # quantization_config.quant_method of a factorised checkpoint
FORMAT_VERSION = 3  # of its quantization_config; the newest, with factors that another tool quantised
LAYERS_VERSION = 2  # of one whose factors are plain; 1 knows the balanced form alone

# of a folder with the code of its layers, which has the same under another key, so that no quantizer takes it up
ENTRY = "lowrank"
CODE = "modeling_lowrank"  # the module, a file beside the weights
PREFIX = "lowrank-"  # of the model type in config.json: a load without the code finds no such model, and ends


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """The config that a folder with the code of its layers would have without it; any other as it is."""
    if not isinstance(config.get(ENTRY), dict) or not str(config.get("model_type")).startswith(PREFIX):
        return config
    kept = {key: value for key, value in config.items() if key not in (ENTRY, "auto_map")}
    kept["quantization_config"] = {"quant_method": METHOD, **config[ENTRY]}
    return {**kept, "model_type": config["model_type"].removeprefix(PREFIX)}
