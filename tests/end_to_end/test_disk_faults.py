"""A disk that refuses at the n-th write, for n = 1, 2, 4, ..., under every command that writes.

Each time: exit code 2 and one line; the output is whole or not there; nothing is left but what --resume goes on from,
and it does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support import tiny, warm

import lrsurgery
from lrsurgery.files.marks import MARK, stranger_in

pytestmark = pytest.mark.process

# From the nth write on, everything that takes room under a folder fails as on a full disk: opening for writing and
# making folders (which Python tells its audit hooks of), fsync, and the writers of torch and of safetensors.
RIGGED = """
import errno, os, sys
import safetensors.torch, torch
from lrsurgery.cli.app import main

root, nth = sys.argv[1] + os.sep, int(sys.argv[2])
sys.argv = ["lrsurgery", *sys.argv[3:]]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
count = 0

def full(path):
    global count
    if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(root):
        return False
    count += 1
    return count >= nth

def refuse(path):
    if full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

def hook(event, arguments):
    if (event == "open" and arguments[2] & WRITES) or event == "os.mkdir":
        refuse(arguments[0])

sys.addaudithook(hook)

fsync = os.fsync
def rigged_fsync(handle):
    if full(os.readlink(f"/proc/self/fd/{handle}")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(handle)
os.fsync = rigged_fsync

save = torch.save
def rigged_save(content, file, *arguments, **options):
    if isinstance(file, (str, os.PathLike)) and full(file):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    save(content, file, *arguments, **options)
torch.save = rigged_save

serialize = safetensors.torch.serialize_file
def rigged_serialize(tensors, file, *arguments, **options):
    if full(file):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    serialize(tensors, file, *arguments, **options)
safetensors.torch.serialize_file = rigged_serialize
"""
# the parts of a command that are processes of their own, which writing has no part in
ALONE = """
from lrsurgery.measure import bench
bench.peak_memory = lambda request: (1, None)
"""
FIGURES = """
from lrsurgery.report.views import figures
figures.rendered = lambda name, fill, size: {f"{name}.svg": b"drawn", f"{name}.png": b"drawn"}
"""
STUDY = """
import json
from lrsurgery.files.writing import staged
from lrsurgery.measure import study
def trained(self, folder, arguments):
    with staged(folder / "model", overwrite=True) as stage:
        (stage / "recipe.yaml").write_text("steps: 1\\n")
    told = {"steps": 1, "stages": {"healed": {"loss": 1.0}}, "seconds": 1.0}
    return 0, json.dumps({**told, "report": {"totals": {"parameters_after": 1}}}), ""
study._Worker._finetune = trained
"""


@dataclass(frozen=True)
class Command:
    """A command that writes OUT."""

    words: str  # with {out} and {base}
    rig: str = ""
    out: str = "out"
    resumes: tuple[str, ...] = ()  # entries beside the output that --resume goes on from
    whole: Callable[[Path], object] = lambda out: out.stat()


def model_is_whole(out: Path) -> None:
    assert stranger_in(out) is None
    listed = json.loads((out / MARK).read_text())["files"]
    assert all((out / name).is_file() for name in listed)
    assert {"config.json", "README.md", "model.safetensors"} <= set(listed)
    lrsurgery.load_model(out)


def study_is_whole(out: Path) -> None:
    found = json.loads((out / "study.json").read_text())
    assert (found["finished"], found["asked"]) == (2, 2)
    assert (out / "index.html").read_text().strip().endswith("</html>")


def bench_is_whole(out: Path) -> None:
    assert json.loads((out / "bench.json").read_text())["runs"]
    assert stranger_in(out) is None


def plots_are_whole(out: Path) -> None:
    assert {file.stem for file in out.glob("*.svg")} == {file.stem for file in out.glob("*.png")}
    assert all(file.read_bytes() for file in out.iterdir())


TEXT = "--calibration {base}/train.txt --samples 2 --block-size 16"
WORK = (".out.factorising",)
COMMANDS = {
    "factorise": Command(
        "factorise {base}/model --rank 0.5 --no-loss-check --output {out}", resumes=WORK, whole=model_is_whole
    ),
    "factorise, calibrated": Command(
        f"factorise {{base}}/model --budget 0.5 {TEXT} --no-loss-check --output {{out}}",
        resumes=WORK,
        whole=model_is_whole,
    ),
    "finetune": Command(
        "finetune {base}/model --data {base}/train.txt --block-size 16 --batch-size 2 --rank 0.5"
        " --dense-steps 1 --steps 2 --save-steps 1 --output {out}",
        resumes=("out.run",),
        whole=model_is_whole,
    ),
    "export": Command("export {base}/half --output {out}", whole=model_is_whole),
    "report": Command("report {base}/half --output {out}", out="out.html", whole=lambda out: out.read_text()),
    "plots": Command("report {base}/half --plots {out}", rig=FIGURES, whole=plots_are_whole),
    "bench": Command(
        "bench {out} --batch 1 --length 4 --new-tokens 0 --seconds 0.01 --save", rig=ALONE, whole=bench_is_whole
    ),
    "study": Command("study {base}/study.yaml --output {out}", rig=STUDY, resumes=("out",), whole=study_is_whole),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "model")
    assert tiny.run("factorise", folder / "model", "--rank", 0.5, "--no-loss-check", "-q", "-o", folder / "half") == 0
    settings = {"model": "model", "data": "train.txt", "from_scratch": True, "rank": 0.5, "steps": 1}
    body = {"settings": settings, "grid": {"seed": [0, 1]}, "table": {"measures": ["loss"]}}
    (folder / "study.yaml").write_text(yaml.safe_dump(body))
    return folder


def execute(command: Command, base: Path, root: Path, nth: int, *more: str) -> subprocess.CompletedProcess[str]:
    words = command.words.format(base=base, out=root / command.out).split()
    return warm.program(
        sys.executable, "-c", f"{RIGGED}{command.rig}\nmain()", root, nth, *words, *more, "--quiet", cwd=root.parent
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_from_the_nth_write_on(name: str, base: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    nth, never = 1, 1 << 40
    while True:
        root = tmp_path / str(nth)
        root.mkdir()
        if name == "bench":
            assert (
                tiny.run("factorise", base / "model", "--rank", 0.5, "--no-loss-check", "-q", "-o", root / "out") == 0
            )
        before = {p.name for p in root.iterdir()}
        done = execute(command, base, root, nth)
        out = root / command.out
        if done.returncode == 0:
            command.whole(out)  # what was refused did not matter to it
            break
        assert done.returncode == 2, (nth, done.stderr)
        assert re.fullmatch(r"lrsurgery: .+\n", done.stderr), (nth, done.stderr)
        assert "a bug" not in done.stderr, (nth, done.stderr)
        assert re.search("No space left|cannot be written", done.stderr), (nth, done.stderr)
        left = {p.name for p in root.iterdir()} - before
        kept = left & set(command.resumes)
        assert left <= {command.out, *command.resumes}, (nth, left, done.stderr)
        if out.exists() and command.out not in command.resumes and name != "bench":
            command.whole(out)
        if kept:
            assert "--resume" in done.stderr, (nth, done.stderr)
            further = execute(command, base, root, never, "--resume")
            assert further.returncode == 0, (nth, done.stderr, further.stderr)
            command.whole(out)
            assert {p.name for p in root.iterdir()} == {command.out}, nth
        nth *= 2
    assert nth > 1
    assert not {p.name for p in root.iterdir()} - before - {command.out}
