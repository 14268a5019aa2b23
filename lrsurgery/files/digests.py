"""Digests of tensors and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MEGABYTE = 1 << 20  # bytes


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, for writing and hashing; memory is shared with a contiguous tensor."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_digest(dtype: torch.dtype, shape: Sequence[int], slices: Iterable[Tensor]) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; `slices` are its elements in order."""
    hasher = hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())
    for part in slices:
        if part.numel():
            hasher.update(as_bytes(part))
    return hasher.hexdigest()


def fingerprint(files: Sequence[Path], text: str = "", *, pieces: int = 2) -> str:
    """Hash of `text` and of the files' names, sizes and contents.

    Of a file of more than `pieces` megabytes, that many at equal distances are read, the first and the last among them.
    """
    hasher = hashlib.blake2b(text.encode(), digest_size=16)
    for file in files:
        size = file.stat().st_size
        starts: Sequence[int] = range(0, size, MEGABYTE)
        if size > pieces * MEGABYTE:
            starts = [(size - MEGABYTE) * i // (pieces - 1) for i in range(pieces)]
        hasher.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            for start in starts:
                handle.seek(start)
                hasher.update(handle.read(MEGABYTE))
    return hasher.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a model's output folder: its JSON files and its weights."""
    # the mark, which is hidden, is written after it is taken
    return fingerprint([file for ending in ("json", "safetensors") for file in sorted(folder.glob(f"[!.]*.{ending}"))])
