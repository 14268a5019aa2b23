"""Locks: which process works on an output. The operating system frees the lock of a process that died."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrsurgery.errors import OutputError

ATTEMPTS = 20  # to take a lock whose file is removed in the same moment


def lock_of(output: Path) -> Path:
    """The lock's file: a hidden sibling, so that it neither needs the output nor stands in it."""
    return output.with_name(f".{output.name}.lock")


@contextmanager
def locked(output: Path, file: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing an output within this context; `file` is the lock's, by default `lock_of`.

    Folders that had to be made for it are removed at the end if they are empty. The file says which process holds the
    lock; it is removed while the lock is held, so none stays.

    Raises OutputError that names the process that works on the output, or if there is no place for the lock's file.
    """
    from filelock import FileLock, Timeout

    file = file or lock_of(output)
    made: list[Path] = []
    try:
        made += [place for place in file.parents if not place.exists()]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as e:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file.parent)) from e
        for attempt in range(ATTEMPTS):
            lock = FileLock(file, fallback_to_soft=False)
            try:
                lock.acquire(blocking=False)
                break
            except Timeout:
                # of a file that its holder has just removed, the lock is worth nothing: take that of the next file
                if attempt + 1 == ATTEMPTS or file.exists():
                    raise
    except Timeout:
        raise OutputError(
            f"{output}: {_holder(file)} is working on it; wait for it, stop it, or choose another --output"
        ) from None
    except OSError as e:
        remove_empty(made)
        raise OutputError(f"{output}: cannot be written ({e.strerror or e})") from e
    try:
        with contextlib.suppress(OSError):  # a full disk is told of by what is written next
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        remove_empty(made)


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


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
