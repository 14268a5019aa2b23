"""Marks and locks of folders, and what a disk refuses."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsurgery.errors import OutputError
from lrsurgery.files.faults import disk_fault, disk_faults
from lrsurgery.files.locks import lock_of, locked
from lrsurgery.files.marks import MARK, check_ours, remove_entries, stranger_in, write_mark
from lrsurgery.files.writing import check_free, replace_file, replace_files, staged


@settings(deadline=None)
@given(st.sets(st.sampled_from(["a", "b", "sub/a", "sub/b", "sub/sub/a"]), min_size=1), st.data())
def test_only_what_was_written_gives_way(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("place") / "out"
    with staged(folder) as stage:
        for name in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text("ours")
    assert stranger_in(folder) is None
    check_free(folder, overwrite=True)
    stranger = data.draw(st.sampled_from(["c", "sub/c", ".hidden", "sub/sub/c", "d/"]))
    if stranger.endswith("/"):
        (folder / stranger).mkdir()
    else:
        (folder / stranger).parent.mkdir(parents=True, exist_ok=True)
        (folder / stranger).write_text("years of work")
    with pytest.raises(OutputError, match="which lrsurgery did not write"), staged(folder, overwrite=True):
        pass
    assert (folder / stranger).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not the mark"),
        ("[]", "not the mark"),
        ('{"format_version": 1, "made_by": "x", "what": 3}', "what: input should be a valid string"),
        ('{"format_version": 99, "made_by": "x", "what": "model"}', "format 99 is newer"),
        ('{"format_version": 0, "made_by": "x", "what": "model"}', "must be a whole number from 1, not 0"),
        ('{"format_version": -3, "made_by": "x", "what": "model"}', "must be a whole number from 1, not -3"),
        ('{"made_by": "x", "what": "model"}', "must be a whole number from 1, not null"),
    ],
)
def test_a_damaged_mark_is_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(text)
    with pytest.raises(OutputError, match=words):
        check_free(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match=words):
        check_ours(tmp_path, "run")


def test_a_folder_of_another_kind_is_not_ours_to_use(tmp_path: Path) -> None:
    write_mark(tmp_path, "run")
    check_ours(tmp_path, "run")
    with pytest.raises(OutputError, match="was not made by lrsurgery as a work folder"):
        check_ours(tmp_path, "work")
    with pytest.raises(OutputError, match="is no model"):
        check_free(tmp_path, overwrite=True)


def test_a_file_that_a_kill_left_half_written_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged(tmp_path / "model") as stage:
        (stage / "weights").write_text("ours")
    run = tmp_path / "run"
    run.mkdir()
    write_mark(run, "run")
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: os._exit(9))
        for folder in (tmp_path / "model", run):
            if not (child := os.fork()):
                replace_file(folder / "facts.json", "{}")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            assert len([place for place in folder.iterdir() if place.name.startswith(".facts.json")]) == 1
    check_free(tmp_path / "model", overwrite=True)
    assert remove_entries(run, ["facts.json"]) == []
    assert not run.exists()


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    ours = tmp_path / "ours"
    ours.mkdir()
    write_mark(ours, "run")
    (ours / "checkpoint-1").symlink_to(tmp_path / "theirs")
    assert remove_entries(ours, ["checkpoint-*"]) == []
    assert not ours.exists()
    assert (tmp_path / "theirs" / "thesis.txt").exists()


@pytest.mark.parametrize("calls", range(8))
def test_a_folder_says_what_it_is_for_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Wherever its removal is cut short; and the next removal leaves nothing."""
    folder = tmp_path / "work"
    for name in ("a", "b", "published"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    write_mark(folder, "work")
    left = calls

    def cut_short(real: Callable[..., None]) -> Callable[..., None]:
        def rigged(*args: Any, **options: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return real(*args, **options)

        return rigged

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        for name in ("unlink", "rmdir", "rename"):
            patched.setattr(os, name, cut_short(getattr(os, name)))
        remove_entries(folder, ["a", "b"], "published")
    assert not folder.exists() or (folder / "published").exists()
    remove_entries(folder, ["a", "b"], "published")
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_come_together(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()  # a folder, which no file replaces, where the file would be
    with pytest.raises(OutputError, match="nowhere"):
        replace_files({tmp_path / "first": "1", tmp_path / "nowhere" / "file": "2"})
    assert [p.name for p in tmp_path.iterdir()] == ["second"]


# locks


def _count(folder: Path, times: int, queue: multiprocessing.Queue[int]) -> None:
    """Add 1 to a number in a file, as often as the lock could be had, and tell how often."""
    done, number = 0, folder / "number"
    while done < times:
        try:
            with locked(folder / "out"):
                found = int(number.read_text())
                number.write_text(str(found + 1))
                done += 1
        except OutputError as e:
            if "is working on it" not in str(e):
                raise
    queue.put(done)


@pytest.mark.process
def test_a_lock_is_held_by_one_whoever_removes_its_file(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_count, args=(tmp_path, 150, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(queue.get(timeout=1) for _ in workers) == 450
    assert int((tmp_path / "number").read_text()) == 450
    assert [p.name for p in tmp_path.iterdir()] == ["number"]


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folders" / "out"
    with locked(output):
        assert lock_of(output).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(OutputError, match=f"out: process {os.getpid()} on .* is working on it"), locked(output):
            pass
    assert not list(tmp_path.iterdir())
    lock_of(tmp_path / "out").write_text("process 1 on another machine\n")  # of a process that was killed
    with locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / ("a" * 300)):
        with pytest.raises(OutputError, match="cannot be written"), locked(output):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# what a disk refuses

FULL: dict[str, Callable[[], object]] = {
    "python": lambda: Path("/dev/full").write_text("x"),
    "torch": lambda: torch.save(torch.zeros(4096), "/dev/full"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_is_one_line_whoever_writes(writer: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out: cannot be written .*; all is kept$"):  # noqa: SIM117
        with disk_faults(tmp_path / "out", lambda: "all is kept"):
            FULL[writer]()


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files stands in for a full disk")
def test_a_full_disk_is_one_line_of_safetensors(tmp_path: Path) -> None:
    """Its writer replaces what has the name, so it is never given a device."""
    import resource

    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    try:
        with (
            pytest.raises(OutputError, match=r"out: cannot be written .*File too large"),
            disk_faults(tmp_path / "out"),
        ):
            safetensors.torch.save_file({"x": torch.zeros(4096)}, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("out"))


def test_other_errors_are_none_of_the_disk(tmp_path: Path) -> None:
    for error in (RuntimeError("something else"), ValueError("x"), OSError("no number"), BrokenPipeError(errno.EPIPE)):
        assert disk_fault(error) is None
        with pytest.raises(type(error)), disk_faults(tmp_path):
            raise error
    named = PermissionError(errno.EACCES, "Permission denied", "data.txt")
    assert disk_fault(named, tmp_path) == "data.txt: cannot be used (Permission denied)"
    with pytest.raises(OutputError, match=r"^is refused$"), disk_faults(tmp_path, lambda: "kept"):
        raise OutputError("is refused")


def test_a_mark_says_who_made_the_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as stage:
        (stage / "a").write_text("x")
    body = json.loads((tmp_path / "out" / MARK).read_text())
    assert body["made_by"].startswith("lrsurgery ")
    assert (body["format_version"], body["what"], body["files"]) == (1, "model", ["a"])
