"""Output folders: whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrsurgery.errors import OutputError
from lrsurgery.sources import Source, inside

COMPANION_SUFFIXES = (".json", ".model", ".jinja", ".py", ".spm", ".vocab", ".tiktoken")
COMPANION_NAMES = ("vocab.txt", "merges.txt", "added_tokens.txt")
NOT_COMPANIONS = ("config.json", "rank_report.json", "bench.json")  # what is true of the source alone


def check_output(output: Path, source: Source | None, overwrite: bool) -> None:
    """Raises OutputError for an output folder that is in the way, or that is the model being read."""
    if source is not None and source.folder is not None and output.resolve() == source.folder.resolve():
        raise OutputError(f"{output}: is the model that is being read; choose another --output")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{output}: already exists; choose another --output or pass --overwrite")
    empty = output.is_dir() and not any(output.iterdir())
    if not output.is_dir() or output.is_symlink() or not (empty or (output / "config.json").is_file()):
        raise OutputError(f"{output}: exists and is no model folder, so it is not overwritten")


@contextmanager
def staged(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A sibling folder that becomes `output` when the block ends well, and vanishes when it does not.

    A killed process leaves at most hidden siblings, which the next run for the same output clears away; a folder that
    was moved aside to be overwritten comes back first.

    Raises OutputError where the place cannot be written.
    """
    prefix = f".{output.name}.{socket.gethostname()}."
    stage = output.parent / f"{prefix}{os.getpid()}.partial"
    made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(output, prefix)
        check_output(output, None, overwrite)
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
    check_output(output, None, overwrite)  # it may have appeared meanwhile
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


def alive(pid: str) -> bool:
    """Whether a process is at work on this machine; one that has ended and waits for its parent to notice is not."""
    import psutil

    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def copy_companions(source: Source, stage: Path) -> list[str]:
    """Copies tokenizer, preprocessor, generation, code and licence files; all else is written anew."""
    copied: list[str] = []
    if source.folder is None:
        return copied
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in COMPANION_SUFFIXES or file.name in COMPANION_NAMES
        wanted = wanted or file.name.startswith(("LICENSE", "NOTICE"))
        if wanted and file.is_file() and file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json"):
            shutil.copyfile(inside(source.folder, file), stage / file.name)
            copied.append(file.name)
    return copied


def replace_file(file: Path, content: str | bytes) -> None:
    """Writes one file, whole or not at all. Raises OutputError where that cannot be done."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(file)
    except OSError as e:
        raise OutputError(f"{file}: cannot be written ({e.strerror or e})") from e
    finally:
        partial.unlink(missing_ok=True)
