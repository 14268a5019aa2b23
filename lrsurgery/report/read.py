"""`report` on whatever is named: a dense model, a factorised or healed one, training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lrsurgery.checkpoints.load import FactorisedCheckpoint, open_factorised
from lrsurgery.checkpoints.mapping import digest_of_entries, list_entries, open_checkpoint, weights_by_layer
from lrsurgery.checkpoints.source import Source, SourceOptions, resolve
from lrsurgery.errors import PlanError, SurgeryError, WeightError
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.bench import read_bench
from lrsurgery.report.dense.profile import WIDEST, ProfileOptions, profile
from lrsurgery.report.rows import compared_row, rank_report, replacement_of, trained_row
from lrsurgery.report.runs import is_run, read_run
from lrsurgery.report.schema import FILE_NAME, Report, Row
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import decomposition_bytes
from lrsurgery.surgery.tables.ties import leaders_of_tied
from lrsurgery.text import expanded


def read_report(
    references: Sequence[str],
    compute: Compute,
    *,
    source_options: SourceOptions | None = None,
    profile_options: ProfileOptions | None = None,
    against: str | None = None,
    command: str | None = None,
    listener: Listener = SILENT,
) -> Report:
    """The report of one model, or of several training runs side by side.

    `profile_options` say what to look at in a dense model and what to plan for it; `against` is the dense model that a
    factorised one came from.

    Raises SurgeryError: which folder, file or layer, what is wrong, what to do.
    """
    source_options, profile_options = source_options or SourceOptions(), profile_options or ProfileOptions()
    planned = profile_options.target is not None
    folders = [expanded(reference) for reference in references]
    if len(references) > 1 or (is_run(folders[0]) and not (folders[0] / "config.json").is_file()):
        if planned or against:
            raise SurgeryError(f"--{'rank' if planned else 'against'} takes one model, not {len(references)} runs")
        runs = tuple(read_run(folder) for folder in folders)
        return Report((), 0, None, about="runs", name=" · ".join(run["name"] for run in runs), training=runs)
    source = source_options.resolve(references[0])
    trust_remote_code = source_options.trust_remote_code
    if source.is_factorised:
        if planned:
            raise SurgeryError(f"{references[0]}: is factorised already; --rank plans surgery on a dense model")
        report = _factorised(source, against, compute, source_options, listener)
    elif against:
        raise SurgeryError(f"{references[0]}: is a dense model; --against compares a factorised one with it")
    else:
        report = profile(
            source,
            profile_options,
            compute,
            trust_remote_code=trust_remote_code,
            command=command,
            listener=listener,
        )
    if source.folder is None:
        return replace(report, name=source.name)
    training = (read_run(source.folder),) if is_run(source.folder) else ()
    return replace(report, name=source.name, training=training, bench=read_bench(source.folder))


def _factorised(
    source: Source, against: str | None, compute: Compute, source_options: SourceOptions, listener: Listener
) -> Report:
    """What surgery or training wrote down; failing that, what the factors tell; and the comparison with `against`."""
    assert source.folder is not None
    written = Report.read(source.folder) if (source.folder / FILE_NAME).is_file() else None
    if written is not None and not against:
        return written
    checkpoint = open_factorised(source, trust_remote_code=source_options.trust_remote_code)
    report = written or replace(rank_report(checkpoint.model, measured=False), source={"reference": source.reference})
    rows = {row.name: row for row in report.rows}
    dense, note = _dense_weights(against, checkpoint, report, source_options) if against else (None, "")

    def row_of(name: str) -> Row:
        factors = checkpoint.factors[name](compute.device)
        try:
            if dense is None:
                return trained_row(rows[name], factors)
            layer = checkpoint.layers[name]
            matrix = layer.layout.matrix_of(dense[name]().to(compute.device), layer.groups)
            return compared_row(rows[name], matrix, factors)
        except WeightError as e:
            raise WeightError(f"{against or source.reference}: {name}: {e}") from e

    tied = leaders_of_tied(checkpoint.layers)
    names = [name for name in checkpoint.factors if name not in tied]
    needs = [decomposition_bytes(replacement_of(name, checkpoint.layers[name]), WIDEST) for name in names]
    found = {}
    for done, (name, row) in enumerate(zip(names, compute.in_order(row_of, names, needs), strict=True), 1):
        found[name] = row
        listener.progress(name, done, len(names))
    notes = (note,) if note else ()
    return replace(report, rows=tuple(found.get(row.name, row) for row in report.rows), notes=(*report.notes, *notes))


def _dense_weights(
    reference: str, checkpoint: FactorisedCheckpoint, report: Report, source_options: SourceOptions
) -> tuple[Mapping[str, Callable[[], Any]], str]:
    """(layer -> what reads its dense weight, note that names the model and says if it is another than the source).

    Raises PlanError where the dense model lacks a layer or has it in another shape, SurgeryError where it is no dense
    model.
    """
    source = resolve(reference, architecture=source_options.architecture)
    if source.is_factorised:
        raise SurgeryError(f"{reference}: is factorised itself; --against takes the dense model")
    dense = open_checkpoint(source, source_options)
    listed = list_entries(dense, set(checkpoint.layers))
    entries = weights_by_layer(dense, listed)
    found = {}
    tied = leaders_of_tied(checkpoint.layers)
    for name, layer in checkpoint.layers.items():
        if name in tied:
            continue
        shape = replacement_of(name, layer).shape
        entry = entries.get(name)
        if entry is None or entry.shape != shape:
            raise PlanError(f"{name}: {reference}, the model to compare with, has no such layer of shape {shape}")
        found[name] = entry.weight
    note = f"errors, energy and directions are against {reference}"
    was = report.dense_source
    if was and was["digest"] != digest_of_entries(listed):
        note += f", which is not the model that this one came from ({was['reference']})"
    return found, note
