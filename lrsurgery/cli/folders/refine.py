"""The `refine` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from lrsurgery.cli.arguments import (
    CALIBRATION,
    BlockSizeOption,
    BosOption,
    DebugOption,
    DeviceOption,
    FolderArgument,
    ImageColumnOption,
    ImageSizeOption,
    JoinOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    ResumeOption,
    SamplesOption,
    ShardOption,
    SplitOption,
    SubsetOption,
    TextColumnOption,
    TrustOption,
    choice,
    command_line,
    make_screen,
    option,
)
from lrsurgery.cli.report import show_report

if TYPE_CHECKING:
    RefineTask: TypeAlias = str
else:
    RefineTask = choice("RefineTask", "lrsurgery.data.options", "TASKS", "none")


def refine(
    folder: FolderArgument,
    against: Annotated[
        str,
        option(
            "--against",
            panel=CALIBRATION,
            metavar="DENSE",
            text="The dense model that it was factorised from.",
            default=False,
        ),
    ],
    calibration: Annotated[
        str,
        option(
            "--calibration",
            panel=CALIBRATION,
            metavar="DATA",
            text="What finetune --data takes, labels or none; or builtin, a text of ours.",
            default=False,
        ),
    ],
    output: OutputOption = None,
    refine_steps: Annotated[
        int,
        option(
            "--refine-steps",
            panel=CALIBRATION,
            metavar="N",
            text="Most steps of a block; 0: closed form alone.",
        ),
    ] = 400,
    statistics: Annotated[
        Path | None,
        option(
            "--statistics",
            panel=CALIBRATION,
            metavar="DIR",
            text="What factorise --save-statistics kept: its gradients weigh the closed form.",
        ),
    ] = None,
    samples: SamplesOption = 128,
    block_size: BlockSizeOption = None,
    task: Annotated[
        RefineTask | None,
        option("--task", panel=CALIBRATION, text="What the data is read for; none: by the arguments of the model."),
    ] = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    text_column: TextColumnOption = None,
    bos: BosOption = "auto",
    join: JoinOption = False,
    image_column: ImageColumnOption = None,
    image_size: ImageSizeOption = None,
    seed: Annotated[int, option("--seed", panel=CALIBRATION, text="Of the choice of samples and of their order.")] = 0,
    device: DeviceOption = "auto",
    shard_size: ShardOption = "5GB",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit a factorised model to its dense model, block by block: better right away, and no labels are needed.

    [bold]Examples[/bold]

      lrsurgery refine gpt2-rank-0.5 --against gpt2 --calibration text.txt

      lrsurgery refine vit-small --against ./my-vit --calibration images/ --refine-steps 1000 --output vit-refined
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.data.options import DataOptions
    from lrsurgery.factorise.options import Calibration
    from lrsurgery.factorise.refining import refine_checkpoint
    from lrsurgery.refine.options import refinement_of
    from lrsurgery.runtime import Processes

    target = output or Path(f"{Path(folder).resolve().name}-refined")
    how = DataOptions(
        task=str(task) if task else None,
        subset=subset,
        text_column=text_column,
        image_column=image_column,
        block_size=block_size,
        bos=str(bos),
        join=join,
        image_size=image_size,
    )
    with screen.follow("refine") as listener:
        found = refine_checkpoint(
            folder,
            target,
            against=against,
            calibration=Calibration(data=calibration, samples=samples, split=split, how=how),
            statistics=statistics,
            refinement=refinement_of(refine_steps, seed),
            seed=seed,
            device=device,
            shard_size=shard_size,
            overwrite=overwrite,
            resume=resume,
            trust_remote_code=trust_remote_code,
            command=command_line(),
            processes=Processes.of_environment(),
            listener=listener,
        )
    show_report(screen, found, output=str(target))
    screen.say(f"Written to {target}")
    screen.say(f"Next: lrsurgery evaluate {shlex.quote(str(target))} --data TEST --against {shlex.quote(against)}")
