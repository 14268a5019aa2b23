"""Pickled checkpoints of PyTorch: what may stand in them besides tensors, and where the weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsurgery.errors import SourceError

# entries of training checkpoints that hold the weights, averaged ones first, as in timm
ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model", "module", "net", "weights", "params"),
)
DEEPEST = 4  # entries within entries; an entry may hold itself


def _unwrap_entries(state: object) -> tuple[object, tuple[str, ...], tuple[str, ...]]:
    """The state dict in a training checkpoint, the entries that lead to it, and the known ones left out beside it."""
    path: list[str] = []
    beside: list[str] = []
    while isinstance(state, Mapping) and len(path) < DEEPEST:
        known = [name for name in ENTRIES if _holds_weights(state.get(name))]
        if not known:
            break
        beside += [".".join((*path, name)) for name in known[1:]]
        path.append(known[0])
        state = state[known[0]]
    return state, tuple(path), tuple(beside)


def _holds_weights(entry: object, depth: int = 0) -> bool:
    return (
        depth < DEEPEST
        and isinstance(entry, Mapping)
        and any(
            _is_weight(value) or (name in ENTRIES and _holds_weights(value, depth + 1)) for name, value in entry.items()
        )
    )


def _is_weight(value: object) -> bool:
    """Whether it is a tensor with dimensions; one without is a counter, such as those of an average."""
    return isinstance(value, Tensor) and value.ndim > 0


def _no_state_dict(file: Path, state: object) -> SourceError:
    """The error about a file with no weights in a place that is known; names the entries that hold some."""
    found = [str(name) for name, entry in state.items() if _holds_weights(entry)] if isinstance(state, Mapping) else []
    if not found:
        return SourceError(f"{file}: holds no state dict, but {_described(state)}; save the model's state_dict()")
    which = ", ".join(f"'{name[:60]}'" for name in found[:5])
    them = "a state dict in" if len(found) == 1 else f"{len(found)} state dicts in"
    return SourceError(
        f"{file}: holds {them} {which}, which {'is' if len(found) == 1 else 'are'} no entry that is known for the"
        f" model's weights; save the one that is wanted by itself: torch.save(torch.load(FILE)[{found[0][:60]!r}], NEW)"
    )


def _described(state: object) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    names = ", ".join(f"'{str(name)[:60]}'" for name in list(state)[:3])
    return f"a dict of {names}{', ...' if len(state) > 3 else ''}" if names else "an empty dict"


def _harmless() -> list[Any]:
    """What a pickle may name besides tensors: options of a script, and numbers and arrays of numpy."""
    import argparse
    import codecs

    import numpy as np

    numpy: Any = np
    multiarray = (numpy._core if hasattr(numpy, "_core") else numpy.core).multiarray
    dtypes = [value for name, value in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"]
    functions = [multiarray.scalar, multiarray._reconstruct]
    # numpy 1 writes another name for the same function
    older = [(function, f"numpy.core.multiarray.{function.__name__}") for function in functions]
    return [argparse.Namespace, codecs.encode, np.dtype, np.ndarray, *dtypes, *functions, *older]


def read_pickles(files: Sequence[Path]) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors of pickled files, the entries they were found in, and the entries with others beside those.

    `torch.load(weights_only=True)` executes no code in them. Averaged weights come before trained ones, as in timm.

    Raises SourceError for files that hold more than weights, or are damaged.
    """
    import pickle

    tensors: dict[str, Tensor] = {}
    wrappers: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for file in files:
        try:
            with torch.serialization.safe_globals(_harmless()):
                state = _load_pickle(file)
        except pickle.UnpicklingError as e:
            raise SourceError(
                f"{file}: holds more than weights, or is damaged{_foreign_names(file)}; code in a pickle is never"
                " executed, so save its state dict as safetensors"
            ) from e
        except FileNotFoundError as e:
            raise SourceError(f"{file}: the shard is missing") from e
        except Exception as e:  # a damaged file makes the reader raise anything
            cause = next(iter(str(e).splitlines()), "") or type(e).__name__
            raise SourceError(f"{file}: not a readable PyTorch file ({cause[:200]}); download it again") from e
        found, path, beside = _unwrap_entries(state)
        if not isinstance(found, Mapping) or not any(_is_weight(v) for v in found.values()):
            raise _no_state_dict(file, state)
        wrappers |= {".".join(path): None} if path else {}
        left_out |= dict.fromkeys(beside)
        for key, value in found.items():
            if isinstance(value, Tensor):
                tensors[str(key)] = _check_strided(file, str(key), value)
    return tensors, tuple(wrappers), tuple(left_out)


def _load_pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as e:
        if "mmap" not in str(e):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _foreign_names(file: Path) -> str:
    """The classes that a pickle names and that are not loaded; empty if it is too damaged to tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # whatever a damaged file makes of the reader
        return ""
    return f" ({', '.join(sorted(names)[:3])})" if names else ""


def _check_strided(file: Path, key: str, tensor: Tensor) -> Tensor:
    """Raise SourceError for a tensor that safetensors cannot hold: sparse, or of torch's quantised types."""
    if tensor.layout != torch.strided:
        raise SourceError(f"{file}: {key} is a sparse tensor, which is not supported; save it as {key}.to_dense()")
    if tensor.is_quantized:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise SourceError(f"{file}: {key} is quantised ({dtype}); start from the checkpoint before quantisation")
    return tensor
