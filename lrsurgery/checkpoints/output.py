"""Output folders of models: companion files, config.json, weights in shards that are written tensor by tensor.

The file is long because the writer of shards stands beside the folder that it fills.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.format import CODE, METHOD
from lrsurgery.checkpoints.mapping import is_transformers_model, with_tripwire
from lrsurgery.checkpoints.quantised.schemes import stored_dtype, without_quantisations
from lrsurgery.checkpoints.source import ADAPTER_FILES, OWN_CLASS, Source, check_inside, read_config
from lrsurgery.checkpoints.tensors import SAFETENSORS_NAMES, HeaderEntry
from lrsurgery.checkpoints.upstream.forms import Modules, layers_entry
from lrsurgery.errors import OutputError, SourceError
from lrsurgery.files.digests import as_bytes
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text, read_as
from lrsurgery.files.locks import locked
from lrsurgery.files.marks import MARK
from lrsurgery.files.writing import check_free, staged, with_name, write_text
from lrsurgery.surgery.apply import check_storable, factorised_layers, specs_of
from lrsurgery.surgery.forms.change import in_form
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.ranks import PIVOTED, check_form
from lrsurgery.text import expanded

COMPANION_SUFFIXES = (".json", ".model", ".jinja", ".py", ".spm", ".vocab", ".tiktoken")
COMPANION_NAMES = ("vocab.txt", "merges.txt", "added_tokens.txt")
# valid for the source only
NOT_COMPANIONS = ("config.json", "rank_report.json", "bench.json", f"{CODE}.py", MARK, *ADAPTER_FILES)
SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Options of a checkpoint's output."""

    dtype: torch.dtype | None = None  # None keeps each tensor's own
    shard_size: int = SHARD_SIZE  # largest weight file, in bytes
    overwrite: bool = False
    resume: bool = False
    command: str | None = None  # the command line, for the report and the card
    remote_code: bool = False  # with the code of the layers, for transformers without this package
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
    source: Source, model: nn.Module, layers: Mapping[str, Spec], dtype: torch.dtype | None = None
) -> Json:
    """Make the output's config.json from the source's; `layers` are the factorised ones."""
    config: Json = json.loads(json.dumps(source.config))
    if source.library == "timm":
        config = _timm_output_config(source, model, config)
    config.pop("quantization_config", None)
    if source.scheme is not None:
        config = without_quantisations(config)
        if stored_dtype(config) is None:
            config["dtype"] = str(source.scheme.dtype).removeprefix("torch.")
    if layers:
        config["quantization_config"] = {"quant_method": METHOD, **layers_entry(layers)}
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
    """Write weights and config.json of a timm model, in the layout that `load_model`, timm and TimmWrapper read.

    Raises OutputError for an entry of the state dict that is no tensor.
    """
    state = with_tripwire(model, _untied(model))
    writer = ShardWriter(stage, shard_size=SHARD_SIZE)
    try:
        for key in in_write_order([(tensor.dtype, key) for key, tensor in state.items()]):
            writer.add(key, state[key].detach().cpu().contiguous())
        writer.finish()
    finally:
        writer.close()
    write_text(stage / "config.json", json_text(config))


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with a tensor of several names under the first of them."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise OutputError(f"{key}: its state is a {type(tensor).__name__}, and a folder holds tensors alone")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[key] = tensor
    return state


def write_transformers(model: nn.Module, stage: Path) -> None:
    """Write a transformers model by `save_pretrained`, as a factorised checkpoint if it has factorised layers."""
    from lrsurgery.checkpoints.pretrained.beside import left_to_caller

    tell_form(model)
    with left_to_caller():
        model.save_pretrained(stage)  # type: ignore[operator]


def tell_form(model: nn.Module) -> None:
    """Tell `save_pretrained` of a transformers model what its factorised layers are now."""
    if is_transformers_model(model) and factorised_layers(model):
        from lrsurgery.checkpoints.pretrained.register import attach_

        attach_(model)


def save_model(module: nn.Module, folder: str | Path, *, overwrite: bool = False, form: str = PIVOTED) -> None:
    """Write a module, factorised or dense, as a folder.

    `load_model` and its own library read that of a transformers or timm model, `load_into_` that of any other module.
    Layers are written in `form`, where their kinds have it; the module keeps its own. A factorised model that was
    loaded from a folder takes the other files of that folder along, and the report where nothing has changed. The write
    is atomic.

    Raises OutputError if the folder exists, cannot be written or is being written, or for a state that is no tensor.
    """
    from lrsurgery.checkpoints.pretrained.beside import folder_of, keep_card, keep_report

    check_form(form)
    check_storable(module)
    output = with_name(Path(folder))
    with disk_faults(output), locked(output), staged(output, overwrite=overwrite) as stage:
        old = folder_of(module)
        if old is not None:
            copy_companions(Source(str(old), "transformers", {}, old, ()), stage)
        try:
            with in_form(module, form):
                holds = keep_card(module, stage)
                _write_module(module, stage)
                keep_report(module, stage, holds)
        finally:
            tell_form(module)


def _write_module(module: nn.Module, stage: Path) -> None:
    from lrsurgery.checkpoints.pretrained.beside import folder_of

    known: Any = getattr(module, "pretrained_cfg", None)
    if is_transformers_model(module):
        write_transformers(module, stage)
    elif isinstance(known, dict) and known.get("architecture") and "_features" not in type(module).__module__:
        source = Source(known["architecture"], "timm", {"architecture": known["architecture"]}, None, ())
        old = folder_of(module)
        if old is not None and (config := read_config(old)).get("num_classes") == getattr(module, "num_classes", None):
            source = replace(source, config=config, folder=old)
        write_timm(module, output_config(source, module, specs_of(module)), stage)
    else:
        layers = specs_of(module)
        config = {OWN_CLASS: f"{type(module).__module__}.{type(module).__qualname__}"}
        if layers:
            config["quantization_config"] = {"quant_method": METHOD, **layers_entry(layers)}
        write_timm(module, config, stage)


class ShardWriter:
    """Writer of safetensors shards, tensor by tensor, with at most one tensor in memory.

    The safetensors library needs all tensors of a file in memory. This class writes the same format one tensor at a
    time, with a header padded with spaces, which the format allows. Tensors must come in descending order of item size,
    so that each is aligned without gaps; small ones that come too late for that go in front, into the header's padding.
    """

    def __init__(self, folder: Path, *, shard_size: int, stem: str = "model", in_front: int = 0) -> None:
        """`in_front` is about how many bytes will be added in front: with room for them, no shard is moved."""
        self._reserved = self.HEADER_BYTES + -(-in_front // 4096) * 4096
        self._front: dict[str, Tensor] = {}  # of the open shard
        self._folder = folder
        self._limit = shard_size
        self._stem = stem
        self._file: IO[bytes] | None = None
        self._shards: list[tuple[Path, dict[str, HeaderEntry], int]] = []
        self._item_size = 16
        self._names: set[str] = set()

    HEADER_BYTES = 1 << 16  # a shard with a longer header is rewritten

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor under a new name."""
        self.add_slices(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_slices(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], slices: Iterable[Tensor]) -> None:
        """Append a tensor from slices: its elements in order, of this dtype, that fill this shape."""
        assert name not in self._names, name
        assert dtype.itemsize <= self._item_size, f"{name}: tensors must come in descending item size"
        self._names.add(name)
        self._item_size = dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        if self._file is None or (self._shards[-1][2] and self._shards[-1][2] + size > self._limit):
            self._close_shard()
            path = self._folder / f"{self._stem}-{len(self._shards) + 1:05d}.partial"
            self._file = path.open("wb")
            self._file.seek(self._reserved)
            self._shards.append((path, {}, 0))
        path, entries, offset = self._shards[-1]
        written = 0
        for part in slices:
            if part.numel():
                assert part.dtype == dtype, name
                written += self._file.write(as_bytes(part.detach().cpu()))
        assert written == size, name
        entries[name] = HeaderEntry(
            dtype=SAFETENSORS_NAMES[dtype], shape=list(shape), data_offsets=[offset, offset + size]
        )
        self._shards[-1] = (path, entries, offset + size)

    def add_in_front(self, name: str, tensor: Tensor) -> None:
        """Add a small tensor, whatever its item size, in front of the shard that the last `add` went to."""
        assert name not in self._names, name
        assert tensor.dtype.itemsize <= 4, name  # so that any number of them is aligned
        assert self._file is not None, "the first tensor of a shard cannot be in front of another"
        self._names.add(name)
        self._front[name] = tensor.detach().cpu()

    def _take_front(self) -> bytes:
        """The bytes in front of the open shard, whose entries now count from their beginning."""
        path, entries, size = self._shards[-1]
        front: dict[str, HeaderEntry] = {}
        content = b""
        for name, tensor in sorted(self._front.items(), key=lambda item: -item[1].dtype.itemsize):
            begin = len(content)
            content += bytes(as_bytes(tensor))
            offsets = [begin, len(content)]
            front[name] = HeaderEntry(
                dtype=SAFETENSORS_NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets
            )
        for entry in entries.values():
            entry["data_offsets"] = [at + len(content) for at in entry["data_offsets"]]
        self._shards[-1] = (path, {**front, **entries}, size + len(content))
        self._front = {}
        return content

    def _close_shard(self) -> None:
        if self._file is None:
            return
        front = self._take_front()
        path, entries, _ = self._shards[-1]
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        room = self._reserved - 8 - len(front)
        if len(header) > room:  # thousands of tensors: copy the shard behind a larger header
            room = -(-(len(header) + 8 + len(front)) // 4096) * 4096 - 8 - len(front)
            self._file.close()
            moved = path.with_suffix(".moved")
            with path.open("rb") as old, moved.open("wb") as new:
                old.seek(self._reserved)
                new.seek(room + 8 + len(front))
                while chunk := old.read(1 << 24):
                    new.write(chunk)
            moved.replace(path)
            self._file = path.open("r+b")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", room) + header.ljust(room) + front)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def finish(self) -> int:
        """Rename the shards, write the index if there are several, and return the bytes of all tensors."""
        self._close_shard()
        total = sum(size for _, _, size in self._shards)
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, entries, _) in enumerate(self._shards, 1):
            name = (
                f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            )
            path.rename(self._folder / name)
            weight_map.update(dict.fromkeys(entries, name))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self._folder / f"{self._stem}.safetensors.index.json", json_text(index))
        return total

    def close(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def in_write_order(items: list[tuple[torch.dtype, str]]) -> Iterator[str]:
    """Yield names in the order that `ShardWriter` needs: wide dtypes first, then natural order of names."""

    def place(part: str) -> tuple[int, int, str]:
        is_number = part.isascii() and part.isdigit() and len(part) < 20
        return (0, int(part), "") if is_number else (1, 0, part)

    def natural(name: str) -> list[tuple[int, int, str]]:
        return [place(part) for part in name.split(".")]

    for _, name in sorted(items, key=lambda item: (-item[0].itemsize, natural(item[1]))):
        yield name
