"""The `export` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from lrsurgery.cli.arguments import (
    OUTPUT,
    DebugOption,
    FolderArgument,
    JsonOption,
    OverwriteOption,
    QuietOption,
    ShardOption,
    TrustOption,
    choice,
    command_line,
    make_screen,
    option,
)

if TYPE_CHECKING:
    ExportName: TypeAlias = str
else:
    ExportName = choice("Export", "lrsurgery.factorise.export", "EXPORTS")


def export(
    folder: FolderArgument,
    output: Annotated[
        Path, option("--output", "-o", panel=OUTPUT, metavar="DIR", text="Output folder.", default=False)
    ],
    to: Annotated[
        ExportName, option("--to", panel=OUTPUT, text="dense: ordinary layers that need no lrsurgery to load.")
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
