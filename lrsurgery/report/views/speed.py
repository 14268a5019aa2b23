"""What `bench` measured: its columns, which Markdown and the page draw from, and its tables in the terminal."""

from __future__ import annotations

from rich.table import Table

from lrsurgery.report.bench import Bench, BenchCertainty, BenchFigures, BenchLayer, BenchRun
from lrsurgery.report.views.columns import Column
from lrsurgery.units import shape_text

IDEAL = "What the arithmetic saved would give alone"


def _against(run: BenchRun) -> BenchFigures | dict[str, None]:
    return run["against"] or {"median_ms": None, "p95_ms": None, "throughput": None}


def _end(row: BenchCertainty, i: int) -> float | None:
    return row["interval"][i] if row["interval"] else None


# columns of one title share a cell in Markdown
RUNS: tuple[Column[BenchRun], ...] = (
    Column(key="work", title="work", form="text", value=lambda run: run["work"]),
    Column(key="batch", title="batch", form="count", value=lambda run: run["batch"]),
    Column(key="length", title="length", form="count", value=lambda run: run["length"]),
    Column(key="median_ms", title="median ms", group="Median, ms", label="this", value=lambda run: run["median_ms"]),
    Column(
        key="against.median_ms",
        title="median ms, dense",
        group="Median, ms",
        label="dense",
        value=lambda run: _against(run)["median_ms"],
        drawn=False,
    ),
    Column(key="p95_ms", title="p95 ms", group="95th percentile, ms", label="this", value=lambda run: run["p95_ms"]),
    Column(
        key="against.p95_ms",
        title="p95 ms, dense",
        group="95th percentile, ms",
        label="dense",
        value=lambda run: _against(run)["p95_ms"],
        drawn=False,
    ),
    Column(key="throughput", title="per second", group="Per second", label="this", value=lambda run: run["throughput"]),
    Column(
        key="against.throughput",
        title="per second, dense",
        group="Per second",
        label="dense",
        value=lambda run: _against(run)["throughput"],
        drawn=False,
    ),
    Column(
        key="speedup",
        title="speedup",
        form="times",
        group="Speedup",
        label="measured",
        value=lambda run: run["speedup"],
    ),
    Column(
        key="interval.0",
        title="95% interval",
        form="times",
        group="Speedup",
        label="from",
        value=lambda run: _end(run, 0),
    ),
    Column(
        key="interval.1",
        title="95% interval",
        form="times",
        group="Speedup",
        label="to",
        value=lambda run: _end(run, 1),
    ),
    Column(key="ideal", title="ideal", form="times", group="Speedup", hint=IDEAL, value=lambda run: run["ideal"]),
    Column(key="rounds", title="rounds", form="count", value=lambda run: run["rounds"], drawn=False),
    Column(
        key="reached",
        title="precision",
        form="text",
        value=lambda run: "reached" if run["reached"] else "not reached",
        drawn=False,
    ),
)
LAYERS: tuple[Column[BenchLayer], ...] = (
    Column(key="names", title="layers", form="text", value=lambda row: " ".join(row["names"])),
    Column(key="kind", title="kind", form="text", value=lambda row: row["kind"]),
    Column(key="shape", title="shape", form="text", value=lambda row: shape_text(row["shape"])),
    Column(key="rank", title="rank", form="count", value=lambda row: row["rank"]),
    Column(key="input", title="input", form="text", value=lambda row: shape_text(row["input"])),
    Column(key="dense_ms", title="dense", group="Median, ms", value=lambda row: row["dense_ms"]),
    Column(key="factorised_ms", title="factorised", group="Median, ms", value=lambda row: row["factorised_ms"]),
    Column(key="speedup", title="measured", form="times", group="Speedup", value=lambda row: row["speedup"]),
    Column(key="interval.0", title="from", form="times", group="Speedup", value=lambda row: _end(row, 0)),
    Column(key="interval.1", title="to", form="times", group="Speedup", value=lambda row: _end(row, 1)),
    Column(key="slower", title="verdict", form="text", value=lambda row: "slower" if row["slower"] else "not slower"),
)


def size_table(found: Bench) -> Table:
    """Parameters, bytes and peak memory of the models."""
    table = _table("model", "parameters", "on disk", "peak memory")
    for each in (found["model"], found["against"]):
        if each is not None:
            sizes = (each["bytes"], each["peak_memory"])
            texts = ("?" if size is None else f"{size / 1e6:,.1f} MB" for size in sizes)
            table.add_row(each["name"], f"{each['parameters']:,}", *texts)
    return table


def speed_table(found: Bench) -> Table:
    """One row a setting. Fits 80 columns."""
    unit = found["runs"][0]["unit"] if found["runs"] else "tokens"
    both = found["against"] is not None
    last = ("other ms", "speedup", "95%", "ideal") if both else ("GFLOP",)
    table = _table("run", "size", "ms", "p95", f"{unit}/s", *last)
    for run in found["runs"]:
        name = "decode" if run["work"] == "token by token" else run["work"]
        mark = "" if run["reached"] else "?"
        cells = [f"{run['batch']}x{run['length']}", _short(run["median_ms"]), _short(run["p95_ms"])]
        cells.append(_short(run["throughput"]))
        if run["against"] is not None:
            cells += [_short(run["against"]["median_ms"]), _times(run, mark), _interval(run)]
            cells.append("" if run["ideal"] is None else f"{run['ideal']:.2f}")
        else:
            cells.append(_short(run["flops"] / 1e9))
            cells[1] += mark
        table.add_row(name, *cells)
    return table


def slower_lines(found: Bench) -> list[str]:
    """The layers whose interval says that they got slower, by name."""
    names = [name for row in found["layers"] if row["slower"] for name in row["names"]]
    return ["", f"Slower than dense: {', '.join(names)}"] if names else []


def bench_layer_table(found: Bench) -> Table:
    """One row for factorised layers of the same shape, rank and input. Fits 80 columns."""
    table = _table("layers", "shape", "rank", "input", "ms", "dense", "speedup", "95%")
    for row in found["layers"]:
        more = f" and {len(row['names']) - 1} more" if len(row["names"]) > 1 else ""
        table.add_row(
            f"{row['names'][0]}{more}",
            "x".join(map(str, row["shape"])),
            str(row["rank"]),
            "x".join(map(str, row["input"])),
            _short(row["factorised_ms"]),
            _short(row["dense_ms"]),
            _times(row, "" if row["reached"] else "?"),
            _interval(row),
        )
    return table


def _table(first: str, *columns: str) -> Table:
    """An empty table of figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _times(row: BenchCertainty, mark: str) -> str:
    return "?" if row["speedup"] is None else f"{row['speedup']:.2f}x{mark}"


def _interval(row: BenchCertainty) -> str:
    return "-".join(f"{end:.2f}" for end in row["interval"] or ())
