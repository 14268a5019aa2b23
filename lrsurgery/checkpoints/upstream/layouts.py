"""What other tools make of a checkpoint's keys: wrappers around names, packed weights, tensors of another model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import RenamedSource, TensorSource
from lrsurgery.errors import SourceError

# modules of torch around another module, at any depth: those of torch.compile, FSDP and activation checkpointing
AROUND = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# what is put in front of keys: these, DistributedDataParallel, Lightning, TimmWrapper and averaged copies
PREFIXES = (
    *(f"{name}." for name in AROUND),
    *("module.", "model.", "timm_model.", "net.", "network."),
    *("model_ema.", "ema_model.", "ema.", "averaged_model."),
)
# the last part of a key that holds a packed weight -> who packs so
PACKED = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "W_q": "HQQ"}


def spellings(key: str) -> list[str]:
    """The key, and what is left of it without its first, its first two, ... prefixes of wrappers."""
    found = [key]
    while (prefix := next((p for p in PREFIXES if found[-1].startswith(p)), None)) is not None:
        found.append(found[-1].removeprefix(prefix))
    return found


def without_inner(key: str) -> str:
    """The key without torch's wrappers behind its prefixes, as in `layer1._orig_mod.0.weight`."""
    rest = spellings(key)[-1]
    return key.removesuffix(rest) + ".".join(part for part in rest.split(".") if part not in AROUND)


def holds_inner(keys: Iterable[str]) -> bool:
    """Whether a key has wrappers of torch around a part of the model."""
    return any(without_inner(key) != key for key in keys if any(name in key for name in AROUND))


def unwrap(tensors: TensorSource, knows: Callable[[str], bool]) -> TensorSource:
    """Take wrappers off keys that `knows` does not know as they stand, in whatever order they come.

    Of two tensors that become one, as in a file with averaged weights beside the trained ones, the averaged one stays,
    else that whose key was the plain one. If no key is known in any spelling, as in an older layout, prefixes that all
    keys share are taken off. Tensors outside of the wrapper, such as a loss's, are left out.
    """
    tensors = _unwrap_inner(tensors, knows)
    keys = tensors.keys()
    known = {key: name for key in keys for name in [next(filter(knows, spellings(key)), None)] if name is not None}
    if not known:
        depth = min((len(spellings(key)) for key in keys), default=1) - 1
        plain = {key: spellings(key)[depth] for key in keys}
        known = plain if len({key.removesuffix(name) for key, name in plain.items()}) == 1 else {}
    prefixes = {key.removesuffix(name): None for key, name in known.items()}
    if not any(prefixes):
        return tensors
    names: dict[str, str] = {}  # name -> key
    beside: list[str] = []
    for key in keys:
        prefix = next((p for p in sorted(prefixes, key=len, reverse=True) if key.startswith(p)), None)
        name = known.get(key) or (None if prefix is None else key.removeprefix(prefix))
        if name is None:
            beside.append(key)
        elif name not in names:
            names[name] = key
        else:
            chosen, other = sorted((key, names[name]), key=lambda each: _preference(each, name))
            names[name] = chosen
            beside.append(other)
    used = dict.fromkeys(f"'{key.removesuffix(name)}'" for name, key in names.items() if key != name)
    return RenamedSource(tensors, names, (*tensors.wrappers, *used), (*tensors.beside, *beside))


def _preference(key: str, name: str) -> tuple[bool, bool]:
    """Sorts the keys of one name: averaged ones first, then the name itself."""
    prefix = key.removesuffix(name)
    return not ("ema" in prefix or "averaged" in prefix), bool(prefix)


def _unwrap_inner(tensors: TensorSource, knows: Callable[[str], bool]) -> TensorSource:
    """Take torch's wrappers off parts of the model, with the plain key first of two that become one."""
    keys = tensors.keys()
    if not holds_inner(keys):
        return tensors
    names: dict[str, str] = {}
    beside: list[str] = []
    for key in keys:
        name = key if knows(key) else without_inner(key)
        if name not in names:
            names[name] = key
        else:
            chosen, other = sorted((key, names[name]), key=lambda each: each != name)
            names[name] = chosen
            beside.append(other)
    used = [
        f"'{each}.' within names" for each in AROUND if any(each in key for name, key in names.items() if key != name)
    ]
    return RenamedSource(tensors, names, (*tensors.wrappers, *used), (*tensors.beside, *beside))


def wrapper_note(tensors: TensorSource) -> str | None:
    """The note that names the wrappers around the weights of a file and what is left out; None without either."""
    count = len(tensors.beside)
    beside = f"{', '.join(tensors.beside[:3])}{f' and {count - 3} more' if count > 3 else ''}"
    if not tensors.wrappers:
        return f"left out beside the weights: {beside}" if count else None
    left_out = f"; left out beside them: {beside}" if count else ""
    return f"weights are wrapped in {', '.join(tensors.wrappers)}, which was taken off{left_out}"


# tensors that do not fit


def check_shape(source: Source, key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise SourceError that names a tensor of another shape than the model's, and says what to do."""
    if tuple(shape) != tuple(wanted):
        raise SourceError(
            f"{source.reference}: {key} has shape {tuple(shape)}, the model wants {tuple(wanted)}; {_remedy(source)}"
        )


def missing(source: Source, name: str, keys: Collection[str]) -> SourceError:
    """The error about a tensor of the model which is not among the keys of the files. Raises that of a packed one."""
    check_not_packed(source, keys)
    return SourceError(f"{source.reference}: {name} is missing from the checkpoint; {_remedy(source)}")


def _remedy(source: Source) -> str:
    if source.folder is None:
        return "name the --architecture that the file is of, or take the file of another class or size"
    return "take the config.json and the weights of one model, of the same class and size"


def check_not_packed(source: Source, keys: Collection[str]) -> None:
    """Raise SourceError for keys, which the model does not know, of a packed weight that no config says how to read."""
    for key in keys:
        stem, _, last = key.rpartition(".")
        if last in PACKED and f"{stem}.weight" not in keys:
            raise SourceError(
                f"{source.reference}: {key} is quantised ({PACKED[last]} layout), and config.json has no"
                " quantization_config that says how; start from the checkpoint before quantisation"
            )
