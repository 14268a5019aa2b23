"""A curve in the terminal: its table, and a plot of the loss and of the speedup over the points."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from lrsurgery.report.targets.columns import columns_of, curve_words, places_of
from lrsurgery.report.targets.schema import Curve
from lrsurgery.text import BARS

HEIGHT = 6  # lines of a plot
WIDE = 100  # columns; below, a table shows less


def curve_parts(curve: Curve, width: int) -> list[RenderableType]:
    """What the terminal shows of a curve: table, plot, words."""
    return [curve_table(curve, width), "", *curve_plot(curve), "", *curve_words(curve), ""]


def curve_table(curve: Curve, width: int = 160) -> Table:
    """A line a point, from small to large."""
    places = places_of(curve)
    shown = [c.terse for c in columns_of(curve) if c.terse is not None and (width >= WIDE or not c.terse.wide)]
    shown = [terse for terse in shown if any(terse.text(place) for place in places)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for terse in shown:
        table.add_column(terse.title, justify="right", no_wrap=True)
    for place in places:
        table.add_row(*(terse.text(place) for terse in shown))
    return table


def curve_plot(curve: Curve) -> list[str]:
    """Bars of the loss over the shares of parameters, the knee marked; nothing without losses."""
    points = curve["points"]
    losses = [point["values"].get("loss", math.nan) for point in points]
    if not any(map(math.isfinite, losses)):
        return []
    marks = "".join("   ^" if i == curve["knee"] else "    " for i in range(len(points)))
    shares = "".join(f"{point['share']:4.0%}" for point in points)
    lines = [f"{label:>9} {row}" for label, row in zip(_labels(losses), bars(losses), strict=True)]
    return ["loss over the share of parameters", *lines, f"{'':>9} {shares}", f"{'':>9} {marks}".rstrip()]


def bars(values: Sequence[float], height: int = HEIGHT) -> list[str]:
    """Lines of a bar chart, the top first; the least finite value is one line high. Four characters a value."""
    least, most = _ends(values)
    low = least - (most - least) / max(1, height - 1)
    rows = []
    for row in reversed(range(height)):
        cells = []
        for value in values:
            part = (value - low) / (most - low) if most > low else 1.0
            full = part * height - row if math.isfinite(value) else 0.0
            at = min(len(BARS), round(full * len(BARS)))
            cells.append(f" {(BARS[at - 1] if at > 0 else ' ') * 3}")
        rows.append("".join(cells))
    return rows


def _labels(values: Sequence[float]) -> list[str]:
    least, most = _ends(values)
    return [f"{most:.3f}", *[""] * (HEIGHT - 2), f"{least:.3f}"]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    return min(known), max(known)
