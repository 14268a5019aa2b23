"""The command that measures speed and memory: `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrsurgery.cli.arguments import (
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    TrustOption,
    command_line,
    make_screen,
)

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DENSE", help="A second model, run in turn with it.", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Sequences or images at a time.")] = "1,8",
    length: Annotated[
        str | None,
        typer.Option(
            "--length", metavar="N,N", help="Tokens of a text; 128,512, or what the model has.", show_default=False
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option("--new-tokens", metavar="N", help="How many of the last tokens to make one by one; 0 for none."),
    ] = 32,
    layers: Annotated[
        bool, typer.Option("--layers", help="Each factorised layer against its dense form too, on its own input.")
    ] = False,
    precision: Annotated[
        float,
        typer.Option("--precision", metavar="X", help="Go on until a speedup's 95% interval is within this share."),
    ] = 0.03,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="But no longer than this for each setting.")
    ] = 20.0,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="keep, float32, bfloat16 or float16.")] = "keep",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Of the CPU; as torch has them.", show_default=False)
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run through torch.compile.")] = False,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="causal-lm, masked-lm, sequence-classification or image-classification, if not the model's own.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random input.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write bench.json into MODEL's folder.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model's latency, throughput, peak memory and operations, beside another one's.

    Input is random: only its shape decides speed. Language models prefill whole texts, then make the last --new-tokens
    one by one with a cache. Both models run in turn, so that what else the machine does meets both; a speedup comes
    with the interval that holds it with 95% confidence. Ideal is the ratio of operations.

    [bold]Examples[/bold]

      lrsurgery bench gpt2-rank-0.5 --against gpt2

      lrsurgery bench gpt2-rank-0.5 --against gpt2 --batch 1 --length 1024 --layers --save

      lrsurgery bench resnet50-half --against timm:resnet50 --threads 1 --json | jq '.runs[].speedup'
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.measure.bench import BenchOptions, iter_bench

    lengths = None if length is None else _numbers("--length", length)
    options = BenchOptions(
        _numbers("--batch", batch), lengths, new_tokens, precision, seconds, layers, device, dtype, threads, compiled,
        seed, task, trust_remote_code,
    )  # fmt: skip
    found = screen.follow(iter_bench(model, against, options, command=command_line(), save=save), "bench")
    screen.emit(found)
    screen.show(size_table(found), "", speed_table(found))
    if found["layers"]:
        screen.show("", bench_layer_table(found), *slower_lines(found))
    for note in [*found["notes"], *_unsure(found)]:
        screen.say(f"Note: {note}")
    if save:
        screen.say(f"Written to {model}/bench.json")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from lrsurgery.errors import SurgeryError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise SurgeryError(f"{name} {text}: write integers with commas, such as 1,8") from e


def size_table(found: dict[str, Any]) -> Table:
    """Parameters, bytes and peak memory of the models."""
    table = _table("model", left=1)
    for header in ("parameters", "on disk", "peak memory"):
        table.add_column(header, justify="right", no_wrap=True)
    for body in (found["model"], found["against"]):
        if body is not None:
            sizes = ("?" if body[key] is None else f"{body[key] / 1e6:,.1f} MB" for key in ("bytes", "peak_memory"))
            table.add_row(body["name"], f"{body['parameters']:,}", *sizes)
    return table


def speed_table(found: dict[str, Any]) -> Table:
    """One row a setting. Fits 80 columns."""
    unit = found["runs"][0]["unit"] if found["runs"] else "tokens"
    both = found["against"] is not None
    table = _table("run", left=1)
    headers = ["size", "ms", "p95", f"{unit}/s", *(["other ms", "speedup", "95%", "ideal"] if both else ["GFLOP"])]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for run in found["runs"]:
        name = "by token" if run["work"] == "token by token" else run["work"]
        mark = "" if run["reached"] else "?"
        cells = [f"{run['batch']}x{run['length']}", _short(run["median_ms"]), _short(run["p95_ms"])]
        cells.append(_short(run["throughput"]))
        if both:
            cells += [_short(run["against"]["median_ms"]), f"{run['speedup']:.2f}x{mark}", _interval(run)]
            cells.append("" if run["ideal"] is None else f"{run['ideal']:.2f}")
        else:
            cells.append(_short(run["flops"] / 1e9))
            cells[1] += mark
        table.add_row(name, *cells)
    return table


def bench_layer_table(found: dict[str, Any]) -> Table:
    """One row for factorised layers of the same shape, rank and input. Fits 80 columns."""
    table = _table("layers", left=1)
    for header in ("shape", "rank", "input", "ms", "dense", "speedup", "95%"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in found["layers"]:
        more = f" and {len(row['names']) - 1} more" if len(row["names"]) > 1 else ""
        table.add_row(
            f"{row['names'][0]}{more}", "x".join(map(str, row["shape"])), str(row["rank"]),
            "x".join(map(str, row["input"])), _short(row["factorised_ms"]), _short(row["dense_ms"]),
            f"{row['speedup']:.2f}x{'' if row['reached'] else '?'}", _interval(row),
        )  # fmt: skip
    return table


def slower_lines(found: dict[str, Any]) -> list[str]:
    """The layers that certainly got slower, by name."""
    names = [name for row in found["layers"] if row["slower"] for name in row["names"]]
    return ["", f"Slower than dense: {', '.join(names)}"] if names else []


def _unsure(found: dict[str, Any]) -> list[str]:
    missed = [run for run in [*found["runs"], *found["layers"]] if not run["reached"]]
    if not missed:
        return []
    total, asked = len(found["runs"]) + len(found["layers"]), found["options"]["precision"]
    return [
        f"{len(missed)} of {total} measurements, marked ?, did not get within {asked:g} in their time;"
        " raise --seconds, or leave the machine to it"
    ]


def _table(first: str, *, left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, left))
    table.add_column(first, overflow="fold")
    return table


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _interval(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{low:.2f}-{high:.2f}"
