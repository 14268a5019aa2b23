"""The check that a folder which is being written loads."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from lrsurgery.checkpoints.build import (
    build_model,
)
from lrsurgery.checkpoints.load import from_pretrained
from lrsurgery.checkpoints.loading.modules import match_module
from lrsurgery.checkpoints.source import resolve
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.errors import SourceError, SurgeryError


def check_folder(
    folder: Path, reference: str, *, unused: Collection[str] = (), trust_remote_code: bool = False
) -> None:
    """Run the load of a folder that is being written once on the meta device, and compare names and shapes.

    No weight is read. `reference` names the source, `unused` tensors of it that its model class does not use.

    Raises SurgeryError for a tensor that is missing, left over or of another shape.
    """
    problem = load_problem(folder, unused=unused, trust_remote_code=trust_remote_code)
    if problem is not None:
        raise SurgeryError(f"{reference}: the output would not load, so it is not written: {problem}")


def load_problem(folder: Path, *, unused: Collection[str] = (), trust_remote_code: bool = False) -> str | None:
    """As `check_folder`: why a folder does not load; None if it does."""
    try:
        _load_on_meta(folder, unused, trust_remote_code)
    except SourceError as e:
        return str(e)
    return None


def _load_on_meta(folder: Path, unused: Collection[str], trust_remote_code: bool) -> None:
    source = resolve(str(folder))
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    if source.library == "timm":
        match_module(source, model)
        return
    import lrsurgery.checkpoints.pretrained.register  # noqa: F401  (registers the format)
    from lrsurgery.checkpoints.upstream.transformers import quiet

    tensors = open_tensors(list(source.files))
    described = {key: tensors.describe(key) for key in tensors.keys()}  # noqa: SIM118
    state = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in described.items()}
    options = {"config": model.config, "state_dict": state, "device_map": {"": "meta"}}
    with quiet():
        _, info = from_pretrained(type(model), source, options, None)
    wrong = {
        "is missing from": info["missing_keys"],
        "has another shape in": [key for key, *_ in info["mismatched_keys"]],
        "has no place in the model, but stands in": set(info["unexpected_keys"]) - set(unused),
    }
    for what, keys in wrong.items():
        if keys:
            raise SourceError(f"{min(keys)} {what} the folder as {type(model).__name__} loads it")
