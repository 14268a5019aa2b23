"""Export with the code of the layers, which transformers loads with trust_remote_code=True and without lrsurgery."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.export.forms import write_in_form
from lrsurgery.progress import SILENT, Listener


def to_remote_code(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint with the code of its layers; raises SurgeryError."""
    write_in_form(reference, output, source_options, replace(options, remote_code=True), listener=listener)
