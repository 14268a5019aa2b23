"""Digests of tensors and files, and the check of files against the digests in the report beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from lrsurgery.errors import SourceError
from lrsurgery.files.json import read_as

MEGABYTE = 1 << 20  # bytes
REPORT = "rank_report.json"  # the report of a folder, which has the digest of each other file
# not in the report: itself, the card, which people edit, and what `bench --save` adds later
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")  # endings of what is checked when it is read
WITHOUT_DIGEST = (REPORT, "README.md", "bench.json")


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, for writing and hashing; memory is shared with a contiguous tensor."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_digest(dtype: torch.dtype, shape: Sequence[int], slices: Iterable[Tensor]) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes; `slices` are its elements in order."""
    hasher = hashlib.sha256(tensor_header(dtype, shape))
    for part in slices:
        hasher.update(as_bytes(part))
    return hasher.hexdigest()


def tensor_header(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """What a tensor's digest begins with, before its bytes."""
    return f"{dtype} {tuple(shape)} ".encode()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """Digest of named tensors, whatever their order, from that of each."""
    return hashlib.sha256("".join(f"{key} {digests[key]}\n" for key in sorted(digests)).encode()).hexdigest()[:32]


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


class FileDigest(TypedDict):
    """A file as it was written."""

    sha256: str
    bytes: int


class _Recorded(TypedDict):
    files: NotRequired[dict[str, FileDigest] | None]


def file_digests(folder: Path, only: Collection[str] | None = None) -> dict[str, FileDigest]:
    """Digest of each file in a folder and below, or of those named, by its path in the folder. Raises OSError."""
    names = sorted(_names_in(folder) if only is None else only)
    return dict(zip(names, _hash_all([folder / name for name in names]), strict=True))


def recorded_digests(folder: Path) -> dict[str, FileDigest]:
    """The digests in the report of a folder; empty if there is no report, or one of an older version.

    Raises SourceError for a damaged report.
    """
    file = folder / REPORT
    return (read_as(_Recorded, file, "a rank report").get("files") or {}) if file.is_file() else {}


def check_files(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise SourceError that names the first of these files of a folder which is not as its report says.

    None stands for all that are there but the weights: config, tokenizer, processor and the like. Files of which the
    report says nothing pass. A process hashes a file once unless it changes; of the processes that
    torchrun starts on a machine, one does.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    recorded = recorded_digests(folder)
    if names is None:
        names = [name for name in recorded if not name.endswith(WEIGHTS) and (folder / name).is_file()]
    known = {name: recorded[name] for name in names if name in recorded}
    differs = _compare(folder, known)
    if differs:
        raise SourceError(
            f"{folder / min(differs)}: differs from what was written, so it is damaged or was changed since; download"
            f' or copy it again (if it was changed on purpose, delete its entry under "files" in {REPORT})'
        )


@dataclass(frozen=True)
class Verified:
    """A folder compared with the digests in its report."""

    files: int  # in the report
    bytes: int  # of those files, as written
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    foreign: tuple[str, ...]  # beside those in the report

    @property
    def whole(self) -> bool:
        """Whether every file in the report is as it was written."""
        return not self.missing and not self.damaged

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """(file, what is wrong or odd with it)."""
        kinds = {"missing": self.missing, "damaged or changed": self.damaged, "not written by lrsurgery": self.foreign}
        return [(name, what) for what, names in kinds.items() for name in names]


def verify_folder(folder: Path) -> Verified:
    """Compare every file of a folder with the digests in its report.

    Raises SourceError if there is no report, or if it has no digests.
    """
    if not (folder / REPORT).is_file():
        raise SourceError(f"{folder}: no {REPORT} in it, so there are no digests to compare with")
    recorded = recorded_digests(folder)
    if not recorded:
        raise SourceError(
            f"{folder / REPORT}: of an older version, without digests of the files; nothing to compare with"
        )
    missing = sorted(name for name in recorded if not (folder / name).is_file())
    damaged = _compare(folder, {name: each for name, each in recorded.items() if name not in missing})
    foreign = sorted(set(_names_in(folder)) - set(recorded))
    total = sum(each["bytes"] for each in recorded.values())
    return Verified(len(recorded), total, tuple(missing), tuple(damaged), tuple(foreign))


def _compare(folder: Path, recorded: Mapping[str, FileDigest]) -> list[str]:
    """The files that are not as recorded, in order; those of another size are not read."""
    names = sorted(recorded)
    try:
        alike = [name for name in names if (folder / name).stat().st_size == recorded[name]["bytes"]]
        found = dict(zip(alike, _hash_all([folder / name for name in alike]), strict=True))
    except OSError as e:
        raise SourceError(f"{e.filename or folder}: cannot be read ({e.strerror or e})") from e
    return [name for name in names if name not in found or found[name]["sha256"] != recorded[name]["sha256"]]


def _names_in(folder: Path) -> Iterable[str]:
    """Paths of files within a folder, without hidden ones and those that have no digest."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and name.as_posix() not in WITHOUT_DIGEST:
            yield name.as_posix()


def _hash_all(files: Sequence[Path]) -> list[FileDigest]:
    """The digests of files, several at once: hashlib releases the interpreter lock."""
    if len(files) < 2:
        return [_hash(file) for file in files]
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, 8), "hash") as pool:
        return list(pool.map(_hash, files))


_known: dict[tuple[str, int, int, int, int], str] = {}  # file, its number, size, times of change -> digest


def _hash(file: Path) -> FileDigest:
    with file.open("rb", buffering=0) as opened:
        is_now = os.fstat(opened.fileno())
        key = (str(file.resolve()), is_now.st_ino, is_now.st_size, is_now.st_mtime_ns, is_now.st_ctime_ns)
        if key not in _known:
            hasher, buffer = hashlib.sha256(), bytearray(4 * MEGABYTE)
            view = memoryview(buffer)
            while count := opened.readinto(buffer):
                hasher.update(view[:count])
            _known[key] = hasher.hexdigest()
    return FileDigest(sha256=_known[key], bytes=is_now.st_size)
