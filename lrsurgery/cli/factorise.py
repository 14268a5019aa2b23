"""The command that writes a factorised checkpoint: `factorise`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from lrsurgery.cli.arguments import (
    CUT,
    MACHINE,
    OUTPUT,
    ArchitectureOption,
    BlockSizeOption,
    BosOption,
    CalibrationOption,
    ConvOption,
    DebugOption,
    DeviceOption,
    DtypeName,
    EmbeddingsOption,
    EngineName,
    ExcludeOption,
    FormOption,
    HeadsOption,
    ImageColumnOption,
    ImageSizeOption,
    ImportanceOption,
    IncludeOption,
    Init,
    JobsOption,
    JoinOption,
    JsonOption,
    MetricOption,
    ModelArgument,
    MultipleOption,
    NoCacheOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RankOption,
    RefineOption,
    RefineStepsOption,
    ResumeOption,
    RevisionOption,
    SamplesOption,
    SaveStatisticsOption,
    SequentialOption,
    ShardOption,
    ShareOption,
    SplitOption,
    StatisticsOption,
    SubsetOption,
    TargetColumnOption,
    TaskOption,
    TemperatureOption,
    TextColumnOption,
    TrustOption,
    choice,
    command_line,
    make_screen,
    option,
)
from lrsurgery.cli.report import show_report
from lrsurgery.cli.targets.options import (
    EvalDataOption,
    EvalSplitOption,
    HealOption,
    LabelColumnOption,
    LabelMapOption,
    MaxLossOption,
    MaxSizeOption,
    MinAccuracyOption,
    SpeedupOption,
    TestDataOption,
    TestSplitOption,
    eval_data_of,
    healing_of,
    request_of,
    stand_in,
)

if TYPE_CHECKING:
    from lrsurgery.measure.targets.goals import Goal, SizeLimit
    from lrsurgery.surgery.plan import Target

    BudgetOf: TypeAlias = str
else:
    BudgetOf = choice("BudgetOf", "lrsurgery.surgery.budget", "SCOPES")


def factorise(
    model: ModelArgument,
    rank: RankOption = None,
    output: OutputOption = None,
    budget: Annotated[
        str | None,
        option(
            "--budget",
            panel=CUT,
            metavar="SHARE",
            text="In place of --rank: 0.5 of the parameters, flops:0.5, time:0.7, bytes:500MB, where they lose least.",
            default=False,
        ),
    ] = None,
    budget_of: Annotated[
        BudgetOf, option("--budget-of", panel=CUT, text="layers: those that may be factorised; model: all of it.")
    ] = "layers",
    max_loss: MaxLossOption = None,
    min_accuracy: MinAccuracyOption = None,
    max_size: MaxSizeOption = None,
    speedup: SpeedupOption = None,
    eval_data: EvalDataOption = None,
    eval_split: EvalSplitOption = None,
    test_data: TestDataOption = None,
    test_split: TestSplitOption = None,
    label_column: LabelColumnOption = None,
    label_map: LabelMapOption = None,
    heal: HealOption = None,
    calibration: CalibrationOption = None,
    importance: ImportanceOption = "fisher",
    metric: MetricOption = None,
    samples: SamplesOption = 128,
    fisher_temperature: TemperatureOption = None,
    block_size: BlockSizeOption = None,
    refine: RefineOption = False,
    refine_steps: RefineStepsOption = None,
    sequential: SequentialOption = False,
    statistics: StatisticsOption = None,
    save_statistics: SaveStatisticsOption = None,
    task: TaskOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    text_column: TextColumnOption = None,
    target_column: TargetColumnOption = None,
    bos: BosOption = "auto",
    join: JoinOption = False,
    image_column: ImageColumnOption = None,
    image_size: ImageSizeOption = None,
    init: Annotated[
        Init, option("--init", panel=CUT, text="spectral keeps the model; the others have to be trained again.")
    ] = "spectral",
    conv: ConvOption = "auto",
    form: FormOption = "pivoted",
    share: ShareOption = "auto",
    include_embeddings: EmbeddingsOption = False,
    include_heads: HeadsOption = False,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    multiple_of: MultipleOption = None,
    allow_larger: Annotated[
        bool, option("--allow-larger", panel=CUT, text="Layers of balanced form at or over break-even too.")
    ] = False,
    min_speedup: Annotated[
        float | None,
        option(
            "--min-speedup",
            panel=CUT,
            metavar="X",
            text="Least speedup of a layer, measured on --device and remembered; slower ones stay dense.",
            default=False,
        ),
    ] = None,
    from_scratch: Annotated[
        bool, option("--from-scratch", panel=CUT, text="The model with new random weights from its config.")
    ] = False,
    seed: Annotated[int, option("--seed", panel=CUT, text="For --from-scratch, calibration and --init he.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[DtypeName, option("--dtype", panel=OUTPUT, text="Of the written weights.")] = "keep",
    svd: Annotated[
        EngineName,
        option(
            "--svd",
            panel=MACHINE,
            text="auto: within 1e-5 of the best error; fast: within 1%, to explore; full: LAPACK's.",
        ),
    ] = "auto",
    jobs: JobsOption = None,
    no_cache: NoCacheOption = False,
    keep_vectors: Annotated[
        bool,
        option(
            "--keep-vectors",
            panel=MACHINE,
            text="Singular vectors in the cache too: another rank costs one product a layer.",
        ),
    ] = False,
    shard_size: ShardOption = "5GB",
    revision: RevisionOption = None,
    architecture: ArchitectureOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    no_loss_check: Annotated[
        bool,
        option("--no-loss-check", panel=OUTPUT, text="No quick look at the loss at the end."),
    ] = False,
    remote_code: Annotated[
        bool,
        option("--remote-code", panel=OUTPUT, text="Code of the layers in the folder, for transformers alone."),
    ] = False,
    check: Annotated[
        bool,
        option("--check", panel=OUTPUT, text="A forward pass of the output against the plan's own factors."),
    ] = False,
    dry_run: Annotated[bool, option("--dry-run", panel=OUTPUT, text="The plan alone; nothing is written.")] = False,
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

      lrsurgery factorise gpt2 --rank params:0.5 --calibration builtin

      lrsurgery factorise gpt2 --budget 0.5 --calibration text.txt --refine

      lrsurgery factorise gpt2 --max-loss 2% --calibration text.txt --eval-data valid.txt --test-data test.txt

      lrsurgery factorise gpt2 --from-scratch --init spectral-ones --rank 0.62
    """
    screen = make_screen(quiet, as_json)
    from dataclasses import replace

    from lrsurgery.data.options import DataOptions
    from lrsurgery.factorise.checkpoint import run_factorise
    from lrsurgery.factorise.decide import plan_checkpoint
    from lrsurgery.factorise.options import parse_calibration, parse_options
    from lrsurgery.measure.targets.choose import factorise_to_goal
    from lrsurgery.measure.targets.goals import parse_goal
    from lrsurgery.refine.options import refinement_of
    from lrsurgery.runtime import Processes

    goal = parse_goal(
        max_loss=max_loss,
        min_accuracy=min_accuracy,
        max_size=max_size,
        speedup=speedup,
        others={"--rank": bool(rank), "--budget": budget is not None},
    )
    how = DataOptions(
        task=str(task) if task else None,
        subset=subset,
        text_column=text_column,
        target_column=target_column,
        image_column=image_column,
        block_size=block_size,
        bos=str(bos),
        join=join,
        image_size=image_size,
    )
    measured = replace(how, label_column=label_column, label_map=label_map)
    data = eval_data_of(eval_data, eval_split, measured)
    calibrated = parse_calibration(
        calibration,
        importance=str(metric or importance),
        statistics=statistics,
        samples=samples,
        fisher_temperature=fisher_temperature,
        save=save_statistics,
        split=split,
        # without calibration these options are about the data to measure on alone
        how=DataOptions() if data is not None and calibration is None and statistics is None else how,
    )
    request = request_of(
        goal,
        data,
        eval_data_of(test_data, test_split, measured, "--test-data"),
        healing_of(heal, calibrated, measured, device),
        budget_of=str(budget_of),
        dry_run=dry_run,
    )
    if sequential:  # what anchored regression has taken the place of
        refine, refine_steps = True, 0 if refine_steps is None else refine_steps
    options = parse_options(
        rank=rank,
        budget=budget if goal is None else stand_in(goal),
        budget_of=str(budget_of),
        multiple_of=multiple_of,
        init=str(init),
        conv=str(conv),
        include=include or ("*",),
        exclude=exclude or (),
        allow_larger=allow_larger,
        min_speedup=min_speedup,
        svd=str(svd),
        form=str(form),
        share=str(share),
        embeddings=include_embeddings or None,
        heads=include_heads,
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
        check=check,
        remote_code=remote_code,
        command=command_line(),
        calibration=calibrated,
        loss_check=not no_loss_check,
        refine=refinement_of(refine_steps, seed) if refine or refine_steps is not None else False,
    )
    if dry_run:
        with screen.follow("calibrate") as listener:
            found = plan_checkpoint(model, options, listener)
        show_report(screen, found)
        screen.say("Nothing was written; leave --dry-run out to do it.")
        return
    target = output or Path(default_name(model, options.surgery.target if goal is None else goal))
    processes = Processes.of_environment()
    with screen.follow("factorise" if request is None else "search") as listener:
        if request is None:
            found = run_factorise(model, target, options, processes=processes, listener=listener)
        else:
            found = factorise_to_goal(model, target, options, request, processes=processes, listener=listener)
    show_report(screen, found, output=str(target))
    screen.say(f"Written to {target}")
    screen.say(f"Next: lrsurgery report {shlex.quote(str(target))}")


def default_name(model: str, target: Target | Goal | SizeLimit) -> str:
    """The output folder of a model that is named by nothing but what was asked for."""
    from lrsurgery.checkpoints.source import weight_ending
    from lrsurgery.surgery.budget import Budget
    from lrsurgery.surgery.ranks import RankSpec

    kind = "rank-" if isinstance(target, RankSpec) else "budget-" if isinstance(target, Budget) else ""
    asked = target.default if isinstance(target, RankSpec) else target
    text = str(asked or "mixed").lstrip("-").replace(":", "-").replace(" ", "-").replace("%", "pct")
    stem = Path(model.removeprefix("timm:"))
    ending = weight_ending(stem.name)
    name = stem.name.removesuffix(ending) if ending else stem.resolve().name
    return f"{name}-{kind}{text}"
