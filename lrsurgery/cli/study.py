"""The `study` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lrsurgery.cli.arguments import DebugOption, JsonOption, QuietOption, make_screen


def study(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A study's YAML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Its folder; named by the recipe if left out.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on: keep finished runs, resume interrupted ones, retry failed ones."),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/N", show_default=False, help="Take every N-th run, from the I-th."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Runs at once; they share the threads.")] = 1,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep each run's weights too.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Take a grid of training runs and tabulate what they come to: means and spreads over seeds, a plot, one page.

    A recipe has settings (as for finetune --recipe), a grid of axes, and what its table and plot show; examples/studies
    has five. Its prepare steps are commands: run only recipes that you trust.

    [bold]Examples[/bold]

      lrsurgery study examples/studies/init-small.yaml --output init

      lrsurgery study examples/studies/init-small.yaml --output init --resume --jobs 2

      lrsurgery study decay.yaml --output /shared/decay --shard 3/8 --resume
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.measure.findings import cells, findings, write_findings
    from lrsurgery.measure.study import iter_study, parse_shard, read_study

    asked = read_study(recipe)
    target = output or Path(asked.name)
    part = parse_shard(shard)
    steps = iter_study(asked, target, shard=part, jobs=jobs, resume=resume or part[1] > 1, keep_models=keep_models)
    results = screen.follow(steps, "study")
    found = findings(asked, results, target)
    write_findings(asked, found, target)
    from rich.table import Table

    headers, body = cells(asked, found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    for line in body:
        table.add_row(*line)
    screen.emit({"output": str(target), **found})
    screen.show(table)
    for run in found["failed"]:
        screen.say(f"Failed: {run['name']}: {run['error']}")
    screen.say(f"{found['finished']} of {found['asked']} runs are finished. Written to {target / 'index.html'}")
    if found["failed"]:
        screen.say(f"Next: lrsurgery study {shlex.quote(str(recipe))} --output {shlex.quote(str(target))} --resume")
        raise typer.Exit(1)
