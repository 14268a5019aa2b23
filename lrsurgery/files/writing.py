"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrsurgery.errors import OutputError
from lrsurgery.files.locks import alive


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
