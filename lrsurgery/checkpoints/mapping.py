"""Mapping between the tensors of checkpoint files and the parameters of a model.

The file is long because what a key of a file is in a model, and the reverse, is decided here alone.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import build_model, read_num_classes, timm_tensors
from lrsurgery.checkpoints.quantised.dense import dequantised
from lrsurgery.checkpoints.quantised.gguf import GgufSource
from lrsurgery.checkpoints.source import Source, SourceOptions, check_index
from lrsurgery.checkpoints.tensors import (
    DictSource,
    SafetensorsSource,
    TensorSource,
    check_weights,
    in_slices,
    open_tensors,
)
from lrsurgery.checkpoints.upstream.layouts import check_shape, holds_inner, missing, unwrap, wrapper_note
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.files.digests import digest_of_all, tensor_digest
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.experts.stack import Stack
from lrsurgery.surgery.kinds.folds import Fold, fold_of, folded
from lrsurgery.surgery.layers import Kind, Spec, outline
from lrsurgery.surgery.rows import Replacement

BANK_AXES = 3  # of a weight under its layer's own name, as of fused experts, whose first axis they are
SAMPLE = 64  # keys that tell whether a file is wrapped; a file has up to some 100,000


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    key: str  # in the files, and in the output if the tensor is copied
    target: str | None  # state-dict key; None if the model does not use it, or if a converter merges it
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    slices: Callable[[], Iterator[Tensor]]  # its elements in order, flat, some at a time
    parts: tuple[Entry, ...] = ()  # of a weight that is computed from several tensors: those, as they are stored
    part: Callable[[int], Tensor] | None = None  # of fused experts to factorise: the matrix of one alone

    def weight(self) -> Tensor | Stack:
        """The tensor, or of fused experts what reads them one at a time."""
        return self.read() if self.part is None else Stack(torch.Size(self.shape), self.dtype, self.part)


@dataclass
class Checkpoint:
    """A source with its skeleton (the dense model on the meta device), ties and tensors."""

    source: Source
    model: nn.Module
    tensors: TensorSource
    tied: dict[str, str] = field(default_factory=dict)  # parameter -> the tied parameter that is stored in files
    unused: list[str] = field(default_factory=list)  # keys that the model class does not use
    notes: tuple[str, ...] = ()  # what the user should know of how the files were read

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def open_checkpoint(source: Source, options: SourceOptions) -> Checkpoint:
    """Build the skeleton and open the files; with a seed in `options`, initialise the model from its config instead.

    Raises SourceError if the model cannot be built or a file cannot be read.
    """
    if source.folder is None and source.files:
        source = read_num_classes(source)
    trust_remote_code = options.trust_remote_code
    if options.from_scratch_seed is not None:
        torch.manual_seed(options.from_scratch_seed)
        fresh = build_model(source, device="cpu", trust_remote_code=trust_remote_code)
        tied = tied_weights(fresh)
        state = {key: tensor for key, tensor in fresh.state_dict().items() if key not in tied}
        return Checkpoint(source, fresh.to("meta"), DictSource(state), tied)
    check_weights(source.folder, source.files)
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    tensors = open_tensors(list(source.files))
    if source.folder is not None and isinstance(tensors, SafetensorsSource):
        keys_of: dict[str, set[str]] = {}
        for key in tensors.keys():  # noqa: SIM118
            keys_of.setdefault(tensors.file_of(key).name, set()).add(key)
        check_index(source.folder, keys_of)
    tensors = dequantised(source, tensors)
    tensors = timm_tensors(source, model, tensors) if source.library == "timm" else unwrap_keys(source, model, tensors)
    note = wrapper_note(tensors)
    notes = (*source.notes, *([note] if note else []))
    return Checkpoint(source, model, tensors, tied_weights(model), notes=notes)


def notes_of(source: Source, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """How the files are read, for the user: wrappers taken off, adapters left out. Raises SourceError."""
    if not source.files or source.is_factorised:  # which we wrote, with no wrapper around
        return source.notes
    return open_checkpoint(source, SourceOptions(trust_remote_code=trust_remote_code)).notes


def unwrap_keys(source: Source, model: nn.Module, tensors: TensorSource) -> TensorSource:
    """Take wrappers off the keys of a transformers checkpoint: within names, and in front if no first key is known."""
    if isinstance(tensors, GgufSource):
        return tensors.for_model(model)
    keys = key_map(source, model)

    def knows(key: str) -> bool:
        return keys.target(key)[0] is not None

    found = tensors.keys()
    return unwrap(tensors, knows) if holds_inner(found) or not any(map(knows, found[:SAMPLE])) else tensors


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter -> the tied parameter that is stored in files, from transformers; empty for other models."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_transformers_model(module: nn.Module) -> bool:
    """Whether the module is one of transformers' models."""
    # a transformers model has imported transformers; for any other module, avoid the slow import
    return "transformers" in sys.modules and any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def with_tripwire(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a tripwire to a state dict: a zero-length tensor under the dense key of the first factorised layer.

    A load where the format is not registered then fails on its shape, in place of initialising the layers randomly.
    """
    layers = factorised_layers(model)
    # a layer that computes its dense weight may store no tensor of that name
    for name in sorted(layers, key=lambda name: layers[name].folded is not None):
        key = layers[name].layout.weight_key(name)
        return {**state, key: torch.empty(0, dtype=outline(layers[name].u.weight).dtype)}
    return state


Members: TypeAlias = Sequence[tuple[str, str]]  # source key and pattern of its converter
Wanted: TypeAlias = tuple[str, tuple[int, ...]]  # state-dict key and shape
ReadExpert: TypeAlias = Callable[[int], Tensor] | None


class KeyTargets(Protocol):
    """Map of checkpoint keys to state-dict keys of a model, as its library loads them."""

    state: dict[str, Tensor]

    def target(self, key: str) -> tuple[str | None, str | None]:
        """(state-dict key or None, pattern of the converter that merges the tensor or None)."""
        ...

    def convert(self, target: str, pieces: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Apply the converter of these (source key, pattern, tensor) pieces: state-dict key -> tensor."""
        ...

    def expert_reader(self, target: str, members: Members, tensors: TensorSource, wanted: Wanted) -> ReadExpert:
        """What reads one expert's matrix of a bank from its own pieces of the files; None if there are none."""
        ...


class _PlainKeys:
    """Keys of timm checkpoints, which are the state-dict keys."""

    def __init__(self, model: nn.Module) -> None:
        self.state: dict[str, Tensor] = model.state_dict()

    def target(self, key: str) -> tuple[str | None, str | None]:
        return (key if key in self.state else None), None

    def convert(self, target: str, pieces: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        raise AssertionError("timm converts no tensors on loading")

    def expert_reader(self, target: str, members: Members, tensors: TensorSource, wanted: Wanted) -> ReadExpert:
        return None


def key_map(source: Source, model: nn.Module) -> KeyTargets:
    """The map of a source's keys to the current state-dict keys of `model`."""
    if source.library == "timm":
        return _PlainKeys(model)
    from lrsurgery.checkpoints.upstream.transformers import KeyMap

    return KeyMap(model)


def source_digest(source: Source, options: SourceOptions, layers: Iterable[str]) -> str:
    """The digest of a dense model's tensors, of which these layers are factorised. Raises as `list_entries` does."""
    return digest_of_entries(list_entries(open_checkpoint(source, options), set(layers)))


def digest_of_entries(entries: Iterable[Entry]) -> str:
    """One digest of all tensors."""
    return digest_of_all({e.key: tensor_digest(e.dtype, e.shape, e.slices()) for e in entries})


def list_entries(checkpoint: Checkpoint, planned: set[str]) -> list[Entry]:
    """List every tensor of the files with its place in the model; `planned` names the layers to factorise.

    Raises SourceError that names a tensor which is missing or of the wrong shape.
    """
    keys, tensors = key_map(checkpoint.source, checkpoint.model), checkpoint.tensors
    entries: list[Entry] = []
    groups: dict[str, list[tuple[str, str]]] = {}
    covered: set[str] = set()
    for key in tensors.keys():  # noqa: SIM118
        target, pattern = keys.target(key)
        if target is not None and pattern is not None:
            check_plain(checkpoint.source, key, tensors.describe(key)[0], keys.state[target])
            groups.setdefault(target, []).append((key, pattern))
            continue
        dtype, shape = tensors.describe(key)
        if target is None:
            checkpoint.unused.append(key)
        else:
            covered.add(target)
            check_plain(checkpoint.source, key, dtype, keys.state[target])
            check_shape(checkpoint.source, key, shape, tuple(keys.state[target].shape))
        part = functools.partial(tensors.part, key) if target in planned and len(shape) == BANK_AXES else None
        entries.append(Entry(key, target, dtype, shape, *_readers(tensors, key), part=part))
    for target, members in groups.items():
        described = [tensors.describe(key) for key, _ in members]
        empties = [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in described]
        converted = keys.convert(
            target, [(key, pattern, e) for (key, pattern), e in zip(members, empties, strict=True)]
        )
        covered |= set(converted)
        if any(layer_of(name, planned)[0] in planned for name in converted):
            # fused in the files but separate in the model: the output uses the model's names
            unfuse = functools.partial(_convert, keys, tensors, target, members)
            for name, value in converted.items():
                shape = tuple(value.shape)
                is_bank = name in planned and len(shape) == BANK_AXES
                one = keys.expert_reader(target, members, tensors, (name, shape)) if is_bank else None
                stack = None if one is None else Stack(torch.Size(shape), described[0][0], one)
                readers = _pickers(unfuse, name) if stack is None else (stack.whole, stack.slices)
                entries.append(Entry(name, name, described[0][0], shape, *readers, part=one))
        else:
            for (key, _), (dtype, shape) in zip(members, described, strict=True):
                entries.append(Entry(key, None, dtype, shape, *_readers(tensors, key)))
    _check_complete(checkpoint, keys.state, covered)
    return _fold(checkpoint.model, entries, planned)


def _fold(model: nn.Module, entries: list[Entry], planned: set[str]) -> list[Entry]:
    """The entries with one weight in place of the tensors that a planned layer's weight is computed from."""
    every = model.named_modules(remove_duplicate=False)
    folds = {name: (module, fold) for name, module in every if name in planned and (fold := fold_of(module))}
    names = {f"{name}.{part}": name for name, (_, fold) in folds.items() for part in fold.parts}
    parts = {entry.target: entry for entry in entries if entry.target in names}
    kept = [entry for entry in entries if entry.target not in names]
    for name, (module, fold) in folds.items():
        own = tuple(parts[place] for part in fold.parts if (place := f"{name}.{part}") in parts)
        if len(own) < len(fold.parts):  # of a module with several names, stored under another
            kept += own
            continue
        kept.append(_folded_entry(f"{name}.weight", module, fold, own))
    return kept


def _folded_entry(key: str, module: nn.Module, fold: Fold, parts: tuple[Entry, ...]) -> Entry:
    def read() -> Tensor:
        return folded(fold, module, [part.read() for part in parts]).contiguous()

    return Entry(key, key, parts[-1].dtype, parts[-1].shape, read, lambda: in_slices(read()), parts=parts)


def weights_by_layer(checkpoint: Checkpoint, entries: Iterable[Entry]) -> dict[str, Entry]:
    """Layer -> its weight in the files, where a tied one may stand under the name of its partner."""
    # that of fused experts has the name of its layer
    found = {e.target.removesuffix(".weight"): e for e in entries if e.target}
    for pair in checkpoint.tied.items():
        name, other = (key.removesuffix(".weight") for key in pair)
        for one, partner in ((name, other), (other, name)):
            if partner in found:
                found.setdefault(one, found[partner])
    return found


def layer_of(key: str | None, layers: Container[str]) -> tuple[str, str]:
    """(layer, part) of a state-dict key; the weight of fused experts has the name of its layer as its key."""
    if key is not None and key in layers:
        return key, "weight"
    layer, _, part = (key or "").rpartition(".")
    return layer, part


def is_wide(dtype: torch.dtype) -> bool:
    """Whether a dtype holds weights as they are: floating point of two bytes or more."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_plain(source: Source, key: str, dtype: torch.dtype, wanted: Tensor) -> None:
    """Raise SourceError that names a weight which is stored quantised, though no config says how to read it."""
    if is_wide(wanted.dtype) and not is_wide(dtype):
        raise SourceError(
            f"{source.reference}: {key} is quantised ({str(dtype).removeprefix('torch.')}), and config.json has no"
            " quantization_config that says how; start from the checkpoint before quantisation"
        )


def _readers(tensors: TensorSource, key: str) -> tuple[Callable[[], Tensor], Callable[[], Iterator[Tensor]]]:
    return lambda: tensors.read(key), lambda: tensors.slices(key)


def _pickers(
    read_all: Callable[[], dict[str, Tensor]], name: str
) -> tuple[Callable[[], Tensor], Callable[[], Iterator[Tensor]]]:
    def read() -> Tensor:
        return read_all()[name].contiguous()

    return read, lambda: in_slices(read())


def _convert(keys: KeyTargets, tensors: TensorSource, target: str, members: Members) -> dict[str, Tensor]:
    return keys.convert(target, [(key, pattern, tensors.read(key)) for key, pattern in members])


def _check_complete(checkpoint: Checkpoint, state: Mapping[str, Tensor], covered: set[str]) -> None:
    same: dict[int, set[str]] = {}  # tensor -> its names, which are several if it is tied in memory
    kept = checkpoint.model.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        same.setdefault(id(tensor), set()).add(name)
    excused = [re.compile(p) for p in _missing_keys_excused(checkpoint)]
    for name in state:
        partners = same[id(kept[name])] | {checkpoint.tied.get(name, name)}
        if partners & covered or name.endswith("num_batches_tracked") or any(p.search(name) for p in excused):
            continue
        raise missing(checkpoint.source, name, checkpoint.unused)


def _missing_keys_excused(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.source.library != "transformers":
        return ()
    from lrsurgery.checkpoints.upstream.transformers import missing_keys_excused

    return missing_keys_excused(checkpoint.model)


@dataclass(frozen=True)
class Names:
    """The keys under which one planned layer is written: those of its parts, which begin alike."""

    stem: str
    kind: Kind

    def of(self, part: str) -> str:
        """The key of one of `PARTS`, or of the dense "weight", which is that of the tripwire."""
        return self.kind.weight_key(self.stem) if part == "weight" else f"{self.stem}.{part}"


PARTS = ("u.weight", "v.weight", "u.bias", "v.bias", "order")  # of a factorised layer, as in `Names`


def _any_specs(row: Replacement) -> dict[str, Spec]:
    """The layer at its rank, or at one that stands for a rank which its spectrum decides."""
    return (row if row.rank is not None else replace(row, rank=1)).specs


def choose_names(
    checkpoint: Checkpoint, entries: list[Entry], rows: Mapping[str, Replacement], aliases: Mapping[str, str]
) -> dict[str, Names]:
    """Choose the factors' keys: the source's stem if the loader maps it to the layer, else the model's name.

    `aliases` maps every name of a planned layer to its name in the plan; each that the files use gets keys of its own.

    Factorises the skeleton, so call it last. Raises SurgeryError if transformers would rename both.
    """
    swap_(checkpoint.model, {name: spec for row in rows.values() for name, spec in _any_specs(row).items()})
    if is_transformers_model(checkpoint.model):
        from lrsurgery.checkpoints.upstream.transformers import retie_

        retie_(checkpoint.model)
    keys = key_map(checkpoint.source, checkpoint.model)
    chosen: dict[str, Names] = {}
    for entry in entries:
        layer, part = layer_of(entry.target, aliases)
        if part not in ("weight", "bias") or layer not in aliases or layer in chosen:
            continue
        kind = rows[aliases[layer]].layout
        parts = [each for each in PARTS if f"{layer}.{each}" in keys.state]
        for stem in (entry.key.removesuffix(f".{part}"), layer):
            names = Names(stem, kind)
            if all(keys.target(names.of(each)) == (f"{layer}.{each}", None) for each in parts):
                chosen[layer] = names
                break
        else:
            raise SurgeryError(f"{layer}: transformers would rename its factors on loading; add --exclude '{layer}'")
    return chosen
