"""What `bench` measured, as tables of the terminal."""

from __future__ import annotations

from rich.table import Table

from lrsurgery.report.schema import Bench, BenchCertainty


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
            cells += [_short(run["against"]["median_ms"]), f"{run['speedup']:.2f}x{mark}", _interval(run)]
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
            f"{row['speedup']:.2f}x{'' if row['reached'] else '?'}",
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


def _interval(row: BenchCertainty) -> str:
    return "-".join(f"{end:.2f}" for end in row["interval"] or ())
