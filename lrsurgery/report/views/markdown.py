"""A report as Markdown, for issues, wikis and pull requests: the same numbers as its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrsurgery.report.schema import Report, Row
from lrsurgery.report.views.columns import QUALITY, Column, columns_with_values, plain_text, shape_text, sorted_rows

ENDINGS = (".md",)


def render(report: Report, *, sort: str = "model", every: bool = True) -> str:
    """The whole report; every layer has its row. Percentages have two digits, other numbers up to six."""
    body = report.to_dict()
    lines = [f"# {_text(report.name or 'model')}", ""]
    if report.command:
        lines += [f"`{report.command}`", ""]
    lines += [f"- {line}" for line in _totals(body)]
    lines += ["", *(f"> {_text(note)}\n" for note in report.notes)]
    if body["ladder"]:
        lines += ["## What each rank would keep", ""]
        lines += table_lines(
            ("`--rank`", "layers", "parameters", "share", "energy kept", "relative error", "predicted damage"),
            (
                (
                    rung["rank"],
                    rung["layers"],
                    rung["parameters"],
                    _percent(rung["share"]),
                    _percent(rung["energy_kept"]),
                    _percent(rung["relative_error"]),
                    _number(rung["damage"]),
                )
                for rung in body["ladder"]
            ),
        )
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
    if body["training"]:
        lines += ["## Training", "", *_training(body["training"])]
    if body["bench"]:
        lines += ["## Speed", "", *_bench(body["bench"])]
    return "\n".join(lines).rstrip() + "\n"


def _totals(body: Mapping[str, Any]) -> Iterable[str]:
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

    def cell(column: Column, row: Row) -> str | int | None:
        value = column.value(row)
        if column.key == "damage" and value is not None:
            return plain_text(value, column.form) + (" (high)" if row.name in high else "")
        return value if isinstance(value, int) else plain_text(value, column.form)

    return table_lines(
        tuple(column.title for column in columns), (tuple(cell(column, row) for column in columns) for row in rows)
    )


def _training(runs: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _bench(bench: Mapping[str, Any]) -> list[str]:
    machine = ", ".join(f"{key} {value}" for key, value in bench["machine"].items() if value)
    return [
        f"{machine}.",
        "",
        *table_lines(
            ("work", "batch", "length", "median ms", "p95 ms", "per second", "speedup", "95% interval", "ideal"),
            (
                (
                    r["work"],
                    r["batch"],
                    r["length"],
                    _number(r["median_ms"]),
                    _number(r["p95_ms"]),
                    _number(r["throughput"]),
                    _number(r["speedup"]),
                    " to ".join(map(_number, r["interval"] or [])),
                    _number(r["ideal"]),
                )
                for r in bench["runs"]
            ),
        ),
    ]


def table_lines(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, and an empty line after it; cells are text, not Markdown."""
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in rows:
        cells = ("" if cell is None else f"{cell:,}" if isinstance(cell, int) else _text(str(cell)) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _text(text: str) -> str:
    """A name or a note as it is: nothing in it is Markdown or HTML."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
