"""The `report` command: parse, call one function, draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from lrsurgery.cli.arguments import (
    OUTPUT,
    ArchitectureOption,
    BlockSizeOption,
    BosOption,
    CalibrationOption,
    Choice,
    ConvOption,
    DebugOption,
    DeviceOption,
    ExcludeOption,
    FormOption,
    ImageColumnOption,
    ImageSizeOption,
    IncludeOption,
    JobsOption,
    JoinOption,
    JsonOption,
    MultipleOption,
    NoCacheOption,
    OverwriteOption,
    QuietOption,
    RevisionOption,
    SamplesOption,
    SplitOption,
    StatisticsOption,
    SubsetOption,
    TargetColumnOption,
    TaskOption,
    TextColumnOption,
    TrustOption,
    choice,
    command_line,
    make_screen,
    option,
)
from lrsurgery.cli.folders.looks import show_reach, verify_folders
from lrsurgery.cli.targets.options import (
    EvalDataOption,
    EvalSplitOption,
    HealOption,
    LabelColumnOption,
    LabelMapOption,
    curve_request,
)
from lrsurgery.report.views import VIEWS, render

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen
    from lrsurgery.report.schema import Report

SHOWN = "What to show"  # panel of help

if TYPE_CHECKING:
    Sort: TypeAlias = str
    View: TypeAlias = str
else:
    Sort = choice("Sort", "lrsurgery.report.views.columns", "SORTS")
    View = Choice("View", {name: name for name in VIEWS})


def report(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A dense model, a folder that lrsurgery wrote, or several folders of training runs.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        option(
            "--against",
            panel=SHOWN,
            metavar="DENSE",
            default=False,
            text="For a factorised model: measure errors, energy and directions against this dense one.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        option(
            "--verify", panel=SHOWN, text="Compare every file with the digests that were written with it, and no more."
        ),
    ] = False,
    rank: Annotated[
        list[str] | None,
        option(
            "--rank",
            "-r",
            panel=SHOWN,
            metavar="RANK|GLOB=RANK",
            default=False,
            text="For a dense model: show this plan beside it; as for factorise.",
        ),
    ] = None,
    reach: Annotated[
        bool,
        option("--reach", panel=SHOWN, text="Of dense models: what share can be factorised, and why not the rest."),
    ] = False,
    sort: Annotated[Sort, option("--sort", panel=SHOWN, text="Order of the layers.")] = "model",
    every: Annotated[
        bool, option("--all", panel=SHOWN, text="Each layer of a large model, not a line a block.")
    ] = False,
    format_: Annotated[
        View | None,
        option(
            "--format", "-f", panel=OUTPUT, default=False, text="What to write; by the ending of --output if left out."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option("--output", "-o", panel=OUTPUT, metavar="FILE", default=False, text="Write to this file."),
    ] = None,
    plots: Annotated[
        Path | None,
        option("--plots", panel=OUTPUT, metavar="DIR", default=False, text="Draw figures for a paper, as svg and png."),
    ] = None,
    eval_data: EvalDataOption = None,
    eval_split: EvalSplitOption = None,
    label_column: LabelColumnOption = None,
    label_map: LabelMapOption = None,
    heal: HealOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = 128,
    block_size: BlockSizeOption = None,
    statistics: StatisticsOption = None,
    task: TaskOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    text_column: TextColumnOption = None,
    target_column: TargetColumnOption = None,
    bos: BosOption = "auto",
    join: JoinOption = False,
    image_column: ImageColumnOption = None,
    image_size: ImageSizeOption = None,
    conv: ConvOption = "auto",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    form: FormOption = "pivoted",
    multiple_of: MultipleOption = None,
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

    Of a dense model: every layer's spectrum, and what a ladder of ranks would keep, lose and save; with --eval-data the
    measured loss and speedup at ten sizes. Of a factorised one:
    what was done to each layer, and with --against what is left of the dense one. Of training runs: their courses side
    by side.

    [bold]Examples[/bold]

      lrsurgery report gpt2 --rank params:0.5

      lrsurgery report gpt2 --calibration text.txt --eval-data valid.txt --output gpt2-curve.html

      lrsurgery report gpt2-rank-0.5 --output gpt2.html

      lrsurgery report gpt2-healed --against gpt2 --sort error --plots figures

      lrsurgery report healed-none healed-l2 healed-frobenius --output decays.html

      lrsurgery report gpt2-rank-0.5 --json | jq .totals

      lrsurgery report gpt2-rank-0.5 --sort error --output layers.csv

      lrsurgery report gpt2-rank-0.5 --verify
    """
    from lrsurgery.errors import SurgeryError

    if verify:
        verify_folders(models, make_screen(quiet, as_json))
        return
    if reach:
        options = {"revision": revision, "architecture": architecture, "trust_remote_code": trust_remote_code}
        show_reach(models, options, make_screen(quiet, as_json))
        return
    view = _view(format_, output, as_json)
    screen = make_screen(quiet, view == "json" and output is None)
    if output is None and view == "html" and screen.out.is_terminal:
        raise SurgeryError("html goes to a file: name it with --output report.html")
    if output is not None and output.exists():
        if not overwrite:
            raise SurgeryError(f"{output}: exists already; replace it with --overwrite")
        _check_own(output, [*models, *([against] if against else [])])
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.report.dense.profile import ProfileOptions
    from lrsurgery.report.read import read_report
    from lrsurgery.runtime import Compute, pick_device
    from lrsurgery.surgery.ranks import parse_rank

    asked = curve_request(
        conv=str(conv),
        include=include or ("*",),
        exclude=exclude or (),
        multiple_of=multiple_of,
        device=device,
        jobs=jobs,
        cache=not no_cache,
        revision=revision,
        architecture=architecture,
        trust_remote_code=trust_remote_code,
        eval_data=eval_data,
        eval_split=eval_split,
        heal=heal,
        calibration=calibration,
        samples=samples,
        statistics=statistics,
        split=split,
        how={
            "task": str(task) if task else None,
            "subset": subset,
            "text_column": text_column,
            "target_column": target_column,
            "image_column": image_column,
            "block_size": block_size,
            "bos": str(bos),
            "join": join,
            "image_size": image_size,
        },
        labels={"label_column": label_column, "label_map": label_map},
    )
    if asked is not None and (len(models) > 1 or against):
        raise SurgeryError("--eval-data measures the curve of one dense model; name one, without --against")
    with screen.follow("report") as listener:
        if asked is not None:  # before the spectra, which take a while
            asked.check(models[0])
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
                form=str(form),
            ),
            against=against,
            command=command_line(),
            listener=listener,
        )
        if asked is not None:
            found = asked.added_to(found, models[0], listener)
    if output is None and view in ("terminal", "json"):
        show_report(screen, found, sort=str(sort), every=every)
    else:
        _write(screen, render(found, view, sort=str(sort), every=every), output)
    if plots is not None:
        from lrsurgery.report.views.figures import draw

        files = draw(found, plots, overwrite=overwrite)
        screen.say(f"Drawn: {', '.join(file.name for file in files)} in {plots}")


def _check_own(output: Path, models: list[str]) -> None:
    """Raise OutputError if a file to overwrite is one of a model or a run that is read, other than a view of it."""
    from lrsurgery.checkpoints.output import check_apart

    for model in map(Path, models):
        files = [file for file in model.rglob("*") if file.is_file()] if model.is_dir() else [model]
        check_apart(output, [f for f in files if f.suffix not in (".html", ".md", ".csv") or f.name == "README.md"])


def _view(asked: str | None, output: Path | None, as_json: bool) -> str:
    """The view that was asked for, or that the output's name says. Raises SurgeryError where neither does."""
    from lrsurgery.errors import SurgeryError

    if as_json and asked not in (None, "json"):
        raise SurgeryError(f"--json and --format {asked} exclude each other")
    if asked or as_json:
        return str(asked or "json")
    if output is None:
        return "terminal"
    by_ending = {ending: name for name, endings in VIEWS.items() for ending in endings}
    if output.suffix not in by_ending:
        known = ", ".join(sorted(by_ending))
        raise SurgeryError(f"{output}: say what to write with --format, or end the name in one of {known}")
    return by_ending[output.suffix]


def _write(screen: Screen, text: str, output: Path | None) -> None:
    """Whole or not at all; to stdout where no file is named."""
    if output is None:
        import sys

        from lrsurgery.text import visible

        # a file holds names as they are; what may be a terminal does not
        sys.stdout.write(visible(text))
        return
    from lrsurgery.files.writing import replace_file

    replace_file(output, text)
    screen.say(f"Written to {output}")


def show_report(screen: Screen, found: Report, *, sort: str = "model", every: bool = False, **facts: object) -> None:
    """In the terminal, or as JSON."""
    from lrsurgery.report.views.terminal import report_parts

    screen.emit({**facts, **found.to_dict()})
    screen.show(*report_parts(found, screen.out.width, sort=sort, every=every))
    for note in found.notes:
        screen.say(f"Note: {note}")
