"""What a study found: measures of each run, means and spreads over seeds, a table, figures and one page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lrsurgery.files import replace_file
from lrsurgery.measure.study import DYNAMICS, MEASURES, RUNS, Study
from lrsurgery.report.runs import read_run
from lrsurgery.report.views.figures import COLOURS, rendered
from lrsurgery.report.views.markdown import table_lines
from lrsurgery.training.run_folder import METRICS

SEED = "seed"  # the axis that means and spreads are over
DEFAULT_MEASURES = ("perplexity", "top1")


def findings(study: Study, results: Sequence[Mapping[str, Any]], output: Path) -> dict[str, Any]:
    """Every run with its measures, and their mean, sample standard deviation and count over the seeds, as JSON."""
    runs = [{**result, "measures": measures_of(result, output)} for result in results]
    finished = [run for run in runs if run["status"] == "finished"]
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for run in finished:
        place = tuple((axis, value) for axis, value in run["axes"].items() if axis != SEED)
        groups.setdefault(place, []).append(run["measures"])
    table = [
        {"axes": dict(place), "runs": len(members), "measures": _spreads(members)} for place, members in groups.items()
    ]
    return {
        "name": study.name, "about": study.about, "asked": len(study.runs), "finished": len(finished),
        "failed": [{"name": run["name"], "error": run["error"]} for run in runs if run["status"] == "failed"],
        "table": table, "runs": runs,
    }  # fmt: skip


def _spreads(members: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for values in members for name in values)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        values = [member[name] for member in members if name in member]
        found[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "n": len(values)}
    return found


def measures_of(result: Mapping[str, Any], output: Path) -> dict[str, float]:
    """Of a finished run: quality in the end, size, time, and what became of the layers' ranks and norms.

    effective_lr is the mean over the evaluations of the learning rate over the mean squared Frobenius norm of the
    layers' products (van Laarhoven 2017), the quantity that Kamalakara et al. (2022) ask about.
    """
    if result["status"] != "finished":
        return {}
    last = list(result["stages"].values())[-1] if result["stages"] else {}
    found: dict[str, float] = {name: value for name, value in last.items() if name != "scored"}
    found |= {name: result[name] for name in ("parameters", "steps", "seconds") if result[name] is not None}
    folder = output / RUNS / result["name"]
    if not (folder / METRICS).is_file():
        return found
    run = read_run(folder)
    layers = list(run["layers"].values())
    if layers:
        found |= {name: mean(layer[name][-1] for layer in layers) for name in DYNAMICS}
        rates = _effective_rates(run, layers)
        if rates:
            found["effective_lr"] = mean(rates)
    return found


def _effective_rates(run: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[float]:
    rates = {loss["step"]: loss["lr"] for loss in run["losses"] if loss["lr"] is not None}
    found = []
    for i, step in enumerate(layers[0]["step"]):
        if step in rates:
            found.append(rates[step] / mean(layer["frobenius_norm"][i] ** 2 for layer in layers))
    return found


def write_findings(study: Study, found: Mapping[str, Any], output: Path) -> list[Path]:
    """study.json, table.md, plot.svg and plot.png where the study asks for one, index.html; what was written."""
    lines = markdown_table(study, found)
    files: dict[str, str | bytes] = {
        "study.json": json.dumps(found, indent=2) + "\n",
        "table.md": "\n".join([f"# {study.name}", "", study.about, "", *lines, *_failures(found)]) + "\n",
    }
    drawn: dict[str, bytes] = {}
    if study.plot and found["table"]:
        drawn = rendered("plot", lambda figure: _plot(figure, study, found), (5.5, 3.2))
    files["index.html"] = _page(study, found, drawn.get("plot.svg", b"").decode())
    files |= drawn
    for name, content in files.items():
        replace_file(output / name, content)
    return [output / name for name in files]


def _failures(found: Mapping[str, Any]) -> list[str]:
    return ["", *(f"- {run['name']} failed: {run['error']}" for run in found["failed"])] if found["failed"] else []


def measures_shown(study: Study, found: Mapping[str, Any]) -> list[str]:
    """Those that the recipe asks for, or the usual ones; only what some run has."""
    known = {name for row in found["table"] for name in row["measures"]}
    asked = study.table.get("measures") or DEFAULT_MEASURES
    return [name for name in asked if name in known]


def cells(study: Study, found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of the study's table: a row for each place on the row axes, a column for each on the other."""
    across = study.table.get("columns")
    rows = study.table.get("rows") or [axis for axis in study.axes if axis not in (SEED, across)]
    names = measures_shown(study, found)
    columns = list(dict.fromkeys(row["axes"].get(across, "") for row in found["table"])) if across else [""]
    named = [(name, f", {across} {column or '-'}" if across else "") for name in names for column in columns]
    headers = [*rows, *(name + place for name, place in named)]
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in found["table"]:
        place = tuple(row["axes"].get(axis, "") for axis in rows)
        column = row["axes"].get(across, "") if across else ""
        for name in names:
            if name in row["measures"]:
                lines.setdefault(place, {})[name, column] = spread_text(row["measures"][name])
    body = [
        [*place, *(line.get((name, column), "") for name in names for column in columns)]
        for place, line in lines.items()
    ]
    return headers, body


def spread_text(spread: Mapping[str, Any]) -> str:
    """`12.34 ± 0.05 (3)`: mean, sample standard deviation to two digits, and of how many."""
    middle, std, count = spread["mean"], spread["std"], spread["n"]
    if not std:
        counted = middle == round(middle) and abs(middle) >= 1000  # parameters, steps
        return f"{middle:{',.0f' if counted else '.5g'}}" + (f" ({count})" if count > 1 else "")
    digits = max(0, 1 - math.floor(math.log10(std)))
    return f"{middle:.{digits}f} ± {std:.{digits}f} ({count})" if digits < 10 else f"{middle:.5g} ({count})"


def markdown_table(study: Study, found: Mapping[str, Any]) -> list[str]:
    headers, body = cells(study, found)
    return table_lines(headers, body)


def _plot(figure: Any, study: Study, found: Mapping[str, Any]) -> None:
    """A measure against an axis or another measure, a line for each value of the `lines` axis, bars for the spread.

    Runs that have no place on the x axis are lines across.
    """
    x, lines = study.plot.get("x"), study.plot.get("lines")
    y = study.plot.get("y") or measures_shown(study, found)[0]
    ax = figure.subplots()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["table"]:
        if y in row["measures"] and (x in row["axes"] or x in row["measures"]):
            groups.setdefault(row["axes"].get(lines, "") if lines else "", []).append(row)
    names = list(dict.fromkeys(row["axes"].get(x, "") for rows in groups.values() for row in rows))
    position = _positions(names)

    def place(row: Mapping[str, Any]) -> float:
        return float(row["measures"][x]["mean"]) if x in MEASURES else position(row["axes"][x])

    for i, (name, rows) in enumerate(groups.items()):
        points = sorted((place(row), row["measures"][y]["mean"], row["measures"][y]["std"] or 0.0) for row in rows)
        places, means, spreads = zip(*points, strict=True)
        ax.errorbar(
            places, means, yerr=spreads, fmt="o-", markersize=3, capsize=2, color=COLOURS[i % len(COLOURS)],
            label=name or None,
        )  # fmt: skip
    without = [row for row in found["table"] if y in row["measures"] and x not in row["axes"] and x not in MEASURES]
    for i, row in enumerate(without, len(groups)):  # such as the dense model beside ranks
        label = row["axes"].get(lines) or " ".join(row["axes"].values())
        ax.axhline(row["measures"][y]["mean"], linestyle="--", color=COLOURS[i % len(COLOURS)], label=label)
    if x not in MEASURES and any(_number(name) is None for name in names):
        ax.set_xticks(range(len(names)), names)
    for scale in study.plot.get("log") or ():
        (ax.set_xscale if scale == "x" else ax.set_yscale)("log")
    ax.set(xlabel=(x or "").replace("_", " "), ylabel=y.replace("_", " "))
    if lines:
        figure.legend(title=lines, loc="outside right upper")


def _number(text: str) -> float | None:
    try:
        return float(text.rpartition(":")[2])
    except ValueError:
        return None


def _positions(names: Sequence[str]) -> Callable[[str], float]:
    """Numbers where all names are numbers, else their order."""
    numbers = [_number(name) for name in names]
    if all(number is not None for number in numbers):
        return lambda name: float(name.rpartition(":")[2])
    return lambda name: float(names.index(name))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.box {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; background: #fff; padding: .5rem; }}
figure svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1><p>{about}</p>
<p>{count}</p>
<div class="box">{table}</div>
{figure}
{failed}
</body></html>
"""


def _page(study: Study, found: Mapping[str, Any], svg: str) -> str:
    """One page without any network; every text is escaped."""
    headers, body = cells(study, found)
    row = "".join
    head = row(f"<th>{html.escape(header)}</th>" for header in headers)
    lines = row(f"<tr>{row(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in body)
    failed = row(f"<li>{html.escape(run['name'])}: {html.escape(run['error'])}</li>" for run in found["failed"])
    return PAGE.format(
        title=html.escape(study.name),
        about=html.escape(study.about),
        count=f"{found['finished']} of {found['asked']} runs are finished. Mean ± sample standard deviation (seeds).",
        table=f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>",
        figure=f"<figure>{svg[svg.index('<svg') :]}</figure>" if svg else "",
        failed=f"<h2>Failed</h2><ul>{failed}</ul>" if failed else "",
    )
