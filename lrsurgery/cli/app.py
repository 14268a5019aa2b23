"""The command line: each command parses, calls one function and renders."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrsurgery import __version__
from lrsurgery.cli import bench as bench_cli
from lrsurgery.cli import report as report_cli
from lrsurgery.cli import study as study_cli
from lrsurgery.cli import training as training_cli
from lrsurgery.cli.arguments import (
    ArchitectureOption,
    ConvOption,
    DebugOption,
    DeviceOption,
    ExcludeOption,
    FolderArgument,
    IncludeOption,
    JobsOption,
    JsonOption,
    ModelArgument,
    MultipleOption,
    NoCacheOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RankOption,
    RevisionOption,
    ShardOption,
    TrustOption,
    command_line,
    make_screen,
)
from lrsurgery.cli.report import show_report
from lrsurgery.errors import Interrupted, SurgeryError

if TYPE_CHECKING:
    from lrsurgery.factorise.options import Options

app = typer.Typer(
    name="lrsurgery",
    help="Make the layers of a pretrained transformers or timm model low rank, see what it cost, ship the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _calibration(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Calibration", metavar=metavar, show_default=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrsurgery {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    imports: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE.py",
            show_default=False,
            help="Run this Python file first, such as one that registers a model with timm. Read it before.",
        ),
    ] = None,
) -> None:
    """Make the layers of a pretrained transformers or timm model low rank, see what it cost, ship the result.

    [bold]Examples[/bold]

      lrsurgery factorise gpt2 --rank 0.5

      lrsurgery finetune gpt2-rank-0.5 --data train.txt --eval-data valid.txt --output gpt2-healed

      lrsurgery evaluate gpt2-healed --data test.txt --against gpt2

      lrsurgery report gpt2-healed
    """
    if imports:
        from lrsurgery.imports import import_file

        for file in imports:
            import_file(file)


def factorise(
    model: ModelArgument,
    rank: RankOption = None,
    output: OutputOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SHARE",
            show_default=False,
            help="In place of --rank: 0.5 of the parameters, flops:0.5 or bytes:500MB, where they lose least.",
        ),
    ] = None,
    budget_of: Annotated[
        str, typer.Option("--budget-of", help="layers: those that may be factorised; model: all of it.")
    ] = "layers",
    calibration: Annotated[
        str | None,
        _calibration("--calibration", metavar="DATA", text="Weigh errors by this data; what finetune --data takes."),
    ] = None,
    metric: Annotated[
        str, _calibration("--metric", text="fisher (inputs and gradients), activations (inputs), or none.")
    ] = "fisher",
    samples: Annotated[
        int, _calibration("--samples", metavar="N", text="Blocks of text, sentences or images of it.")
    ] = 128,
    block_size: Annotated[
        int | None, _calibration("--block-size", metavar="N", text="Tokens of a block; 512, or the model's maximum.")
    ] = None,
    sequential: Annotated[
        bool, _calibration("--sequential", text="Look at each block once those before it are replaced.")
    ] = False,
    statistics: Annotated[
        Path | None, _calibration("--statistics", metavar="DIR", text="What --save-statistics kept, in place of data.")
    ] = None,
    save_statistics: Annotated[
        Path | None, _calibration("--save-statistics", metavar="DIR", text="Keep them for other ranks and budgets.")
    ] = None,
    task: Annotated[
        str | None, _calibration("--task", text="What the model is for, where its config does not say.")
    ] = None,
    subset: Annotated[str | None, _calibration("--subset", text="Configuration of a hub dataset.")] = None,
    split: Annotated[str | None, _calibration("--split", text="Split of the data; train if it is there.")] = None,
    text_column: Annotated[str | None, _calibration("--text-column", text="Column of the text.")] = None,
    image_column: Annotated[str | None, _calibration("--image-column", text="Column of the image.")] = None,
    image_size: Annotated[
        int | None, _calibration("--image-size", text="Pixels; the checkpoint's own size if left out.")
    ] = None,
    init: Annotated[
        str, typer.Option("--init", help="spectral (keeps the model), or spectral-ones, he (to be trained again).")
    ] = "spectral",
    conv: ConvOption = "channel",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    multiple_of: MultipleOption = 1,
    allow_larger: Annotated[
        bool, typer.Option("--allow-larger", help="Factorise layers at or over break-even too.")
    ] = False,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            "--min-speedup",
            metavar="X",
            show_default=False,
            help="Leave dense what would not run X times as fast, measured on --device and remembered; 1.0 is usual.",
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Initialise the model anew from its config first.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="For --from-scratch and --init he.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="keep, float32, bfloat16 or float16.")] = "keep",
    svd: Annotated[
        str,
        typer.Option("--svd", help="auto: within 1e-5 of the best error; fast: within 1%, to explore; full: LAPACK's."),
    ] = "auto",
    jobs: JobsOption = None,
    no_cache: NoCacheOption = False,
    keep_vectors: Annotated[
        bool, typer.Option("--keep-vectors", help="Keep singular vectors too: another rank costs one product a layer.")
    ] = False,
    shard_size: ShardOption = "5GB",
    revision: RevisionOption = None,
    architecture: ArchitectureOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where this command was interrupted or killed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Replace a model's layers by low-rank ones and write a checkpoint that loads in transformers or timm.

    [bold]Examples[/bold]

      lrsurgery factorise gpt2 --rank 0.5 --dry-run

      lrsurgery factorise ./my-llama --rank params:0.5 --rank '*.down_proj=0.7' --exclude '*.0.*'

      lrsurgery factorise timm/resnet50.a1_in1k --rank energy:0.9 --conv spatial --output resnet50-small

      lrsurgery factorise gpt2 --budget 0.5 --calibration text.txt

      lrsurgery factorise gpt2 --from-scratch --init spectral-ones --rank 0.62
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.factorise.calibrate import Calibration
    from lrsurgery.factorise.checkpoint import iter_factorise, iter_plan
    from lrsurgery.factorise.options import Options
    from lrsurgery.runtime import Processes
    from lrsurgery.training.recipe import DataOptions

    how = DataOptions(task, subset, text_column, None, image_column, block_size, image_size)
    options = Options(
        rank, init, conv, include or ("*",), exclude or (), allow_larger, multiple_of, seed, from_scratch, device,
        dtype, shard_size, revision, architecture, trust_remote_code, overwrite, command_line(), min_speedup,
        svd, jobs, resume, not no_cache, keep_vectors, budget, budget_of,
        Calibration(calibration, metric, samples, sequential, statistics, save_statistics, split, how),
    )  # fmt: skip
    if dry_run:
        show_report(screen, screen.follow(iter_plan(model, options), "calibrate"))
        screen.say("Nothing was written; leave --dry-run out to do it.")
        return
    options.check()
    target = output or Path(_default_name(model, options))
    report = screen.follow(iter_factorise(model, target, options, Processes.of_environment()), "factorise")
    show_report(screen, report, output=str(target))
    screen.say(f"Written to {target}")
    screen.say(f"Next: lrsurgery report {shlex.quote(str(target))}")


def export(
    folder: FolderArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Output folder.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="dense: ordinary layers that need no lrsurgery to load.")] = "dense",
    shard_size: ShardOption = "5GB",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a factorised model as a folder that plain transformers or timm loads.

    [bold]Examples[/bold]

      lrsurgery export gpt2-rank-0.5 --to dense --output gpt2-dense
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.factorise.export import iter_export

    steps = iter_export(
        folder, output, shard_size, to=to, overwrite=overwrite, trust_remote_code=trust_remote_code,
        command=command_line(),
    )  # fmt: skip
    screen.follow(steps, "export")
    screen.emit({"output": str(output), "to": to})
    screen.say(f"Written to {output}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show or clear the singular values that earlier runs kept, so that another rank or a plan need not compute them.

    $LRSURGERY_CACHE names another folder, $LRSURGERY_CACHE_SIZE another limit than 10GB.

    [bold]Examples[/bold]

      lrsurgery cache

      lrsurgery cache --clear
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.checkpoints.spectra import SpectrumCache

    kept = SpectrumCache()
    if clear:
        kept.clear()
    entries, size = kept.size()
    screen.emit({"folder": str(kept.folder), "entries": entries, "bytes": size})
    screen.show(f"{kept.folder}: {entries} entries, {size / 1e6:.1f} MB")


COMMANDS = (
    factorise, training_cli.finetune, training_cli.evaluate, report_cli.report, bench_cli.bench, study_cli.study,
    export, cache,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def _default_name(model: str, options: Options) -> str:
    kind = "rank" if options.budget is None else "budget"
    spec = str(options.spec.default or "mixed").replace(":", "-").replace(" ", "-")
    stem = Path(model.removeprefix("timm:"))
    name = stem.stem if stem.suffix in (".safetensors", ".bin", ".pth", ".pt") else stem.resolve().name
    return f"{name}-{kind}-{spec}"


def main() -> None:
    """The `lrsurgery` program: 0 for success, 2 for what the user can put right, 130 after Ctrl-C, 1 for our bugs."""
    import signal

    atexit.register(gc.freeze)  # else the collector walks through all of torch and transformers as the process ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written output is removed
    arguments = sys.argv[1:]
    debug, as_json = "--debug" in arguments, "--json" in arguments
    # their loaders' own bars and warnings are not this program's voice
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import warnings

        warnings.filterwarnings("ignore")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except typer.Abort:
        _fail("aborted", 1, as_json)
    except Interrupted as e:
        _fail(str(e), 130, as_json)
    except SurgeryError as e:
        if debug:
            raise
        _fail(" ".join(str(e).split()), 2, as_json)
    except Exception as e:
        if debug:
            raise
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # a usage error of the command line parser
            context = getattr(e, "ctx", None)
            command = context.command_path if context else "lrsurgery"
            _fail(f"{e.format_message().rstrip('.')}. See {command} --help", 2, as_json)
        _fail(f"unexpected {type(e).__name__}: {' '.join(str(e).split())} (a bug; --debug shows where)", 1, as_json)
    if code == 130:  # typer's exit code for Ctrl-C, of which it says nothing
        _fail("interrupted; nothing was written", 130, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, as_json: bool) -> None:
    sys.stderr.write(f"lrsurgery: {message}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": message}) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
