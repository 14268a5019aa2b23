"""The commands that write checkpoints: `factorise` and `export`; and `cache`, which they share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrsurgery.cli.arguments import (
    CUT,
    MACHINE,
    OUTPUT,
    ArchitectureOption,
    ConvOption,
    DebugOption,
    DeviceOption,
    DtypeName,
    EngineName,
    ExcludeOption,
    FolderArgument,
    Importance,
    IncludeOption,
    Init,
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
    Task,
    TrustOption,
    choice,
    command_line,
    make_screen,
)
from lrsurgery.cli.report import show_report

if TYPE_CHECKING:
    from lrsurgery.surgery.plan import Target

    BudgetOf = ExportName = str
else:
    BudgetOf = choice("BudgetOf", "lrsurgery.surgery.budget", "SCOPES")
    ExportName = choice("Export", "lrsurgery.factorise.export", "EXPORTS")

CALIBRATION = "Calibration"


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
            rich_help_panel=CUT,
        ),
    ] = None,
    budget_of: Annotated[
        BudgetOf,
        typer.Option(
            "--budget-of", help="layers: those that may be factorised; model: all of it.", rich_help_panel=CUT
        ),
    ] = "layers",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            show_default=False,
            help="Data that weighs errors; whatever finetune --data takes.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    importance: Annotated[
        Importance,
        typer.Option(
            "--importance",
            help="fisher: inputs and output gradients; activations: inputs; none: weights alone.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "fisher",
    metric: Annotated[Importance | None, typer.Option("--metric", hidden=True)] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            help="Sequences, sentences or images of the data.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 128,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            metavar="N",
            show_default=False,
            help="Tokens of a sequence; 512, or the model's maximum.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Inputs of each block as they are once those before it are replaced.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            metavar="DIR",
            show_default=False,
            help="What --save-statistics kept, in place of data.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(
            "--save-statistics",
            metavar="DIR",
            show_default=False,
            help="Folder to keep them in, for other ranks and budgets.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            "--task",
            show_default=False,
            help="What the model is for, where its config does not say.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset", show_default=False, help="Configuration of a hub dataset.", rich_help_panel=CALIBRATION
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            show_default=False,
            help="Split of the data; train if it is there.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", show_default=False, help="Column of the text.", rich_help_panel=CALIBRATION),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option("--image-column", show_default=False, help="Column of the image.", rich_help_panel=CALIBRATION),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            show_default=False,
            help="Pixels; the checkpoint's own size if left out.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    init: Annotated[
        Init,
        typer.Option(
            "--init",
            help="spectral keeps the model; the others have to be trained again.",
            rich_help_panel=CUT,
        ),
    ] = "spectral",
    conv: ConvOption = "channel",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    multiple_of: MultipleOption = 1,
    allow_larger: Annotated[
        bool,
        typer.Option("--allow-larger", help="Layers at or over break-even too.", rich_help_panel=CUT),
    ] = False,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            "--min-speedup",
            metavar="X",
            show_default=False,
            help="Least speedup of a layer, measured on --device and remembered; slower ones stay dense.",
            rich_help_panel=CUT,
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="The model initialised anew from its config first.", rich_help_panel=CUT),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", help="For --from-scratch, calibration and --init he.", rich_help_panel=CUT)
    ] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[
        DtypeName, typer.Option("--dtype", help="Of the written weights.", rich_help_panel=OUTPUT)
    ] = "keep",
    svd: Annotated[
        EngineName,
        typer.Option(
            "--svd",
            help="auto: within 1e-5 of the best error; fast: within 1%, to explore; full: LAPACK's.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    jobs: JobsOption = None,
    no_cache: NoCacheOption = False,
    keep_vectors: Annotated[
        bool,
        typer.Option(
            "--keep-vectors",
            help="Singular vectors in the cache too: another rank costs one product a layer.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    shard_size: ShardOption = "5GB",
    revision: RevisionOption = None,
    architecture: ArchitectureOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where this command was interrupted or killed.", rich_help_panel=OUTPUT),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The plan alone; nothing is written.", rich_help_panel=OUTPUT)
    ] = False,
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
    from lrsurgery.data.options import DataOptions
    from lrsurgery.factorise.checkpoint import plan_checkpoint, run_factorise
    from lrsurgery.factorise.options import parse_calibration, parse_options
    from lrsurgery.runtime import Processes

    options = parse_options(
        rank=rank,
        budget=budget,
        budget_of=str(budget_of),
        multiple_of=multiple_of,
        init=str(init),
        conv=str(conv),
        include=include or ("*",),
        exclude=exclude or (),
        allow_larger=allow_larger,
        min_speedup=min_speedup,
        svd=str(svd),
        seed=seed,
        from_scratch=from_scratch,
        revision=revision,
        architecture=architecture,
        trust_remote_code=trust_remote_code,
        device=device,
        jobs=jobs,
        cache=not no_cache,
        keep_vectors=keep_vectors,
        dtype=str(dtype),
        shard_size=shard_size,
        overwrite=overwrite,
        resume=resume,
        command=command_line(),
        calibration=parse_calibration(
            calibration,
            importance=str(metric or importance),
            statistics=statistics,
            samples=samples,
            sequential=sequential,
            save=save_statistics,
            split=split,
            how=DataOptions(
                task=str(task) if task else None,
                subset=subset,
                text_column=text_column,
                image_column=image_column,
                block_size=block_size,
                image_size=image_size,
            ),
        ),
    )
    if dry_run:
        with screen.follow("calibrate") as listener:
            found = plan_checkpoint(model, options, listener)
        show_report(screen, found)
        screen.say("Nothing was written; leave --dry-run out to do it.")
        return
    target = output or Path(default_name(model, options.surgery.target))
    with screen.follow("factorise") as listener:
        found = run_factorise(model, target, options, processes=Processes.of_environment(), listener=listener)
    show_report(screen, found, output=str(target))
    screen.say(f"Written to {target}")
    screen.say(f"Next: lrsurgery report {shlex.quote(str(target))}")


def default_name(model: str, target: Target) -> str:
    """The output folder of a model that is named by nothing but what was asked for."""
    from lrsurgery.surgery.ranks import RankSpec

    kind = "rank" if isinstance(target, RankSpec) else "budget"
    asked = target.default if isinstance(target, RankSpec) else target
    text = str(asked or "mixed").replace(":", "-").replace(" ", "-")
    stem = Path(model.removeprefix("timm:"))
    name = stem.stem if stem.suffix in (".safetensors", ".bin", ".pth", ".pt") else stem.resolve().name
    return f"{name}-{kind}-{text}"


def export(
    folder: FolderArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Output folder.", show_default=False, rich_help_panel=OUTPUT
        ),
    ],
    to: Annotated[
        ExportName,
        typer.Option("--to", help="dense: ordinary layers that need no lrsurgery to load.", rich_help_panel=OUTPUT),
    ] = "dense",
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
    from lrsurgery.checkpoints.output import OutputOptions
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.factorise.export import export as write
    from lrsurgery.units import parse_size

    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite, command=command_line())
    with screen.follow("export") as listener:
        write(
            folder,
            output,
            SourceOptions(trust_remote_code=trust_remote_code),
            options,
            to=str(to),
            listener=listener,
        )
    screen.emit({"output": str(output), "to": str(to)})
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
