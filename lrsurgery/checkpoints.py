"""Checkpoints between files and modules: which tensor goes where, under which name, and with which config."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.plan import Replaced
from lrsurgery.skeletons import build_model, timm_tensors, without_wrappers
from lrsurgery.sources import Source, check_index
from lrsurgery.surgery import swap_
from lrsurgery.tensors import DictSource, SafetensorsSource, TensorSource, in_slices, open_tensors


@dataclass(frozen=True)
class Entry:
    """One tensor on its way through."""

    key: str  # in the files, and in the output where it passes through
    target: str | None  # state-dict key; None where the model does not use it, or a converter takes it in
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    slices: Callable[[], Iterator[Tensor]]  # its elements in order, flat, some at a time


@dataclass
class Checkpoint:
    """A source with its skeleton: the dense model on the meta device, its heads and ties, and its tensors."""

    source: Source
    model: nn.Module
    tensors: TensorSource
    tied: dict[str, str] = field(default_factory=dict)  # parameter -> the parameter that stands for it in files
    unused: list[str] = field(default_factory=list)  # keys that the model class has no place for

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def open_checkpoint(
    source: Source, *, trust_remote_code: bool = False, from_scratch_seed: int | None = None
) -> Checkpoint:
    """Builds the skeleton and opens the files; with a seed, initialises the model anew from its config instead.

    Raises SourceError.
    """
    if source.folder is None and source.files:
        source = _with_classes_of(source)
    if from_scratch_seed is not None:
        torch.manual_seed(from_scratch_seed)
        fresh = build_model(source, device="cpu", trust_remote_code=trust_remote_code)
        tied = _tied(fresh)
        state = {key: tensor for key, tensor in fresh.state_dict().items() if key not in tied}
        return Checkpoint(source, fresh.to("meta"), DictSource(state), tied)
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    tensors = open_tensors(list(source.files))
    if source.folder is not None and isinstance(tensors, SafetensorsSource):
        keys_of: dict[str, set[str]] = {}
        for key in tensors.keys():  # noqa: SIM118
            keys_of.setdefault(tensors.file_of(key).name, set()).add(key)
        check_index(source.folder, keys_of)
    if source.library == "timm":
        tensors = timm_tensors(source, model, tensors)
    return Checkpoint(source, model, tensors, _tied(model))


def _with_classes_of(source: Source) -> Source:
    """A bare weight file says by its classifier how many classes it was trained for."""
    import timm

    cfg = timm.get_pretrained_cfg(source.config["architecture"])
    classifier = getattr(cfg, "classifier", None)
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    tensors = open_tensors(list(source.files))
    for name in names:
        for key in tensors.keys():  # noqa: SIM118
            if without_wrappers(key) == f"{name}.weight":
                config = {**source.config, "num_classes": tensors.describe(key)[1][0]}
                return Source(source.reference, "timm", config, None, source.files)
    return source


def _tied(model: nn.Module) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


class _PlainKeys:
    """timm's keys are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.state: dict[str, Tensor] = model.state_dict()

    def target(self, key: str) -> tuple[str | None, str | None]:
        return (key if key in self.state else None), None


def key_map(checkpoint: Checkpoint) -> Any:
    """Where the checkpoint's own library would put a key in its model, as the model is now."""
    if checkpoint.source.library == "timm":
        return _PlainKeys(checkpoint.model)
    from lrsurgery.hf import KeyMap

    return KeyMap(checkpoint.model)


def list_entries(checkpoint: Checkpoint, planned: set[str]) -> list[Entry]:
    """Every tensor of the files, with its place in the model. `planned` are names of layers whose weights are needed.

    Raises SourceError that names a tensor which is missing or has another shape than the model's.
    """
    keys, tensors = key_map(checkpoint), checkpoint.tensors
    entries: list[Entry] = []
    groups: dict[str, list[tuple[str, str]]] = {}
    covered: set[str] = set()
    for key in tensors.keys():  # noqa: SIM118
        target, pattern = keys.target(key)
        if target is not None and pattern is not None:
            groups.setdefault(target, []).append((key, pattern))
            continue
        dtype, shape = tensors.describe(key)
        if target is None:
            checkpoint.unused.append(key)
        else:
            covered.add(target)
            wanted = tuple(keys.state[target].shape)
            if shape != wanted:
                raise SourceError(f"{checkpoint.source.reference}: {key} has shape {shape}, the model wants {wanted}")
        entries.append(Entry(key, target, dtype, shape, *_readers(tensors, key)))
    for target, members in groups.items():
        described = [tensors.describe(key) for key, _ in members]
        empties = [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in described]
        made = keys.convert(target, [(key, pattern, e) for (key, pattern), e in zip(members, empties, strict=True)])
        covered |= set(made)
        if any(name.rpartition(".")[0] in planned for name in made):
            # fused in the files and single layers in the model: written under the model's names from here on
            unfuse = _converted(keys, tensors, target, members)
            for name, value in made.items():
                entries.append(Entry(name, name, described[0][0], tuple(value.shape), *_pickers(unfuse, name)))
        else:
            for (key, _), (dtype, shape) in zip(members, described, strict=True):
                entries.append(Entry(key, None, dtype, shape, *_readers(tensors, key)))
    _check_complete(checkpoint, keys.state, covered)
    return entries


def _readers(tensors: TensorSource, key: str) -> tuple[Callable[[], Tensor], Callable[[], Iterator[Tensor]]]:
    return lambda: tensors.read(key), lambda: tensors.slices(key)


def _pickers(
    read_all: Callable[[], dict[str, Tensor]], name: str
) -> tuple[Callable[[], Tensor], Callable[[], Iterator[Tensor]]]:
    def read() -> Tensor:
        return read_all()[name].contiguous()

    return read, lambda: in_slices(read())


def _converted(
    keys: Any, tensors: TensorSource, target: str, members: list[tuple[str, str]]
) -> Callable[[], dict[str, Tensor]]:
    def read_all() -> dict[str, Tensor]:
        made: dict[str, Tensor] = keys.convert(target, [(key, pattern, tensors.read(key)) for key, pattern in members])
        return made

    return read_all


def _check_complete(checkpoint: Checkpoint, state: Mapping[str, Tensor], covered: set[str]) -> None:
    same: dict[int, set[str]] = {}  # names of one tensor, by ties in memory
    kept = checkpoint.model.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        same.setdefault(id(tensor), set()).add(name)
    excused = [re.compile(p) for p in getattr(checkpoint.model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name in state:
        partners = same[id(kept[name])] | {checkpoint.tied.get(name, name)}
        if partners & covered or name.endswith("num_batches_tracked") or any(p.search(name) for p in excused):
            continue
        raise SourceError(f"{checkpoint.source.reference}: {name} is missing from the checkpoint")


@dataclass(frozen=True)
class Names:
    """Under which keys one planned layer is written."""

    u: str
    v: str
    bias: str
    dense: str  # the tripwire's key


def choose_names(checkpoint: Checkpoint, entries: list[Entry], rows: Mapping[str, Replaced]) -> dict[str, Names]:
    """Keys for the factors: the source's own stem where the loader leads it to the right place, else the model's name.

    The skeleton is factorised for this, so call it last. Raises SurgeryError where no name works.
    """
    swap_(checkpoint.model, {name: (row.kind, row.rank or 1) for name, row in rows.items()})
    keys = key_map(checkpoint)
    chosen: dict[str, Names] = {}
    for entry in entries:
        layer = (entry.target or "").removesuffix(".weight")
        if layer == entry.target or layer not in rows:
            continue
        bias = f"{layer}.u.bias" in keys.state
        for stem in (entry.key.removesuffix(".weight"), layer):
            names = Names(f"{stem}.u.weight", f"{stem}.v.weight", f"{stem}.u.bias", f"{stem}.weight")
            wanted = {names.u: f"{layer}.u.weight", names.v: f"{layer}.v.weight"}
            wanted |= {names.bias: f"{layer}.u.bias"} if bias else {}
            if all(keys.target(key) == (place, None) for key, place in wanted.items()):
                chosen[layer] = names
                break
        else:
            raise SurgeryError(f"{layer}: transformers would rename its factors on loading; --exclude '{layer}'")
    return chosen


def output_config(
    checkpoint: Checkpoint, layers: Mapping[str, dict[str, Any]], dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json for the output: the source's, with the layers that are factorised (none for a dense export)."""
    source = checkpoint.source
    config = json.loads(json.dumps(source.config))
    if source.library == "timm":
        config = _timm_output_config(source, checkpoint.model, config)
    config.pop("quantization_config", None)
    if layers:
        config["quantization_config"] = {"quant_method": "lrsurgery", "format_version": 1, "layers": dict(layers)}
    if dtype is not None and source.library == "transformers":
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not config.get("architectures") and source.library == "transformers":
        config["architectures"] = [type(checkpoint.model).__name__]
    return config  # type: ignore[no-any-return]


def _timm_output_config(source: Source, model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    if source.folder is None:
        from timm.models._hub import save_config_for_hf

        with tempfile.TemporaryDirectory() as folder:
            save_config_for_hf(model, f"{folder}/config.json")
            config = json.loads(Path(folder, "config.json").read_text())
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
