"""`report` on whatever is named: a dense model, a factorised or healed one, training runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrsurgery.checkpoints.load import FactorisedCheckpoint, is_factorised, open_factorised
from lrsurgery.checkpoints.mapping import list_entries, open_checkpoint
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.errors import PlanError, SourceError, SurgeryError, WeightError
from lrsurgery.factorise.options import Options, pick_device
from lrsurgery.measure.bench import read_bench
from lrsurgery.progress import Progress, result_of
from lrsurgery.report.profile import iter_profile
from lrsurgery.report.rows import compared_row, rank_report, replaced_of, trained_row
from lrsurgery.report.runs import is_run, read_run
from lrsurgery.report.schema import FILE_NAME, Report, Row
from lrsurgery.surgery.layers import KINDS
from lrsurgery.surgery.threads import in_order, layers_at_once, memory


def read_report(reference: str) -> Report:
    """The report of a factorised folder. Raises SourceError for any other model."""
    source = resolve(reference)
    if not is_factorised(source):
        raise SourceError(f"{reference}: not a factorised checkpoint; make one with lrsurgery factorise")
    return result_of(iter_report([reference], Options(rank="0.5")))


def iter_report(
    references: Sequence[str], options: Options, *, planned: bool = False, against: str | None = None
) -> Generator[Progress, None, Report]:
    """The report of one model, or of several training runs side by side; a step for each layer that is looked at.

    `planned`: `options.rank` is what to plan for a dense model; else its rank is not looked at. `against` is the dense
    model that a factorised one came from.

    Raises SurgeryError: which folder, file or layer, what is wrong, what to do.
    """
    options.check()
    folders = [Path(reference).expanduser() for reference in references]
    if len(references) > 1 or (is_run(folders[0]) and not (folders[0] / "config.json").is_file()):
        if planned or against:
            raise SurgeryError(f"--{'rank' if planned else 'against'} takes one model, not {len(references)} runs")
        runs = tuple(read_run(folder) for folder in folders)
        return Report((), 0, None, about="runs", name=" · ".join(run["name"] for run in runs), training=runs)
    source = resolve(references[0], revision=options.revision, architecture=options.architecture)
    if is_factorised(source):
        if planned:
            raise SurgeryError(f"{references[0]}: is factorised already; --rank plans surgery on a dense model")
        report = yield from _factorised(source, options, against)
    elif against:
        raise SurgeryError(f"{references[0]}: is a dense model; --against compares a factorised one with it")
    else:
        report = yield from iter_profile(source, options, planned=planned)
    if source.folder is None:
        return replace(report, name=source.name)
    training = (read_run(source.folder),) if is_run(source.folder) else ()
    return replace(report, name=source.name, training=training, bench=read_bench(source.folder))


def _factorised(source: Source, options: Options, against: str | None) -> Generator[Progress, None, Report]:
    """What surgery or training wrote down; what it did not, from the factors; and against the dense weights."""
    assert source.folder is not None
    written = Report.read(source.folder) if (source.folder / FILE_NAME).is_file() else None
    if written is not None and not against:
        return written
    checkpoint = open_factorised(source, trust_remote_code=options.trust_remote_code)
    bare = written or replace(rank_report(checkpoint.model, measured=False), source={"reference": source.reference})
    rows = {row.name: row for row in bare.rows}
    dense = _dense_weights(against, checkpoint, options) if against else None
    names = list(checkpoint.factors)
    layers = dict(checkpoint.layers)
    device = pick_device(options.device)

    def row_of(name: str) -> Row:
        factors = checkpoint.factors[name](device)
        row = rows[name]
        try:
            if dense is None:
                return trained_row(row, factors)
            return compared_row(row, KINDS[row.kind].to_matrix(dense[name]().to(device)), factors)
        except WeightError as e:
            raise WeightError(f"{against or source.reference}: {name}: {e}") from e

    threads = torch.get_num_threads()
    needs = [memory(replaced_of(name, layers[name]), 8) for name in names]
    at_once = (options.jobs or layers_at_once(needs, threads)) if device.type == "cpu" else 1
    for done, (name, row) in enumerate(zip(names, in_order(row_of, names, at_once, threads), strict=True), 1):
        rows[name] = row
        yield Progress(name, done, len(names))
    notes = (f"errors, energy and directions are against {against}",) if against else ()
    return replace(bare, rows=tuple(rows[row.name] for row in bare.rows), notes=(*bare.notes, *notes))


def _dense_weights(reference: str, checkpoint: FactorisedCheckpoint, options: Options) -> Mapping[str, Any]:
    """Layer -> what reads its dense weight. Raises where the dense model lacks a layer, or has it in another shape."""
    source = resolve(reference)
    if is_factorised(source):
        raise SurgeryError(f"{reference}: is factorised itself; --against takes the dense model")
    dense = open_checkpoint(source, trust_remote_code=options.trust_remote_code)
    entries = {e.target.removesuffix(".weight"): e for e in list_entries(dense, set()) if e.target}
    found = {}
    for name, layer in checkpoint.layers.items():
        shape = replaced_of(name, layer).shape
        entry = entries.get(name)
        if entry is None or entry.shape != shape:
            raise PlanError(f"{name}: {reference}, the model to compare with, has no such layer of shape {shape}")
        found[name] = entry.read
    return found
