"""Output folders of models: companion files, config.json, weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.checkpoints.mapping import is_transformers_model, with_tripwire
from lrsurgery.checkpoints.source import ADAPTER_FILES, Source, check_inside
from lrsurgery.checkpoints.tensors import ShardWriter, in_write_order
from lrsurgery.checkpoints.upstream.forms import FORMAT_VERSION, METHOD, Modules
from lrsurgery.errors import OutputError, SourceError
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text, read_as
from lrsurgery.files.locks import locked
from lrsurgery.files.marks import MARK
from lrsurgery.files.writing import check_free, staged, with_name, write_text
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.text import expanded

COMPANION_SUFFIXES = (".json", ".model", ".jinja", ".py", ".spm", ".vocab", ".tiktoken")
COMPANION_NAMES = ("vocab.txt", "merges.txt", "added_tokens.txt")
NOT_COMPANIONS = ("config.json", "rank_report.json", "bench.json", MARK, *ADAPTER_FILES)  # valid for the source only
SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Options of a checkpoint's output."""

    dtype: torch.dtype | None = None  # None keeps each tensor's own
    shard_size: int = SHARD_SIZE  # largest weight file, in bytes
    overwrite: bool = False
    resume: bool = False
    command: str | None = None  # the command line, for the report and the card
    check: bool = False  # run the output against the plan's own factors before it is published

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of this dtype is written in."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


def check_output(output: Path, source: Source, overwrite: bool, others: Iterable[str | None] = ()) -> None:
    """Raise OutputError if `output` is or holds the model that is read, or exists and may not be overwritten.

    `others` are the MODEL arguments of further models that the command reads, such as a teacher.
    """
    places = [*([source.folder] if source.folder else []), *source.files]
    check_apart(output, [*places, Path(source.reference), *(Path(other) for other in others if other is not None)])
    check_free(output, overwrite)


def check_apart(output: Path, places: Iterable[Path]) -> None:
    """Raise OutputError if a file or folder of a model that is read is `output` or lies in it, by whatever name."""
    for place in places:
        if _holds(output, expanded(place)):
            raise OutputError(f"{output}: is or holds the model that is being read; choose another --output")


def _holds(folder: Path, place: Path) -> bool:
    """Whether a file or folder that exists is `folder` or lies in it; links and other names of either count."""
    try:
        own, real = folder.stat(), place.resolve(strict=True)
    except (OSError, ValueError):  # one of them is not there
        return False
    named = place.absolute()
    return any(os.path.samestat(own, each.stat()) for each in (real, *real.parents, *named.parents) if each.exists())


def copy_companions(source: Source, stage: Path) -> list[str]:
    """Copy tokenizer, preprocessor, generation, code and licence files, and the modules of sentence-transformers.

    Returns their names.
    """
    copied: list[str] = []
    if source.folder is None:
        return copied
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in COMPANION_SUFFIXES or file.name in COMPANION_NAMES
        wanted = wanted or file.name.startswith(("LICENSE", "NOTICE"))
        if wanted and file.is_file() and file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json"):
            shutil.copyfile(check_inside(source.folder, file), stage / file.name)
            copied.append(file.name)
    for folder in _module_folders(source.folder):
        (stage / folder.relative_to(source.folder)).mkdir(parents=True, exist_ok=True)
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            target = stage / file.relative_to(source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(check_inside(source.folder, file), target)
            copied.append(str(file.relative_to(source.folder)))
    return copied


def _module_folders(folder: Path) -> list[Path]:
    """The folders of a sentence-transformers model's further modules, such as 1_Pooling, by its modules.json.

    Raises SourceError for one that lies elsewhere.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = read_as(Modules, file, "a list of sentence-transformers modules")
    found = [folder / path for module in modules if (path := module.get("path")) and "\0" not in path]
    for place in found:
        if not place.resolve().is_relative_to(folder.resolve()):
            raise SourceError(f"{file}: names {place}, which is outside of the model's folder")
    # a module without anything to keep, such as Normalize, has an empty folder, which hubs drop
    return [place for place in found if place.is_dir()]


def output_config(
    source: Source, model: nn.Module, layers: Mapping[str, tuple[str, int]], dtype: torch.dtype | None = None
) -> Json:
    """Make the output's config.json from the source's; `layers` maps factorised layers to (kind, rank)."""
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
    # transformers' TimmWrapper passes num_classes itself and fails if model_args has it too
    if (config.get("model_args") or {}).pop("num_classes", None) is not None or "num_classes" not in config:
        config.setdefault("num_classes", getattr(model, "num_classes", 1000))
    return config


def write_timm(model: nn.Module, config: Json, stage: Path) -> None:
    """Write weights and config.json of a timm model, in the layout that `load_model`, timm and TimmWrapper read."""
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
    """Write a transformers model by `save_pretrained`, as a factorised checkpoint if it has factorised layers."""
    saved: Any = model
    if factorised_layers(model):
        from lrsurgery.checkpoints.quantizer import attach_

        attach_(model)
    saved.save_pretrained(stage)


def save_model(module: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a transformers or timm model, factorised or dense, as a folder that `load_model` and its library read.

    The write is atomic. Raises OutputError if the folder exists or cannot be written, if another process is writing it,
    or if the module belongs to neither library.
    """
    output = with_name(Path(folder))
    with disk_faults(output), locked(output), staged(output, overwrite=overwrite) as stage:
        if is_transformers_model(module):
            write_transformers(module, stage)
            return
        known: Any = getattr(module, "pretrained_cfg", None)
        if not isinstance(known, dict) or not known.get("architecture"):
            raise OutputError(
                f"{type(module).__name__}: neither a transformers nor a timm model; save its state_dict() as"
                " safetensors, or call densify_ and save it as a dense model"
            )
        source = Source(known["architecture"], "timm", {"architecture": known["architecture"]}, None, ())
        layers = {name: (layer.kind, layer.rank) for name, layer in factorised_layers(module).items()}
        write_timm(module, output_config(source, module, layers), stage)
