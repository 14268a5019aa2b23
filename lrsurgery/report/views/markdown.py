"""A report as Markdown, for issues, wikis and pull requests: the same numbers as its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrsurgery.report.schema import Report

QUALITIES = ("loss", "perplexity", "top1", "top5")


def markdown(report: Report) -> str:
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
                (rung["rank"], rung["layers"], rung["parameters"], _percent(rung["share"]),
                 _percent(rung["energy_kept"]), _percent(rung["relative_error"]), _number(rung["damage"]))
                for rung in body["ladder"]
            ),
        )  # fmt: skip
    layers = [row for row in body["layers"] if row["status"] == "factorised" or row["full_rank"] is not None]
    if layers:
        lines += ["## Layers", "", *_layers(layers)]
    staying = [row for row in body["layers"] if row["status"] == "dense" and row["reason"]]
    if staying:
        lines += ["## Layers that stay dense", ""]
        lines += table_lines(
            ("layer", "kind", "shape", "parameters", "reason"),
            (
                (row["name"], row["kind"], _shape(row["shape"]), row["parameters_before"], row["reason"])
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


def _layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns: dict[str, Any] = {
        "layer": lambda row: row["name"],
        "shape": lambda row: _shape(row["shape"]),
        "rank": lambda row: row["rank"],
        "full rank": lambda row: row["full_rank"],
        "break-even": lambda row: row["break_even"],
        "parameters": lambda row: row["parameters_before"],
        "after": lambda row: row["parameters_after"] if row["status"] == "factorised" else None,
        "energy kept": lambda row: _percent(row["energy_kept"]),
        "relative error": lambda row: _percent(row["relative_error"]),
        "spectral error": lambda row: _percent(row["spectral_error"]),
        **{
            f"{measure} rank{', after' if when == 'after' else ''}": _rank_of(when, measure)
            for when in ("before", "after")
            for measure in ("nuclear", "entropy", "stable")
        },
        "largest angle, output": lambda row: row["overlap"] and _number(row["overlap"]["output"]["largest"]),
        "largest angle, input": lambda row: row["overlap"] and _number(row["overlap"]["input"]["largest"]),
        "error in the metric": lambda row: _percent(row["weighted_error"]),
        "predicted loss": lambda row: _number(row["predicted_loss"]),
        "unbalanced": lambda row: _percent(row["balance"]) if (row["balance"] or 0) >= 0.01 else None,
        "predicted damage": lambda row: _number(row["damage"]) + (" (high)" if row["damage_high"] else ""),
    }
    used = {name: cell for name, cell in columns.items() if any(cell(row) not in (None, "") for row in rows)}
    return table_lines(tuple(used), (tuple(cell(row) for cell in used.values()) for row in rows))


def _rank_of(when: str, measure: str) -> Any:
    return lambda row: _number(row[when][measure]) if row[when] else None


def _training(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [q for q in QUALITIES if any(q in e for run in runs for e in run["evaluations"])]
    return table_lines(
        ("run", "decay", "strength", "learning rate", "step", "stage", *known),
        (
            (run["name"], run["settings"]["decay"], _number(run["settings"]["decay_strength"]),
             _number(run["settings"]["lr"]), e["step"], e["stage"], *(_number(e.get(q)) for q in known))
            for run in runs for e in run["evaluations"]
        ),
    )  # fmt: skip


def _bench(bench: Mapping[str, Any]) -> list[str]:
    machine = ", ".join(f"{key} {value}" for key, value in bench["machine"].items() if value)
    return [
        f"{machine}.",
        "",
        *table_lines(
            ("work", "batch", "length", "median ms", "p95 ms", "per second", "speedup", "95% interval", "ideal"),
            (
                (r["work"], r["batch"], r["length"], _number(r["median_ms"]), _number(r["p95_ms"]),
                 _number(r["throughput"]), _number(r["speedup"]),
                 " to ".join(map(_number, r["interval"] or [])), _number(r["ideal"]))
                for r in bench["runs"]
            ),
        ),
    ]  # fmt: skip


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


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
