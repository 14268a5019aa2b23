"""A report as Markdown, for issues, wikis and pull requests: the same numbers as its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lrsurgery.files.json import Json
from lrsurgery.report.bench import Bench
from lrsurgery.report.runs import Run
from lrsurgery.report.schema import Report, Row
from lrsurgery.report.targets.columns import columns_of, curve_words, places_of
from lrsurgery.report.views.columns import (
    LADDER,
    QUALITY,
    Column,
    T,
    columns_with_values,
    form_words,
    plain_text,
    sorted_rows,
    steps_of,
)
from lrsurgery.report.views.speed import RUNS
from lrsurgery.text import code, markdown
from lrsurgery.units import shape_text

ENDINGS = (".md",)


def render(report: Report, *, sort: str = "model", every: bool = True) -> str:
    """The whole report; every layer has its row. Percentages have two digits, other numbers up to six."""
    body = report.to_dict()
    lines = [f"# {markdown(report.name or 'model')}", ""]
    if report.command:
        lines += [code(report.command), ""]
    lines += [f"- {line}" for line in _totals(body)]
    if report.share_saved_by_form is not None:
        lines.append(f"- {form_words(report)}")
    if report.loss_check is not None:
        lines.append(f"- loss: {markdown(report.loss_check['text'])}")
    if report.refinement is not None:
        lines.append(f"- refined: {markdown(report.refinement['text'])}")
    if report.choice is not None:
        lines += [f"- {markdown(line)}" for line in report.choice["lines"]]
    lines += ["", *(f"> {markdown(note)}\n" for note in report.notes)]
    if report.ladder:
        lines += ["## What each rank would keep", "", *column_lines(LADDER, steps_of(report))]
    if report.curve:
        lines += ["## What each size loses", "", *(f"- {markdown(line)}" for line in curve_words(report.curve)), ""]
        lines += column_lines(columns_of(report.curve), places_of(report.curve))
    layers = [row for row in sorted_rows(report.rows, sort) if row.status == "factorised" or row.full_rank is not None]
    if layers:
        high = {row["name"] for row in body["layers"] if row["damage_high"]}
        lines += ["## Layers", "", *_layers(layers, high)]
    staying = [row for row in body["layers"] if row["status"] == "dense" and row["reason"]]
    if staying:
        lines += ["## Layers that stay dense", ""]
        lines += table_lines(
            ("layer", "kind", "shape", "parameters", "reason"),
            (
                (row["name"], row["kind"], shape_text(row["shape"]), row["parameters_before"], row["reason"])
                for row in staying
            ),
        )
    if report.training:
        lines += ["## Training", "", *_training(report.training)]
    if report.bench:
        lines += ["## Speed", "", *_bench(report.bench)]
    return "\n".join(lines).rstrip() + "\n"


def _totals(body: Json) -> Iterable[str]:
    totals = body["totals"]
    if totals is None:
        return
    yield f"layers: {totals['layers_factorised']} factorised, {totals['layers_dense']} dense"
    for name, label in (("parameters", "parameters"), ("bytes", "bytes"), ("flops", "FLOPs of the layers a token")):
        before, after = totals[f"{name}_before"], totals[f"{name}_after"]
        if before is not None and (after is None or body["about"] == "dense"):
            yield f"{label}: {before:,}"
        elif before:
            yield f"{label}: {before:,} → {after:,} ({after / before:.2%})"


def _layers(rows: Sequence[Row], high: set[str]) -> list[str]:
    """`high`: names of the layers whose predicted damage is far above the others'."""
    columns = columns_with_values(rows, without=("kind", "status"))

    def text(column: Column[Row], row: Row) -> str:
        found = plain_text(column.shown(row), column.form)
        return f"{found} (high)" if column.key == "damage" and found and row.name in high else found

    return table_lines([c.title for c in columns], ([text(c, row) for c in columns] for row in rows))


def _training(runs: Sequence[Run]) -> list[str]:
    known = [q for q in QUALITY if any(q in e for run in runs for e in run["evaluations"])]
    return table_lines(
        ("run", "decay", "strength", "learning rate", "step", "stage", *known),
        (
            (
                run["name"],
                run["settings"]["decay"],
                _number(run["settings"]["decay_strength"]),
                _number(run["settings"]["lr"]),
                e["step"],
                e["stage"],
                *(_number(e.get(q)) for q in known),
            )
            for run in runs
            for e in run["evaluations"]
        ),
    )


def _bench(bench: Bench) -> list[str]:
    machine = ", ".join(f"{key} {value}" for key, value in bench["machine"].items() if value)
    return [f"{markdown(machine)}.", "", *column_lines([column for column in RUNS if column.drawn], bench["runs"])]


def column_lines(columns: Sequence[Column[T]], rows: Iterable[T]) -> list[str]:
    """A table of these columns; those of one title share a cell."""
    titles = list(dict.fromkeys(column.title for column in columns))

    def cell(title: str, row: T) -> str:
        texts = [plain_text(column.shown(row), column.form) for column in columns if column.title == title]
        return " to ".join(text for text in texts if text)

    return table_lines(titles, ([cell(title, row) for title in titles] for row in rows))


def table_lines(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table, and an empty line after it; cells are text, not Markdown."""
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in rows:
        cells = ("" if cell is None else f"{cell:,}" if isinstance(cell, int) else markdown(str(cell)) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
