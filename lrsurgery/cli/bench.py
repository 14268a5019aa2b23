"""The commands that measure: `bench` (speed and memory) and `study` (a grid of training runs)."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrsurgery.cli.arguments import (
    MACHINE,
    OUTPUT,
    ArchitectureOption,
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
    from lrsurgery.report.bench import Bench

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
    architecture: ArchitectureOption = None,
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
    from lrsurgery.report.views.speed import bench_layer_table, size_table, slower_lines, speed_table

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
        architecture=architecture,
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


def _unsure_notes(found: Bench, asked: float) -> list[str]:
    measured = [*(run["reached"] for run in found["runs"]), *(row["reached"] for row in found["layers"])]
    missed = measured.count(False)
    if not missed:
        return []
    return [
        f"{missed} of {len(measured)} measurements, marked ?, did not get within {asked:g} in their time;"
        " raise --seconds, or leave the machine to it"
    ]


def study(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A study's YAML file.", show_default=False)],
    resume: Annotated[
        bool,
        option(
            "--resume",
            panel=RUN,
            text="Going on: finished runs stay, interrupted ones resume, failed ones are retried.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        option("--shard", panel=RUN, metavar="I/N", text="Every N-th run, from the I-th.", default=False),
    ] = None,
    jobs: Annotated[
        int, option("--jobs", "-j", panel=MACHINE, metavar="N", text="Runs at once; they share the threads.")
    ] = 1,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            text="The study's folder; named by the recipe.",
            default=False,
        ),
    ] = None,
    keep_models: Annotated[bool, option("--keep-models", panel=OUTPUT, text="Each run's weights too.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a grid of runs and tabulate the results: means and spreads over seeds, a plot, one page.

    A recipe has settings (as for finetune --recipe), a grid of axes, and what its table and plot show; there are small
    ones in examples/studies. Its prepare steps are commands: run only recipes that you trust.

    [bold]Examples[/bold]

      lrsurgery study examples/studies/init-small.yaml --output init

      lrsurgery study examples/studies/init-small.yaml --output init --resume --jobs 2

      lrsurgery study decay.yaml --output /shared/decay --shard 3/8 --resume
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.errors import StudyError
    from lrsurgery.measure.findings import cells, findings_of, write_findings
    from lrsurgery.measure.study import run_study
    from lrsurgery.measure.study_recipe import parse_shard, read_study
    from lrsurgery.text import one_line

    asked = read_study(recipe)
    target = output or Path(asked.name)
    part = parse_shard(shard)
    with screen.follow("study") as listener:
        results = run_study(
            asked,
            target,
            shard=part,
            jobs=jobs,
            resume=resume or part.which > 1,
            keep_models=keep_models,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    found = findings_of(asked, results, target)
    write_findings(asked, found, target)
    screen.emit({"output": str(target), **found})
    from rich.table import Table

    headers, body = cells(asked, found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    for line in body:
        table.add_row(*line)
    screen.show(table)
    for run in found["failed"]:
        screen.say(f"Failed: {run['name']}: {run['error']}")
    screen.say(f"{found['finished']} of {found['asked']} runs are finished. Written to {target / 'index.html'}")
    if found["failed"]:
        again = f"lrsurgery study {shlex.quote(str(recipe))} --output {shlex.quote(str(target))} --resume"
        if any(run["exit_code"] != StudyError.exit_code for run in found["failed"]):
            screen.say(f"Next: {again}")
            raise typer.Exit(1)
        count = len(found["failed"])
        who = "1 run refused what it was given" if count == 1 else f"{count} runs refused what they were given"
        # not raised: with --json the findings are the one document
        typer.echo(f"lrsurgery: {one_line(f'{recipe}: {who}; mend it, then {again}')}", err=True)
        raise typer.Exit(StudyError.exit_code)
