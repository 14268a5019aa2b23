"""Pieces: tensors and JSON facts in one safetensors file with a digest."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lrsurgery.files.digests import as_bytes
from lrsurgery.files.json import Json


@dataclass(frozen=True)
class Piece:
    """Tensors with JSON facts about them, such as the factors of one layer."""

    facts: Json
    tensors: dict[str, Tensor]


def save_piece(file: Path, piece: Piece) -> None:
    """Write a safetensors file atomically, with a digest of its contents. Raises OSError."""
    from safetensors.torch import save

    facts = json.dumps(piece.facts)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in piece.tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.half")
    try:
        half.write_bytes(save(tensors, {"format": "pt", "facts": facts, "sha256": piece_digest(facts, tensors)}))
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def load_piece(file: Path, *, verify: bool = True) -> Piece | None:
    """Read a file of `save_piece`; None if it is missing or unreadable, or with `verify` if its digest differs."""
    from pydantic_core import from_json
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if verify and metadata["sha256"] != piece_digest(metadata["facts"], tensors):
            return None
        facts = from_json(metadata["facts"])
        return Piece(facts, tensors) if isinstance(facts, dict) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def piece_digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of `facts` and of the tensors' names, dtypes, shapes and bytes."""
    hasher = hashlib.sha256(facts.encode())
    for key in sorted(tensors):
        hasher.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        if tensors[key].numel():
            hasher.update(as_bytes(tensors[key]))
    return hasher.hexdigest()
