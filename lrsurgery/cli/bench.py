"""The command that measures speed and memory: `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from lrsurgery.cli.arguments import (
    MACHINE,
    OUTPUT,
    DebugOption,
    DeviceOption,
    DtypeName,
    JsonOption,
    ModelArgument,
    QuietOption,
    Task,
    TrustOption,
    command_line,
    make_screen,
    option,
)

if TYPE_CHECKING:
    from rich.table import Table

    from lrsurgery.report.schema import Bench, BenchCertainty

RUN, PRECISION = "What to run", "How precisely"  # panels of help


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        option("--against", panel=RUN, metavar="DENSE", text="Second model, run in turn with it.", default=False),
    ] = None,
    batch: Annotated[
        str, option("--batch", panel=RUN, metavar="N,N", text="Batch sizes, in sequences or images.")
    ] = "1,8",
    length: Annotated[
        str | None,
        option(
            "--length",
            panel=RUN,
            metavar="N,N",
            text="Lengths in tokens; 128,512, or the model's maximum.",
            default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        option("--new-tokens", panel=RUN, metavar="N", text="Tokens at the end to decode; 0 for no decode."),
    ] = 32,
    layers: Annotated[
        bool, option("--layers", panel=RUN, text="Each factorised layer against its dense form too, on its own input.")
    ] = False,
    task: Annotated[
        Task | None, option("--task", panel=RUN, text="Purpose of the model; from its architecture.", default=False)
    ] = None,
    precision: Annotated[
        float,
        option(
            "--precision",
            panel=PRECISION,
            metavar="X",
            text="Relative half width of a speedup's 95% interval to reach.",
        ),
    ] = 0.03,
    seconds: Annotated[
        float, option("--seconds", panel=PRECISION, metavar="S", text="Longest time for each setting.")
    ] = 20.0,
    seed: Annotated[int, option("--seed", panel=PRECISION, text="Seed of the random input.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[DtypeName, option("--dtype", panel=MACHINE, text="Dtype of weights and input.")] = "keep",
    threads: Annotated[
        int | None,
        option("--threads", panel=MACHINE, metavar="N", text="Threads of the CPU; torch's default.", default=False),
    ] = None,
    compiled: Annotated[bool, option("--compile", panel=MACHINE, text="Models through torch.compile.")] = False,
    trust_remote_code: TrustOption = False,
    save: Annotated[bool, option("--save", panel=OUTPUT, text="bench.json in MODEL's folder too.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model's latency, throughput, peak memory and FLOPs, beside another one's.

    The input is random: only its shape decides speed. Language models prefill whole sequences, then decode the last
    --new-tokens with a KV cache. Both models run in turn, so that other load on the machine slows both alike. A speedup
    stands with its 95% confidence interval; ideal is the ratio of FLOPs.

    [bold]Examples[/bold]

      lrsurgery bench gpt2-rank-0.5 --against gpt2

      lrsurgery bench gpt2-rank-0.5 --against gpt2 --batch 1 --length 1024 --layers --save

      lrsurgery bench resnet50-half --against timm:resnet50 --threads 1 --json | jq '.runs[].speedup'
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.measure.bench import BenchOptions
    from lrsurgery.measure.bench import bench as measure

    options = BenchOptions(
        batch=_numbers("--batch", batch),
        length=None if length is None else _numbers("--length", length),
        new_tokens=new_tokens,
        precision=precision,
        seconds=seconds,
        layers=layers,
        device=device,
        dtype=str(dtype),
        threads=threads,
        compile=compiled,
        seed=seed,
        task=None if task is None else str(task),
        trust_remote_code=trust_remote_code,
    )
    with screen.follow("bench") as listener:
        found = measure(model, against, options, command=command_line(), save=save, listener=listener)
    screen.emit({**found})
    screen.show(size_table(found), "", speed_table(found))
    if found["layers"]:
        screen.show("", bench_layer_table(found), *slower_lines(found))
    for note in [*found["notes"], *_unsure_notes(found, precision)]:
        screen.say(f"Note: {note}")
    if save:
        screen.say(f"Written to {model}/bench.json")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from lrsurgery.errors import SurgeryError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise SurgeryError(f"{name} {text}: write integers with commas, such as 1,8") from e


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


def slower_lines(found: Bench) -> list[str]:
    """The layers whose interval says that they got slower, by name."""
    names = [name for row in found["layers"] if row["slower"] for name in row["names"]]
    return ["", f"Slower than dense: {', '.join(names)}"] if names else []


def _unsure_notes(found: Bench, asked: float) -> list[str]:
    measured = [*(run["reached"] for run in found["runs"]), *(row["reached"] for row in found["layers"])]
    missed = measured.count(False)
    if not missed:
        return []
    return [
        f"{missed} of {len(measured)} measurements, marked ?, did not get within {asked:g} in their time;"
        " raise --seconds, or leave the machine to it"
    ]


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

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
