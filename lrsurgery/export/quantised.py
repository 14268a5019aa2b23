"""Export with quantised factors: low rank and few bits in one folder, which loads through both tools' own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.checkpoints.build import check_plain_factors
from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.output import OutputOptions, check_output, copy_companions
from lrsurgery.checkpoints.quantizer.method import LowRankConfig, LowRankQuantizer
from lrsurgery.checkpoints.quantizer.packed import keep_layout_
from lrsurgery.checkpoints.source import SourceOptions, resolve
from lrsurgery.errors import SourceError
from lrsurgery.export.schemes import scheme_of
from lrsurgery.files.digests import file_digests
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import read_json
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import model_card
from lrsurgery.report.rows import rank_report
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import find_heads
from lrsurgery.units import parse_size


def export_quantised(
    folder: str | Path,
    output: str | Path,
    scheme: str = "int8",
    *,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the factorised transformers checkpoint in `folder` with few bits a weight in its linear layers.

    The factors and the layers that stayed dense become torchao's int8 weights, one scale a row, or by "nf4"
    bitsandbytes' 4 bits, one scale for 64 weights; heads, tables and what is tied to them keep their dtype. The folder
    is read whole. Raises SurgeryError that gives the folder or layer, the fault and the remedy; nothing is written
    then.
    """
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite)
    write_quantised(str(folder), Path(output), SourceOptions(trust_remote_code=trust_remote_code), options, scheme)


def write_quantised(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    scheme: str,
    listener: Listener = SILENT,
) -> None:
    """As `export_quantised`, with parsed options."""
    scheme_of(scheme).config(torch.float32, ())  # before anything is read
    source = source_options.resolve(reference)
    if not source.is_factorised:
        raise SourceError(f"{reference}: not a factorised checkpoint; transformers quantises dense ones by itself")
    if source.library != "transformers":
        raise SourceError(f"{reference}: a timm folder; --quantise writes transformers folders")
    check_plain_factors(source)
    output = with_name(output)
    with disk_faults(output, lambda: "nothing is written"), locked(output):
        check_output(output, source, options.overwrite)
        model: Any = load_source(source, trust_remote_code=source_options.trust_remote_code)
        quantise_(model, scheme, listener)
        with staged(output, overwrite=options.overwrite) as stage:
            model.save_pretrained(stage, max_shard_size=options.shard_size)
            copy_companions(source, stage)
            report = _report(source.folder, model, scheme)
            bytes_after = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
            report = replace(report, bytes_after=bytes_after, files=file_digests(stage))
            write_text(stage / FILE_NAME, report.to_json())
            written = read_json(stage / "config.json")
            write_text(stage / "README.md", model_card(report, source, output.name, written, (), options.command))
            load_source(resolve(str(stage)), trust_remote_code=source_options.trust_remote_code)


def _report(folder: Path | None, model: nn.Module, scheme: str) -> Report:
    known = folder is not None and (folder / FILE_NAME).is_file()
    report = Report.read(folder) if known and folder is not None else rank_report(model, measured=False)
    note = f"the weights of linear layers are {scheme_of(scheme).note}; the rows tell of them before that"
    return replace(report, notes=(*report.notes, note))


def quantise_(model: Any, scheme: str, listener: Listener = SILENT) -> None:
    """Quantise the linear layers of a factorised transformers model in place, factors among them.

    What is tied, and heads, keep their dtype. The model then saves as it is. Raises SurgeryError for an unknown scheme,
    or one whose package is missing.
    """
    chosen = scheme_of(scheme)
    tied = [f"{name}.{part}" for name, layer in factorised_layers(model).items() if layer.tied for part in "uv"]
    odd = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and not chosen.takes(each)]
    config = chosen.config(model.dtype, [*tied, *odd, *_heads(model)])
    known: LowRankConfig = model.hf_quantizer.quantization_config
    both = LowRankConfig(known.layers, then=config.to_dict())
    quantizer = LowRankQuantizer(both, pre_quantized=False)
    with torch.no_grad():
        chosen.convert_(model, quantizer.then, listener)
    keep_layout_(model)
    quantizer.pre_quantized = True
    model.hf_quantizer = quantizer
    model.config.quantization_config = both


def _heads(model: Any) -> Iterator[str]:
    """Output heads and classifiers, and the factors of those that are low rank."""
    for name in find_heads(model):
        yield from (name, f"{name}.u", f"{name}.v")
