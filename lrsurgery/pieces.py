"""Finished layers of an unfinished job: files in a work folder that outlives a kill and that processes share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lrsurgery.errors import OutputError
from lrsurgery.staging import alive, remove_empty
from lrsurgery.tensors import as_bytes


@dataclass(frozen=True)
class Piece:
    """What became of one layer."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def save_piece(file: Path, piece: Piece) -> None:
    """Writes a safetensors file, whole or not at all, with a digest of what is in it."""
    from safetensors.torch import save

    facts = json.dumps(piece.facts)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in piece.tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.half")
    try:
        half.write_bytes(save(tensors, {"format": "pt", "facts": facts, "sha256": digest(facts, tensors)}))
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def load_piece(file: Path, *, verify: bool = True) -> Piece | None:
    """What `save_piece` wrote; None where there is no such file, or with `verify` where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if verify and metadata["sha256"] != digest(metadata["facts"], tensors):
            return None
        return Piece(json.loads(metadata["facts"]), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """A fingerprint of some tensors and what goes with them."""
    found = hashlib.sha256(facts.encode())
    for key in sorted(tensors):
        found.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        if tensors[key].numel():
            found.update(as_bytes(tensors[key]))
    return found.hexdigest()


class WorkFolder:
    """A hidden sibling of an output folder: one piece a finished layer, and what job they are of."""

    def __init__(self, output: Path) -> None:
        self.path = output.parent / f".{output.name}.factorising"
        self._output = output
        self._made: list[Path] = []
        self.ours = False  # whether it was opened, so that it may be removed

    def open(self, task: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the folder for this job, or with `resume` takes over the one that an earlier process left.

        Raises OutputError where another process is at work in it, or where it is of another job.
        """
        file = self.path / "job.json"
        wanted = json.loads(json.dumps(dict(task)))
        try:
            left = json.loads(file.read_text(encoding="utf-8")) if self.path.exists() else None
        except (OSError, ValueError):
            left = {}  # killed before it was written
        if left:
            here = left.get("host") == socket.gethostname()
            if here and left.get("pid") != os.getpid() and alive(str(left.get("pid"))):
                raise OutputError(f"{self._output}: process {left['pid']} is writing it; wait for it, or stop it")
            if not here and not resume:
                raise OutputError(
                    f"{self._output}: begun on {left.get('host')}; if it runs no more there, go on with --resume"
                    f" or remove {self.path}"
                )
            if resume and left.get("task") != wanted:
                was = next((k for k in wanted if (left.get("task") or {}).get(k) != wanted[k]), "")
                raise OutputError(
                    f"{self._output}: the job to be resumed had another {was}; give the same options, or leave"
                    " --resume out to begin anew"
                )
        try:
            if left is not None and not resume:
                shutil.rmtree(self.path)
            self._made = [p for p in (self._output.parent, *self._output.parent.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            owner = {"task": wanted, "host": socket.gethostname(), "pid": os.getpid()}
            file.write_text(json.dumps(owner, indent=2) + "\n", encoding="utf-8")
            self.ours = True
        except OSError as e:
            remove_empty(self._made)
            raise OutputError(f"{self._output}: cannot be written ({e.strerror})") from e

    def file(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"

    def count(self) -> int:
        """Pieces that are there."""
        return sum(1 for _ in self.path.glob("*.safetensors"))

    def set_to_do(self, numbers: Sequence[int]) -> None:
        """Tells the other processes which pieces are still to be made."""
        (self.path / "to_do.json").write_text(json.dumps(list(numbers)), encoding="utf-8")
        (self.path / "failed").unlink(missing_ok=True)

    def set_ranks(self, ranks: Mapping[str, int | str | None]) -> None:
        """Tells the other processes what was settled: a rank, why a layer stays dense, or None for not known yet."""
        (self.path / "ranks.json").write_text(json.dumps(dict(ranks)), encoding="utf-8")

    def ranks(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "ranks.json").read_text(encoding="utf-8"))
        return found

    def to_do(self) -> set[int]:
        return set(json.loads((self.path / "to_do.json").read_text(encoding="utf-8")))

    def fail(self, message: str) -> None:
        """Tells the other processes that this one cannot go on."""
        (self.path / "failed").write_text(message, encoding="utf-8")

    def failure(self) -> str | None:
        """What another process said when it could not go on."""
        file = self.path / "failed"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def remove(self) -> None:
        """Removes it, where this process has opened it, and the folders that were made for it if nothing came of it."""
        if not self.ours:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if not self._output.exists():
            remove_empty(self._made)
