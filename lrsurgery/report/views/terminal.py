"""A report in the terminal: tables that fit 80 columns, and say more where there is room."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lrsurgery.report.runs import Measure, Run
from lrsurgery.report.schema import Report, Row
from lrsurgery.report.targets.draw import curve_parts
from lrsurgery.report.views.columns import (
    COLUMNS,
    HEADINGS,
    LADDER,
    PIPED_WIDTH,
    QUALITY,
    QualityName,
    course,
    form_words,
    sorted_rows,
    steps_of,
)
from lrsurgery.report.views.speed import slower_lines, speed_table
from lrsurgery.text import BARS, visible
from lrsurgery.units import shape_text

NARROW = 100  # columns; below, a table shows less
MANY = 80  # layers; above, they are shown a block at a time
LAST = ("loss", "damage", "unbalanced")  # columns of a table of factorised layers
SHOWN = "params:0.5"  # the rung of the ladder that the table of a dense model's layers shows

ENDINGS = (".txt",)


class Paper(Console):
    """A console on which every text is only text: no markup, no emoji codes, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]  # its options are rich's
        """Texts, as they are before their width is measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn by other ways than as a text."""
        for segment in super().render(renderable, options):
            plain = visible(segment.text) if segment.control is None else segment.text
            yield segment if plain == segment.text else Segment(plain, segment.style)


def render(report: Report, *, sort: str = "model", every: bool = False) -> str:
    """What the terminal shows, as plain text."""
    out = StringIO()
    paper = Paper(file=out, width=PIPED_WIDTH)
    for part in report_parts(report, PIPED_WIDTH, sort=sort, every=every):
        paper.print(part)
    return out.getvalue()


def report_parts(report: Report, width: int, *, sort: str = "model", every: bool = False) -> list[RenderableType]:
    """What the terminal shows of a report, in order: tables and lines, with empty lines between."""
    parts: list[RenderableType] = []
    if report.ladder:
        parts += [ladder_table(report), ""]
    if report.curve:
        parts += curve_parts(report.curve, width)
    rows = [row for row in report.rows if row.status == "factorised" or row.full_rank is not None]
    if rows:
        grouped = len(rows) > MANY and not every and sort == "model"
        make = block_table if grouped else dense_table if report.about == "dense" else layer_table
        parts += [make(sorted_rows(rows, sort), width), ""]
        if grouped:
            parts += [f"{len(rows)} layers; --all shows each", ""]
    staying = [row for row in report.dense if row.reason]
    if staying:
        parts += [kept_table(staying), ""]
    if report.training:
        parts += [runs_table(report.training, width), ""]
    if report.bench:
        parts += [speed_table(report.bench), *slower_lines(report.bench), ""]
    return [*parts, *totals_lines(report)]


def _table(*columns: str, first: str = "layer") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def layer_table(rows: Sequence[Row], width: int = 160) -> Table:
    """The factorised layers; rank, full rank and parameter share side by side, since tools differ in what 0.5 means."""
    rows = [row for row in rows if row.status == "factorised"]
    wide = width >= NARROW
    shown = [c.terse for c in COLUMNS if c.terse is not None and (wide or not c.terse.wide)]
    shown = [terse for terse in shown if terse.always or any(terse.text(row) for row in rows)]
    titles = {terse.title for terse in shown}
    if (not wide and "shared" in titles) or "loss" in titles:  # which says more
        shown = [terse for terse in shown if terse.title != "damage"]
    # the terminal's own order of the last ones
    shown.sort(key=lambda terse: LAST.index(terse.title) if terse.title in LAST else -1)
    columns = {terse.title: terse.text for terse in shown}
    if any(_spectrum(row) for row in rows):
        columns["spectrum"] = lambda row: sparkline(_spectrum(row))
    table = _table(*columns)
    for row in rows:
        table.add_row(row.name, *(text(row) for text in columns.values()))
    return table


def dense_table(rows: Sequence[Row], width: int = 160) -> Table:
    """The layers of a dense model: how many directions matter, and what half of the parameters would keep."""
    wide = width >= NARROW
    table = _table(
        *(("shape",) if wide else ()),
        "full",
        "even",
        "nuclear",
        "entropy",
        "stable",
        "energy",
        "error",
        *(("damage",) if wide else ()),
        "spectrum",
    )
    for row in rows:
        rung = next((rung for rung in row.ladder or () if rung.rank == SHOWN), None)
        energy, error = _kept(row)
        known = row.before  # None where the weights overflow
        ranks = ["?"] * 3 if known is None else [f"{n:.1f}" for n in (known.nuclear, known.entropy, known.stable)]
        table.add_row(
            row.name,
            *((shape_text(row.shape),) if wide else ()),
            str(row.full_rank),
            str(row.break_even),
            *ranks,
            _percent(energy),
            _percent(error),
            *((f"{rung.damage:.1f}" if rung else "",) if wide else ()),
            sparkline(_spectrum(row)),
        )
    table.caption = f"even: break-even rank of the balanced form; energy and error: at {SHOWN}"
    table.caption_justify = "left"
    return table


def block_table(rows: Sequence[Row], width: int = 160) -> Table:
    """Layers of one block in a line, ranges where they differ; a block is the name up to its first number."""
    planned = any(row.status == "factorised" for row in rows)
    table = _table("layers", *(("rank", "kept") if planned else ("full", "stable")), "energy", "error", first="block")
    for name, members in groupby(rows, key=lambda row: block_of(row.name)):
        group = list(members)
        before = sum(row.parameters_before for row in group)
        after = [row.parameters_after for row in group]
        share = "?" if None in after or not before else f"{sum(n or 0 for n in after) / before:.1%}"
        stable = _range([row.before.stable if row.before else None for row in group], "{:.1f}")
        table.add_row(
            name,
            str(len(group)),
            *(
                (_range([row.rank for row in group], "{:g}"), share)
                if planned
                else (_range([row.full_rank for row in group], "{:g}"), stable)
            ),
            _range([_kept(row)[0] for row in group], "{:.1%}"),
            _range([_kept(row)[1] for row in group], "{:.1%}"),
        )
    if not planned:
        table.caption, table.caption_justify = f"energy and error: at {SHOWN}", "left"
    return table


def _kept(row: Row) -> tuple[float | None, float | None]:
    """Energy kept and relative error, of a dense layer those of one rung."""
    if row.status == "factorised":
        return row.energy_kept, row.relative_error
    rung = next((rung for rung in row.ladder or () if rung.rank == SHOWN), None)
    return (rung.energy_kept, rung.relative_error) if rung else (None, None)


def block_of(name: str) -> str:
    """A layer's name up to its first number, which counts the blocks; the first word where there is none."""
    found = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return found[1] if found else name.partition(".")[0]


def _range(values: Sequence[float | None], form: str) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    low, high = form.format(known[0]), form.format(known[-1])
    return low if low == high else f"{low} to {high}"


def ladder_table(report: Report) -> Table:
    """What each rank would keep, lose and save of the whole model."""
    first, *others = [column.terse for column in LADDER if column.terse is not None]
    table = _table(*(terse.title for terse in others), first=first.title)
    for step in steps_of(report):
        table.add_row(first.text(step), *(terse.text(step) for terse in others))
    return table


def kept_table(rows: Sequence[Row]) -> Table:
    """The layers that stay dense, by reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers", justify="right")
    table.add_column("stay dense because", overflow="fold")
    table.add_column("such as", overflow="fold")
    counts = Counter(row.reason for row in rows)
    for reason, count in counts.most_common():
        first = next(row.name for row in rows if row.reason == reason)
        table.add_row(str(count), reason or "", first)
    return table


def runs_table(runs: Sequence[Run], width: int = 160) -> Table:
    """Training runs side by side: their decay, how good they began and ended, what became of the effective ranks."""
    known = [name for name in QUALITY if any(name in e for run in runs for e in run["evaluations"])]
    wide = width >= NARROW
    if not wide:
        known = sorted(known, key=lambda name: name not in ("perplexity", "top1", "f1", "spearman"))[:1]
    columns: dict[str, Callable[[Run], str]] = {
        "decay": _decay,
        **({"lr": _learning_rate} if wide else {}),
        **({"steps": lambda run: str(run["settings"]["steps"])} if wide else {}),
        **{HEADINGS[name]: _quality_course(name) for name in known},
        "entropy rank": lambda run: course(_texts(mean_course(run, "entropy_rank"))),
        **({"norm": lambda run: course(_texts(mean_course(run, "frobenius_norm")))} if wide else {}),
        "loss": lambda run: sparkline([e["loss"] for e in run["evaluations"] if "loss" in e]),
    }
    table = _table(*columns, first="run")
    for run in runs:
        table.add_row(run["name"], *(cell(run) for cell in columns.values()))
    return table


def _texts(values: Sequence[float | None]) -> list[str]:
    return [f"{value:.1f}" for value in values if value is not None]


def _decay(run: Run) -> str:
    decay, strength = run["settings"]["decay"], run["settings"]["decay_strength"]
    return (decay or "") if decay in ("none", None) or strength is None else f"{decay} {strength:g}"


def _learning_rate(run: Run) -> str:
    rate = run["settings"]["lr"]  # None where the folder has no recipe
    return "" if rate is None else f"{rate:g}"


def _quality_course(name: QualityName) -> Callable[[Run], str]:
    return lambda run: course([QUALITY[name].format(e[name]) for e in run["evaluations"] if name in e])


def mean_course(run: Run, measure: Measure) -> list[float | None]:
    """The mean of a measure over the layers of a run, at each evaluation of its low-rank stage."""
    known: dict[int, list[float]] = {}  # step -> values of the layers that the evaluation knows
    for layer in run["layers"].values():
        for step, value in zip(layer["step"], layer[measure], strict=True):
            known.setdefault(step, []).extend(() if value is None else (value,))
    return [sum(values) / len(values) if values else None for values in known.values()]


def totals_lines(report: Report) -> list[str]:
    """Parameters and bytes, before and after."""
    totals = report.to_dict()["totals"]
    if totals is None:
        return []
    before, after = totals["parameters_before"], totals["parameters_after"]
    if report.about == "dense":
        able = sum(row.full_rank is not None for row in report.rows)
        return [f"{able} layers may be factorised, {len(report.rows) - able} stay dense", f"parameters: {before:,}"]
    lines = [f"{totals['layers_factorised']} layers factorised, {totals['layers_dense']} stay dense"]
    if after is None:
        lines.append(f"parameters: {before:,} before")
    else:
        share = "" if totals["share"] is None else f" ({totals['share']:.1%})"
        lines.append(f"parameters: {before:,} -> {after:,}{share}")
    if report.share_saved_by_form is not None:
        lines.append(f"form:       {form_words(report)}")
    if totals["bytes_before"] and totals["bytes_after"]:
        share = totals["bytes_after"] / totals["bytes_before"]
        lines.append(f"bytes:      {totals['bytes_before']:,} -> {totals['bytes_after']:,} ({share:.1%})")
    if totals["predicted_loss"] is not None:
        unit = (report.calibration or {}).get("scored_in", "sample")
        lines.append(f"predicted: +{totals['predicted_loss']:.4g} loss a {unit}, to second order")
    if report.loss_check is not None:
        lines.append(f"loss:       {report.loss_check['text']}")
    if report.refinement is not None:
        lines.append(f"refined:    {report.refinement['text']}")
    return lines if report.choice is None else [*lines, *report.choice["lines"]]


def sparkline(values: Sequence[float], length: int = 8) -> str:
    """The course of some numbers in `length` characters, from the least of them, or 0, to the greatest.

    Numbers that are not finite are left out.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(length, len(values))
    picked = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    size = max(map(abs, picked)) or 1.0  # differences of the largest floats would overflow
    picked = [value / size for value in picked]
    low, high = min(0.0, *picked) if min(picked) < 0.5 * max(picked) else min(picked), max(picked)
    if high == low:
        return BARS[0] * count
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / (high - low) * len(BARS)))] for value in picked)


def _spectrum(row: Row) -> list[float]:
    """Singular values at even distances, the dense weight's where they are known."""
    points = row.spectrum_before or row.spectrum_after
    if points is None:
        return []
    last = points.index[-1]
    wanted = [1 + i * (last - 1) / 7 for i in range(min(8, last))]
    return [points.value[min(range(len(points.index)), key=lambda i: abs(points.index[i] - at))] for at in wanted]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
