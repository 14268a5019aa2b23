"""What a disk can refuse, as one line: it is full or read-only, a name is too long, a folder is not one's own."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrsurgery.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT)
# of the file system; those of the network and of pipes are others
FAULTS = {
    *FULL,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ELOOP,
    errno.ESTALE,
    errno.EBUSY,
    errno.ENOLCK,
    errno.ENOSYS,
}
# how torch and safetensors, whose writers raise errors of their own, tell of a file system's
THEIRS = ("PytorchStreamWriter", "inline_container", "iostream error", "No space left", "I/O error", "os error ")
KNOWN = {"No space left": errno.ENOSPC, "File too large": errno.EFBIG, "Read-only": errno.EROFS}


def disk_fault(error: BaseException, place: Path | None = None) -> str | None:
    """What a file system refused, after the name of the file, or of `place` if the error names none.

    None for any other error.
    """
    if isinstance(error, OSError):
        if error.errno not in FAULTS:
            return None
        code, reason = error.errno, error.strerror or str(error)
        named = error.filename if isinstance(error.filename, str | Path) else None
    elif isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        text = " ".join(str(error).split())
        if not any(word in text for word in THEIRS):
            return None
        code = next((code for word, code in KNOWN.items() if word in text), 0)
        # torch tells where in its own C++ a write failed, not why
        reason, named = os.strerror(code) if code else "a write failed", None
    else:
        return None
    if (code in FULL or not code) and place is not None and (free := _free(place)) is not None:
        reason = f"{reason}, {free / 1e9:.2f} GB are free"
    return f"{named or place or 'a file'}: {'cannot be written' if named is None else 'cannot be used'} ({reason})"


def _free(place: Path) -> int | None:
    for folder in (place, *place.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


@contextmanager
def disk_faults(place: Path, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn what a file system refuses while `place` is written into OutputError.

    `kept` gives the end of the line, which says what there is to go on from: it is added to OutputErrors that such a
    fault has caused, too. The fault's own removal of half-written files comes before it.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, OutputError):
            fault = str(e) if e.__cause__ is not None and disk_fault(e.__cause__) is not None else None
        else:
            fault = disk_fault(e, place)
        if fault is None:
            raise
        end = kept() if kept is not None else ""
        raise OutputError(f"{fault}; {end}" if end else fault) from (e.__cause__ if isinstance(e, OutputError) else e)
