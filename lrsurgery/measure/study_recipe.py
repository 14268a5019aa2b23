"""A study's recipe: settings, a grid of axes, a table and a plot. It is checked as a whole before anything runs."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from lrsurgery.errors import RecipeError
from lrsurgery.files.json import Json
from lrsurgery.files.yaml import read_yaml
from lrsurgery.report.runs import Measure
from lrsurgery.report.views.columns import QUALITY
from lrsurgery.training.recipe import Recipe, check_permissions

KEYS = ("name", "about", "imports", "prepare", "settings", "grid", "table", "plot")
TABLE_KEYS = ("rows", "columns", "measures")
PLOT_KEYS = ("x", "lines", "y", "log")
# means over the layers, in the end
DYNAMICS: tuple[Measure, ...] = ("nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm", "spectral_norm")
MEASURES = (*QUALITY, "parameters", "steps", "seconds", *DYNAMICS, "effective_lr")
SCALES = ("x", "y")  # of a plot, which may be logarithmic
CONFIG = "config"  # a setting of studies alone: changes of the model's config.json, for runs from scratch
MOST_RUNS = 100_000
LONGEST_NAME = 200  # bytes of a run's name, which a file system's longest leaves room for


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: its value on each axis of the grid, and the settings of its `finetune`."""

    name: str
    axes: Mapping[str, str]
    settings: Json

    @property
    def fingerprint(self) -> str:
        """Changes with any setting."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A command that creates a file in the study's folder; it runs where the file is missing."""

    creates: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What the table shows."""

    rows: tuple[str, ...] = ()  # axes; empty: all but the seed and that of the columns
    columns: str | None = None  # an axis
    measures: tuple[str, ...] = ()  # empty: the quality


@dataclass(frozen=True, kw_only=True)
class PlotSpec:
    """What the plot shows."""

    x: str | None = None  # an axis or a measure
    lines: str | None = None  # an axis
    y: str | None = None  # a measure; None: the first of the table
    log: tuple[str, ...] = ()  # "x", "y"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A recipe, read and checked."""

    file: Path
    name: str
    about: str
    prepare: tuple[Preparation, ...]
    runs: tuple[Run, ...]
    imports: tuple[Path, ...] = ()  # Python files that register models
    table: TableSpec = TableSpec()
    plot: PlotSpec | None = None

    @property
    def axes(self) -> list[str]:
        """Every axis, in the order of the grids."""
        return list(dict.fromkeys(axis for run in self.runs for axis in run.axes))


class Shard(NamedTuple):
    """One of several parts of a study: every `parts`-th run from the `which`-th on, counted from 1."""

    which: int
    parts: int

    def of(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Its runs."""
        return runs[self.which - 1 :: self.parts]


WHOLE = Shard(1, 1)


def parse_shard(text: str | None) -> Shard:
    """The shard of `I/N`. Raises RecipeError."""
    if text is None:
        return WHOLE
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    shard = Shard(int(found[1]), int(found[2])) if found else None
    if shard is None or not 1 <= shard.which <= shard.parts:
        raise RecipeError(f"shard '{text}': write I/N with I from 1 to N, such as 1/4")
    return shard


def read_study(file: Path) -> Study:
    """Read a recipe. Raises RecipeError that names the key, the axis or the setting which is wrong."""
    body = read_yaml(file)
    try:
        return _study_of(file, body)
    except RecipeError as e:
        raise RecipeError(f"{file}: {e}") from e


def _study_of(file: Path, body: Json) -> Study:
    for key in body:
        _check_known(key, KEYS, "key")
    runs = _runs(body)
    table, plot = _mapping("table", body.get("table") or {}), _mapping("plot", body.get("plot") or {})
    for key in table:
        _check_known(key, TABLE_KEYS, "table's")
    for key in plot:
        _check_known(key, PLOT_KEYS, "plot's")
    for scale in _texts(plot.get("log")):
        _check_known(scale, SCALES, "scale of plot: log:")
    study = Study(
        file=file,
        name=_name(str(body.get("name") or file.stem)),
        about=str(body.get("about") or ""),
        imports=tuple(_imports(file, body)),
        prepare=tuple(_preparations(body)),
        runs=tuple(runs),
        table=TableSpec(
            rows=_texts(table.get("rows")),
            columns=_text_or_none(table.get("columns")),
            measures=_texts(table.get("measures")),
        ),
        plot=PlotSpec(
            x=_text_or_none(plot.get("x")),
            lines=_text_or_none(plot.get("lines")),
            y=_text_or_none(plot.get("y")),
            log=_texts(plot.get("log")),
        )
        if plot
        else None,
    )
    _check_names(study)
    return study


def _name(text: str) -> str:
    """A study's name, which is also that of its folder unless another is given."""
    if not re.fullmatch(r"[\w.+ -]+", text) or text.strip(". ") == "":
        raise RecipeError(
            f"name {text!r}: is no name of a folder; write letters, digits, spaces, '_', '-', '+' and '.'"
        )
    return text


def _check_names(study: Study) -> None:
    """Raises RecipeError where the table or the plot names a measure or an axis that there is not."""
    table, plot = study.table, study.plot or PlotSpec()
    for measure in (*table.measures, plot.y):
        if measure is not None:
            _check_known(measure, MEASURES, "measure")
    for scale in plot.log:
        _check_known(scale, ("x", "y"), "scale of the plot's log")
    for axis in (*table.rows, table.columns, plot.x if plot.x not in MEASURES else None, plot.lines):
        if axis is not None and axis not in study.axes:
            raise RecipeError(f"'{axis}' is no axis of the grid; its axes: {', '.join(study.axes)}")


def _check_known(key: str, known: Sequence[str], what: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
        raise RecipeError(f"unknown {what} '{key}'{hint}")


def _runs(body: Json) -> list[Run]:
    """Every combination of each grid. Raises RecipeError for settings that no run can have."""
    base = _mapping("settings", body.get("settings", {}))
    runs: dict[str, Run] = {}
    given = body.get("grid", {})
    grids = [_axes(_mapping("grid", grid)) for grid in (given if isinstance(given, list) else [given])]
    count = sum(math.prod(map(len, grid.values())) for grid in grids)
    if count > MOST_RUNS:
        raise RecipeError(f"grid: has {count:,} runs, over the {MOST_RUNS:,} of a study; write fewer values")
    for grid in grids:
        for axes, settings in _points(grid):
            whole = {**base, **settings}
            _check_settings(whole)
            name = "_".join(f"{axis}-{_slug(value)}" for axis, value in axes.items()) or "run"
            if len(name.encode()) > LONGEST_NAME:
                raise RecipeError(
                    f"grid: the run {name[:60]}... has a name of over {LONGEST_NAME} bytes; give its values names"
                    " that are shorter"
                )
            if name in runs:
                raise RecipeError(f"two runs are {name}; name the axes' values apart")
            runs[name] = Run(name=name, axes=axes, settings=whole)
    return list(runs.values())


def _axes(grid: Json) -> dict[str, list[tuple[str, Json]]]:
    """Axis -> (name, settings) of each of its values.

    An axis lists values of the setting of its name, or maps names of its own to settings. Its name becomes part of the
    names of folders.
    """
    axes: dict[str, list[tuple[str, Json]]] = {}
    for axis, values in grid.items():
        if not re.fullmatch(r"[\w.-]+", axis) or axis in (".", ".."):
            raise RecipeError(f"grid: {axis!r} is no name of an axis; write letters, digits, '_', '-' and '.'")
        if isinstance(values, Mapping):
            axes[axis] = [(str(name), _mapping(f"{axis}: {name}", value or {})) for name, value in values.items()]
        elif isinstance(values, list):
            axes[axis] = [(_value_name(value), {axis: value}) for value in values]
        else:
            raise RecipeError(f"grid: {axis}: write a list of values, or names with their settings")
        if not axes[axis]:
            raise RecipeError(f"grid: {axis}: has no values")
    return axes


def _points(grid: Mapping[str, list[tuple[str, Json]]]) -> Iterator[tuple[dict[str, str], Json]]:
    """(value on each axis, settings) of every combination."""
    for point in itertools.product(*grid.values()):
        settings: Json = {}
        for _, more in point:
            settings |= more
        yield dict(zip(grid, (name for name, _ in point), strict=True)), settings


def _check_settings(settings: Json) -> None:
    recipe = Recipe().merged({key.replace("-", "_"): value for key, value in settings.items() if key != CONFIG})
    recipe.check()
    check_permissions(recipe)
    if settings.get(CONFIG) is not None:
        _mapping(CONFIG, settings[CONFIG])
        try:
            json.dumps(settings[CONFIG])
        except (TypeError, ValueError) as e:
            raise RecipeError(f"{CONFIG}: holds a value that no config.json can have ({e})") from e
    if settings.get(CONFIG) is not None and not settings.get("from_scratch"):
        raise RecipeError(f"{CONFIG}: changes the model's shape, so the run has to be from_scratch")


def _imports(file: Path, body: Json) -> Iterator[Path]:
    for name in _texts(body.get("imports")):
        script = file.parent / name
        if not script.is_file():
            raise RecipeError(f"imports: {script}: no such file")
        yield script


def _preparations(body: Json) -> Iterator[Preparation]:
    for step in _list(body.get("prepare")):
        if not isinstance(step, Mapping) or set(step) != {"creates", "run"} or not _is_command(step["run"]):
            raise RecipeError("prepare: each step is 'creates: FILE' and 'run: [PROGRAM, ARGUMENT, ...]'")
        if not step["run"]:
            raise RecipeError("prepare: run: names no program")
        made = PurePath(str(step["creates"]))
        if made.is_absolute() or not made.parts or ".." in made.parts:
            raise RecipeError(f"prepare: creates: {made} is no file in the study's folder; write a path inside of it")
        yield Preparation(creates=str(step["creates"]), command=_texts(step["run"]))


def _is_command(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def _mapping(key: str, value: object) -> Json:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RecipeError(f"{key}: write it as 'NAME: value' lines")
    return dict(value)


def _list(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, _list(value)))


def _text_or_none(value: object) -> str | None:
    return None if value is None else str(value)


def _value_name(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-+" else "-" for c in text).strip("-") or "empty"
