"""Singular values, and vectors where asked for, kept between runs by the digest of the tensor that they are of."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lrsurgery.cache import cache_folder
from lrsurgery.linalg import Decomposed, Spectrum
from lrsurgery.pieces import Piece, load_piece, save_piece
from lrsurgery.tensors import parse_size

FORMAT = 1
LIMIT = "10GB"  # unless $LRSURGERY_CACHE_SIZE says otherwise


class SpectrumCache:
    """A file for each decomposed tensor. An entry belongs to a tensor's content, so it cannot be out of date."""

    def __init__(self, *, keep_vectors: bool = False) -> None:
        self.folder = cache_folder() / "spectra"
        self.keep_vectors = keep_vectors

    def _file(self, digest: str, kind: str) -> Path:
        return self.folder / digest[:2] / f"{digest}-{kind}.safetensors"

    def get(self, digest: str, kind: str) -> Spectrum | None:
        """What is known of the tensor of this digest as a layer of this kind; damaged entries are put away."""
        file = self._file(digest, kind)
        piece = load_piece(file)
        try:
            if piece is None or piece.facts["format"] != FORMAT:
                file.unlink(missing_ok=True)
                return None
            os.utime(file)  # the least recently used go first
            precision = {"float32": torch.float32, "float64": torch.float64}[piece.facts["precision"]]
            return Spectrum(piece.tensors["values"], piece.tensors.get("vectors"), precision)
        except (OSError, KeyError):
            return None

    def put(self, digest: str, kind: str, found: Decomposed | torch.Tensor) -> None:
        """Keeps what a decomposition found, or the values alone. A cache that cannot be written is no fault."""
        values = found if isinstance(found, torch.Tensor) else found.values
        spectrum = None if isinstance(found, torch.Tensor) else found.spectrum
        if bool(values.isnan().any()):
            return
        tensors, precision = {"values": values}, torch.float32
        if spectrum is not None and spectrum.vectors is not None:
            tensors["vectors"], precision = spectrum.vectors, spectrum.precision
        facts = {"format": FORMAT, "precision": str(precision).removeprefix("torch.")}
        try:
            save_piece(self._file(digest, kind), Piece(facts, tensors))
        except OSError:
            return

    def trim(self) -> None:
        """Removes the least recently used entries beyond the limit. Raises OutputError for a limit that is no size."""
        limit = parse_size(os.environ.get("LRSURGERY_CACHE_SIZE") or LIMIT)
        total = 0
        for _, size, file in sorted(self._entries(), reverse=True):
            total += size
            if total > limit:
                file.unlink(missing_ok=True)

    def size(self) -> tuple[int, int]:
        """(entries, bytes)."""
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def clear(self) -> None:
        for _, _, file in self._entries():
            file.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[float, int, Path]]:
        found = []
        for file in self.folder.glob("*/*"):
            try:
                stat = file.stat()
            except OSError:  # another process has just removed it
                continue
            found.append((stat.st_mtime, stat.st_size, file))
        return found
