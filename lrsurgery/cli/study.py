"""The `study` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lrsurgery.cli.arguments import (
    MACHINE,
    OUTPUT,
    DebugOption,
    JsonOption,
    QuietOption,
    TrustOption,
    make_screen,
    option,
)

RUN = "What to run"  # a panel of help


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
