"""Runs that are killed, stopped and taken up again, and runs of two processes: always real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.warm import program

from lrsurgery.files.locks import locked

pytestmark = pytest.mark.process
STEPS, DENSE, SAVE = 12, 5, 3
# a process that kills itself, or sends itself a signal, at one moment of a run
RIGGED = """
import os, signal, sys
from lrsurgery.training.loop import callbacks
from lrsurgery.cli import app as cli
from lrsurgery.training import checkpoints as runs
from lrsurgery.training import publish as saving
from lrsurgery.training import switch as switching
moment, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.argv = ["lrsurgery", *sys.argv[4:]]

def strike(step):
    if step == at:
        os.kill(os.getpid(), number)

if moment == "step":
    original = callbacks.RunCallback.on_step_end
    def rigged(self, args, state, control, **facts):
        strike(state.global_step)
        return original(self, args, state, control, **facts)
    callbacks.RunCallback.on_step_end = rigged
elif moment == "mark":
    original = runs.mark_complete
    def rigged(checkpoint):
        strike(runs.step_of(checkpoint))
        original(checkpoint)
    callbacks.mark_complete = switching.mark_complete = rigged  # each has its own name for it
elif moment == "publish":
    original = saving.save_subject
    def rigged(*args):
        report = original(*args)
        strike(at)
        return report
    saving.save_subject = rigged
cli.main()
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "model")
    tiny.save_gpt2(folder / "calm", dropout=0.0)
    return folder


def arguments(bench: Path, output: str, *more: object) -> list[str]:
    data = ["--data", bench / "train.txt", "--eval-data", bench / "valid.txt"]
    length = f"--dense-steps {DENSE} --steps {STEPS} --save-steps {SAVE} --eval-steps {SAVE} --log-steps 1"
    rest = f"--rank 0.5 {length} --batch-size 4 --warmup-steps 2".split()
    return list(map(str, ["finetune", bench / "model", *data, *rest, "--output", bench / output, *more]))


@pytest.fixture(scope="module")
def whole(bench: Path) -> Path:
    """The run that nothing interrupts."""
    done = program(*tiny.PROGRAM, *arguments(bench, "whole"))
    assert done.returncode == 0, done.stderr
    return bench / "whole"


def same_weights(one: Path, other: Path) -> None:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("moment", "at", "number"),
    [
        ("step", 4, signal.SIGKILL),  # dense; the checkpoint of step 3 is there
        ("mark", 5, signal.SIGKILL),  # the switch's checkpoint is written and not marked
        ("step", 6, signal.SIGKILL),  # the switch's checkpoint is the newest
        ("step", 8, signal.SIGKILL),  # factorised
        ("publish", 0, signal.SIGKILL),  # trained to the end, the output half-written
        ("step", 2, signal.SIGINT),  # before the first checkpoint
        ("step", 7, signal.SIGTERM),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    bench: Path, whole: Path, moment: str, at: int, number: signal.Signals
) -> None:
    output = f"{moment}-{at}-{number.name}"
    rest = arguments(bench, output)
    stopped = program(sys.executable, "-c", RIGGED, moment, at, int(number), *rest)
    assert not (bench / output).exists()
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    else:
        assert stopped.returncode == 130, stopped.stderr
        last = stopped.stderr.strip().splitlines()[-1]
        assert f"stopped after step {at} of {STEPS}" in last
        assert f"lrsurgery finetune --resume --output {bench / output}" in last
    resumed = program(*tiny.PROGRAM, "finetune", "--resume", "--output", bench / output)
    assert resumed.returncode == 0, resumed.stderr
    same_weights(whole, bench / output)
    # and it tells the same story, each step once
    assert records(bench / output) == records(whole)
    assert not (bench / f"{output}.run").exists()


def test_two_interrupts_end_a_run_at_once(bench: Path) -> None:
    twice = RIGGED.replace("os.kill(os.getpid(), number)", "os.kill(os.getpid(), number); os.kill(os.getpid(), number)")
    stopped = program(sys.executable, "-c", twice, "step", 4, int(signal.SIGINT), *arguments(bench, "twice"))
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (bench / "twice").exists()
    last = stopped.stderr.strip().splitlines()[-1]
    assert "nothing was written" not in last  # the checkpoint of step 3 is kept
    assert "interrupted; the last good checkpoint stays: " in last
    assert f"to continue: lrsurgery finetune --resume --output {bench / 'twice'}" in last
    assert (bench / "twice.run" / "dense" / "checkpoint-3").is_dir()


def test_resume_refuses_another_run(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = program(sys.executable, "-c", RIGGED, "step", 4, int(signal.SIGINT), *arguments(bench, "other"))
    assert stopped.returncode == 130, stopped.stderr
    run = bench / "other.run"

    def refused(*more: object) -> str:
        capsys.readouterr()
        assert tiny.run(*more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "an unfinished run; pass --resume" in refused(*arguments(bench, "other"))
    other = ["--lr" if a == "--warmup-steps" else a for a in arguments(bench, "other", "--resume")]
    assert f"{run}: was begun with lr 0.001, now it is 2.0" in refused(*other)
    model = [str(bench / "calm") if a == str(bench / "model") else a for a in arguments(bench, "other", "--resume")]
    assert "was begun with model" in refused(*model)
    text = bench / "train.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before.replace(b"the", b"The", 1))
        assert f"{text}: has changed since" in refused("finetune", "--resume", "--output", bench / "other")
    finally:
        text.write_bytes(before)


def test_one_process_works_on_a_run(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second process is told who does; the lock of a process that was killed is free."""
    file = bench / ".locked.lock"
    holder = (
        f"from lrsurgery.files.locks import locked; from pathlib import Path\n"
        f"with locked(Path({str(bench / 'locked')!r})):\n    print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert tiny.run(*arguments(bench, "locked")) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"lrsurgery: {bench / 'locked'}: process {other.pid} on ")
        other.kill()
    assert file.is_file()
    with locked(bench / "locked"):
        assert f"process {os.getpid()}" in file.read_text()
    assert not file.exists()


def steps_of(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if "loss" in record]


def calm(bench: Path, output: Path, batch: int, steps: str) -> list[object]:
    """Training of the model without dropout."""
    data = ["--data", bench / "train.txt", "--eval-data", bench / "valid.txt"]
    decay = "--rank 0.5 --decay frobenius --decay-strength 0.1"
    rest = f"{decay} {steps} --log-steps 1 --batch-size {batch} --stride 16".split()
    return ["finetune", bench / "calm", *data, *rest, "--output", output]


@pytest.mark.parametrize("switched", [False, True])
def test_two_processes_train_as_one(bench: Path, switched: bool) -> None:
    """Data parallel over gloo: the same losses and weights as one process with the same global batch.

    Within one epoch: at its end two processes fill their last batches up with examples from its beginning.
    """

    def command(output: Path, batch: int) -> list[object]:
        steps = f"--steps 20 --eval-steps 10{' --dense-steps 8' if switched else ''}"
        return calm(bench, output, batch, steps)

    one, two = bench / f"one-{switched}", bench / f"two-{switched}"
    alone = program(*tiny.PROGRAM, *command(one, 8))
    assert alone.returncode == 0, alone.stderr
    both = program(*tiny.TORCHRUN, "-m", "lrsurgery", *command(two, 4))
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("Written to") == 1
    losses = torch.tensor(steps_of(one)), torch.tensor(steps_of(two))
    assert len(losses[0]) == 20
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    evaluations = [[r["eval"] for r in records(folder) if "eval" in r] for folder in (one, two)]
    for mine, other in zip(*evaluations, strict=True):
        assert other == pytest.approx(mine, rel=1e-4)
        assert other["scored"] == mine["scored"]  # shared out unevenly, each token still counts once
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for key, tensor in left.items():
        torch.testing.assert_close(right[key], tensor, rtol=1e-3, atol=2e-5)


# accelerate shards a model over accelerators only; this tells it that the two processes' CPUs are such
SHARDING = """
import os, signal, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from lrsurgery.training.loop import callbacks
from lrsurgery.cli import app as cli

begin = PartialState.__init__
def rigged(self, *arguments, **options):
    begin(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU
PartialState.__init__ = rigged

end = callbacks.RunCallback.on_step_end
def watched(self, args, state, control, **facts):
    factor = next(p for n, p in self.trainer.model.named_parameters() if n.endswith("u.weight"))
    assert type(factor).__name__ == "DTensor", type(factor)
    if state.global_step == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return end(self, args, state, control, **facts)
callbacks.RunCallback.on_step_end = watched
stop = int(sys.argv[1])
sys.argv = ["lrsurgery", *sys.argv[2:]]
cli.main()
"""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_USE_CPU": "true",
}


def test_two_processes_with_sharded_weights_train_as_one(bench: Path, tmp_path: Path) -> None:
    """FSDP2, stopped half-way and resumed: the same losses and weights as one process with the same global batch."""
    script = tmp_path / "sharding.py"
    script.write_text(SHARDING)

    def command(output: Path, batch: int) -> list[object]:
        return calm(bench, output, batch, "--steps 12 --eval-steps 6")

    one, two = bench / "whole-weights", bench / "sharded"
    alone = program(*tiny.PROGRAM, *command(one, 8))
    assert alone.returncode == 0, alone.stderr
    stopped = program(*tiny.TORCHRUN, script, 7, *command(two, 4), **FSDP2)
    assert "stopped after step 7 of 12" in stopped.stderr, stopped.stderr
    resumed = program(*tiny.TORCHRUN, script, 99, "finetune", "--resume", "--output", two, **FSDP2)
    assert resumed.returncode == 0, resumed.stderr
    losses = torch.tensor(steps_of(one)), torch.tensor(steps_of(two))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(right[key], tensor, rtol=1e-3, atol=2e-5)
