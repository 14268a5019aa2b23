"""Output folders of models: what of the source goes along, and their config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.mapping import is_transformers_model, with_tripwire
from lrsurgery.checkpoints.source import FORMAT_VERSION, METHOD, Source, inside
from lrsurgery.checkpoints.tensors import ShardWriter, in_write_order
from lrsurgery.errors import OutputError
from lrsurgery.files import Json, check_free, json_text, staged, write_text
from lrsurgery.surgery.apply import factorised_layers

COMPANION_SUFFIXES = (".json", ".model", ".jinja", ".py", ".spm", ".vocab", ".tiktoken")
COMPANION_NAMES = ("vocab.txt", "merges.txt", "added_tokens.txt")
NOT_COMPANIONS = ("config.json", "rank_report.json", "bench.json")  # what is true of the source alone
SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How a checkpoint is written."""

    dtype: torch.dtype | None = None  # None keeps each tensor's own
    shard_size: int = SHARD_SIZE  # bytes of the largest weight file
    overwrite: bool = False
    resume: bool = False
    command: str | None = None  # the command line, for the report and the card

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of this dtype is written."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


def check_output(output: Path, source: Source, overwrite: bool) -> None:
    """Raises OutputError for an output folder that is in the way, or that is the model being read."""
    if source.folder is not None and output.resolve() == source.folder.resolve():
        raise OutputError(f"{output}: is the model that is being read; choose another --output")
    check_free(output, overwrite)


def copy_companions(source: Source, stage: Path) -> list[str]:
    """Copy tokenizer, preprocessor, generation, code and licence files; all else is written anew."""
    copied: list[str] = []
    if source.folder is None:
        return copied
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in COMPANION_SUFFIXES or file.name in COMPANION_NAMES
        wanted = wanted or file.name.startswith(("LICENSE", "NOTICE"))
        if wanted and file.is_file() and file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json"):
            shutil.copyfile(inside(source.folder, file), stage / file.name)
            copied.append(file.name)
    return copied


def output_config(
    source: Source, model: nn.Module, layers: Mapping[str, tuple[str, int]], dtype: torch.dtype | None = None
) -> Json:
    """config.json for the output: the source's, with the factorised layers as name -> (kind, rank), none when dense."""
    config: Json = json.loads(json.dumps(source.config))
    if source.library == "timm":
        config = _timm_output_config(source, model, config)
    config.pop("quantization_config", None)
    if layers:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "layers": {name: {"kind": kind, "rank": rank} for name, (kind, rank) in layers.items()},
        }
    if dtype is not None and source.library == "transformers":
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not config.get("architectures") and source.library == "transformers":
        config["architectures"] = [type(model).__name__]
    return config


def _timm_output_config(source: Source, model: nn.Module, config: Json) -> Json:
    if source.folder is None:
        from lrsurgery.checkpoints.upstream import timm as upstream

        config = upstream.config_for_hub(model)
    elif "pretrained_cfg" not in config:  # timm's first format: one flat dictionary
        rest = {k: v for k, v in config.items() if k not in ("architecture", "num_features", "quantization_config")}
        config = {
            "architecture": config["architecture"],
            "num_classes": config.get("num_classes", 1000),
            "pretrained_cfg": rest,
        }
    # transformers' TimmWrapper passes num_classes itself and fails where it is given twice
    if config.get("model_args", {}).pop("num_classes", None) is not None or "num_classes" not in config:
        config.setdefault("num_classes", getattr(model, "num_classes", 1000))
    return config


def write_timm(model: nn.Module, config: Json, stage: Path) -> None:
    """Write a timm model's weights and config.json into a folder, so that `load_model`, timm and TimmWrapper read it."""
    state = with_tripwire(model, model.state_dict())
    writer = ShardWriter(stage, shard_size=SHARD_SIZE)
    try:
        for key in in_write_order([(tensor.dtype, key) for key, tensor in state.items()]):
            writer.add(key, state[key].detach().cpu().contiguous())
        writer.finish()
    finally:
        writer.close()
    write_text(stage / "config.json", json_text(config))


def write_transformers(model: nn.Module, stage: Path) -> None:
    """Write a transformers model by its own `save_pretrained`, as a factorised checkpoint where it is factorised."""
    saved: Any = model
    if factorised_layers(model):
        from lrsurgery.checkpoints.quantizer import attach_

        attach_(model)
    saved.save_pretrained(stage)


def save_model(module: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a transformers or timm model, factorised or not, as a folder that `load_model` and its library read.

    The folder appears whole or not at all. Raises OutputError where it is in the way, or for any other kind of module.
    """
    with staged(Path(folder), overwrite=overwrite) as stage:
        if is_transformers_model(module):
            write_transformers(module, stage)
            return
        known: Any = getattr(module, "pretrained_cfg", None)
        if not isinstance(known, dict) or not known.get("architecture"):
            raise OutputError(
                f"{type(module).__name__}: neither a transformers nor a timm model; save its state_dict() as"
                " safetensors, or densify_ it and save it as before"
            )
        source = Source(known["architecture"], "timm", {"architecture": known["architecture"]}, None, ())
        layers = {name: (layer.kind, layer.rank) for name, layer in factorised_layers(module).items()}
        write_timm(module, output_config(source, module, layers), stage)
