"""Studies: a grid of training runs from one recipe, each in a folder and a process of its own, none done twice."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lrsurgery.checkpoints.output import copy_companions
from lrsurgery.checkpoints.source import resolve
from lrsurgery.errors import Interrupted, RecipeError, StudyError
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text, read_as
from lrsurgery.files.locks import alive, lock_of, locked
from lrsurgery.files.marks import MODEL, check_ours, read_mark, remove, remove_entries, write_mark
from lrsurgery.files.writing import check_free, replace_file, with_name
from lrsurgery.measure.study_recipe import CONFIG, WHOLE, Preparation, Run, Shard, Study
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.runs import METRICS, RECIPE
from lrsurgery.report.schema import FILE_NAME
from lrsurgery.runtime import MOST_JOBS
from lrsurgery.training.run_folder import RunFolder

RESULT = "result.json"
RUNS = "runs"
STUDY, STUDY_RUN = "study", "study's run"  # what the marks of the folders say
# in a run's folder, beside its model and its run folder; the fingerprint says what the others are
ENTRIES = ("asked.yaml", "config", RESULT, METRICS, RECIPE, FILE_NAME, "fingerprint")
PATHS = ("model", "data", "eval_data", "teacher", "against")  # settings that may be files beside the recipe
INTERRUPTED = 130  # exit code of a run that was asked to stop, and has saved itself


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended, as its result.json holds it."""

    name: str
    axes: Mapping[str, str]
    fingerprint: str
    settings: Json
    status: Literal["finished", "failed"]
    error: str | None = None  # the last line of a failed run
    exit_code: int | None = None  # of a failed run: 2 is for what it was given
    # of a finished run
    steps: int | None = None
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # stage -> figures
    seconds: float | None = None  # in training steps; None for a resumed run, which knows its last part alone
    parameters: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def to_dict(self) -> Json:
        """The JSON object, with the fields that a run of this status has."""
        common = ("name", "axes", "fingerprint", "settings", "status")
        own = ("steps", "stages", "seconds", "parameters") if self.is_finished else ("error", "exit_code")
        return {name: getattr(self, name) for name in (*common, *own)}


def folder_of(run: Run, output: Path) -> Path:
    """The folder of a run in a study's output."""
    return output / RUNS / run.name


def read_result(run: Run, output: Path) -> RunResult | None:
    """The result of a run; None where it has not ended, or had other settings."""
    try:
        found = read_as(RunResult, folder_of(run, output) / RESULT, "a run's result", StudyError)
    except StudyError:
        return None
    return found if found.fingerprint == run.fingerprint else None


def run_study(
    study: Study,
    output: Path,
    *,
    shard: Shard = WHOLE,
    jobs: int = 1,
    resume: bool = False,
    keep_models: bool = False,
    trust_remote_code: bool = False,
    listener: Listener = SILENT,
) -> list[RunResult]:
    """Do the runs of a shard that are not finished, `jobs` at once; the results of all runs that have one.

    A run that fails keeps its error as its result and stops no other one; `resume` tries it again.

    Raises StudyError where the output holds another study, or exists and `resume` is False; RecipeError for `jobs`;
    Interrupted after Ctrl-C or SIGTERM, once the current runs have saved themselves.
    """
    if not 1 <= jobs <= MOST_JOBS:
        raise RecipeError(f"jobs {str(jobs)[:20]}: write an integer from 1 to {MOST_JOBS:,}")
    output = with_name(output)
    part = (
        lock_of(output) if shard == WHOLE else output.with_name(f".{output.name}.{shard.which}-of-{shard.parts}.lock")
    )

    def kept() -> str:
        return "finished runs are kept; continue with --resume" if output.exists() else ""

    with disk_faults(output, kept), locked(output, part):
        _open_output(study, output, resume)
        worker = _Worker(
            study=study, output=output, jobs=jobs, keep_models=keep_models, trust_remote_code=trust_remote_code
        )
        try:
            return _run(worker, shard, listener)
        except (KeyboardInterrupt, SystemExit) as e:  # a second one, while the runs were saving themselves
            raise Interrupted(f"interrupted; {kept()}") from e


def _run(worker: _Worker, shard: Shard, listener: Listener) -> list[RunResult]:
    study, output, jobs = worker.study, worker.output, worker.jobs
    for step in study.prepare:
        _prepare(study, step, output)
    mine = shard.of(study.runs)
    to_do = [run for run in mine if not _is_finished(run, output)]
    for run in to_do:
        _check_idle(folder_of(run, output))
    total, done = len(mine), len(mine) - len(to_do)
    with ThreadPoolExecutor(jobs, "run") as pool:
        futures: dict[Future[None], Run] = {pool.submit(worker.do, run): run for run in to_do}
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    done += 1
                    listener.progress(futures[future].name, done, total)
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            worker.stop()
            pool.shutdown(wait=True)
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise Interrupted(
                    f"interrupted; {done} of {total} runs are finished, what others have saved is kept:"
                    " continue with the same command and --resume"
                ) from e
            raise
    return [result for run in study.runs if (result := read_result(run, output)) is not None]


def _open_output(study: Study, output: Path, resume: bool) -> None:
    text = study.file.read_bytes()
    if os.path.lexists(output) and not output.is_dir():
        raise StudyError(f"{output}: is a file; name a folder with --output")
    if output.exists() and any(output.iterdir()):
        mark = read_mark(output)
        if mark is None or mark.what != STUDY:
            raise StudyError(f"{output}: exists and holds no study; name another folder")
        if not resume:
            raise StudyError(f"{output}: exists already; continue it with --resume, or name another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_mark(output, STUDY)
    replace_file(output / "study.yaml", text)


def _prepare(study: Study, step: Preparation, output: Path) -> None:
    """Run a command of the recipe unless what it creates exists; "python" is this interpreter."""
    made = output / step.creates
    begun = output / f".{made.name}.preparing"  # with who runs the command, which a kill may cut short
    host, _, pid = _text_in(begun).partition(" ")
    cut_short = host == socket.gethostname() and not alive(pid)
    if made.exists() and not cut_short:
        return
    shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    replace_file(begun, f"{socket.gethostname()} {os.getpid()}")
    program, *arguments = step.command
    beside = study.file.resolve().parent
    words = [str(beside / word) if (beside / word).is_file() else word for word in arguments]
    command = [sys.executable if program == "python" else program, *words]
    try:
        done = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    except OSError as e:
        raise StudyError(f"{study.file}: prepare: {program}: {e.strerror}") from e
    if done.returncode or not made.exists():
        said = (done.stderr.strip().splitlines() or ["it made no such file"])[-1]
        raise StudyError(f"{study.file}: prepare: {step.creates}: {said}")
    begun.unlink()


def _is_finished(run: Run, output: Path) -> bool:
    result = read_result(run, output)
    return result is not None and result.is_finished


def _check_idle(folder: Path) -> None:
    """Raise OutputError if a run is at work, such as one whose study was killed, or if its folder is not ours."""
    check_ours(folder, STUDY_RUN)
    if lock_of(folder / MODEL).exists():
        with locked(folder / MODEL):
            pass


def _text_in(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """Does runs of a study, each in a process of its own, so that nothing in one run can harm another."""

    study: Study
    output: Path
    jobs: int
    keep_models: bool
    trust_remote_code: bool
    processes: set[subprocess.Popen[str]] = field(default_factory=set)  # of the current runs

    def do(self, run: Run) -> None:
        """Begin a run, or go on with one that has a checkpoint, and keep its result."""
        folder = folder_of(run, self.output)
        model, recipe, begun = folder / MODEL, folder / "asked.yaml", RunFolder(folder / MODEL)
        _check_idle(folder)
        same = recipe.is_file() and _text_in(folder / "fingerprint") == run.fingerprint
        if not same:
            begun.check()
            begun.remove()
            _remove_model(model)
            remove_entries(folder, ENTRIES)
            folder.mkdir(parents=True, exist_ok=True)
            write_mark(folder, STUDY_RUN)
            _write_recipe(self.study, run, self.output, recipe)
            replace_file(folder / "fingerprint", run.fingerprint)
        resumes = same and begun.can_resume(model)
        if not resumes:
            begun.check()
            begun.remove()
        how = ["--resume"] if resumes else ["--recipe", str(recipe), "--overwrite"]
        if self.trust_remote_code:
            how.append("--trust-remote-code")
        code, told, said = self._finetune(folder, ["--output", str(model), "--json", *how])
        if code == INTERRUPTED:
            return  # it is saved, and --resume goes on with it
        if code:
            last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
            facts = {"status": "failed", "error": last.removeprefix("lrsurgery: "), "exit_code": code}
            result = _result_of(run, facts)
        else:
            outcome = json.loads(told)
            facts = {
                "status": "finished",
                "steps": outcome["steps"],
                "stages": outcome["stages"],
                "seconds": None if resumes else outcome["seconds"],
                "parameters": outcome["report"]["totals"]["parameters_after"],
            }
            result = _result_of(run, facts)
            for name in (METRICS, RECIPE, FILE_NAME):
                if (model / name).is_file():
                    shutil.copyfile(model / name, folder / name)
            if not self.keep_models:
                _remove_model(model)
        replace_file(folder / RESULT, json_text(result.to_dict()))

    def stop(self) -> None:
        """Ask the current runs to stop: they finish their step, save and end."""
        for process in list(self.processes):
            process.terminate()

    def _finetune(self, folder: Path, arguments: Sequence[str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `lrsurgery finetune` with these arguments."""
        imports = [word for script in self.study.imports for word in ("--import", str(script))]
        env = {**os.environ}
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        process = subprocess.Popen(
            [sys.executable, "-m", "lrsurgery", *imports, "finetune", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,  # so that Ctrl-C reaches it once, through `stop`
        )
        self.processes.add(process)
        told, said = process.communicate()
        self.processes.discard(process)
        return process.returncode, told, said


def _remove_model(model: Path) -> None:
    """Remove the output of a run. Raises OutputError if it holds what this program did not write."""
    check_free(model, overwrite=True)
    remove(model)


def _result_of(run: Run, facts: Json) -> RunResult:
    return RunResult(name=run.name, axes=run.axes, fingerprint=run.fingerprint, settings=run.settings, **facts)


def _write_recipe(study: Study, run: Run, output: Path, file: Path) -> None:
    """Write the recipe of one run, with its model reshaped and the paths of its files absolute.

    Files are looked for beside the study's recipe, then in its output.
    """
    import yaml

    settings = {key: value for key, value in run.settings.items() if key != CONFIG}
    for key in PATHS:
        value = settings.get(key)
        for folder in (study.file.resolve().parent, output.resolve()):
            if isinstance(value, str) and (folder / value).exists():
                settings[key] = str(folder / value)
                break
    if run.settings.get(CONFIG):
        settings["model"] = str(_reshape(settings["model"], run.settings[CONFIG], file.parent / "config"))
    replace_file(file, yaml.safe_dump(settings, sort_keys=False))


def _reshape(model: str, changes: Json, folder: Path) -> Path:
    """Copy a model's small files, with these changes of its config.json."""
    source = resolve(model, weights=False)
    if source.folder is None:
        raise RecipeError(f"{model}: has no config.json, so there is no config to change")
    folder.mkdir(exist_ok=True)
    copy_companions(source, folder)
    (folder / "config.json").write_text(json_text({**source.config, **changes}), encoding="utf-8")
    return folder
