"""The `export` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from lrsurgery.cli.arguments import (
    OUTPUT,
    DebugOption,
    FolderArgument,
    Form,
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
    ExportName = choice("Export", "lrsurgery.export.targets", "EXPORTS")


def export(
    folder: FolderArgument,
    output: Annotated[
        Path, option("--output", "-o", panel=OUTPUT, metavar="DIR", text="Output folder.", default=False)
    ],
    to: Annotated[
        ExportName | None,
        option(
            "--to",
            panel=OUTPUT,
            text="dense (if nothing is said): ordinary layers that need no lrsurgery to load. remote-code: low-rank"
            " layers with their code in the folder, for trust_remote_code=True. onnx, openvino, executorch: a graph for"
            " that runtime, its layers still low rank. gguf: how to get there.",
            default=False,
        ),
    ] = None,
    form: Annotated[
        Form | None,
        option(
            "--form",
            panel=OUTPUT,
            text="The low-rank layers in this form, in place of --to; the same up to rounding.",
            default=False,
        ),
    ] = None,
    quantise: Annotated[
        str | None,
        option(
            "--quantise",
            panel=OUTPUT,
            metavar="SCHEME",
            text="The factors and other linear layers in few bits, in place of --to: int8 (torchao), or nf4, 4 bits"
            " (bitsandbytes).",
            default=False,
        ),
    ] = None,
    format_: Annotated[
        int | None,
        option(
            "--format",
            panel=OUTPUT,
            metavar="N",
            text="Format of a low-rank output: the oldest that holds it; 1 for old versions, balanced layers alone.",
            default=False,
        ),
    ] = None,
    shard_size: ShardOption = "5GB",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a factorised model for plain transformers or timm, for another runtime, or with its layers in another form.

    [bold]Examples[/bold]

      lrsurgery export gpt2-rank-0.5 --to dense --output gpt2-dense

      lrsurgery export gpt2-rank-0.5 --to remote-code --output gpt2-for-anybody

      lrsurgery export bert-rank-0.5 --to onnx --output bert-onnx

      lrsurgery export gpt2-rank-0.5 --form balanced --output gpt2-to-train

      lrsurgery export gpt2-rank-0.5 --quantise nf4 --output gpt2-4-bits

      lrsurgery export gpt2-rank-0.5 --form balanced --format 1 --output gpt2-for-0.1
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.checkpoints.output import OutputOptions
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.errors import SurgeryError
    from lrsurgery.export.forms import export_in_form
    from lrsurgery.export.quantised import write_quantised
    from lrsurgery.export.targets import export as write
    from lrsurgery.units import parse_size

    in_form = form is not None or format_ is not None
    if to is not None and in_form:
        other = f"--form {form}" if form is not None else f"--format {format_}"
        raise SurgeryError(f"--to {to} and {other} are both given: the output is dense or low rank, so leave one out")
    if quantise is not None and (to is not None or in_form):
        raise SurgeryError(f"--quantise {quantise} writes an output of its own, so leave --to, --form and --format out")
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite, command=command_line())
    source_options = SourceOptions(trust_remote_code=trust_remote_code)
    with screen.follow("export") as listener:
        if quantise is not None:
            write_quantised(folder, output, source_options, options, quantise, listener)
        elif in_form:
            asked = str(form) if form is not None else None
            export_in_form(folder, output, source_options, options, form=asked, version=format_, listener=listener)
        else:
            write(folder, output, source_options, options, to=str(to or "dense"), listener=listener)
    what = {"form": form and str(form), "format": format_} if in_form else {"to": str(to or "dense")}
    what = {"quantise": quantise} if quantise is not None else what
    screen.emit({"output": str(output), **what})
    screen.say(f"Written to {output}")
