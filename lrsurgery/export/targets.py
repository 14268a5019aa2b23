"""The targets of `export --to`, and the functions that write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lrsurgery.checkpoints.output import (
    OutputOptions,
)
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.errors import SurgeryError
from lrsurgery.export.dense import to_dense
from lrsurgery.export.graphs.write import to_executorch, to_gguf, to_onnx, to_openvino
from lrsurgery.export.remote_code import to_remote_code
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import with_name
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.units import parse_size


def export_dense(
    folder: str | Path,
    output: str | Path,
    *,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the factorised checkpoint in `folder` as a dense one, with the product of each layer's factors.

    Weights keep their dtype. Raises SurgeryError that gives the file or layer, the fault and the remedy; nothing is
    written then.
    """
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite)
    export(str(folder), Path(output), SourceOptions(trust_remote_code=trust_remote_code), options, listener=USUAL)


def export_graph(
    folder: str | Path,
    output: str | Path,
    *,
    to: str,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the factorised checkpoint in `folder` as the graph of a runtime: "onnx", "openvino" or "executorch".

    Its layers stay low rank, its weights are fp32, and its tokenizer or processor goes with it. Before the folder
    appears, the runtime runs it and its outputs are compared with the model's. Raises SurgeryError that gives the
    fault and the remedy; nothing is written then.
    """
    options = OutputOptions(overwrite=overwrite)
    export(str(folder), Path(output), SourceOptions(trust_remote_code=trust_remote_code), options, to=to)


def export(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    *,
    to: str = "dense",
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint in one of the formats of `EXPORTS`. Raises SurgeryError."""
    if to not in EXPORTS:
        raise SurgeryError(f"unknown target '{to}'; known: {', '.join(EXPORTS)}")
    output = with_name(output)
    with disk_faults(output, lambda: "nothing is written"), locked(output):
        EXPORTS[to](reference, output, source_options, options, listener)


# the formats of `export --to`
Export = Callable[[str, Path, SourceOptions, OutputOptions, Listener], None]
EXPORTS: dict[str, Export] = {
    "dense": to_dense,
    "remote-code": to_remote_code,
    "onnx": to_onnx,
    "openvino": to_openvino,
    "executorch": to_executorch,
    "gguf": to_gguf,
}
