"""Files on disk: atomic writes, digests, the one reader of JSON, the cache folder."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import OutputError, SourceError, SurgeryError

Json: TypeAlias = dict[str, Any]  # a JSON object of a file; readers turn it into typed values

MEGABYTE = 1 << 20  # bytes


def read_json(file: Path, what: str = "a JSON object", error: type[SurgeryError] = SourceError) -> Json:
    """Read the JSON object in a file. Raises `error` if the file is missing or is not `what`."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise error(f"{file}: missing") from e
    except (OSError, ValueError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise error(f"{file}: not {what} ({e})") from e
    if not isinstance(body, dict):
        raise error(f"{file}: not {what} (it holds a {type(body).__name__})")
    return body


def read_lines(file: Path) -> list[Json]:
    """Read the objects of an append-only .jsonl file, up to a last line that a kill truncated; [] without a file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def json_text(body: object, indent: int | None = 2) -> str:
    """The text of a JSON file, or of one line of several. JSON has no NaN and no infinities: they are null."""
    return json.dumps(_finite(body), indent=indent, allow_nan=False) + "\n"


def _finite(body: object) -> object:
    if isinstance(body, float):
        return body if math.isfinite(body) else None
    if isinstance(body, Mapping):
        return {key: _finite(value) for key, value in body.items()}
    return [_finite(value) for value in body] if isinstance(body, list | tuple) else body


def write_text(path: Path, text: str) -> None:
    """Write a file and fsync it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(file: Path, content: str | bytes) -> None:
    """Write one file atomically. Raises OutputError if it cannot be written."""
    partial = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(file)
    except OSError as e:
        raise OutputError(f"{file}: cannot be written ({e.strerror or e})") from e
    finally:
        with contextlib.suppress(OSError):  # the error was raised above; a parent that is a file fails here too
            partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$LRSURGERY_CACHE`, or `lrsurgery` in the user's cache folder. The folder may not exist yet."""
    import platformdirs

    own = os.environ.get("LRSURGERY_CACHE")
    return Path(own).expanduser() if own else platformdirs.user_cache_path("lrsurgery", appauthor=False)


# output folders


def check_free(output: Path, overwrite: bool) -> None:
    """Raise OutputError if `output` exists and may not be overwritten."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{output}: already exists; choose another --output or add --overwrite")
    empty = output.is_dir() and not any(output.iterdir())
    if not output.is_dir() or output.is_symlink() or not (empty or (output / "config.json").is_file()):
        raise OutputError(
            f"{output}: exists and is no model folder, so --overwrite refuses it; choose another --output"
        )


@contextmanager
def staged(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a sibling folder that is renamed to `output` on success and removed on an exception.

    A killed process leaves hidden siblings, which the next job for the same output removes; a folder that was moved
    aside for an overwrite is restored first.

    Raises OutputError if `output` cannot be written.
    """
    prefix = f".{output.name}.{socket.gethostname()}."
    stage = output.parent / f"{prefix}{os.getpid()}.partial"
    made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(output, prefix)
        check_free(output, overwrite)
        stage.mkdir()
    except OSError as e:
        remove_empty(made)
        raise OutputError(f"{output}: cannot be written ({e.strerror})") from e
    try:
        yield stage
        _publish(stage, output, overwrite)
    except BaseException as e:
        shutil.rmtree(stage, ignore_errors=True)
        remove_empty(made)
        if isinstance(e, OSError):
            raise OutputError(f"{output}: cannot be written ({e.strerror or e})") from e
        raise


def _clear_stale(output: Path, prefix: str) -> None:
    for stale in sorted(output.parent.glob(f"{glob.escape(prefix)}*")):
        pid, _, state = stale.name.removeprefix(prefix).partition(".")
        if state not in ("partial", "replaced") or alive(pid):
            continue
        if state == "replaced" and not output.exists():
            stale.rename(output)  # killed between the two renames of an overwrite
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _publish(stage: Path, output: Path, overwrite: bool) -> None:
    _sync_folder(stage)
    old = stage.with_suffix(".replaced")
    check_free(output, overwrite)  # another process may have created it meanwhile
    if output.exists():
        output.rename(old)
    stage.rename(output)
    _sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, and stop at the first that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def alive(pid: str) -> bool:
    """Whether a process runs on this machine; a zombie, which has ended, does not."""
    import psutil

    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


# fingerprints


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


# pieces: tensors and JSON facts in one safetensors file with a digest


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if verify and metadata["sha256"] != piece_digest(metadata["facts"], tensors):
            return None
        return Piece(json.loads(metadata["facts"]), tensors)
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
