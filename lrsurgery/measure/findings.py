"""The findings of a study: measures of each run, means and spreads over seeds; as JSON, table, figure and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, TypedDict

from lrsurgery.files.json import Json, json_text
from lrsurgery.files.writing import replace_files
from lrsurgery.measure.study import RUNS, RunResult
from lrsurgery.measure.study_recipe import DYNAMICS, MEASURES, PlotSpec, Study
from lrsurgery.report.runs import METRICS, LayerCourse, read_run
from lrsurgery.report.runs import Run as Course
from lrsurgery.report.views.figures import COLOURS, drawn_text, rendered
from lrsurgery.report.views.markdown import table_lines
from lrsurgery.text import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = "seed"  # the axis that means and spreads are over
DEFAULT_MEASURES = ("perplexity", "top1", "f1", "spearman")
PAGE = Path(__file__).with_name("study.html.jinja")


class Spread(TypedDict):
    """A measure over the seeds."""

    mean: float
    std: float | None  # of the sample; None for a single run
    n: int


class Group(TypedDict):
    """The runs that differ in their seed alone."""

    axes: dict[str, str]
    runs: int
    measures: dict[str, Spread]


class Failure(TypedDict):
    """A run that failed."""

    name: str
    error: str | None
    exit_code: int | None


class Findings(TypedDict):
    """study.json."""

    name: str
    about: str
    asked: int  # runs
    finished: int
    failed: list[Failure]
    table: list[Group]
    runs: list[Json]  # each result, with its measures


def findings_of(study: Study, results: Sequence[RunResult], output: Path) -> Findings:
    """Each run with its measures, and their mean, sample standard deviation and count over the seeds."""
    measures = [measures_of(result, output) for result in results]
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, float]]] = {}
    for result, values in zip(results, measures, strict=True):
        if result.is_finished:
            place = tuple((axis, value) for axis, value in result.axes.items() if axis != SEED)
            groups.setdefault(place, []).append(values)
    return Findings(
        name=study.name,
        about=study.about,
        asked=len(study.runs),
        finished=sum(result.is_finished for result in results),
        failed=[
            Failure(name=each.name, error=each.error, exit_code=each.exit_code)
            for each in results
            if not each.is_finished
        ],
        table=[
            Group(axes=dict(place), runs=len(members), measures=_spreads(members)) for place, members in groups.items()
        ],
        runs=[{**result.to_dict(), "measures": values} for result, values in zip(results, measures, strict=True)],
    )


def _spreads(members: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    spreads = {}
    for name in dict.fromkeys(name for values in members for name in values):
        values = [member[name] for member in members if name in member]
        spreads[name] = Spread(mean=mean(values), std=stdev(values) if len(values) > 1 else None, n=len(values))
    return spreads


def measures_of(result: RunResult, output: Path) -> dict[str, float]:
    """Measures of a finished run: final quality, size, time, and the layers' mean ranks and norms; else none.

    effective_lr is the mean over the evaluations of the learning rate over the mean squared Frobenius norm of the
    layers' products (van Laarhoven 2017), the quantity that Kamalakara et al. (2022) ask about.
    """
    if not result.is_finished:
        return {}
    last = list(result.stages.values())[-1] if result.stages else {}
    found = {name: value for name, value in last.items() if name != "scored"}
    sizes = {"parameters": result.parameters, "steps": result.steps, "seconds": result.seconds}
    found |= {name: value for name, value in sizes.items() if value is not None}
    folder = output / RUNS / result.name
    if not (folder / METRICS).is_file():
        return found
    course = read_run(folder)
    layers = list(course["layers"].values())
    if layers:
        last_ones = {name: _known([layer[name][-1] for layer in layers]) for name in DYNAMICS}
        found |= {name: mean(values) for name, values in last_ones.items() if values}
        rates = _effective_rates(course, layers)
        if rates:
            found["effective_lr"] = mean(rates)
    return found


def _effective_rates(course: Course, layers: Sequence[LayerCourse]) -> list[float]:
    rates = {loss["step"]: loss["lr"] for loss in course["losses"]}
    found = []
    for i, step in enumerate(layers[0]["step"]):
        rate = rates.get(step)
        at_step = [layer["frobenius_norm"][i] for layer in layers if i < len(layer["step"])]
        squares = [norm**2 for norm in _known(at_step)]
        if rate is not None and any(squares):
            found.append(rate / mean(squares))
    return found


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def write_findings(study: Study, found: Findings, output: Path) -> list[Path]:
    """Write study.json, table.md, index.html, and plot.svg and plot.png where the study asks for a plot."""
    headers, body = cells(study, found)
    failures = [f"- {markdown(run['name'])} failed: {markdown(run['error'] or '')}" for run in found["failed"]]
    table = [
        f"# {markdown(study.name)}",
        "",
        study.about,
        "",
        *table_lines(headers, body),
        *(["", *failures] if failures else []),
    ]
    plot = study.plot
    drawn: dict[str, bytes] = {}
    if plot is not None and (plot.y or measures_shown(study, found)) and found["table"]:
        drawn = rendered("plot", lambda figure: _plot(figure, study, plot, found), (5.5, 3.2))
    files: dict[str, str | bytes] = {
        "study.json": json_text(found),
        "table.md": "\n".join(table) + "\n",
        "index.html": _page(study, found, drawn.get("plot.svg", b"").decode()),
        **drawn,
    }
    replace_files({output / name: content for name, content in files.items()})
    return [output / name for name in files]


def measures_shown(study: Study, found: Findings) -> list[str]:
    """The measures that the recipe asks for, or the usual ones, as far as some run has them."""
    known = {name for group in found["table"] for name in group["measures"]}
    return [name for name in study.table.measures or DEFAULT_MEASURES if name in known]


def cells(study: Study, found: Findings) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of the table: a row for each point on the row axes, a column for each value of the other axis."""
    across = study.table.columns
    rows = study.table.rows or [axis for axis in study.axes if axis not in (SEED, across)]
    names = measures_shown(study, found)
    columns = list(dict.fromkeys(group["axes"].get(across, "") for group in found["table"])) if across else [""]
    headers = [
        *rows,
        *(f"{name}, {across} {column or '-'}" if across else name for name in names for column in columns),
    ]
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for group in found["table"]:
        place = tuple(group["axes"].get(axis, "") for axis in rows)
        column = group["axes"].get(across, "") if across else ""
        for name in names:
            if name in group["measures"]:
                lines.setdefault(place, {})[name, column] = spread_text(group["measures"][name])
    body = [
        [*place, *(line.get((name, column), "") for name in names for column in columns)]
        for place, line in lines.items()
    ]
    return headers, body


def spread_text(spread: Spread) -> str:
    """`12.34 ± 0.05 (3)`: mean, sample standard deviation to two digits, count."""
    middle, std, count = spread["mean"], spread["std"], spread["n"]
    if not std:
        counted = middle == round(middle) and abs(middle) >= 1000  # parameters, steps
        return f"{middle:{',.0f' if counted else '.5g'}}" + (f" ({count})" if count > 1 else "")
    digits = max(0, 1 - math.floor(math.log10(std)))
    return f"{middle:.{digits}f} ± {std:.{digits}f} ({count})" if digits < 10 else f"{middle:.5g} ({count})"


def _plot(figure: Figure, study: Study, plot: PlotSpec, found: Findings) -> None:
    """A measure against an axis or another measure: a line for each value of the `lines` axis, with error bars.

    Groups without a value on the x axis are horizontal lines.
    """
    x, lines = plot.x or "", plot.lines or ""
    y = plot.y or measures_shown(study, found)[0]
    ax = figure.subplots()
    measured = [group for group in found["table"] if y in group["measures"]]
    series: dict[str, list[Group]] = {}
    for group in measured:
        if x in group["axes"] or x in group["measures"]:
            series.setdefault(group["axes"].get(lines, ""), []).append(group)
    names = list(dict.fromkeys(group["axes"].get(x, "") for groups in series.values() for group in groups))
    position = _positions(names)

    def place(group: Group) -> float:
        return group["measures"][x]["mean"] if x in MEASURES else position(group["axes"][x])

    for i, (name, groups) in enumerate(series.items()):
        points = sorted(
            (place(each), each["measures"][y]["mean"], each["measures"][y]["std"] or 0.0) for each in groups
        )
        places, means, spreads = zip(*points, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        ax.errorbar(
            places, means, yerr=spreads, fmt="o-", markersize=3, capsize=2, color=colour, label=drawn_text(name) or None
        )
    without = [group for group in measured if x not in group["axes"] and x not in MEASURES]
    for i, group in enumerate(without, len(series)):  # such as the dense model beside ranks
        label = drawn_text(group["axes"].get(lines) or " ".join(group["axes"].values()))
        ax.axhline(group["measures"][y]["mean"], linestyle="--", color=COLOURS[i % len(COLOURS)], label=label)
    if x not in MEASURES and any(_number(name) is None for name in names):
        ax.set_xticks(range(len(names)), [drawn_text(name) for name in names])
    for scale in plot.log:
        (ax.set_xscale if scale == "x" else ax.set_yscale)("log")
    ax.set(xlabel=drawn_text(x.replace("_", " ")), ylabel=y.replace("_", " "))
    if lines:
        figure.legend(title=drawn_text(lines), loc="outside right upper")


def _number(text: str) -> float | None:
    try:
        return float(text.rpartition(":")[2])
    except ValueError:
        return None


def _positions(names: Sequence[str]) -> Callable[[str], float]:
    """Names as numbers where all of them are, else by their order."""
    if all(_number(name) is not None for name in names):
        return lambda name: float(name.rpartition(":")[2])
    return lambda name: float(names.index(name))


def _page(study: Study, found: Findings, svg: str) -> str:
    """One page without any network; every text is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    headers, body = cells(study, found)
    page = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(
        PAGE.read_text("utf-8")
    )
    figure = Markup(svg[svg.index("<svg") :]) if svg else ""
    return page.render(study=study, found=found, headers=headers, body=body, figure=figure)
