"""Checkpoints between files and modules: which tensor goes where, and under which name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import build_model, timm_tensors, without_wrappers
from lrsurgery.checkpoints.source import Source, SourceOptions, check_index
from lrsurgery.checkpoints.tensors import DictSource, SafetensorsSource, TensorSource, in_slices, open_tensors
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.plan import Replacement


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


def open_checkpoint(source: Source, options: SourceOptions) -> Checkpoint:
    """Build the skeleton and opens the files; with a seed, initialises the model anew from its config instead.

    Raises SourceError.
    """
    if source.folder is None and source.files:
        source = _with_classes_of(source)
    trust_remote_code = options.trust_remote_code
    if options.from_scratch_seed is not None:
        torch.manual_seed(options.from_scratch_seed)
        fresh = build_model(source, device="cpu", trust_remote_code=trust_remote_code)
        tied = tied_weights(fresh)
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
    return Checkpoint(source, model, tensors, tied_weights(model))


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


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter -> the parameter that stands for it in files, as transformers tells; empty for other models."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_transformers_model(module: nn.Module) -> bool:
    """Whether the module is one of transformers' models."""
    # such a model has brought transformers along; anything else need not wait for its import
    return "transformers" in sys.modules and any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def with_tripwire(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict and, under the dense key of the first factorised layer, a zero-length tensor.

    A load without `import lrsurgery.hf` then fails on its shape, where it would go on with random layers.
    """
    for name, layer in factorised_layers(model).items():
        return {**state, f"{name}.weight": torch.empty(0, dtype=layer.u.weight.dtype)}
    return state


class KeyTargets(Protocol):
    """Where the checkpoint's own library would put a key in its model, as the model is now."""

    state: dict[str, Tensor]

    def target(self, key: str) -> tuple[str | None, str | None]:
        """(state-dict key or None, the pattern of the converter that takes the tensor in or None)."""
        ...

    def convert(self, target: str, pieces: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """What the converter behind these (source key, pattern, tensor) makes of them: state-dict key -> tensor."""
        ...


class _PlainKeys:
    """timm's keys are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.state: dict[str, Tensor] = model.state_dict()

    def target(self, key: str) -> tuple[str | None, str | None]:
        return (key if key in self.state else None), None

    def convert(self, target: str, pieces: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        raise AssertionError("timm converts no tensors as it loads them")


def key_map(source: Source, model: nn.Module) -> KeyTargets:
    """The keys of a source in its model, as the model is now."""
    if source.library == "timm":
        return _PlainKeys(model)
    from lrsurgery.checkpoints.upstream.transformers import KeyMap

    return KeyMap(model)


def list_entries(checkpoint: Checkpoint, planned: set[str]) -> list[Entry]:
    """Every tensor of the files, with its place in the model. `planned` are names of layers whose weights are needed.

    Raises SourceError that names a tensor which is missing or has another shape than the model's.
    """
    keys, tensors = key_map(checkpoint.source, checkpoint.model), checkpoint.tensors
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
    keys: KeyTargets, tensors: TensorSource, target: str, members: list[tuple[str, str]]
) -> Callable[[], dict[str, Tensor]]:
    def read_all() -> dict[str, Tensor]:
        return keys.convert(target, [(key, pattern, tensors.read(key)) for key, pattern in members])

    return read_all


def _check_complete(checkpoint: Checkpoint, state: Mapping[str, Tensor], covered: set[str]) -> None:
    same: dict[int, set[str]] = {}  # names of one tensor, by ties in memory
    kept = checkpoint.model.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        same.setdefault(id(tensor), set()).add(name)
    excused = [re.compile(p) for p in _missing_keys_excused(checkpoint)]
    for name in state:
        partners = same[id(kept[name])] | {checkpoint.tied.get(name, name)}
        if partners & covered or name.endswith("num_batches_tracked") or any(p.search(name) for p in excused):
            continue
        raise SourceError(f"{checkpoint.source.reference}: {name} is missing from the checkpoint")


def _missing_keys_excused(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.source.library != "transformers":
        return ()
    from lrsurgery.checkpoints.upstream.transformers import missing_keys_excused

    return missing_keys_excused(checkpoint.model)


@dataclass(frozen=True)
class Names:
    """Under which keys one planned layer is written."""

    u: str
    v: str
    bias: str
    dense: str  # the tripwire's key


def choose_names(checkpoint: Checkpoint, entries: list[Entry], rows: Mapping[str, Replacement]) -> dict[str, Names]:
    """Keys for the factors: the source's own stem where the loader leads it to the right place, else the model's name.

    The skeleton is factorised for this, so call it last. Raises SurgeryError where no name works.
    """
    swap_(checkpoint.model, {name: (row.kind, row.rank or 1) for name, row in rows.items()})
    keys = key_map(checkpoint.source, checkpoint.model)
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
