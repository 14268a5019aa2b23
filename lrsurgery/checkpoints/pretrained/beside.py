"""The card and the report of a folder, kept where a model that was loaded from it is saved again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.checkpoints.mapping import key_map, tied_weights
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.errors import SurgeryError
from lrsurgery.files.digests import REPORT, file_digests
from lrsurgery.files.json import json_text, read_json
from lrsurgery.files.writing import write_text
from lrsurgery.surgery.apply import factorised_layers, specs_of

CARD = "README.md"
FOLDER = "_lrsurgery_folder"  # attribute of a model: the folder that it was loaded from
CHANGED = (
    "The weights here were saved from memory and are not, or not certainly, those that this text describes; its figures"
    " may not hold."
)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)

_left_to_caller: ContextVar[bool] = ContextVar("left_to_caller", default=False)


@contextmanager
def left_to_caller() -> Iterator[None]:
    """Within the block, saving a model writes neither card nor report: the caller does."""
    token = _left_to_caller.set(True)
    try:
        yield
    finally:
        _left_to_caller.reset(token)


def remember_(model: nn.Module, folder: Path) -> None:
    """Note on a model from which folder it was loaded."""
    model.__dict__[FOLDER] = str(folder.absolute())


def forget_(model: nn.Module) -> None:
    """Undo `remember_`: the model is no longer what the folder's card describes."""
    model.__dict__.pop(FOLDER, None)


def folder_of(model: nn.Module) -> Path | None:
    """The folder that a factorised model was loaded from; None if it is not known or no longer there."""
    found = vars(model).get(FOLDER)
    return Path(found) if found is not None and Path(found).is_dir() and factorised_layers(model) else None


def keep_card(model: nn.Module, folder: Path) -> bool:
    """Copy the card to the `folder` that a model is being saved in, unless it has one; return if it holds there.

    It does if every tensor and layer of the model is as in the folder that it was loaded from. If not, the copy says
    so.
    """
    old = None if _left_to_caller.get() else folder_of(model)
    if old is None or old.resolve() == folder.resolve():
        return False
    card, same = old / CARD, _is_as_in(model, old)
    if card.is_file() and not (folder / CARD).exists():
        text = card.read_text(encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CARD, text if same else _with_line(text))
    return same


def keep_report(model: nn.Module, folder: Path, holds: bool, names: Collection[str] | None = None) -> None:
    """Write the report of the old folder into `folder`, once all else is in it; `holds` is from `keep_card`.

    It gets the digests of the files `names`, or of all. If it does not hold, a report that lies in `folder` loses them,
    and has a note.
    """
    if _left_to_caller.get():
        return
    old = folder_of(model)
    if holds and old is not None and (old / REPORT).is_file():
        body = read_json(old / REPORT, "a rank report")
        body["files"] = file_digests(folder, names)
    elif (folder / REPORT).is_file():
        body = read_json(folder / REPORT, "a rank report")
        digests = body.get("files") or {}
        body["files"] = {name: digest for name, digest in digests.items() if names is not None and name not in names}
        body["notes"] = [*(note for note in body.get("notes") or [] if note != CHANGED), CHANGED]
    else:
        return
    write_text(folder / REPORT, json_text(body))


def _with_line(text: str) -> str:
    front = FRONT_MATTER.match(text)
    end = front.end() if front else 0
    return f"{text[:end]}\n> {CHANGED}\n\n{text[end:].lstrip()}"


def _is_as_in(model: nn.Module, folder: Path) -> bool:
    """Whether the layers and tensors of a model are those in a folder; False where that cannot be told."""
    try:
        source = resolve(str(folder))
        return _layers_of(model, source) == source.layers and _same_tensors(model, source)
    except (SurgeryError, OSError):
        return False


def _layers_of(model: nn.Module, source: Source) -> object:
    layers = specs_of(model)
    if source.library == "timm":
        return layers
    from lrsurgery.checkpoints.quantizer.names import config_names

    transformers_model: Any = model
    return config_names(transformers_model, layers)


def _same_tensors(model: nn.Module, source: Source) -> bool:
    keys, tensors, covered = key_map(source, model), open_tensors(list(source.files)), set(tied_weights(model))
    tripwires = {layer.layout.weight_key(name) for name, layer in factorised_layers(model).items()}
    for key in tensors.keys():  # noqa: SIM118
        target, pattern = keys.target(key)
        dtype, shape = tensors.describe(key)
        if target is None or pattern is not None:  # of several tensors, the model has what a converter made
            if key in tripwires or shape == (0,):
                continue
            return False
        held = keys.state[target]
        if type(held.detach()) is not torch.Tensor:  # sharded, or quantised: no process has all of it as it is in files
            return False
        if held.is_meta or held.dtype != dtype or tuple(held.shape) != shape:
            return False
        if not torch.equal(held.detach().cpu(), tensors.read(key)):
            return False
        covered.add(target)
    return covered >= keys.state.keys()
