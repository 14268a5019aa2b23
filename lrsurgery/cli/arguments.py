"""Arguments and options that several commands share, in panels by what they decide, with choices that help lists."""

from __future__ import annotations

import ast
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen

# panels of help
CUT, CALIBRATION, DATA, OUTPUT, MACHINE = "What to cut", "Calibration", "Data", "Output", "Machine"


PACKAGE = Path(__file__).parents[1]


class Choice(str, Enum):
    """A value among known ones; its text is the value."""

    __str__ = str.__str__


def _source(module: str) -> str:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")


def table_names(module: str, table: str) -> list[str]:
    """The names in a table of another module, read from its source, so that --help need not import torch.

    The table is a dict or a tuple with its texts spelled out.
    """
    for node in ast.parse(_source(module)).body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == table and isinstance(node, ast.AnnAssign | ast.Assign):
            values = node.value.keys if isinstance(node.value, ast.Dict) else getattr(node.value, "elts", [])
            return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    raise AssertionError(f"{module} has no table {table}")


def constant(module: str, name: str) -> str:
    """The text of a constant in another module, read from its source for the same reason."""
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no constant {name}")


def choice(name: str, module: str, table: str, *others: str) -> type[Choice]:
    """The names in a table of another module, and some others, as an enum for typer."""
    names = [*table_names(module, table), *others]
    return Choice(name, {each: each for each in names})  # type: ignore


if TYPE_CHECKING:
    Bos: TypeAlias = str
    Conv: TypeAlias = str
    DtypeName: TypeAlias = str
    EngineName: TypeAlias = str
    Form: TypeAlias = str
    Share: TypeAlias = str
    Importance: TypeAlias = str
    Init: TypeAlias = str
    Protocol: TypeAlias = str
    Task: TypeAlias = str
else:
    Bos = choice("Bos", "lrsurgery.data.options", "BOS")
    Conv = choice("Conv", "lrsurgery.surgery.kinds.common", "CONV_SCHEMES")
    DtypeName = choice("Dtype", "lrsurgery.runtime", "DTYPES")
    EngineName = choice("Engine", "lrsurgery.linalg.svd", "ENGINES")
    Form = choice("Form", "lrsurgery.surgery.ranks", "FORMS")
    Share = choice("Share", "lrsurgery.surgery.budget", "SHARING")
    Importance = choice("Importance", "lrsurgery.calibration.loss", "IMPORTANCES", "none")
    Init = choice("Init", "lrsurgery.linalg.inits", "INITS")
    Protocol = choice("Protocol", "lrsurgery.measure.evaluate", "PROTOCOLS")
    Task = choice("Task", "lrsurgery.data.options", "TASKS")


def option(*names: str, panel: str, text: str, metavar: str | None = None, default: bool = True) -> Any:
    """An option in a panel of help, which shows its default unless that says nothing."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=default)


def _calibration(*names: str, text: str, metavar: str | None = None, default: bool = False) -> Any:
    return option(*names, panel=CALIBRATION, text=text, metavar=metavar, default=default)


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A transformers or timm folder, a hub id, timm:NAME, or a weight file with --architecture.",
        show_default=False,
    ),
]
FolderArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A folder that lrsurgery wrote.", show_default=False)
]

# what to cut
RANKS = f"{constant('lrsurgery.surgery.ranks', 'READABLE').capitalize()}; again as GLOB=RANK for single layers."
RankOption = Annotated[
    list[str] | None, option("--rank", "-r", panel=CUT, metavar="RANK|GLOB=RANK", text=RANKS, default=False)
]
IncludeOption = Annotated[list[str] | None, option("--include", panel=CUT, metavar="GLOB", text="Only these layers.")]
ExcludeOption = Annotated[list[str] | None, option("--exclude", panel=CUT, metavar="GLOB", text="Not these layers.")]
MultipleOption = Annotated[
    int | None,
    option(
        "--multiple-of",
        panel=CUT,
        metavar="N",
        text="Round ranks to multiples of N; 8 by default where full rank is 384 or more and the rank no number.",
    ),
]
SCHEMES = "channel: kh x kw then 1x1; spatial: kh x 1 then 1 x kw; auto: for each layer what loses less."
ConvOption = Annotated[Conv, option("--conv", panel=CUT, text=SCHEMES)]
FORMS = "pivoted: rank^2 numbers less a layer, so smaller than dense below full rank; balanced: as it trains."
FormOption = Annotated[Form, option("--form", panel=CUT, text=FORMS)]
SHARING = "auto: layers with the same inputs have one v where a calibrated budget loses less so; never: each its own."
ShareOption = Annotated[Share, option("--share", panel=CUT, text=SHARING)]
TABLES = "Tables of tokens and the heads tied to them too, as a budget over the model does by itself."
EmbeddingsOption = Annotated[bool, option("--include-embeddings", panel=CUT, text=TABLES)]
HeadsOption = Annotated[bool, option("--include-heads", panel=CUT, text="Output heads and classifiers too.")]

# calibration
CalibrationOption = Annotated[
    str | None,
    _calibration(
        "--calibration",
        metavar="DATA",
        text="Data that weighs errors: what finetune --data takes, builtin (a text of ours), or none.",
    ),
]
IMPORTANCES = "fisher: inputs and output gradients; activations: inputs; none: weights alone."
ImportanceOption = Annotated[Importance, _calibration("--importance", text=IMPORTANCES, default=True)]
MetricOption = Annotated[Importance | None, typer.Option("--metric", hidden=True)]  # what --importance was called
SamplesOption = Annotated[
    int,
    _calibration("--samples", metavar="N", text="Sequences, sentences or images of the data.", default=True),
]
BlockSizeOption = Annotated[
    int | None, _calibration("--block-size", metavar="N", text="Tokens of a sequence; 512, or the model's maximum.")
]
TemperatureOption = Annotated[
    float | None,
    _calibration(
        "--fisher-temperature", metavar="T", text="Divisor of the logits in the gradients of fisher: 2; 1 for none."
    ),
]
REFINE = "Fit each block to the dense block's outputs on the data: much better, and takes longer; needs no labels."
RefineOption = Annotated[bool, _calibration("--refine", text=REFINE)]
RefineStepsOption = Annotated[
    int | None,
    _calibration(
        "--refine-steps", metavar="N", text="At most so many steps a block, with --refine: 400; 0: closed form alone."
    ),
]
SequentialOption = Annotated[bool, typer.Option("--sequential", hidden=True)]  # what --refine has taken the place of
StatisticsOption = Annotated[
    Path | None, _calibration("--statistics", metavar="DIR", text="What --save-statistics kept, in place of data.")
]
SaveStatisticsOption = Annotated[
    Path | None,
    _calibration("--save-statistics", metavar="DIR", text="Folder to keep them in, for other ranks and budgets."),
]
TaskOption = Annotated[
    Task | None, _calibration("--task", text="What the model is for, where its config does not say.")
]
SubsetOption = Annotated[str | None, _calibration("--subset", text="Configuration of a hub dataset.")]
SplitOption = Annotated[str | None, _calibration("--split", text="Split of the data; train if it is there.")]
BOS = "BOS token at the head of each sequence; auto: where the tokenizer adds one."
BosOption = Annotated[Bos, _calibration("--bos", text=BOS, default=True)]
JoinOption = Annotated[bool, _calibration("--join", text="All rows of text as one document.")]
TextColumnOption = Annotated[str | None, _calibration("--text-column", text="Column of the text.")]
TargetColumnOption = Annotated[
    str | None, _calibration("--target-column", text="Column of the text to write, for seq2seq.")
]
ImageColumnOption = Annotated[str | None, _calibration("--image-column", text="Column of the image.")]
ImageSizeOption = Annotated[
    int | None, _calibration("--image-size", text="Pixels; the checkpoint's own size if left out.")
]

# output
OutputOption = Annotated[
    Path | None,
    option("--output", "-o", panel=OUTPUT, metavar="DIR", text="Output folder; named from model and rank if left out."),
]
OverwriteOption = Annotated[bool, option("--overwrite", panel=OUTPUT, text="Replace what is already at --output.")]
ResumeOption = Annotated[
    bool, option("--resume", panel=OUTPUT, text="Go on where this command was interrupted or killed.")
]
ShardOption = Annotated[
    str, option("--shard-size", panel=OUTPUT, metavar="SIZE", text="Largest weight file, such as 5GB or 500MB.")
]
JsonOption = Annotated[
    bool, option("--json", panel=OUTPUT, text="One JSON object on stdout; words for people go to stderr.")
]
QuietOption = Annotated[bool, option("--quiet", "-q", panel=OUTPUT, text="Errors alone.")]
DebugOption = Annotated[bool, option("--debug", panel=OUTPUT, text="Tracebacks of errors.")]

# machine
DeviceOption = Annotated[str, option("--device", panel=MACHINE, text="auto, cpu, cuda or cuda:N.")]
JobsOption = Annotated[
    int | None,
    option("--jobs", "-j", panel=MACHINE, metavar="N", text="Layers at once; as threads and memory allow."),
]
NoCacheOption = Annotated[bool, option("--no-cache", panel=MACHINE, text="Neither use nor keep singular values.")]
RevisionOption = Annotated[
    str | None, option("--revision", panel=MACHINE, text="Branch, tag or commit of a hub model.")
]
ArchitectureOption = Annotated[
    str | None,
    option("--architecture", panel=MACHINE, metavar="NAME", text="timm model name of a bare weight file."),
]
TrustOption = Annotated[
    bool,
    option(
        "--trust-remote-code",
        panel=MACHINE,
        text="Run Python code that comes with the checkpoint. Read it first.",
    ),
]


def make_screen(quiet: bool, as_json: bool) -> Screen:
    """Where a command's words go; of several processes under torchrun only rank 0 speaks."""
    from lrsurgery.cli.console import Screen
    from lrsurgery.runtime import numbers_of_processes

    speaks = numbers_of_processes()[0] == 0
    return Screen(quiet=quiet or not speaks, as_json=as_json and speaks)


def command_line() -> str:
    """The command as it was typed, for reports and cards."""
    return shlex.join(["lrsurgery", *sys.argv[1:]])
