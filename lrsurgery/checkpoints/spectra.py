"""Singular values, and vectors where asked for, kept between runs by the digest of the tensor that they are of.

All decompositions of checkpoints go this way: the tensor's digest, what the cache knows of it, else the arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.files import Piece, cache_folder, load_piece, save_piece, tensor_digest
from lrsurgery.linalg.svd import Decomposition, Spectrum, singular_values
from lrsurgery.linalg.weighted import Metric, weighted_values
from lrsurgery.runtime import Compute
from lrsurgery.surgery.layers import Kind
from lrsurgery.units import parse_size

FORMAT = 1
LIMIT = "10GB"  # unless $LRSURGERY_CACHE_SIZE says otherwise


class SpectrumCache:
    """A file for each decomposed tensor. An entry belongs to a tensor's content, so it cannot be out of date."""

    def __init__(self) -> None:
        self.folder = cache_folder() / "spectra"

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

    def put(self, digest: str, kind: str, found: Decomposition | Tensor) -> None:
        """Keep what a decomposition found, or the values alone. A cache that cannot be written is no fault."""
        values = found if isinstance(found, Tensor) else found.values
        spectrum = None if isinstance(found, Tensor) else found.spectrum
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
        """Remove the least recently used entries beyond the limit. Raises OutputError for a limit that is no size."""
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


class SpectrumLookup:
    """What the cache knows of one dense weight as a layer of some kind, and how to find the rest."""

    def __init__(self, weight: Tensor, kind: Kind, compute: Compute, device: torch.device | None = None) -> None:
        """`weight` is the dense weight as stored; arithmetic runs on `device`, the compute's by default."""
        self.digest = tensor_digest(weight.dtype, tuple(weight.shape), [weight.cpu()]) if compute.cache else ""
        self._weight, self._kind, self._compute = weight, kind, compute
        self._device = device or compute.device
        self._cache = SpectrumCache() if compute.cache else None

    def spectrum(self) -> Spectrum | None:
        """Of the weight itself, where an earlier decomposition kept it."""
        return self._cache.get(self.digest, self._kind.name) if self._cache else None

    def keep(self, found: Decomposition) -> None:
        """Keep what a decomposition found of the weight itself."""
        if self._cache:
            self._cache.put(self.digest, self._kind.name, found)

    def matrix(self) -> Tensor:
        return self._kind.to_matrix(self._weight.to(self._device))

    def values(self, metric: Metric | None = None, metric_digest: str | None = None) -> Tensor:
        """Singular values (full rank,) of the weight, or in a metric, whose digest names them in the cache.

        Raises WeightError where the weight is not finite.
        """
        if metric is None:
            return self.values_named("", lambda: singular_values(self.matrix()))
        found: Callable[[], Tensor] = lambda: weighted_values(self.matrix(), metric)  # noqa: E731
        return self.values_named(f"-{metric_digest}", found) if metric_digest else found()

    def wide_values(self) -> Tensor:
        """Singular values from arithmetic in fp64, which resolves small ones."""
        return self.values_named("", lambda: singular_values(self.matrix().double()), kind=f"{self._kind.name}-fp64")

    def values_named(self, suffix: str, find: Callable[[], Tensor], *, kind: str | None = None) -> Tensor:
        kind = kind or self._kind.name
        known = self._cache.get(self.digest + suffix, kind) if self._cache else None
        if known is not None:
            return known.values
        values = find()
        if self._cache:
            self._cache.put(self.digest + suffix, kind, values.cpu())
        return values
