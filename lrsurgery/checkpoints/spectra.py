"""A disk cache of singular values, and optionally singular vectors, keyed by the digest of the tensor.

Every decomposition of a checkpoint's tensor goes through `SpectrumLookup`: digest, cache, then computation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch import Tensor

from lrsurgery.errors import OutputError
from lrsurgery.files.digests import tensor_digest
from lrsurgery.files.marks import remove
from lrsurgery.files.pieces import Piece, load_piece, save_piece
from lrsurgery.linalg.svd import Decomposition, Spectrum, singular_values
from lrsurgery.linalg.weighted import Metric, StackedMetric, weighted_values
from lrsurgery.runtime import Compute, cache_folder
from lrsurgery.surgery.experts.stack import Stack, slices_of
from lrsurgery.surgery.layers import Kind
from lrsurgery.units import parse_size

FORMAT = 1
LIMIT = "10GB"  # unless $LRSURGERY_CACHE_SIZE says otherwise
# DIGEST-KIND or DIGEST-METRIC-KIND; half of one where a process was killed
ENTRY = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{64}(-inputs)?)?-[a-z][a-z0-9-]*\.(safetensors|[^/]+\.half)")


def cache_limit() -> int:
    """The most bytes that the cache keeps. Raises OutputError if $LRSURGERY_CACHE_SIZE is no size."""
    asked = os.environ.get("LRSURGERY_CACHE_SIZE") or LIMIT
    try:
        return parse_size(asked)
    except OutputError as e:
        raise OutputError(f"LRSURGERY_CACHE_SIZE '{asked}': write a size such as 10GB or 500MB") from e


class SpectrumCache:
    """One file per decomposed tensor. The key is a digest of the tensor's content, so no entry can be stale."""

    def __init__(self) -> None:
        self.folder = cache_folder() / "spectra"

    def _file(self, digest: str, kind: str) -> Path:
        return self.folder / digest[:2] / f"{digest}-{kind}.safetensors"

    def get(self, digest: str, kind: str) -> Spectrum | None:
        """The spectrum of the tensor with this digest, as a layer of this kind; damaged entries are removed."""
        file = self._file(digest, kind)
        if not ENTRY.fullmatch(file.name):
            return None  # such as of statistics whose digests are none
        piece = load_piece(file)
        try:
            if piece is None or piece.facts.get("format") != FORMAT:
                file.unlink(missing_ok=True)
                return None
            with contextlib.suppress(OSError):  # of a cache that is read-only
                os.utime(file)  # `trim` removes the least recently used entries
            precision = {"float32": torch.float32, "float64": torch.float64}[str(piece.facts["precision"])]
            values, vectors = piece.tensors["values"], piece.tensors.get("vectors")
            whole = values.ndim == 1 and (vectors is None or vectors.shape[1:] == values.shape)
            return Spectrum(values, vectors, precision) if whole else None
        except (OSError, KeyError):
            return None

    def put(self, digest: str, kind: str, result: Decomposition | Tensor) -> None:
        """Store the spectrum of a decomposition, or singular values; does nothing if the cache cannot be written."""
        values = result if isinstance(result, Tensor) else result.values
        spectrum = None if isinstance(result, Tensor) else result.spectrum
        file = self._file(digest, kind)
        if bool(values.isnan().any()) or not ENTRY.fullmatch(file.name):
            return
        tensors, precision = {"values": values}, torch.float32
        if spectrum is not None and spectrum.vectors is not None:
            tensors["vectors"], precision = spectrum.vectors, spectrum.precision
        facts = {"format": FORMAT, "precision": str(precision).removeprefix("torch.")}
        try:
            save_piece(file, Piece(facts, tensors))
        except OSError:
            return

    def trim(self, limit: int) -> None:
        """Remove the least recently used entries beyond a limit in bytes, as far as the cache can be written."""
        total = 0
        for _, size, file in sorted(self._entries(), reverse=True):
            total += size
            if total > limit:
                remove(file)

    def size(self) -> tuple[int, int]:
        """(entries, bytes)."""
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def clear(self) -> None:
        """Remove every entry, and nothing else. Raises OSError."""
        for _, _, file in self._entries():
            file.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of the last use, bytes, file) of each; files of any other form are not the cache's."""
        entries = []
        for file in self.folder.glob("??/*"):
            if not ENTRY.fullmatch(file.name) or file.name[:2] != file.parent.name:
                continue
            try:
                stat = file.lstat()
            except OSError:  # another process removed it
                continue
            if S_ISREG(stat.st_mode):
                entries.append((stat.st_mtime, stat.st_size, file))
        return entries


def joint_lookup(
    weights: Sequence[Tensor], metrics: Sequence[str | None], compute: Compute, values: Callable[[], Tensor]
) -> Tensor:
    """Singular values of weights together, from the cache or computed; `metrics` are the digests of their metrics."""
    if not compute.cache or None in metrics:
        return values()
    parts = [tensor_digest(weight.dtype, tuple(weight.shape), [weight.cpu()]) for weight in weights]
    digest = hashlib.sha256(" ".join([*parts, *map(str, metrics)]).encode()).hexdigest()
    cache = SpectrumCache()
    known = cache.get(digest, "joint")
    if known is not None:
        return known.values
    found = values()
    cache.put(digest, "joint", found.cpu())
    return found


class SpectrumLookup:
    """Spectra of one dense weight as a layer of some kind, from the cache or computed."""

    def __init__(
        self,
        weight: Tensor | Stack,
        kind: Kind,
        compute: Compute,
        device: torch.device | None = None,
        groups: int = 1,
    ) -> None:
        """`weight` is the dense weight as stored; computation runs on `device`, by default that of `compute`."""
        self.digest = tensor_digest(weight.dtype, tuple(weight.shape), slices_of(weight)) if compute.cache else ""
        self._weight, self._kind, self._compute, self._groups = weight, kind, compute, groups
        self._name = kind.name if groups == 1 else f"{kind.name}-{groups}-groups"
        self._device = device or compute.device
        self._cache = SpectrumCache() if compute.cache else None

    def spectrum(self) -> Spectrum | None:
        """The cached spectrum of the weight, or None."""
        return self._cache.get(self.digest, self._name) if self._cache else None

    def keep(self, decomposition: Decomposition) -> None:
        """Store the spectrum of a decomposition of the weight."""
        if self._cache:
            self._cache.put(self.digest, self._name, decomposition)

    def matrix(self) -> Any:
        """The matrix (rows, columns), or those of groups or of a bank along a first axis."""
        weight: Any = self._weight.to(self._device)
        return self._kind.matrix_of(weight, self._groups)

    def values(self, metric: Metric | StackedMetric | None = None, metric_digest: str | None = None) -> Tensor:
        """Singular values (full rank,) of the weight, or in a metric, which are cached under the digest of the metric.

        Raises WeightError if the weight is not finite.
        """
        if metric is None:
            return self._cached_values("", lambda: singular_values(self.matrix()))
        compute: Callable[[], Tensor] = lambda: weighted_values(self.matrix(), metric)  # noqa: E731
        return self._cached_values(f"-{metric_digest}", compute) if metric_digest else compute()

    def wide_values(self) -> Tensor:
        """Singular values computed in fp64, which resolves small ones."""
        return self._cached_values("", lambda: singular_values(self.matrix().double()), kind=f"{self._name}-fp64")

    def _cached_values(self, suffix: str, compute: Callable[[], Tensor], *, kind: str | None = None) -> Tensor:
        kind = kind or self._name
        known = self._cache.get(self.digest + suffix, kind) if self._cache else None
        if known is not None:
            return known.values
        values = compute()
        if self._cache:
            self._cache.put(self.digest + suffix, kind, values.cpu())
        return values
