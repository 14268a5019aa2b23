"""The mark in each folder that this program makes: what the folder is, and which of its files are ours to remove."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lrsurgery import __version__
from lrsurgery.errors import OutputError
from lrsurgery.files.json import json_text, read_as

MARK = ".lrsurgery.json"
HALF_MARK = f"{MARK}.half"  # a mark that is being written
HALF_FILE = re.compile(r"\..+\.\d+\.\d+\.half")  # another file that is, see `half_of`
FORMAT_VERSION = 1
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What the mark says of its folder."""

    format_version: int
    made_by: str  # "lrsurgery 0.1.0"
    what: str  # "model", "run", "work", ...
    files: list[str] = field(default_factory=list)  # of a model: every file that was written, relative to the folder


def half_of(file: Path) -> Path:
    """What a file is called until it is whole; a kill leaves it, and then it is ours to remove."""
    return file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.half")


def write_mark(folder: Path, what: str, files: Iterable[str] = ()) -> None:
    """Mark a folder as made by this program. Raises OSError."""
    body = {
        "format_version": FORMAT_VERSION,
        "made_by": f"lrsurgery {__version__}",
        "what": what,
        "files": sorted(files),
    }
    half = folder / HALF_MARK
    with half.open("w", encoding="utf-8") as file:
        file.write(json_text(body))
        file.flush()
        os.fsync(file.fileno())
    half.replace(folder / MARK)


def mark_contents(folder: Path, what: str) -> None:
    """Mark a folder whose present files are all ours. Raises OSError."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    write_mark(folder, what, (name for name in files if name not in (MARK, HALF_MARK)))


def read_mark(folder: Path) -> Mark | None:
    """The mark of a folder; None without one. Raises OutputError for one that is damaged or of a newer format."""
    file = folder / MARK
    if not file.is_file():
        return None
    return read_as(Mark, file, "the mark of a folder that lrsurgery made", OutputError, newest=FORMAT_VERSION)


def add_to_mark(folder: Path, name: str) -> None:
    """Name a file that was added to a model's folder, if the folder is marked. Raises OutputError, OSError."""
    mark = read_mark(folder)
    if mark is not None and name not in mark.files:
        write_mark(folder, mark.what, [*mark.files, name])


def stranger_in(folder: Path) -> str | None:
    """The first file or folder in a model's folder that its mark does not name; None if all is ours."""
    mark = read_mark(folder)
    known = {MARK} if mark is not None else set()
    for name in mark.files if mark is not None else ():
        known |= {name, *map(str, PurePosixPath(name).parents)}
    found = (place.relative_to(folder).as_posix() for place in sorted(folder.rglob("*")))
    return next((name for name in found if name not in known and not _is_half(name)), None)


def _is_half(name: str) -> bool:
    return HALF_FILE.fullmatch(PurePosixPath(name).name) is not None


def is_blank(folder: Path) -> bool:
    """Whether a folder is empty, but for a first mark that a kill cut short."""
    return all(place.name == HALF_MARK for place in folder.iterdir())


def check_ours(folder: Path, what: str) -> None:
    """Raise OutputError unless a place is free, an empty folder, or a folder that this program made as `what`."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{folder}: is in the way; move it away, or choose another --output")
    mark = read_mark(folder)
    if mark is None and is_blank(folder):
        return
    if mark is None or mark.what != what:
        raise OutputError(
            f"{folder}: was not made by lrsurgery as a {what} folder (its {MARK} would say so), so it is left alone;"
            " move it away, or choose another --output"
        )


def remove_entries(folder: Path, patterns: Iterable[str], last: str | None = None) -> list[Path]:
    """Remove what matches from a folder of ours, in the order of the patterns, then its mark and the empty folder.

    Files that a kill left half-written are removed too. The file `last` says what the folder is for, and is there until
    the whole folder is gone: this is moved aside first, so that no kill leaves a folder that says nothing. What a kill
    leaves aside is removed by the next call.

    Returns the rest, which keeps the folder and its mark. What cannot be removed counts as the rest.
    """
    aside = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    if not aside.is_symlink() and aside.is_dir() and (is_blank(aside) or read_mark(aside) is not None):
        remove(aside)
    if not folder.is_dir():
        return []
    for pattern in patterns:
        for place in sorted(folder.iterdir()):
            if fnmatch.fnmatchcase(place.name, pattern) or _is_half(place.name):
                remove(place)
    rest = sorted(place for place in folder.iterdir() if place.name not in (MARK, HALF_MARK, last))
    if rest:
        if last is not None:
            remove(folder / last)
        return rest
    gone = folder
    with contextlib.suppress(OSError):  # a file system that refuses it, or something in the way
        gone = folder.rename(aside)
    if last is not None:
        remove(gone / last)
    remove(gone)
    return []


def remove(place: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as possible."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
        return
    try:
        place.unlink()
    except OSError:
        return
