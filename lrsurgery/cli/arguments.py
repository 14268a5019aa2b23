"""Arguments and options that several commands share, in panels by what they decide; choices that help and completion list."""

from __future__ import annotations

import ast
import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen

CUT, DATA, OUTPUT, MACHINE = "What to cut", "Data", "Output", "Machine"  # panels of help


PACKAGE = Path(__file__).parents[1]


class Choice(str, Enum):
    """A value among known ones; its text is the value."""

    __str__ = str.__str__


def table_names(module: str, table: str) -> list[str]:
    """The names in a table of another module, read from its source, so that --help need not import torch.

    The table is a dict or a tuple with its texts spelled out.
    """
    source = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
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


def choice(name: str, module: str, table: str, *others: str) -> type[Choice]:
    """The names in a table of another module, and some others, as an enum for typer."""
    names = [*table_names(module, table), *others]
    return Choice(name, {each: each for each in names})  # type: ignore[return-value]


if TYPE_CHECKING:
    Conv = DtypeName = EngineName = Importance = Init = Task = str
else:
    Conv = choice("Conv", "lrsurgery.surgery.kinds", "CONV_SCHEMES")
    DtypeName = choice("Dtype", "lrsurgery.runtime", "DTYPES")
    EngineName = choice("Engine", "lrsurgery.linalg.svd", "ENGINES")
    Importance = choice("Importance", "lrsurgery.calibration.loss", "IMPORTANCES", "none")
    Init = choice("Init", "lrsurgery.linalg.inits", "INITS")
    Task = choice("Task", "lrsurgery.data.options", "TASKS")

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
RankOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rank",
        "-r",
        metavar="RANK|GLOB=RANK",
        help="0.5 (of full rank), 64, energy:0.9, params:0.5 or stable; again as GLOB=RANK for single layers.",
        show_default=False,
        rich_help_panel=CUT,
    ),
]
IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these layers.", rich_help_panel=CUT)
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these layers.", rich_help_panel=CUT)
]
MultipleOption = Annotated[
    int, typer.Option("--multiple-of", metavar="N", help="Round ranks to multiples of N.", rich_help_panel=CUT)
]
ConvOption = Annotated[
    Conv,
    typer.Option("--conv", help="channel: kh x kw then 1x1; spatial: kh x 1 then 1 x kw.", rich_help_panel=CUT),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Output folder; named from model and rank if left out.",
        rich_help_panel=OUTPUT,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing model folder.", rich_help_panel=OUTPUT)
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--shard-size", metavar="SIZE", help="Largest weight file, such as 5GB or 500MB.", rich_help_panel=OUTPUT
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on stdout; words for people go to stderr.", rich_help_panel=OUTPUT),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors alone.", rich_help_panel=OUTPUT)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.", rich_help_panel=OUTPUT)]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", metavar="N", help="Layers at once; as threads and memory allow.", rich_help_panel=MACHINE
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Neither use nor keep singular values.", rich_help_panel=MACHINE)
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.", rich_help_panel=MACHINE)
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(
        "--architecture", metavar="NAME", help="timm model name of a bare weight file.", rich_help_panel=MACHINE
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the checkpoint. Read it first.",
        rich_help_panel=MACHINE,
    ),
]


def make_screen(quiet: bool, as_json: bool) -> Screen:
    """Where a command's words go; of several processes under torchrun only rank 0 speaks."""
    from lrsurgery.cli.console import Screen

    speaks = os.environ.get("RANK", "0") == "0"
    return Screen(quiet=quiet or not speaks, as_json=as_json and speaks)


def command_line() -> str:
    """The command as it was typed, for reports and cards."""
    return shlex.join(["lrsurgery", *sys.argv[1:]])
