"""A factorised folder's weights written again with other values for some: the same keys, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.checkpoints.mapping import KeyTargets
from lrsurgery.checkpoints.output import ShardWriter, in_write_order
from lrsurgery.checkpoints.tensors import TensorSource
from lrsurgery.errors import WeightError


def written_alone(keys: KeyTargets, tensors: TensorSource) -> dict[str, str]:
    """Key in the files -> state-dict key, of the tensors that the files have as the model does, each once."""
    found: dict[str, list[str]] = {}
    for key in tensors.keys():  # noqa: SIM118
        target, pattern = keys.target(key)
        if target is None:
            continue
        alike = pattern is None and tensors.describe(key)[1] == tuple(keys.state[target].shape)
        found.setdefault(target, []).append(key if alike else "")
    return {sources[0]: target for target, sources in found.items() if len(sources) == 1 and sources[0]}


def rewrite(
    tensors: TensorSource,
    targets: dict[str, str],
    value_of: Callable[[str], Tensor | None],
    stage: Path,
    shard_size: int,
) -> int:
    """Write all tensors of the files, those with a new value in their old dtype; return their bytes.

    `targets` are those of `written_alone`, `value_of` gives the new value of a state-dict key or None. Raises
    WeightError that names a tensor which overflows its dtype.
    """
    writer = ShardWriter(stage, shard_size=shard_size)
    keys: Iterable[str] = in_write_order([(tensors.describe(key)[0], key) for key in tensors.keys()])  # noqa: SIM118
    try:
        for key in keys:
            dtype, shape = tensors.describe(key)
            value = value_of(targets[key]) if key in targets else None
            if value is None:
                writer.add_slices(key, dtype, shape, tensors.slices(key))
                continue
            stored = value.detach().to(dtype)
            if not bool(torch.isfinite(stored).all()):
                raise WeightError(f"{key}: overflows {dtype} after refinement")
            writer.add(key, stored)
        return writer.finish()
    finally:
        writer.close()
