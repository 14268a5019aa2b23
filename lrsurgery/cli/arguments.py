"""Arguments and options that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen

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
_RANK = typer.Option(
    "--rank",
    "-r",
    metavar="RANK|GLOB=RANK",
    help="0.5 (of full rank), 64, energy:0.9, params:0.5 or stable; again as GLOB=RANK for single layers.",
    show_default=False,
)
RankOption = Annotated[list[str] | None, _RANK]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Output folder; named from model and rank if left out."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; words for people go to stderr.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint. Read it first.")
]
ShardOption = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Largest weight file, such as 5GB or 500MB.")
]

IncludeOption = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these layers.")]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these layers.")]
MultipleOption = Annotated[int, typer.Option("--multiple-of", metavar="N", help="Round ranks to multiples of N.")]
ConvOption = Annotated[str, typer.Option("--conv", help="channel: kh x kw then 1x1; spatial: kh x 1 then 1 x kw.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", metavar="N", help="Layers at once; as threads and memory allow.")
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep singular values.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
ArchitectureOption = Annotated[
    str | None, typer.Option("--architecture", metavar="NAME", help="timm model name of a bare weight file.")
]


def make_screen(quiet: bool, as_json: bool) -> Screen:
    """Where a command's words go; of several processes under torchrun only the first one speaks."""
    from lrsurgery.cli.console import Screen

    speaks = os.environ.get("RANK", "0") == "0"
    return Screen(quiet=quiet or not speaks, as_json=as_json and speaks)


def command_line() -> str:
    return shlex.join(["lrsurgery", *sys.argv[1:]])
