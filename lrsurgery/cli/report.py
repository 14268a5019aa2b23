"""The `report` command: parse, call one function, draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrsurgery.cli.arguments import (
    ArchitectureOption,
    ConvOption,
    DebugOption,
    DeviceOption,
    ExcludeOption,
    IncludeOption,
    JobsOption,
    JsonOption,
    MultipleOption,
    NoCacheOption,
    OverwriteOption,
    QuietOption,
    RevisionOption,
    TrustOption,
    command_line,
    make_screen,
)

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen
    from lrsurgery.report.schema import Report

FORMATS = {"terminal": "", "json": ".json", "markdown": ".md", "html": ".html"}


def report(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A dense model, a folder that lrsurgery wrote, or several folders of training runs.",
            show_default=False,
        ),
    ],
    rank: Annotated[
        list[str] | None,
        typer.Option(
            "--rank",
            "-r",
            metavar="RANK|GLOB=RANK",
            show_default=False,
            help="For a dense model: show this plan beside it; as for factorise.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="DENSE",
            show_default=False,
            help="For a factorised model: measure errors, energy and directions against this dense one.",
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            show_default=False,
            help="terminal, json, markdown or html; by the ending of --output if left out.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Write it to this file.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", show_default=False, help="Draw figures for a paper, as svg and png."),
    ] = None,
    sort: Annotated[str, typer.Option("--sort", help="model, name, params or error: order of the layers.")] = "model",
    every: Annotated[bool, typer.Option("--all", help="Each layer of a large model, not a line a block.")] = False,
    conv: ConvOption = "channel",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    multiple_of: MultipleOption = 1,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    no_cache: NoCacheOption = False,
    revision: RevisionOption = None,
    architecture: ArchitectureOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show which layers can shrink and at which rank, what surgery cost, whether healing worked, whether it is faster.

    Of a dense model: every layer's spectrum, and what a ladder of ranks would keep, lose and save. Of a factorised one:
    what was done to each layer, and with --against what is left of the dense one. Of training runs: their courses side
    by side.

    [bold]Examples[/bold]

      lrsurgery report gpt2 --rank params:0.5

      lrsurgery report gpt2-rank-0.5 --output gpt2.html

      lrsurgery report gpt2-healed --against gpt2 --sort error --plots figures

      lrsurgery report healed-none healed-l2 healed-frobenius --output decays.html

      lrsurgery report gpt2-rank-0.5 --json | jq .totals
    """
    from lrsurgery.errors import SurgeryError
    from lrsurgery.report.views.terminal import check_sort

    wanted = _format(format_, output, as_json)
    screen = make_screen(quiet, wanted == "json" and output is None)
    check_sort(sort)
    if output is None and wanted == "html" and screen.out.is_terminal:
        raise SurgeryError("html goes to a file: name it with --output report.html")
    if output is not None and output.exists() and not overwrite:
        raise SurgeryError(f"{output}: exists already; replace it with --overwrite")
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.report.profile import ProfileOptions
    from lrsurgery.report.read import read_report
    from lrsurgery.runtime import Compute, pick_device
    from lrsurgery.surgery.ranks import parse_rank

    with screen.follow("report") as listener:
        found = read_report(
            models,
            Compute(device=pick_device(device), jobs=jobs, cache=not no_cache),
            source_options=SourceOptions(
                revision=revision, architecture=architecture, trust_remote_code=trust_remote_code
            ),
            profile_options=ProfileOptions(
                target=parse_rank(rank, multiple_of) if rank else None,
                conv=str(conv),
                include=include or ("*",),
                exclude=exclude or (),
                multiple_of=multiple_of,
            ),
            against=against,
            command=command_line(),
            listener=listener,
        )
    if output is not None or wanted in ("markdown", "html"):
        _write(screen, _drawn(found, wanted, sort=sort, every=every), output)
    else:
        show_report(screen, found, sort=sort, every=every)
    if plots is not None:
        from lrsurgery.report.views.figures import draw

        files = draw(found, plots, overwrite=overwrite)
        screen.say(f"Drawn: {', '.join(file.name for file in files)} in {plots}")


def _format(asked: str | None, output: Path | None, as_json: bool) -> str:
    from lrsurgery.errors import SurgeryError

    if asked is not None and asked not in FORMATS:
        raise SurgeryError(f"unknown format '{asked}'; known: {', '.join(FORMATS)}")
    if as_json and asked not in (None, "json"):
        raise SurgeryError(f"--json and --format {asked} exclude each other")
    if asked or as_json:
        return asked or "json"
    if output is None:
        return "terminal"
    endings = {ending: name for name, ending in FORMATS.items() if ending} | {".htm": "html", ".txt": "terminal"}
    if output.suffix not in endings:
        raise SurgeryError(f"{output}: say what to write with --format, or end the name in .html, .md, .json or .txt")
    return endings[output.suffix]


def _drawn(found: Report, wanted: str, *, sort: str, every: bool) -> str:
    if wanted == "json":
        return found.to_json()
    if wanted == "markdown":
        from lrsurgery.report.views.markdown import markdown

        return markdown(found)
    if wanted == "html":
        from lrsurgery.report.views.html import html_page

        return html_page(found.to_dict())
    from io import StringIO

    from rich.console import Console

    from lrsurgery.cli.console import PIPED_WIDTH
    from lrsurgery.report.views.terminal import report_parts

    text = StringIO()
    paper = Console(file=text, width=PIPED_WIDTH, highlight=False)
    for part in report_parts(found, PIPED_WIDTH, sort=sort, every=every):
        paper.print(part, markup=False) if isinstance(part, str) else paper.print(part)
    return text.getvalue()


def _write(screen: Screen, text: str, output: Path | None) -> None:
    """Whole or not at all; to stdout where no file is named."""
    if output is None:
        import sys

        sys.stdout.write(text)
        return
    from lrsurgery.files import replace_file

    replace_file(output, text)
    screen.say(f"Written to {output}")


def show_report(screen: Screen, found: Report, *, sort: str = "model", every: bool = False, **facts: Any) -> None:
    """In the terminal, or as JSON."""
    from lrsurgery.report.views.terminal import report_parts

    screen.emit({**facts, **found.to_dict()})
    screen.show(*report_parts(found, screen.out.width, sort=sort, every=every))
    for note in found.notes:
        screen.say(f"Note: {note}")
