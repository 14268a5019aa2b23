"""Figures for a paper, drawn from a report by matplotlib: svg for print, png to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lrsurgery.errors import OutputError
from lrsurgery.files.writing import replace_files
from lrsurgery.report.runs import Measure, Run
from lrsurgery.report.schema import Report, Row, Rung
from lrsurgery.report.targets.schema import Curve
from lrsurgery.report.views.terminal import mean_course
from lrsurgery.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008), told apart with any kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 5.5  # inches, the text width of most conference papers
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lrsurgery",
}
LABELS = {"nuclear": "nuclear rank", "entropy": "entropy rank", "stable": "stable rank"}
DPI = 200


def draw(report: Report, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Every figure that the report has numbers for, as NAME.svg and NAME.png.

    Raises OutputError where there is nothing to draw, where a file exists and `overwrite` is False, or where the folder
    cannot be written. Nothing is written then.
    """
    drawn: dict[Path, bytes] = {}
    for name, fill, size in _figures(report):
        drawn |= {folder / file: content for file, content in rendered(name, fill, size).items()}
    if not drawn:
        raise OutputError(f"{report.name}: the report has nothing to draw: no spectra and no training")
    for file in drawn:
        if file.exists() and not overwrite:
            raise OutputError(f"{file}: exists already; replace it with --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made ({e.strerror})") from e
    replace_files(drawn)
    return list(drawn)


Fill: TypeAlias = "Callable[[Figure], None]"  # draws on a figure


def rendered(name: str, fill: Fill, size: tuple[float, float]) -> dict[str, bytes]:
    """A figure of this size in inches as NAME.svg and NAME.png; the same figure gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        for ending in ("svg", "png"):
            data = BytesIO()
            figure.savefig(data, format=ending, dpi=DPI, metadata={"Date": None} if ending == "svg" else None)
            drawn[f"{name}.{ending}"] = data.getvalue()
    return drawn


def _figures(report: Report) -> Iterator[tuple[str, Fill, tuple[float, float]]]:
    """(file name, what fills the figure, inches) of each figure that there are numbers for."""
    curve = report.curve
    known = [row for row in report.rows if row.spectrum_before or row.spectrum_after]
    if known:
        yield "spectra", lambda figure: _spectra(figure, known), (WIDTH, 2.6)
        yield "effective_ranks", lambda figure: _effective_ranks(figure, known), (WIDTH, 2.2)
    if report.ladder:
        yield "ladder", lambda figure: _ladder(figure, report), (WIDTH, 2.4)
    if curve:
        yield "curve", lambda figure: _curve(figure, curve), (WIDTH, 2.4)
    kept = [row for row in report.factorised if row.energy_kept is not None]
    if kept:
        suffixes = {_place(row.name)[0] for row in kept}
        height = max(1.6, min(9.0, 0.22 * len(suffixes) + 0.9))
        yield "energy_kept", lambda figure: _energy_map(figure, kept), (WIDTH, height)
    turned = [row for row in report.rows if row.overlap is not None]
    if turned:
        yield "directions", lambda figure: _directions(figure, turned), (WIDTH, 2.4)
    if any(run["evaluations"] for run in report.training):
        yield "training", lambda figure: _training(figure, report.training), (WIDTH, 4.2)


def _spectra(figure: Figure, rows: Sequence[Row]) -> None:
    """Singular values relative to the largest against the position relative to full rank, first layer to last."""
    import matplotlib as mpl

    both = any(row.spectrum_before for row in rows) and any(row.spectrum_after for row in rows)
    sides = [("before", "dense"), ("after", "factorised")] if both else [("before", "dense")]
    if not both and not any(row.spectrum_before for row in rows):
        sides = [("after", "factorised")]
    axes = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    colours = mpl.colormaps["viridis"]
    for ax, (when, title) in zip(axes, sides, strict=True):
        for i, row in enumerate(rows):
            points = row.spectrum_before if when == "before" else row.spectrum_after
            if points is None or not points.value[0] > 0:
                continue
            whole = row.full_rank or points.index[-1]
            top = points.value[0]
            shown = [(n / whole, v / top) for n, v in zip(points.index, points.value, strict=True) if v > 1e-6 * top]
            ax.plot(*zip(*shown, strict=True), color=colours(i / max(1, len(rows) - 1)), alpha=0.8, linewidth=0.9)
        ax.set(yscale="log", xlabel="position / full rank", title=title, xlim=(0, 1))
    axes[0].set_ylabel("singular value / largest")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, len(rows)), colours)
    figure.colorbar(scale, ax=list(axes), label="layer", pad=0.02)


def _effective_ranks(figure: Figure, rows: Sequence[Row]) -> None:
    """Each measure over the layers in the model's order, before and after."""
    axes = figure.subplots(1, 3)
    for ax, (measure, label), colour in zip(axes, LABELS.items(), COLOURS[: len(LABELS)], strict=True):
        for when, style in (("before", ":"), ("after", "-")):
            places = [(i, getattr(row, when)) for i, row in enumerate(rows, 1) if getattr(row, when)]
            if places:
                x, y = zip(*((i, getattr(ranks, measure)) for i, ranks in places), strict=True)
                ax.plot(x, y, style, color=colour, marker="o", markersize=2, label=when)
        ax.set(title=label, xlabel="layer", ylim=(0, None))
        if len(ax.lines) > 1:
            ax.legend()


def _ladder(figure: Figure, report: Report) -> None:
    """Energy kept and relative error of the whole model against its share of parameters."""
    axes = figure.subplots(1, 2)
    groups: dict[str, list[Rung]] = {}
    for rung in report.ladder or ():
        kind = rung.rank.partition(":")[0] if ":" in rung.rank else "fraction of full rank"
        groups.setdefault(kind, []).append(rung)
    for i, (kind, rungs) in enumerate(groups.items()):
        colour = COLOURS[i % len(COLOURS)]
        shares = [rung.parameters / report.parameters_before for rung in rungs]
        for ax, field in zip(axes, ("energy_kept", "relative_error"), strict=True):
            ax.plot(shares, [getattr(rung, field) for rung in rungs], "o-", color=colour, markersize=3, label=kind)
    axes[0].set(xlabel="share of parameters", ylabel="energy kept", ylim=(None, 1.02))
    axes[1].set(xlabel="share of parameters", ylabel="relative error", ylim=(0, None))
    axes[0].legend(loc="lower right")


def _curve(figure: Figure, curve: Curve) -> None:
    """Loss and speedup against the share of parameters, the knee marked."""
    axes = figure.subplots(1, 2)
    points = curve["points"]
    losses = [(point["share"], point["values"]["loss"]) for point in points if "loss" in point["values"]]
    if losses:
        axes[0].plot(*zip(*losses, strict=True), "o-", color=COLOURS[0], markersize=3)
    knee = None if curve["knee"] is None else points[curve["knee"]]
    if knee is not None:
        axes[0].plot(knee["share"], knee["values"]["loss"], "o", color=COLOURS[1], markersize=5, label="knee")
        axes[0].legend()
    for point in points:
        speedup, interval = point.get("speedup"), point.get("interval")
        if speedup is not None:
            axes[1].plot(point["share"], speedup, "o", color=COLOURS[0], markersize=3)
        if interval is not None:
            axes[1].plot([point["share"]] * 2, interval, color=COLOURS[0])
    axes[1].axhline(1, color=COLOURS[-1], linewidth=0.6)
    axes[0].set(xlabel="share of parameters", ylabel="loss")
    axes[1].set(xlabel="share of parameters", ylabel="speedup")


def drawn_text(name: str) -> str:
    """A name as matplotlib draws it: a dollar sign begins no formula, and a leading `_` hides nothing from a legend."""
    text = one_line(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _place(name: str) -> tuple[str, int | None]:
    """What is left of a layer's name without its block's number, and the number."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not found:
        return name, None
    return name[: found.start(1)] + "*" + name[found.end(1) :], int(found[1])


def _energy_map(figure: Figure, rows: Sequence[Row]) -> None:
    """Energy kept of each layer: what it is by the block that it is in."""
    places = {_place(row.name): row.energy_kept for row in rows if row.energy_kept is not None}
    names = list(dict.fromkeys(name for name, _ in places))
    blocks = sorted({block for _, block in places if block is not None}) or [0]
    grid = [[places.get((name, block), places.get((name, None), float("nan"))) for block in blocks] for name in names]
    ax = figure.subplots()
    image = ax.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
    ax.grid(False)
    ax.set_yticks(range(len(names)), [drawn_text(name) for name in names] if len(names) <= 40 else [""] * len(names))
    step = max(1, len(blocks) // 12)
    ax.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    ax.set_xlabel("block")
    figure.colorbar(image, ax=ax, label="energy kept", pad=0.02)


def _directions(figure: Figure, rows: Sequence[Row]) -> None:
    """How much of the k leading directions the factorised layers share with the dense ones."""
    import matplotlib as mpl

    axes = figure.subplots(1, 2, sharey=True)
    colours = mpl.colormaps["viridis"]
    for i, row in enumerate(rows):
        assert row.overlap is not None
        for ax, side in zip(axes, ("output", "input"), strict=True):
            shares = [(share.k, getattr(share, side)) for share in row.overlap.leading]
            ax.plot(*zip(*shares, strict=True), color=colours(i / max(1, len(rows) - 1)), linewidth=0.9)
    for ax, side in zip(axes, ("output", "input"), strict=True):
        ax.set(xscale="log", xlabel="k leading directions", title=f"{side} side", ylim=(0, 1.02))
    axes[0].set_ylabel("overlap with the dense weight")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(1, len(rows)), colours)
    figure.colorbar(scale, ax=list(axes), label="layer", pad=0.02)


def _training(figure: Figure, runs: Sequence[Run]) -> None:
    """Evaluation loss, and the layers' mean effective ranks and norm, over the steps of each run."""
    axes = figure.subplots(2, 3)
    flat = list(axes.flat)
    panels: tuple[Measure, ...] = ("nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm")
    for i, run in enumerate(runs):
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        evaluated = [(e["step"], e["loss"]) for e in run["evaluations"] if "loss" in e]
        if evaluated:
            flat[0].plot(
                *zip(*evaluated, strict=True),
                style,
                color=colour,
                marker="o",
                markersize=2,
                label=drawn_text(run["name"]),
            )
        losses = [(e["step"], e["loss"]) for e in run["losses"]]
        if losses:
            flat[1].plot(*zip(*losses, strict=True), style, color=colour)
        for ax, measure in zip(flat[2:], panels, strict=True):
            if run["layers"]:
                steps = next(iter(run["layers"].values()))["step"]
                ax.plot(steps, mean_course(run, measure), style, color=colour, marker="o", markersize=2)
    titles = (
        "Loss, evaluation",
        "Loss, training",
        *(f"{panel.replace('_', ' ').capitalize()}, mean" for panel in panels),
    )
    for ax, title in zip(flat, titles, strict=True):
        ax.set(title=title, xlabel="step")
    figure.legend(*flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
