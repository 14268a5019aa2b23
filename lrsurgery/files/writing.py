"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lrsurgery.errors import OutputError
from lrsurgery.files.locks import alive, remove_empty
from lrsurgery.files.marks import (
    MARK,
    MODEL,
    half_of,
    is_blank,
    mark_contents,
    read_mark,
    remove,
    stranger_in,
    write_mark,
)
from lrsurgery.text import expanded

HALF = "partial"  # what a folder is until it is published


def write_text(path: Path, text: str) -> None:
    """Write a file and fsync it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(file: Path, content: str | bytes) -> None:
    """Write one file atomically. Raises OutputError if it cannot be written."""
    replace_files({file: content})


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together: all of them, or none if one cannot be written. Raises OutputError."""
    partials = {file: half_of(file) for file in contents}
    file = next(iter(contents))
    try:
        for file, content in contents.items():
            partials[file].write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        for file, partial in partials.items():
            partial.replace(file)
    except OSError as e:
        raise OutputError(f"{file}: cannot be written ({e.strerror or e})") from e
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):  # the error was raised above; a parent that is a file fails here too
                partial.unlink(missing_ok=True)


def with_name(output: Path) -> Path:
    """An output with a name of its own, for what stands beside it: `~`, `.` and `..` resolved. Raises OutputError."""
    output = expanded(output)
    if "\0" in str(output):
        raise OutputError(f"{str(output)!r}: holds a NUL, which no name may")
    found = output if output.name not in ("", "..") else output.resolve()
    if not found.name:
        raise OutputError(f"{output}: cannot be an output; choose another --output")
    return found


def check_free(output: Path, overwrite: bool) -> None:
    """Raise OutputError if `output` exists and may not be overwritten.

    With `overwrite`, a folder gives way if it is empty, or a model that this program wrote and nothing was added to.
    """
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output}: already exists; choose another --output or add --overwrite")
    if output.is_symlink() or not output.is_dir():
        what = "a link" if output.is_symlink() else "no folder"
        raise OutputError(f"{output}: is {what}, which --overwrite does not replace; choose another --output")
    if not any(output.iterdir()):
        return
    mark = read_mark(output)
    if mark is None or mark.what != MODEL:
        raise OutputError(
            f"{output}: is no model that this version of lrsurgery wrote (its {MARK} would say so), so --overwrite"
            " does not replace it; move it away or remove it by hand, or choose another --output"
        )
    stranger = stranger_in(output)
    if stranger is not None:
        raise OutputError(
            f"{output}: holds {stranger}, which lrsurgery did not write, so --overwrite does not replace it; move"
            f" {stranger} away, or choose another --output"
        )


@contextmanager
def staged(output: Path, *, overwrite: bool = False, what: str = MODEL) -> Iterator[Path]:
    """Yield a sibling folder that is renamed to `output` on success and removed on an exception.

    It is marked as `what`, with the files that are in it then. A killed process leaves hidden siblings, which the next
    job for the same output removes; a folder that was moved aside for an overwrite is restored first.

    Raises OutputError if `output` cannot be written.
    """
    prefix = f".{output.name}.{socket.gethostname()}."
    stage = output.parent / f"{prefix}{os.getpid()}.partial"
    made: list[Path] = []
    try:
        made += [p for p in (output.parent, *output.parent.parents) if not p.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(output, prefix)
        check_free(output, overwrite)
        stage.mkdir()
    except OSError as e:
        remove_empty(made)
        raise OutputError(f"{output}: cannot be written ({e.strerror})") from e
    try:
        write_mark(stage, HALF)
        yield stage
        mark_contents(stage, what)
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
        if state not in ("partial", "replaced") or alive(pid) or not _is_ours(stale):
            continue
        if state == "replaced" and not output.exists():
            stale.rename(output)  # killed between the two renames of an overwrite
        else:
            remove(stale)


def _is_ours(stale: Path) -> bool:
    """Whether a folder was staged, or moved aside, by this program, and holds nothing else."""
    if stale.is_symlink() or not stale.is_dir():
        return False
    mark = read_mark(stale)
    if mark is None:  # a kill may have come before the first mark was whole
        return is_blank(stale)
    return mark.what == HALF or stranger_in(stale) is None


def _publish(stage: Path, output: Path, overwrite: bool) -> None:
    _sync_folder(stage)
    old = stage.with_suffix(".replaced")
    check_free(output, overwrite)  # another process may have created it meanwhile
    existed = output.exists()
    if existed:
        output.rename(old)
    try:
        stage.rename(output)
    except OSError:
        if existed:
            old.rename(output)
        raise
    _sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
