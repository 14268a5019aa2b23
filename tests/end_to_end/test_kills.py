"""Jobs that are killed at random moments of each stage: resumed once, they end with the bytes of one never killed.

One kill in each stage in every run; LRSURGERY_KILLS=200 does that many, at least ten in each stage.
The moments are calls of functions, drawn by a fixed seed from those of an undisturbed job, and some milliseconds later.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import tiny
from support.warm import program

# A job whose places are counted, and which is killed by SIGKILL some time after the nth call of one of them. A study's
# runs are forked, and what kills one of them kills the study too.
RIGGED = """
import atexit, contextlib, importlib, json, os, signal, socket, sys, threading
from pathlib import Path
from lrsurgery.cli.app import main
from lrsurgery.measure import study
places, chosen, nth, delay, counts = json.loads(sys.argv[1])
sys.argv = ["lrsurgery", *sys.argv[2:]]
called = dict.fromkeys(places, 0)
others = set()
def kill():
    for pid in list(others):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
def strike():
    if not delay:
        kill()
    timer = threading.Timer(delay, kill)
    timer.daemon = True
    timer.start()
def rig(place):
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, name)
    def rigged(*args, **options):
        called[place] += 1
        if place == chosen and called[place] == nth:
            strike()
        return real(*args, **options)
    setattr(owner, name, rigged)
for place in places:
    rig(place)
def serve(asked):
    for line in asked.makefile():
        folder, arguments = json.loads(line)
        parent, pid = os.getppid(), os.fork()
        if not pid:
            others.update((parent, os.getppid()))
            with open(f"{folder}/told", "wb") as told:
                os.dup2(told.fileno(), 1)
            sys.argv = ["lrsurgery", "finetune", *arguments]
            code = 1
            try:
                main()
            except SystemExit as e:
                code = e.code or 0
            sys.stdout.flush()
            if counts:
                write(f"{counts}.{os.getpid()}")
            os._exit(code)
        asked.sendall(f"{pid}\\n".encode())
        asked.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\\n".encode())
    os._exit(0)
def forked(self, folder, arguments):
    ours.sendall(json.dumps([str(folder), arguments]).encode() + b"\\n")
    pid = int(answers.readline())
    others.add(pid)
    code = int(answers.readline())
    others.discard(pid)
    told = (folder / "told").read_text()
    (folder / "told").unlink()
    return code, told, ""
def write(file):
    Path(file).write_text(json.dumps(called))
if sys.argv[1] == "study":  # a process that has no threads yet forks the runs
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        serve(theirs)
    theirs.close()
    answers = ours.makefile()
    others.add(pid)
    study._Worker._finetune = forked
if counts:
    atexit.register(write, counts)
main()
"""

ADD = "lrsurgery.calibration.statistics:StatisticsWriter.add"
MOMENTS = "lrsurgery.calibration.collect:call"
STEP = "lrsurgery.training.loop.trainer:LowRankTrainer.training_step"
SHARD = "lrsurgery.checkpoints.output:ShardWriter"
SWITCH = "lrsurgery.training.switch"
FOLDER = "lrsurgery.training.run_folder"
MARKS = "lrsurgery.training.checkpoints"
WRITING = "lrsurgery.files.writing"
BLOCKS = "lrsurgery.factorise.work.blocks"
REFINE, REFINING = "lrsurgery.refine.walk", "lrsurgery.factorise.refining"


@dataclass(frozen=True)
class Stage:
    """A stage of a command: places, each with the part of its calls that are in the stage."""

    command: str
    places: tuple[tuple[str, float, float], ...]


STAGES = {
    "factorise: calibration": Stage("factorise", ((MOMENTS, 0, 0.6), (ADD, 0, 1))),
    "factorise: refinement": Stage(
        "factorise",
        ((f"{REFINE}:fit_", 0, 1), (f"{BLOCKS}:save_piece", 0, 1), (f"{REFINING}:rewrite", 0, 1)),
    ),
    "refine": Stage(
        "refine",
        (
            (f"{REFINE}:regress_", 0, 1),
            (f"{REFINE}:fit_", 0, 1),
            ("lrsurgery.refine.reconstruction:run", 0, 1),
            ("lrsurgery.refine.streams:call", 0, 1),
            (f"{BLOCKS}:save_piece", 0, 1),
            (f"{REFINING}:rewrite", 0, 1),
            (f"{SHARD}.add", 0, 1),
            (f"{REFINING}:write_text", 0, 1),
            (f"{WRITING}:_publish", 0, 1),
        ),
    ),
    "factorise: decomposition": Stage(
        "factorise",
        (("lrsurgery.factorise.work.jobs:decompose", 0, 1), ("lrsurgery.factorise.work.jobs:save_piece", 0, 1)),
    ),
    "factorise: writing": Stage(
        "factorise",
        (
            (f"{SHARD}.add", 0, 1),
            (f"{SHARD}.finish", 0, 1),
            ("lrsurgery.factorise.checkpoint:write_text", 0, 1),
            ("lrsurgery.factorise.work.folder:WorkFolder.set_published", 0, 1),
            ("lrsurgery.factorise.work.folder:WorkFolder.remove", 0, 1),
            (f"{WRITING}:_publish", 0, 1),
            (f"{WRITING}:_sync_folder", 0, 1),
        ),
    ),
    "finetune: before the first checkpoint": Stage(
        "finetune",
        (
            (f"{FOLDER}:RunFolder.begin", 0, 1),
            (f"{FOLDER}:RunFolder.append_metrics", 0, 0.1),
            (STEP, 0, 0.15),
        ),
    ),
    "finetune: dense stage": Stage("finetune", ((STEP, 0.2, 0.4),)),
    "finetune: switch": Stage(
        "finetune",
        (
            (f"{SWITCH}:factorise_subject_", 0, 1),
            (f"{SWITCH}:write_switched", 0, 1),
            (f"{SWITCH}:switch_optimizer", 0, 1),
            (f"{SWITCH}:_project", 0, 1),
            (f"{SWITCH}:switch_schedule", 0, 1),
            (f"{SWITCH}:mark_complete", 0, 1),
            (f"{FOLDER}:RunFolder.write_layers", 0, 1),
            (STEP, 0.45, 0.5),
        ),
    ),
    "finetune: factorised stage": Stage("finetune", ((STEP, 0.5, 1),)),
    "finetune: writing of a checkpoint": Stage(
        "finetune",
        (
            ("lrsurgery.training.loop.trainer:LowRankTrainer._save", 0, 1),
            ("lrsurgery.training.loop.callbacks:mark_complete", 0, 1),
            (f"{MARKS}:_digest", 0, 1),
            (f"{MARKS}:replace_file", 0, 1),
            ("os:fsync", 0, 1),
        ),
    ),
    "finetune: evaluation": Stage(
        "finetune", (("lrsurgery.training.loop.trainer:LowRankTrainer.prediction_step", 0, 1),)
    ),
    "finetune: publishing": Stage(
        "finetune",
        (
            ("lrsurgery.training.publish:save_subject", 0, 1),
            ("lrsurgery.training.publish:write_text", 0, 1),
            ("lrsurgery.training.publish:write_recipe", 0, 1),
            (f"{FOLDER}:RunFolder.set_published", 0, 1),
            (f"{FOLDER}:RunFolder.close", 0, 1),
            (f"{WRITING}:_publish", 0, 1),
            (f"{WRITING}:_sync_folder", 0, 1),
        ),
    ),
    "study": Stage(
        "study",
        (
            (STEP, 0, 1),
            ("lrsurgery.measure.study:replace_file", 0, 1),
            ("lrsurgery.measure.study:_Worker.do", 0, 1),
            ("lrsurgery.measure.study:_result_of", 0, 1),
            ("lrsurgery.measure.findings:replace_files", 0, 1),
            (f"{FOLDER}:RunFolder.close", 0, 1),
            (f"{WRITING}:_publish", 0, 1),
        ),
    ),
}


class Bench:
    """Jobs on one tiny model, with the undisturbed outcome of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.valid = tiny.write_text(folder)
        tiny.save_gpt2(folder / "model", blocks=1)
        (folder / "study.yaml").write_text(
            json.dumps(
                {
                    "name": "s",
                    "settings": {
                        "model": str(folder / "model"),
                        "data": str(self.train),
                        "eval_data": str(self.valid),
                        "rank": ["0.5"],
                        "steps": 4,
                        "save_steps": 2,
                        "eval_steps": 2,
                        "batch_size": 2,
                    },
                    "grid": {"decay": ["none", "l2"]},
                }
            )
        )
        self.counts: dict[str, Counter[str]] = {}
        self.whole: dict[str, dict[str, str]] = {}

    def words(self, command: str, output: Path) -> list[object]:
        if command == "factorise":
            calibration = [
                "--calibration",
                self.train,
                "--samples",
                8,
                "--refine-steps",
                3,
                "--importance",
                "activations",
            ]
            return ["factorise", self.folder / "model", "--rank", 0.4, *calibration, "--output", output, "--jobs", 1]
        if command == "refine":
            data = ["--against", self.folder / "model", "--calibration", self.train, "--samples", 8]
            return ["refine", self.folder / "low", *data, "--refine-steps", 6, "--output", output]
        if command == "finetune":
            data = ["--data", self.train, "--eval-data", self.valid]
            rest = "--rank 0.5 --dense-steps 5 --steps 12 --save-steps 3 --eval-steps 3 --log-steps 2 --batch-size 2"
            return ["finetune", self.folder / "model", *data, *rest.split(), "--output", output]
        return ["study", self.folder / "study.yaml", "--output", output]

    def prepare(self, command: str) -> None:
        """Do a job undisturbed, counting the calls of its places."""
        if command in self.counts:
            return
        if command == "refine":
            self.prepare("factorise")
            shutil.copytree(self.folder / "factorise-whole", self.folder / "low")
        places = places_of(command)
        counts, output = self.folder / f"{command}.counts", self.folder / f"{command}-whole"
        asked = json.dumps([places, None, 0, 0, str(counts)])
        done = program(sys.executable, "-c", RIGGED, asked, *self.words(command, output))
        assert done.returncode == 0, done.stderr
        found: Counter[str] = Counter()
        for number, file in enumerate(sorted(self.folder.glob(f"{command}.counts*"))):
            if command != "study" or number < 2:  # the study's own, and one of its runs
                found |= Counter(json.loads(file.read_text()))
        self.counts[command], self.whole[command] = found, outcome(command, output)

    def kill(self, stage: str, chance: random.Random) -> None:
        """Kill a job in a stage, resume it once, and compare."""
        command = STAGES[stage].command
        self.prepare(command)
        place, low, high = chance.choice([p for p in STAGES[stage].places if self.counts[command][p[0]]])
        calls = self.counts[command][place]
        nth = chance.randint(min(calls, int(low * calls) + 1), max(1, int(high * calls)))
        delay = chance.choice([0, 0, 0.002, 0.01, 0.03])
        output, words = self.folder / "killed" / "output", self.words(command, self.folder / "killed" / "output")
        for later in (delay, 0):  # a job may end before its kill
            told = f"{stage}: {place}, call {nth} of {calls}, {later} s later"
            shutil.rmtree(output.parent, ignore_errors=True)
            asked = json.dumps([places_of(command), place, nth, later, ""])
            killed = program(sys.executable, "-c", RIGGED, asked, *words)
            if killed.returncode:
                break
        assert killed.returncode == -signal.SIGKILL, f"{told}: {killed.stderr}"
        unrigged = json.dumps([[], None, 0, 0, ""])
        if not left_to_resume(command, output) and command != "study":
            assert not output.exists() or outcome(command, output) == self.whole[command], told
            shutil.rmtree(output, ignore_errors=True)
        resumed = program(sys.executable, "-c", RIGGED, unrigged, *words, "--resume")
        assert resumed.returncode == 0, f"{told}: {resumed.stderr}"
        assert outcome(command, output) == self.whole[command], told
        left = {p.name for p in output.parent.iterdir()} - {"output"}
        assert not {name for name in left if not name.endswith((".partial", ".replaced", ".lock"))}, f"{told}: {left}"


def left_to_resume(command: str, output: Path) -> bool:
    """Whether a killed job left its folder, by which it is resumed; one that had removed it was finished."""
    return (output.parent / (".output.factorising" if command in ("factorise", "refine") else "output.run")).exists()


def places_of(command: str) -> list[str]:
    return sorted({place for stage in STAGES.values() if stage.command == command for place, _, _ in stage.places})


def outcome(command: str, output: Path) -> dict[str, str]:
    """What a job wrote, by digests, without times and versions."""
    if command == "study":
        found = {}
        for folder in sorted((output / "runs").iterdir()):
            found |= {f"{folder.name}/{name}": text for name, text in outcome("run", folder).items()}
            result = json.loads((folder / "result.json").read_text())
            found[f"{folder.name}/result"] = json.dumps({**result, "seconds": None}, sort_keys=True)
        return {**found, "table": (output / "table.md").read_text()}
    report = json.loads((output / "rank_report.json").read_text())
    found = {"layers": json.dumps([report["layers"], report["totals"]])}
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        if (output / name).is_file():
            found[name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kills"))


def chosen() -> list[tuple[str, int]]:
    """Stages in turn, so that each has its share."""
    names = list(STAGES)
    kills = int(os.environ.get("LRSURGERY_KILLS", str(len(names))))
    return [(names[i % len(names)], i) for i in range(kills)]


@pytest.mark.process
@pytest.mark.parametrize(("stage", "number"), chosen(), ids=[f"{stage} {number}" for stage, number in chosen()])
def test_a_killed_job_resumes_to_the_same_bytes(stage: str, number: int, bench: Bench) -> None:
    bench.kill(stage, random.Random(number))
