"""The commands that train and measure: `finetune` and `evaluate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrsurgery.cli.arguments import (
    DebugOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    QuietOption,
    TrustOption,
    command_line,
    make_screen,
)

if TYPE_CHECKING:
    from lrsurgery.training.finetune import Outcome

NOT_SETTINGS = (
    "output", "recipe", "setting", "resume", "keep_checkpoints", "overwrite", "as_json", "quiet", "debug",
)  # fmt: skip
DATA, SURGERY, DECAY, TRAINING, RUN = "Data", "Surgery", "Decay", "Training", "The run"


def _option(*names: str, panel: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


DataOption = Annotated[
    str | None,
    _option("--data", panel=DATA, metavar="DATA", text="Text, jsonl, csv, parquet, a folder, a hub dataset."),
]
TaskOption = Annotated[
    str | None,
    _option("--task", panel=DATA, text="causal-lm, masked-lm, sequence-classification or image-classification."),
]
SubsetOption = Annotated[str | None, _option("--subset", panel=DATA, text="Configuration of a hub dataset.")]
TextColumn = Annotated[
    str | None, _option("--text-column", panel=DATA, text="Column of the text; two, with a comma, for sentence pairs.")
]
LabelColumn = Annotated[str | None, _option("--label-column", panel=DATA, text="Column of the class.")]
ImageColumn = Annotated[str | None, _option("--image-column", panel=DATA, text="Column of the image.")]
BlockSize = Annotated[
    int | None, _option("--block-size", panel=DATA, text="Tokens of a block; the model's maximum if left out.")
]
ImageSize = Annotated[
    int | None, _option("--image-size", panel=DATA, text="Pixels; the checkpoint's own size if left out.")
]
EvalBatch = Annotated[
    int | None, _option("--eval-batch-size", panel=TRAINING, text="Examples at a time when measuring.")
]
Device = Annotated[str | None, _option("--device", panel=RUN, text="auto, cpu or cuda.")]
Precision = Annotated[str | None, _option("--precision", panel=TRAINING, text="auto (GPU: bf16), fp32, bf16, fp16.")]


def finetune(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A factorised folder, or a dense model with --rank. In the recipe, or here.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    output: Annotated[
        Path | None, _option("--output", "-o", panel=RUN, metavar="DIR", text="Output; MODEL-finetuned if left out.")
    ] = None,
    recipe: Annotated[
        Path | None, _option("--recipe", panel=RUN, metavar="FILE", text="YAML with any of these settings; flags win.")
    ] = None,
    eval_data: Annotated[
        str | None, _option("--eval-data", panel=DATA, metavar="DATA", text="What to measure on while training.")
    ] = None,
    task: TaskOption = None,
    subset: SubsetOption = None,
    split: Annotated[
        str | None, _option("--split", panel=DATA, text="Split to train on; train if it is there.")
    ] = None,
    eval_split: Annotated[str | None, _option("--eval-split", panel=DATA, text="Split to measure on.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    block_size: BlockSize = None,
    stride: Annotated[
        int | None, _option("--stride", panel=DATA, text="Training blocks begin this many tokens apart.")
    ] = None,
    streaming: Annotated[
        bool | None, _option("--streaming", panel=DATA, text="Read text as it is needed; for text too large to hold.")
    ] = None,
    image_size: ImageSize = None,
    augment: Annotated[
        bool | None, _option("--augment/--no-augment", panel=DATA, text="Random crops and flips of images (default).")
    ] = None,
    new_head: Annotated[
        bool | None, _option("--new-head", panel=DATA, text="Give the model a new head for the data's classes.")
    ] = None,
    rank: Annotated[
        list[str] | None,
        _option("--rank", "-r", panel=SURGERY, metavar="RANK|GLOB=RANK", text="Factorise a dense model to this rank."),
    ] = None,
    dense_steps: Annotated[
        int | None, _option("--dense-steps", panel=SURGERY, text="Train dense for so many steps, then factorise.")
    ] = None,
    switch_lr: Annotated[
        float | None, _option("--switch-lr", panel=SURGERY, text="Scale of the learning rate from then on (0.5).")
    ] = None,
    init: Annotated[str | None, _option("--init", panel=SURGERY, text="spectral, spectral-ones or he.")] = None,
    conv: Annotated[str | None, _option("--conv", panel=SURGERY, text="channel or spatial.")] = None,
    include: Annotated[list[str] | None, _option("--include", panel=SURGERY, text="Only these layers.")] = None,
    exclude: Annotated[list[str] | None, _option("--exclude", panel=SURGERY, text="Not these layers.")] = None,
    multiple_of: Annotated[int | None, _option("--multiple-of", panel=SURGERY, text="Round ranks.")] = None,
    allow_larger: Annotated[
        bool | None, _option("--allow-larger", panel=SURGERY, text="Layers at or over break-even too.")
    ] = None,
    from_scratch: Annotated[
        bool | None, _option("--from-scratch", panel=SURGERY, text="Initialise the model anew from its config first.")
    ] = None,
    dense: Annotated[
        bool | None, _option("--dense", panel=SURGERY, text="Train a dense model as it is, with no factorising.")
    ] = None,
    decay: Annotated[
        str | None, _option("--decay", panel=DECAY, text="Of the factors: frobenius (default), l2 or none.")
    ] = None,
    decay_strength: Annotated[float | None, _option("--decay-strength", panel=DECAY, text="Its lambda (0.01).")] = None,
    decay_coupled: Annotated[
        bool | None, _option("--decay-coupled", panel=DECAY, text="Add it to the gradient, as Khodak et al.")
    ] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", panel=DECAY, text="AdamW decay of all other weights (0.01).")
    ] = None,
    optimizer: Annotated[str | None, _option("--optimizer", panel=TRAINING, text="adamw (default) or sgd.")] = None,
    momentum: Annotated[float | None, _option("--momentum", panel=TRAINING, text="Of sgd (0.9).")] = None,
    lr: Annotated[float | None, _option("--lr", panel=TRAINING, text="Peak learning rate (1e-3).")] = None,
    schedule: Annotated[
        str | None, _option("--schedule", panel=TRAINING, text="linear (default, to 0), cosine, constant and more.")
    ] = None,
    warmup_steps: Annotated[int | None, _option("--warmup-steps", panel=TRAINING, text="0 if left out.")] = None,
    epochs: Annotated[float | None, _option("--epochs", panel=TRAINING, text="Passes over the data (1).")] = None,
    steps: Annotated[int | None, _option("--steps", panel=TRAINING, text="Optimizer steps, not epochs.")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", panel=TRAINING, text="Examples a process (8).")] = None,
    eval_batch_size: EvalBatch = None,
    accumulate: Annotated[
        int | None, _option("--accumulate", panel=TRAINING, text="Batches a step; gradients add up (1).")
    ] = None,
    seed: Annotated[int | None, _option("--seed", panel=TRAINING, text="0 if left out.")] = None,
    precision: Precision = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("--gradient-checkpointing", panel=TRAINING, text="Less memory, more time.")
    ] = None,
    teacher: Annotated[
        str | None, _option("--teacher", panel=TRAINING, metavar="DENSE", text="Distil from this model's logits.")
    ] = None,
    temperature: Annotated[float | None, _option("--temperature", panel=TRAINING, text="Of distillation (2).")] = None,
    teacher_weight: Annotated[
        float | None, _option("--teacher-weight", panel=TRAINING, text="Share of its loss (0.5).")
    ] = None,
    best: Annotated[bool | None, _option("--best", panel=TRAINING, text="Keep the best model, not the last.")] = None,
    early_stopping: Annotated[
        int | None,
        _option("--early-stopping", panel=TRAINING, text="Stop after so many evaluations with no gain."),
    ] = None,
    eval_steps: Annotated[int | None, _option("--eval-steps", panel=RUN, text="Measure every N steps.")] = None,
    save_steps: Annotated[int | None, _option("--save-steps", panel=RUN, text="Save every N steps.")] = None,
    log_steps: Annotated[int | None, _option("--log-steps", panel=RUN, text="Log the loss every N steps.")] = None,
    report_to: Annotated[
        list[str] | None, _option("--report-to", panel=RUN, text="tensorboard, wandb and others that are installed.")
    ] = None,
    against: Annotated[
        str | None, _option("--against", panel=RUN, metavar="DENSE", text="Measure this model beside the healed one.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        _option("--set", panel=RUN, metavar="KEY=VALUE", text="Any other field of transformers' TrainingArguments."),
    ] = None,
    device: Device = None,
    resume: Annotated[bool, _option("--resume", panel=RUN, text="Go on from the run's last checkpoint.")] = False,
    keep_checkpoints: Annotated[
        bool, _option("--keep-checkpoints", panel=RUN, text="Leave the run's folder, OUTPUT.run, where it is.")
    ] = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Heal a factorised model, train one in low rank, or pre-train dense and factorise on the way.

    The output has the weights, the rank report, metrics.jsonl and recipe.yaml, which runs it again. Under `torchrun` or
    `accelerate launch` the same command trains on many devices and machines.

    [bold]Examples[/bold]

      lrsurgery finetune gpt2-rank-0.5 --data train.txt --eval-data valid.txt --teacher gpt2 --output gpt2-healed

      lrsurgery finetune gpt2 --from-scratch --data big.txt --dense-steps 40000 --steps 240000 --rank 0.62

      lrsurgery finetune resnet50-half --data imagenet/ --eval-split validation --optimizer sgd --lr 0.01 --epochs 5

      lrsurgery finetune --recipe gpt2-healed/recipe.yaml --seed 1 --output gpt2-healed-1

      torchrun --nproc-per-node 8 -m lrsurgery finetune gpt2-rank-0.5 --data train.txt --output gpt2-healed
    """
    values = locals()
    given = {key: value for key, value in values.items() if key not in NOT_SETTINGS and value not in (None, [], False)}
    given |= {key: False for key in ("augment",) if values[key] is False}
    if setting:
        given["set"] = dict(_key_value(text) for text in setting)
    screen = make_screen(quiet, as_json)
    from lrsurgery.cli.console import TrainingScreen, quality_table
    from lrsurgery.training import finetune as training

    with TrainingScreen(screen) as watch:
        outcome = training.finetune(
            given, output, recipe_file=recipe, resume=resume, overwrite=overwrite, keep_checkpoints=keep_checkpoints,
            command=command_line(), watch=watch,
        )  # fmt: skip
    screen.emit(outcome.to_dict())
    screen.show("", quality_table(_stage_rows(outcome)))
    for note in outcome.report.notes:
        screen.say(f"Note: {note}")
    screen.say(f"Written to {outcome.output}")
    screen.say(f"Next: lrsurgery report {shlex.quote(str(outcome.output))}")


def evaluate(
    model: ModelArgument,
    data: Annotated[str, _option("--data", panel=DATA, metavar="DATA", text="As for finetune.")],
    against: Annotated[
        str | None, _option("--against", panel=RUN, metavar="DENSE", text="Another model, measured beside it.")
    ] = None,
    split: Annotated[
        str | None, _option("--split", panel=DATA, text="Split of the data; validation or test if there is one.")
    ] = None,
    stride: Annotated[
        int | None,
        _option("--stride", panel=DATA, text="Tokens between windows; the block size, so no overlap, if left out."),
    ] = None,
    task: TaskOption = None,
    subset: SubsetOption = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    block_size: BlockSize = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, _option("--batch-size", panel=TRAINING, text="Examples at a time (8).")] = 8,
    precision: Annotated[str, _option("--precision", panel=TRAINING, text="fp32 (default), bf16, fp16.")] = "fp32",
    device: Annotated[str, _option("--device", panel=RUN, text="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, _option("--revision", panel=RUN, text="Of a hub model.")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model on a whole dataset, exactly: loss and perplexity, or top-1 and top-5.

    Text is scored in windows that slide by --stride; with a stride below the block size, every token has at least the
    difference before it. The figures do not depend on the batch size.

    [bold]Examples[/bold]

      lrsurgery evaluate gpt2-healed --data valid.txt --against gpt2

      lrsurgery evaluate gpt2-healed --data valid.txt --stride 512 --json | jq '.models[0].values.perplexity'

      lrsurgery evaluate resnet50-half --data imagenet/ --split validation --against timm/resnet50.a1_in1k
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.cli.console import TrainingScreen, quality_table
    from lrsurgery.measure.evaluate import evaluate as measure
    from lrsurgery.training.recipe import DataOptions

    options = DataOptions(task, subset, text_column, label_column, image_column, block_size, image_size)
    found = []
    with TrainingScreen(screen) as watch:
        for reference in [against, model] if against else [model]:
            found.append(
                measure(
                    reference, data, options, split=split, stride=stride, batch_size=batch_size, device=device,
                    precision=precision, revision=revision if reference == model else None,
                    trust_remote_code=trust_remote_code, watch=watch,
                )
            )  # fmt: skip
    screen.emit({"data": data, "models": [measured.to_dict() for measured in found]})
    screen.show(quality_table([(m.model, m.parameters, m.bytes, m.values) for m in found]))
    if len({m.values.get("scored") for m in found}) > 1:
        screen.say("Note: they scored different numbers of tokens: other tokenizers, so the losses do not compare")


def _stage_rows(outcome: Outcome) -> list[tuple[str, int | None, int | None, dict[str, float]]]:
    report = outcome.report
    sizes = {"dense": report.parameters_before}
    return [(name, sizes.get(name, report.parameters_after), None, values) for name, values in outcome.stages.items()]


def _key_value(text: str) -> tuple[str, Any]:
    import yaml

    from lrsurgery.errors import RecipeError

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: write KEY=VALUE")
    return key.strip(), yaml.safe_load(value)
