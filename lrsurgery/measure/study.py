"""Studies: a grid of training runs from one recipe, each in a folder and a process of its own, none done twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrsurgery.checkpoints.source import resolve
from lrsurgery.errors import Interrupted, RecipeError, StudyError
from lrsurgery.files import alive, copy_companions, replace_file
from lrsurgery.progress import Progress
from lrsurgery.report.schema import FILE_NAME
from lrsurgery.training.recipe import Recipe, read_yaml
from lrsurgery.training.run_folder import METRICS, RECIPE

RESULT = "result.json"
RUNS = "runs"
PROCESS = "process"  # host and number of the one that a run is at work in
PATHS = ("model", "data", "eval_data", "teacher", "against")  # settings that may be files beside the recipe
KEYS = ("name", "about", "imports", "prepare", "settings", "grid", "table", "plot")
TABLE_KEYS = ("rows", "columns", "measures")
PLOT_KEYS = ("x", "lines", "y", "log")
DYNAMICS = ("nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm", "spectral_norm")  # means over the layers
MEASURES = ("loss", "perplexity", "top1", "top5", "parameters", "steps", "seconds", *DYNAMICS, "effective_lr")
CONFIG = "config"  # a setting of a study alone: what is changed in the model's config.json, for runs from scratch


@dataclass(frozen=True)
class Run:
    """One run: where it stands on each axis of the grid, and what `finetune` is asked for."""

    name: str
    axes: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes with any setting."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """A recipe, read and checked."""

    file: Path
    name: str
    about: str
    prepare: tuple[Mapping[str, Any], ...]
    runs: tuple[Run, ...]
    imports: tuple[Path, ...] = ()  # Python files that register models
    table: Mapping[str, Any] = field(default_factory=dict)
    plot: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> list[str]:
        """Every axis, in the order of the grids."""
        return list(dict.fromkeys(axis for run in self.runs for axis in run.axes))


def read_study(file: Path) -> Study:
    """Raises RecipeError that names the key, the axis or the setting which is wrong."""
    body = read_yaml(file)
    for key in body:
        _known(file, key, KEYS, "key")
    base = _mapping(file, "settings", body.get("settings", {}))
    grids = body.get("grid", {})
    runs: dict[str, Run] = {}
    for grid in grids if isinstance(grids, list) else [grids]:
        for axes, settings in _points(file, _mapping(file, "grid", grid)):
            whole = {**base, **settings}
            _check_settings(file, whole)
            name = "_".join(f"{axis}-{_slug(value)}" for axis, value in axes.items()) or "run"
            if name in runs:
                raise RecipeError(f"{file}: two runs are {name}; name the axes' values apart")
            runs[name] = Run(name, axes, whole)
    table, plot = (_mapping(file, key, body.get(key, {})) for key in ("table", "plot"))
    for key in table:
        _known(file, key, TABLE_KEYS, "table's")
    for key in plot:
        _known(file, key, PLOT_KEYS, "plot's")
    imports = tuple(file.parent / str(name) for name in _list(body.get("imports")))
    for script in imports:
        if not script.is_file():
            raise RecipeError(f"{file}: imports: {script}: no such file")
    study = Study(
        file, str(body.get("name") or file.stem), str(body.get("about") or ""), tuple(_steps(file, body)),
        tuple(runs.values()), imports, table, plot,
    )  # fmt: skip
    for measure in [*_list(table.get("measures")), *_list(plot.get("y"))]:
        _known(file, measure, MEASURES, "measure")
    x = plot.get("x") if plot.get("x") not in MEASURES else None
    named = [*_list(table.get("rows")), table.get("columns"), x, plot.get("lines")]
    for axis in (name for name in named if name is not None):
        if axis not in study.axes:
            raise RecipeError(f"{file}: '{axis}' is no axis of the grid; its axes: {', '.join(study.axes)}")
    return study


def _known(file: Path, key: str, known: Sequence[str], what: str) -> None:
    import difflib

    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
        raise RecipeError(f"{file}: unknown {what} '{key}'{hint}")


def _mapping(file: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RecipeError(f"{file}: {key}: write it as 'NAME: value' lines")
    return dict(value)


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _points(file: Path, grid: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(place on each axis, settings) of every combination. An axis lists values of the setting of its name, or maps
    names to settings."""
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    for axis, values in grid.items():
        if isinstance(values, Mapping):
            axes.append([(str(name), _mapping(file, f"{axis}: {name}", value or {})) for name, value in values.items()])
        elif isinstance(values, list):
            axes.append([(_text(value), {axis: value}) for value in values])
        else:
            raise RecipeError(f"{file}: grid: {axis}: write a list of values, or names with their settings")
        if not axes[-1]:
            raise RecipeError(f"{file}: grid: {axis}: has no values")
    for point in itertools.product(*axes):
        settings: dict[str, Any] = {}
        for _, more in point:
            settings |= more
        yield dict(zip(grid, (name for name, _ in point), strict=True)), settings


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-+" else "-" for c in text).strip("-") or "empty"


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    given = {key.replace("-", "_"): value for key, value in settings.items() if key != CONFIG}
    try:
        Recipe().merged(given).check()
        if settings.get(CONFIG) is not None and not settings.get("from_scratch"):
            raise RecipeError(f"{CONFIG}: changes the model's shape, so the run has to be from_scratch")
    except RecipeError as e:
        raise RecipeError(f"{file}: {e}") from e


def _steps(file: Path, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for step in _list(body.get("prepare")):
        if not isinstance(step, Mapping) or set(step) != {"creates", "run"} or not isinstance(step["run"], list):
            raise RecipeError(f"{file}: prepare: each step is 'creates: FILE' and 'run: [PROGRAM, ARGUMENT, ...]'")
        yield step


def parse_shard(text: str | None) -> tuple[int, int]:
    """(which, of how many) of `i/n`, counted from 1. Raises RecipeError."""
    if text is None:
        return 1, 1
    which, _, count = text.partition("/")
    if not (which.isdigit() and count.isdigit() and 1 <= int(which) <= int(count)):
        raise RecipeError(f"shard '{text}': write I/N with I from 1 to N, such as 1/4")
    return int(which), int(count)


def iter_study(
    study: Study, output: Path, *, shard: tuple[int, int] = (1, 1), jobs: int = 1, resume: bool = False,
    keep_models: bool = False,
) -> Generator[Progress, None, list[dict[str, Any]]]:  # fmt: skip
    """Takes the runs of a shard that are not finished, `jobs` at once; the results of all runs that there are.

    A run that fails is told in its result and stops no other one; `resume` tries it again.

    Raises StudyError where the output holds another study, or is there and `resume` is False; RecipeError for `jobs`;
    Interrupted after Ctrl-C or SIGTERM, once the runs at work have saved themselves.
    """
    if jobs < 1:
        raise RecipeError(f"jobs {jobs}: write an integer of at least 1")
    _open(study, output, resume)
    for step in study.prepare:
        _prepare(study, step, output)
    which, count = shard
    mine = [run for i, run in enumerate(study.runs) if i % count == which - 1]
    to_do = [run for run in mine if not _finished(run, output)]
    for run in to_do:
        _check_idle(folder_of(run, output))
    total, done = len(mine), len(mine) - len(to_do)
    running: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(jobs, "run") as pool:
        futures: dict[Future[None], Run] = {
            pool.submit(_take, study, run, output, jobs, keep_models, running): run for run in to_do
        }
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    done += 1
                    yield Progress(futures[future].name, done, total)
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):  # they finish their step, save and stop
                process.terminate()
            pool.shutdown(wait=True)
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise Interrupted(
                    f"interrupted; {done} of {total} runs are finished, what others have saved is kept:"
                    " the same command with --resume goes on"
                ) from e
            raise
    return [result for run in study.runs if (result := read_result(run, output)) is not None]


def _open(study: Study, output: Path, resume: bool) -> None:
    copy = output / "study.yaml"
    text = study.file.read_text(encoding="utf-8")
    if output.exists() and any(output.iterdir()):
        if not copy.is_file():
            raise StudyError(f"{output}: exists and holds no study; name another folder")
        if not resume:
            raise StudyError(f"{output}: is there already; --resume goes on with it, or name another folder")
    output.mkdir(parents=True, exist_ok=True)
    replace_file(copy, text)


def _prepare(study: Study, step: Mapping[str, Any], output: Path) -> None:
    """Runs a step of the recipe unless what it creates is there; "python" is the one that runs this."""
    if (output / str(step["creates"])).exists():
        return
    program, *arguments = map(str, step["run"])
    beside = study.file.resolve().parent
    words = [str(beside / word) if (beside / word).is_file() else word for word in arguments]
    command = [sys.executable if program == "python" else program, *words]
    try:
        done = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    except OSError as e:
        raise StudyError(f"{study.file}: prepare: {program}: {e.strerror}") from e
    if done.returncode or not (output / str(step["creates"])).exists():
        said = (done.stderr.strip().splitlines() or ["it made no such file"])[-1]
        raise StudyError(f"{study.file}: prepare: {step['creates']}: {said}")


def folder_of(run: Run, output: Path) -> Path:
    return output / RUNS / run.name


def read_result(run: Run, output: Path) -> dict[str, Any] | None:
    """What a run came to; None where it has not ended, or was a run of other settings."""
    try:
        found = json.loads((folder_of(run, output) / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("fingerprint") == run.fingerprint else None


def _finished(run: Run, output: Path) -> bool:
    result = read_result(run, output)
    return result is not None and result["status"] == "finished"


def _take(
    study: Study, run: Run, output: Path, jobs: int, keep_models: bool, running: set[subprocess.Popen[str]]
) -> None:
    """One run in a process of its own, so that whatever happens to it happens to no other."""
    folder = folder_of(run, output)
    model, recipe = folder / "model", folder / "asked.yaml"
    begun = folder / "model.run"
    same = recipe.is_file() and _text_in(folder / "fingerprint") == run.fingerprint
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_recipe(study, run, output, recipe)
        replace_file(folder / "fingerprint", run.fingerprint)
    imports = [word for script in study.imports for word in ("--import", str(script))]
    command = [sys.executable, "-m", "lrsurgery", *imports, "finetune", "--output", str(model), "--json"]
    # only a run that has a checkpoint goes on from it
    resumes = same and any(begun.glob("*/checkpoint-*/complete"))
    command += ["--resume"] if resumes else ["--recipe", str(recipe), "--overwrite"]
    if not resumes:
        shutil.rmtree(begun, ignore_errors=True)
    env = {**os.environ}
    if jobs > 1:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # in a session of its own, so that Ctrl-C reaches it once, through the study, and not as a second one at once
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    replace_file(folder / PROCESS, f"{socket.gethostname()} {process.pid}")
    running.add(process)
    told, said = process.communicate()
    running.discard(process)
    (folder / PROCESS).unlink(missing_ok=True)
    if process.returncode == 130:
        return  # interrupted: it is saved and goes on with --resume
    result: dict[str, Any] = {
        "name": run.name, "axes": dict(run.axes), "fingerprint": run.fingerprint, "settings": dict(run.settings),
    }  # fmt: skip
    if process.returncode:
        last = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        result |= {"status": "failed", "error": last.removeprefix("lrsurgery: ")}
    else:
        outcome = json.loads(told)
        result |= {
            "status": "finished", "steps": outcome["steps"], "stages": outcome["stages"],
            # a resumed run knows only of its last part
            "seconds": None if resumes else outcome["seconds"],
            "parameters": outcome["report"]["totals"]["parameters_after"],
        }  # fmt: skip
        for name in (METRICS, RECIPE, FILE_NAME):
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)
        if not keep_models:
            shutil.rmtree(model)
    replace_file(folder / RESULT, json.dumps(result, indent=2) + "\n")


def _check_idle(folder: Path) -> None:
    host, _, pid = _text_in(folder / PROCESS).partition(" ")
    if host == socket.gethostname() and alive(pid):  # the study was killed, and this run with it not
        raise StudyError(f"{folder}: is still at work in process {pid}; wait for it, or end it")


def _text_in(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _write_recipe(study: Study, run: Run, output: Path, file: Path) -> None:
    """The run's own recipe: paths beside the study's file or in its output folder spelled out, the model reshaped."""
    import yaml

    settings = {key: value for key, value in run.settings.items() if key != CONFIG}
    for key in PATHS:
        value = settings.get(key)
        for folder in (study.file.resolve().parent, output.resolve()):
            if isinstance(value, str) and (folder / value).exists():
                settings[key] = str(folder / value)
                break
    if run.settings.get(CONFIG):
        settings["model"] = str(_reshaped(settings["model"], run.settings[CONFIG], file.parent / "config"))
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _reshaped(model: str, changes: Mapping[str, Any], folder: Path) -> Path:
    """A copy of a model's small files, whose config.json has these changes."""
    source = resolve(model, weights=False)
    if source.folder is None:
        raise RecipeError(f"{model}: has no config.json, so there is no config to change")
    folder.mkdir(exist_ok=True)
    copy_companions(source, folder)
    (folder / "config.json").write_text(json.dumps({**source.config, **changes}, indent=2) + "\n", encoding="utf-8")
    return folder
