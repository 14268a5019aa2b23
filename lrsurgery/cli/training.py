"""The commands that train and measure: `finetune` and `evaluate`. Their options are built from a recipe's fields."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lrsurgery.cli.arguments import (
    OUTPUT,
    Choice,
    DebugOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    Protocol,
    QuietOption,
    RevisionOption,
    choice,
    command_line,
    make_screen,
)
from lrsurgery.data.options import DATA, DataOptions, Setting, settings_of
from lrsurgery.training.recipe import DECAY, MACHINE, RUN, SURGERY, TRAINING, Recipe, ValueKind, kinds_of_values

if TYPE_CHECKING:
    from lrsurgery.training.publish import Outcome

PANELS = (DATA, SURGERY, DECAY, TRAINING, RUN, MACHINE, OUTPUT)  # in the order of help
Command = TypeVar("Command", bound=Callable[..., None])


def parameter_of(name: str, **changes: Any) -> inspect.Parameter:
    """The option of a recipe's field, as typer reads a command's parameter; `changes` are to its `Setting`."""
    about, kind = replace(settings_of(Recipe)[name], **changes), kinds_of_values()[name]
    found: Any
    if name == "model":
        found = typer.Argument(help=about.help, metavar=about.metavar, show_default=False)
    else:
        flag = name.replace("_", "-")
        found = typer.Option(
            f"--{flag}/--no-{flag}" if about.default is True else f"--{flag}",
            *([about.short] if about.short else []),
            help=about.help,
            metavar=about.metavar or "|".join(about.suggestions) or None,
            rich_help_panel=about.panel,
            autocompletion=_completion(about.suggestions) if about.suggestions else None,
            show_default=about.default is not None and about.default is not False,
            parser=_number_or(kind.words) if kind.words else None,
        )
    default = list(about.default) or None if isinstance(about.default, tuple) else about.default
    annotation: Any = Annotated[_type_of(name, about, kind), found]  # type: ignore[misc]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_or(words: tuple[str, ...]) -> Callable[[str], float | str]:
    def parse(text: str) -> float | str:
        try:
            return text if text in words else float(text)
        except ValueError as e:
            raise typer.BadParameter(f"'{text}': write a number or {' or '.join(words)}") from e

    return parse


def _type_of(name: str, about: Setting, kind: ValueKind) -> Any:
    if kind.is_list or kind.type is dict:
        return list[str] | None
    if kind.words:
        return str  # what `_number_or` reads
    of_value: Any = kind.type
    if about.table is not None:
        of_value = choice(name, *about.table)
    elif about.choices:
        of_value = Choice(name, {each: each for each in about.choices})  # type: ignore[call-overload]
    return of_value | None if kind.is_optional else of_value


def _completion(values: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def takes(*parameters: inspect.Parameter) -> Callable[[Command], Command]:
    """Give a command further parameters, which it receives as `**values`; help shows all of them by panels."""

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        every = [*(p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD), *parameters]
        every.sort(key=_panel)
        signature = inspect.Signature(every)
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every}
        return command

    return decorate


def _panel(parameter: inspect.Parameter) -> int:
    """Where a parameter stands in help; arguments stand first."""
    (option,) = getattr(parameter.annotation, "__metadata__", (None,))
    panel = getattr(option, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _given(context: typer.Context, values: Mapping[str, object]) -> dict[str, object]:
    """The values that stand on the command line, be they the defaults: these alone win over a recipe's."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: _plain(values[name]) for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


# a recipe's own fields before those that it shares with `evaluate`
FIELDS = sorted(settings_of(Recipe), key=lambda name: name in settings_of(DataOptions))


@takes(*map(parameter_of, FIELDS))
def finetune(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Output folder; MODEL-finetuned by default.", rich_help_panel=OUTPUT
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="YAML file with any of these settings; flags win over it.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continuation from the run's last checkpoint.", rich_help_panel=RUN)
    ] = False,
    keep_checkpoints: Annotated[
        bool,
        typer.Option("--keep-checkpoints", help="The run's folder, OUTPUT.run, left where it is.", rich_help_panel=RUN),
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **values: object,
) -> None:
    """Heal a factorised model, train one in low rank, or pre-train dense and factorise on the way.

    The output has the weights, the rank report, metrics.jsonl and recipe.yaml, which runs it again. Under `torchrun` or
    `accelerate launch` the same command trains on many devices and machines.

    [bold]Examples[/bold]

      lrsurgery finetune gpt2-rank-0.5 --data train.txt --eval-data valid.txt --teacher gpt2 --output gpt2-healed

      lrsurgery finetune gpt2 --from-scratch --data big.txt --dense-steps 40000 --steps 240000 --rank 0.62

      lrsurgery finetune resnet50-half --data imagenet/ --eval-split validation --optimizer sgd --lr 0.01 --epochs 5

      lrsurgery finetune clip-half --data captions/ --teacher openai/clip-vit-base-patch32 --output clip-healed

      lrsurgery finetune --recipe gpt2-healed/recipe.yaml --seed 1 --output gpt2-healed-1

      torchrun --nproc-per-node 8 -m lrsurgery finetune gpt2-rank-0.5 --data train.txt --output gpt2-healed
    """
    settings = _given(context, values)
    if "set" in settings:
        settings["set"] = dict(map(_key_value, settings["set"]))  # type: ignore[call-overload]
    screen = make_screen(quiet, as_json)
    from lrsurgery.cli.console import quality_table
    from lrsurgery.report.runs import untrained_dense
    from lrsurgery.training import finetune as training

    with screen.follow("train") as listener:
        outcome = training.finetune(
            settings,
            output,
            recipe_file=recipe,
            resume=resume,
            overwrite=overwrite,
            keep_checkpoints=keep_checkpoints,
            command=command_line(),
            listener=listener,
        )
    screen.emit(outcome.to_dict())
    screen.show("", quality_table(_stage_rows(outcome)))
    if (flattered := untrained_dense(outcome.stages, outcome.report.options.get("dense_steps", 0))) is not None:
        screen.say(f"Note: {flattered}")
    for note in outcome.report.notes:
        screen.say(f"Note: {note}")
    screen.say(f"Written to {outcome.output}")
    screen.say(f"Next: lrsurgery report {shlex.quote(str(outcome.output))}")


@takes(
    *map(parameter_of, settings_of(DataOptions)),
    parameter_of("split", help="Split of the data; validation or test by default."),
    parameter_of("stride", help="Tokens between the starts of windows; the block size by default, so no overlap."),
    parameter_of("against", help="Another model, measured beside it; without a task, what its outputs should be."),
    parameter_of("batch_size", help="Examples of a batch.", panel=MACHINE),
    parameter_of("precision", default="fp32"),
    parameter_of("device", help="Device to measure on."),
    parameter_of("trust_remote_code"),
    parameter_of("architecture"),
)
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DATA", help="Data to measure on, of the forms that finetune takes.", rich_help_panel=DATA
        ),
    ],
    protocol: Annotated[
        Protocol,
        typer.Option(
            "--protocol",
            help="Windows of text: windows (of the block size, with stride), lm-eval (as its task wikitext), or"
            " lm-eval-plain (the same without detokenising).",
            rich_help_panel=DATA,
        ),
    ] = "windows",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **values: Any,
) -> None:
    """Measure a model on a whole dataset, exactly: loss and perplexity, or top-1 and top-5.

    Text is scored in windows that slide by --stride; with a stride below the block size, every token has at least the
    difference before it. The figures do not depend on the batch size. A model without a task, or data without labels,
    is measured by how far the outputs agree with those of --against.

    [bold]Examples[/bold]

      lrsurgery evaluate gpt2-healed --data valid.txt --against gpt2

      lrsurgery evaluate gpt2-healed --data valid.txt --stride 512 --json | jq '.models[0].values.perplexity'

      lrsurgery evaluate gpt2-healed --data wiki.txt --protocol lm-eval --against gpt2

      lrsurgery evaluate resnet50-half --data imagenet/ --split validation --against timm/resnet50.a1_in1k

      lrsurgery evaluate clip-half --data captions/ --against openai/clip-vit-base-patch32
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.cli.console import quality_table
    from lrsurgery.measure.evaluate import evaluate_all

    plain: dict[str, Any] = {name: _plain(value) for name, value in {**values, "protocol": protocol}.items()}
    options = DataOptions(**{name: plain.pop(name) for name in settings_of(DataOptions)})
    against = plain.pop("against")
    with screen.follow("evaluate") as listener:
        found = evaluate_all(model, data, options, against=against, revision=revision, listener=listener, **plain)
    screen.emit({"data": data, "models": [measured.to_dict() for measured in found]})
    screen.show(quality_table([(m.model, m.parameters, m.bytes, m.values) for m in found]))
    if len({m.values.get("scored") for m in found}) > 1:
        screen.say("Note: they scored different numbers of tokens: other tokenizers, so the losses do not compare")


def _stage_rows(outcome: Outcome) -> list[tuple[str, int | None, int | None, dict[str, float]]]:
    from lrsurgery.report.runs import DENSE_TRAINED

    report = outcome.report
    sizes = {"dense": report.parameters_before, DENSE_TRAINED: report.parameters_before}
    return [(name, sizes.get(name, report.parameters_after), None, values) for name, values in outcome.stages.items()]


def _key_value(text: str) -> tuple[str, object]:
    from lrsurgery.errors import RecipeError
    from lrsurgery.files.yaml import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: write KEY=VALUE")
    return key.strip(), parse_yaml(value, f"--set {text}: not a value of YAML")
