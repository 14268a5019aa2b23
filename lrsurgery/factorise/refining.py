"""`refine`, and the last part of `factorise --refine`: a factorised folder fitted to its dense model.

The file is long because the job is one from the folder that is read to the one that is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrsurgery.calibration.statistics import FILE_NAME as STATISTICS
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.build import build_model, check_plain_factors
from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.loading.check import check_folder
from lrsurgery.checkpoints.mapping import key_map
from lrsurgery.checkpoints.output import OutputOptions, check_output, copy_companions
from lrsurgery.checkpoints.quantised.dense import usual_dtype
from lrsurgery.checkpoints.source import Source, SourceOptions, resolve
from lrsurgery.checkpoints.tensors import TensorSource, open_tensors
from lrsurgery.data.datasets import digest_of
from lrsurgery.data.interfaces.wrapped import Wrapped
from lrsurgery.errors import CalibrationError, SourceError
from lrsurgery.factorise.options import Calibration, FactoriseOptions
from lrsurgery.factorise.work.blocks import BlockPieces
from lrsurgery.factorise.work.folder import REFINED, WorkFolder, keep_work
from lrsurgery.factorise.work.opened import Compute, open_both, room_of, share_of
from lrsurgery.files.digests import file_digests, fingerprint
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, read_json
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.modules import model_faults
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.refine.options import Refinement
from lrsurgery.refine.reconstruction import Fit
from lrsurgery.refine.walk import Walk, refine_blocks_
from lrsurgery.refine.writing import rewrite, written_alone
from lrsurgery.report.card import model_card, public_name
from lrsurgery.report.rows import rank_report
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.runtime import Processes, check_seed, device_of_process, pick_device, versions
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.units import parse_size


def refine_checkpoint(
    folder: str | Path,
    output: str | Path,
    *,
    against: str | Path,
    calibration: Calibration,
    statistics: str | Path | None = None,
    refinement: Refinement | None = None,
    seed: int = 0,
    device: str = "auto",
    shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
    processes: Processes | None = None,
    listener: Listener = USUAL,
) -> Report:
    """Fit the factorised checkpoint in `folder` to the dense model `against`, block by block, and write it to `output`.

    Needs neither labels nor a head: each block is fitted to the outputs of the dense block on the calibration data.
    Ranks, forms and sizes stay. The gradients in `statistics`, a folder that `factorise` kept of the dense model, weigh
    the closed form. Several `processes`, all of which call this, share the samples. Raises SurgeryError that gives the
    file or layer, the fault and the remedy.
    """
    check_seed(seed)
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite, resume=resume, command=command)
    place = with_name(Path(output))
    if statistics is not None:
        if not Statistics.read(Path(statistics)).has_gradients:  # raises CalibrationError if they cannot be read
            raise CalibrationError(
                f"{statistics}: holds no gradients, by which the closed form is weighed; leave --statistics out"
            )
        calibration = replace(calibration, own_statistics=Path(statistics))
    processes = processes or Processes()
    how = Compute(device_of_process(pick_device(device), processes.local_rank), trust_remote_code, processes)
    job = _Job(str(folder), str(against), place, calibration, refinement or Refinement(seed=seed), how, options)
    if not how.processes.is_main:
        return job.take_part(listener)
    with disk_faults(place), locked(place):
        return job.run(listener)


@dataclass(frozen=True)
class _Job:
    """A folder to refine, and all that it is refined by."""

    reference: str
    against: str
    output: Path
    calibration: Calibration
    refinement: Refinement
    how: Compute
    options: OutputOptions

    def _sources(self) -> tuple[Source, Source]:
        """The factorised and the dense one. Raises SourceError."""
        source = SourceOptions(trust_remote_code=self.how.trust_remote_code).resolve(self.reference)
        if not source.is_factorised or source.folder is None:
            raise SourceError(
                f"{self.reference}: not a factorised checkpoint; lrsurgery factorise makes one of a dense model"
            )
        check_plain_factors(source)
        dense = resolve(self.against)
        if dense.is_factorised:
            raise SourceError(f"{self.against}: is factorised itself; name the dense model that was factorised")
        return source, dense

    def take_part(self, listener: Listener) -> Report:
        """Do what a process other than the main one does."""
        source, dense = self._sources()
        work, processes = WorkFolder(self.output), self.how.processes
        processes.barrier("begin")
        if not (self.options.resume and work.is_published()):
            _take_part(source, dense, self.calibration, self.refinement, work, self.how, listener)
        processes.barrier("end")
        return Report.read(self.output)

    def run(self, listener: Listener) -> Report:
        source, dense = self._sources()
        work, processes = WorkFolder(self.output), self.how.processes
        finished = self.options.resume and work.is_published()
        check_output(self.output, source, self.options.overwrite or finished, (self.against,))
        with keep_work(work, self.output, 0):
            task = _describe(source, dense, self.calibration, self.refinement, processes.size)
            work.open(task, resume=self.options.resume)
            processes.barrier("begin")
            if finished:
                listener.note(f"{self.output}: the job is finished")
                processes.barrier("end")
                return Report.read(self.output)
            report = self._write(source, dense, work, listener)
        processes.barrier("end")
        return report

    def _write(self, source: Source, dense: Source, work: WorkFolder, listener: Listener) -> Report:
        assert source.folder is not None
        with staged(self.output, overwrite=self.options.overwrite) as stage:
            copy_companions(source, stage)
            shutil.copyfile(source.folder / "config.json", stage / "config.json")
            report = refine_folder(
                source,
                dense,
                stage,
                self.calibration,
                self.refinement,
                work,
                self.how,
                self.options.shard_size,
                _report_of(source),
                listener,
            )
            check_folder(stage, self.reference, trust_remote_code=self.how.trust_remote_code)
            report = replace(report, command=self.options.command, versions=versions(), loss_check=None)
            report = replace(report, files=file_digests(stage))
            write_text(stage / FILE_NAME, report.to_json())
            config = read_json(stage / "config.json")
            card = model_card(report, source, self.output.name, config, (), self.options.command)
            write_text(stage / "README.md", card)
            work.set_published(stage)
        return report


def _importance(report: Report) -> str | None:
    """What cut the layers of a model; None where nothing but their weights did."""
    return (report.calibration or {}).get("metric")


def _targets(source: Source, how: Compute) -> tuple[TensorSource, dict[str, str]]:
    """The tensors in the files, and the state-dict keys of those that may change; see `written_alone`."""
    tensors = open_tensors(list(source.files))
    model = build_model(source, device="meta", trust_remote_code=how.trust_remote_code)
    swap_(model, source.layers)
    return tensors, written_alone(key_map(source, model), tensors)


def _report_of(source: Source) -> Report:
    assert source.folder is not None
    if (source.folder / FILE_NAME).is_file():
        return Report.read(source.folder)
    return rank_report(load_source(source), measured=False)


def _describe(source: Source, dense: Source, calibration: Calibration, refinement: Refinement, processes: int) -> Json:
    """Everything that a finished block depends on."""

    def stamps(of: Source) -> list[list[Any]]:
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in of.files]

    return {
        "source": [source.name, *stamps(source)],
        "dense model": [dense.name, *stamps(dense)],
        "calibration": calibration.recorded(),
        "calibration data": digest_of(calibration.data, calibration.split, calibration.how.subset),
        "statistics": None if (folder := calibration.own_statistics) is None else fingerprint([folder / STATISTICS]),
        "refinement": refinement.recorded(),
        "number of processes": processes,
        "version of torch": torch.__version__,
    }


def refine_folder(
    source: Source,
    dense: Source,
    stage: Path,
    calibration: Calibration,
    refinement: Refinement,
    work: WorkFolder,
    how: Compute,
    shard_size: int,
    report: Report,
    listener: Listener = SILENT,
) -> Report:
    """Write the weights of a factorised source, refined against the dense one, into `stage`; return the report of them.

    Blocks that an earlier part of the job finished are read from the work folder. `stage` may be the source's folder.
    """
    refinement = refinement.after(_importance(report))
    tensors, targets = _targets(source, how)
    pieces = BlockPieces(work.path / REFINED, f"{work.job} {REFINED}", report)
    fits = _walk(source, dense, calibration, refinement, targets, pieces, work, how, listener)
    fresh = stage / ".refined"
    fresh.mkdir()
    size = rewrite(tensors, targets, pieces.value, fresh, shard_size)
    for file in [*stage.glob("*.safetensors"), *stage.glob("*.safetensors.index.json")]:
        file.unlink()
    for file in sorted(fresh.iterdir()):
        file.rename(stage / file.name)
    fresh.rmdir()
    rows = tuple(pieces.rows.get(row.name, row) for row in report.rows)
    told = _told(fits, calibration, refinement)
    listener.note(f"refinement: {told['text']}")
    return replace(report, rows=rows, bytes_after=size, refinement=told)


def refine_stage(
    dense: Source,
    stage: Path,
    options: FactoriseOptions,
    work: WorkFolder,
    processes: Processes,
    report: Report,
    listener: Listener,
) -> Report:
    """Refine the folder that `factorise` is about to publish; see `refine_folder`. The other processes `take_part`."""
    assert options.calibration is not None
    assert options.refinement is not None
    if processes.size > 1:
        write_text(stage / FILE_NAME, report.to_json())
        work.set_stage(stage)
        processes.barrier("refine")
    source, how = resolve(str(stage)), _compute_of(options, processes)
    size = options.output.shard_size
    return refine_folder(
        source, dense, stage, options.calibration, options.refinement, work, how, size, report, listener
    )


def take_part(
    dense: Source, options: FactoriseOptions, work: WorkFolder, processes: Processes, listener: Listener
) -> None:
    """Do what a process other than the main one does of `refine_stage`."""
    assert options.calibration is not None
    assert options.refinement is not None
    processes.barrier("refine")
    source, how = resolve(str(work.stage())), _compute_of(options, processes)
    _take_part(source, dense, options.calibration, options.refinement, work, how, listener)


def _compute_of(options: FactoriseOptions, processes: Processes) -> Compute:
    device = options.compute.for_process(processes.local_rank)
    return Compute(device, options.source.trust_remote_code, processes)


def _take_part(
    source: Source,
    dense: Source,
    calibration: Calibration,
    refinement: Refinement,
    work: WorkFolder,
    how: Compute,
    listener: Listener,
) -> None:
    report = _report_of(source)
    blocks = BlockPieces(work.path / REFINED, f"{work.job} {REFINED}", report, writes=False)
    targets = _targets(source, how)[1]
    _walk(source, dense, calibration, refinement.after(_importance(report)), targets, blocks, work, how, listener)


def _told(fits: Sequence[Fit], calibration: Calibration, refinement: Refinement) -> Json:
    """What refinement did, as the report keeps it."""
    count = max(1, len(fits))
    before, after = (sum(getattr(fit, name) for fit in fits) / count for name in ("before", "after"))
    changed = sum(fit.after < fit.before for fit in fits)
    last = fits[-1] if fits else Fit("", 0.0, 0.0, 0)
    return {
        "text": (
            f"{changed} of {len(fits)} blocks fitted to the dense model's; relative squared error of a block's outputs"
            f" on held-out samples {before:.2%} -> {after:.2%} in the mean, of the last {last.before:.2%} ->"
            f" {last.after:.2%}"
        ),
        "data": public_name(calibration.data or ""),
        "options": refinement.recorded(),
        "blocks": [asdict(fit) for fit in fits],
    }


def _walk(
    source: Source,
    dense: Source,
    calibration: Calibration,
    refinement: Refinement,
    targets: Mapping[str, str],
    pieces: BlockPieces,
    work: WorkFolder,
    how: Compute,
    listener: Listener,
) -> list[Fit]:
    if calibration.data is None:
        raise CalibrationError("refinement needs data, and not statistics; add --calibration DATA")
    folder = work.path / "activations" / str(how.processes.rank)
    kept = calibration.own_statistics or work.path / "statistics"  # of this job, or an earlier one
    statistics = Statistics.read(kept) if (kept / STATISTICS).is_file() else None
    shutil.rmtree(folder, ignore_errors=True)
    try:
        opened = open_both(source, dense, calibration, refinement.seed, folder, how)
        for note in opened.notes:
            listener.note(note)
        pieces.outer = "body." if isinstance(opened.compressed, Wrapped) else ""
        if calibration.own_statistics is not None and statistics is not None:
            names = (name.removeprefix(pieces.outer) for name in factorised_layers(opened.compressed))
            if not any(name in statistics.uses for name in names):
                raise CalibrationError(f"{kept}: knows none of the factorised layers, so it is of another model")
            if not refinement.anchored:
                listener.note(f"{kept}: weighs the closed form alone, which a Fisher cut takes with --refine-steps 0")
        walk = Walk(
            dense=opened.dense,
            compressed=opened.compressed,
            batches=share_of(opened.batches, how.processes),
            options=refinement,
            per_call=len(next(iter(opened.batches[0].values()))),
            processes=how.processes,
            stored=usual_dtype(source),
            writable={f"{pieces.outer}{name}" for name in targets.values()},
            folder=folder,
            room=room_of(how),
            frees=opened.on_disk,
            statistics=statistics,
            outer=pieces.outer,
        )
        with model_faults(source.reference):
            return refine_blocks_(walk, pieces, listener)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
