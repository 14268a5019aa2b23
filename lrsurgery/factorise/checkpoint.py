"""Factorisation of a checkpoint, one tensor at a time, for models of any size.

Each layer is a job. Several threads and processes decompose layers and write the factors as pieces into a work folder.
Meanwhile rank 0 writes the output in order: it copies unchanged tensors and inserts the factors of each layer as soon
as its piece exists. Reading, computation and writing therefore overlap. Only tied copies are read twice, a killed job
resumes from its pieces, and the output's bytes do not depend on the distribution of jobs.

The file is long because it is one job from its first to its last step.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrsurgery import __version__
from lrsurgery.calibration.allocate import Weights, allocate_ranks
from lrsurgery.calibration.statistics import FILE_NAME as STATISTICS
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.build import check_not_converted
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, list_entries, open_checkpoint
from lrsurgery.checkpoints.output import check_output, copy_companions, output_config
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.spectra import SpectrumCache, cache_limit
from lrsurgery.checkpoints.upstream.own import is_own, lacks_for_measuring
from lrsurgery.data.datasets import digest_of
from lrsurgery.data.tasks import TASKS, is_for
from lrsurgery.errors import SurgeryError
from lrsurgery.factorise.calibrate import calibrate, recalibrate
from lrsurgery.factorise.check import check_loss, warnings
from lrsurgery.factorise.options import Calibration, FactoriseOptions, choose_calibration, parse_options
from lrsurgery.factorise.work.folder import SPEEDS, Decision, WorkFolder, keep_work
from lrsurgery.factorise.work.jobs import find_pending
from lrsurgery.factorise.work.rewrite import Rewriter
from lrsurgery.files.digests import file_digests, fingerprint
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import model_card
from lrsurgery.report.rows import plan_report
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.runtime import Processes, versions
from lrsurgery.surgery.plan import Kept, Plan, Replacement, join_rows, layers_of_several_names
from lrsurgery.surgery.speed import POSITIONS, SpeedTable, describe, make_timer, plan_layers


def plan_checkpoint(reference: str, options: FactoriseOptions, listener: Listener = SILENT) -> Report:
    """Report what `factorise` would do.

    Reads weights only if the rank policy, a budget or calibration needs their singular values. Raises SurgeryError.
    """
    source = options.source.resolve(reference)
    options, note = choose_calibration(source, options)
    checkpoint, plan = _open(source, options)
    if note is not None:
        listener.note(note)
    statistics = None
    if plan.needs_spectra or options.calibration is not None:
        entries = list_entries(checkpoint, {row.name for row in plan.replacements})
        with tempfile.TemporaryDirectory(prefix="lrsurgery-") as folder:
            statistics = _calibrate(source, plan, options, Path(folder), "", listener)
            weights = _weights(checkpoint, entries, options)
            plan = allocate_ranks(plan, weights, options.compute, statistics, share=_shares(options))
    return replace(
        plan_report(plan, checkpoint.parameters),
        command=options.output.command,
        options=options.recorded(),
        about="plan",
        name=checkpoint.source.name,
        notes=_notes(options, checkpoint),
        calibration=None if statistics is None else statistics.facts,
    )


def _open(source: Source, options: FactoriseOptions) -> tuple[Checkpoint, Plan]:
    check_not_converted(source)
    checkpoint = open_checkpoint(source, options.source)
    plan = plan_layers(
        checkpoint.model,
        options.surgery,
        tied=checkpoint.tied,
        device=options.compute.device,
        dtype=options.output.dtype,
    )
    return checkpoint, plan


def _calibrate(
    source: Source, plan: Plan, options: FactoriseOptions, folder: Path, owner: str, listener: Listener
) -> Statistics | None:
    if options.calibration is None:
        return None
    return calibrate(
        source,
        options.calibration,
        plan.replacements,
        folder,
        owner=owner,
        seed=options.surgery.seed,
        device=options.compute.device,
        trust_remote_code=options.source.trust_remote_code,
        listener=listener,
    )


def _weights(
    checkpoint: Checkpoint, entries: list[Entry], options: FactoriseOptions, speeds: Path | None = None
) -> Weights:
    """Access to the dense weights in a checkpoint's files; `speeds` keeps the times that a budget of time uses."""
    timer = None
    if _is_timed(options):
        table = SpeedTable(options.compute.device, options.output.dtype, kept=speeds)
        timer = make_timer(checkpoint.model, options.surgery.conv, table)
    output = options.output
    by_layer = {e.target.removesuffix(".weight"): e for e in entries if e.target and e.target.endswith(".weight")}
    return Weights(
        read=lambda name: by_layer[name].read(),
        widths={name: entry.dtype.itemsize for name, entry in by_layer.items()},
        stored_widths={name: output.stored(entry.dtype).itemsize for name, entry in by_layer.items()},
        parameters=checkpoint.parameters,
        stored_bytes=sum(torch.Size(e.shape).numel() * output.stored(e.dtype).itemsize for e in entries),
        device=options.compute.device,
        timer=timer,
        alone=layers_of_several_names(checkpoint.model),
    )


def _shares(options: FactoriseOptions) -> bool:
    """Whether layers may share one v; --sequential calibrates each block again, where no group is known."""
    return options.surgery.shares and not (options.calibration is not None and options.calibration.sequential)


def _is_timed(options: FactoriseOptions) -> bool:
    budget = options.surgery.budget
    return budget is not None and budget.kind == "time"


def factorise_checkpoint(
    source: str | Path, output: str | Path, *, listener: Listener = SILENT, **options: Any
) -> Report:
    """Write the factorised checkpoint of a model, in the memory of a few tensors; `options` as in `parse_options`.

    Raises SurgeryError that gives the file or layer, the fault and the remedy; nothing is written then.
    """
    return run_factorise(str(source), Path(output), parse_options(**options), listener=listener)


def run_factorise(
    reference: str,
    output: Path,
    options: FactoriseOptions,
    *,
    processes: Processes | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Write the factorised checkpoint of a model; see `factorise_checkpoint`.

    Every process of a job calls it; rank 0 writes the output. Raises SurgeryError; raises Interrupted if Ctrl-C or
    SIGTERM comes after statistics or layers are finished, which are kept.
    """
    processes, output = processes or Processes(), with_name(output)
    if not processes.is_main:
        # Wait for rank 0, which reports errors once, fills the caches and writes the job list.
        processes.barrier("begin")
        return _factorise(reference, output, options, processes, listener)
    with disk_faults(output), locked(output):
        return _factorise(reference, output, options, processes, listener)


def _factorise(
    reference: str, output: Path, options: FactoriseOptions, processes: Processes, listener: Listener
) -> Report:
    source = options.source.resolve(reference)
    options, note = choose_calibration(source, options)
    work = WorkFolder(output)
    finished = options.output.resume and work.is_published()
    check_output(output, source, options.output.overwrite or finished)
    limit = cache_limit()
    checkpoint, plan = _open(source, options)
    entries = list_entries(checkpoint, {row.name for row in plan.replacements})
    parameters = checkpoint.parameters
    if not processes.is_main:
        if not finished:
            plan, statistics = _read_decisions(plan, options.calibration, work)
            _rewriter(checkpoint, plan, options, entries, statistics).do_jobs(work, processes)
        processes.barrier("end")  # rank 0 has written the output
        return Report.read(output)
    with keep_work(work, output, len(plan.replacements)):
        work.open(_task(source, options), resume=options.output.resume)
        if finished:
            listener.note(f"{output}: the job is finished")
            for moment in ("begin", "end"):
                processes.barrier(moment)
            return Report.read(output)
        if note is not None and options.surgery.budget is not None:
            listener.note(note)
        plan, statistics = _decide(source, checkpoint, plan, options, entries, work, listener)
        work.set_decisions(
            {row.name: _decision(row) if isinstance(row, Replacement) else row.reason for row in plan.rows}
        )
        rewriter = _rewriter(checkpoint, plan, options, entries, statistics)
        work.set_to_do([job.number for job in find_pending(rewriter.jobs, work)])
        processes.barrier("begin")
        with staged(output, overwrite=options.output.overwrite) as stage:
            rewriter.check_space(stage)
            rewriter.run(stage, work, processes, listener)
            layers = {
                row.name: row.spec
                for row in rewriter.decided.values()
                if isinstance(row, Replacement) and row.rank is not None
            }
            if not layers:
                why = _list_reasons(rewriter)
                raise SurgeryError(
                    f"nothing to factorise at {plan.target.description}: every layer stays dense ({why})"
                )
            report = replace(
                plan_report(plan.with_rows(rewriter.decided), parameters, rewriter.measured),
                bytes_before=rewriter.bytes_before,
                bytes_after=rewriter.bytes_after,
                source={
                    "reference": reference,
                    "hub_id": source.hub_id,
                    "revision": source.revision,
                    "digest": rewriter.digest,
                },
                command=options.output.command,
                options=options.recorded(),
                versions=versions(),
                notes=_notes(options, checkpoint),
                calibration=None if statistics is None else statistics.facts,
            )
            copy_companions(source, stage)
            config = output_config(source, checkpoint.model, layers, options.output.dtype)
            write_text(stage / "config.json", json_text(config))
            rewriter.check(stage, work, options.source, listener)
            loss_check = check_loss(source, stage, options, listener)
            report = replace(report, loss_check=loss_check, files=file_digests(stage))
            write_text(stage / FILE_NAME, report.to_json())
            write_text(stage / "README.md", model_card(report, source, output.name, config))
            work.set_published(stage)
    if options.compute.cache:
        SpectrumCache().trim(limit)
    processes.barrier("end")
    told = [note] if note is not None and options.surgery.budget is None else []
    for text in (*told, *warnings(report, reference, output, options)):
        listener.note(text)
    return report


def _decide(
    source: Source,
    checkpoint: Checkpoint,
    plan: Plan,
    options: FactoriseOptions,
    entries: list[Entry],
    work: WorkFolder,
    listener: Listener,
) -> tuple[Plan, Statistics | None]:
    """Decide ranks as far as needed before decomposition, and collect the statistics of calibration.

    A rank that depends on the layer's own spectrum is decided with its decomposition. It is decided earlier where
    speeds cannot be measured beside decompositions, where a budget needs the spectra of all layers, where --sequential
    factorises a block before it calibrates the next, and where convolution schemes compare.
    """
    statistics = _calibrate(source, plan, options, work.path / "statistics", work.job, listener)
    sequential = options.calibration is not None and options.calibration.sequential
    schemes = any(row.others for row in plan.replacements)
    early = options.surgery.min_speedup is not None or options.surgery.budget is not None or sequential or schemes
    if plan.needs_spectra and early:
        weights = _weights(checkpoint, entries, options, work.path / SPEEDS)
        plan = allocate_ranks(plan, weights, options.compute, statistics, share=_shares(options))
    if sequential and statistics is not None:
        assert options.calibration is not None
        statistics = recalibrate(
            source,
            options.calibration,
            plan,
            statistics,
            work.path / "sequential",
            owner=f"{work.job} sequential",
            seed=options.surgery.seed,
            init=options.surgery.init,
            device=options.compute.device,
            trust_remote_code=options.source.trust_remote_code,
            listener=listener,
        )
    return plan, statistics


def _decision(row: Replacement) -> Decision:
    if row.joint is None or row.rank is None:
        return row.kind, row.rank
    return row.kind, row.rank, list(row.joint.names)


def _read_decisions(plan: Plan, calibration: Calibration | None, work: WorkFolder) -> tuple[Plan, Statistics | None]:
    """Read the decisions and statistics of rank 0 from the work folder, for the other processes."""
    decisions = work.decisions()
    rows: dict[str, Replacement | Kept] = {}
    for row in plan.replacements:
        decision = decisions[row.name]
        if isinstance(decision, str):
            rows[row.name] = Kept(row.name, row.kind, row.shape, row.parameters, decision)
        else:
            kind, rank, *_ = decision
            rows[row.name] = replace(next(option for option in row.options if option.kind == kind), rank=rank)
    for name, decision in decisions.items():
        if isinstance(decision, tuple) and len(decision) == 3 and decision[2][0] == name:
            unit = [each for each in map(rows.__getitem__, decision[2]) if isinstance(each, Replacement)]
            rows.update((each.name, each) for each in join_rows(unit, decision[1]))
    plan = plan.with_rows(rows)
    if calibration is None:
        return plan, None
    if calibration.statistics is not None:
        return plan, calibration.read_statistics()
    return plan, Statistics.read(work.path / ("sequential" if calibration.sequential else "statistics"))


def _rewriter(
    checkpoint: Checkpoint, plan: Plan, options: FactoriseOptions, entries: list[Entry], statistics: Statistics | None
) -> Rewriter:
    return Rewriter(checkpoint, plan, options.surgery, options.output, options.compute, entries, statistics)


def _task(source: Source, options: FactoriseOptions) -> Json:
    """Everything that a piece depends on; `WorkFolder.open` names the entry that differs."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return {
        **{name.replace("_", " "): value for name, value in options.recorded().items()},
        "source": [source.name, *map(list, files)],
        **({"device of the times": describe(options.compute.device)} if _is_timed(options) else {}),
        "calibration data": None if options.calibration is None else _digest_data(options.calibration),
        "version of lrsurgery or torch": [__version__, torch.__version__],
    }


def _digest_data(calibration: Calibration) -> str:
    if calibration.statistics is not None:
        return fingerprint([calibration.statistics / STATISTICS])
    return digest_of(calibration.data, calibration.split, calibration.how.subset)


def _list_reasons(rewriter: Rewriter) -> str:
    reasons = sorted({row.reason for row in rewriter.decided.values() if isinstance(row, Kept)})
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")


def _notes(options: FactoriseOptions, checkpoint: Checkpoint) -> tuple[str, ...]:
    notes = list(checkpoint.notes)
    if _is_timed(options):
        notes.append(
            f"the budget is of the time of the layers alone, for {POSITIONS} tokens or positions at once on"
            f" {describe(options.compute.device)}; lrsurgery bench measures the whole model"
        )
    from_scratch = options.source.from_scratch_seed is not None
    if options.surgery.init != "spectral" and not from_scratch:
        notes.append(f"--init {options.surgery.init} gives up the pretrained values: the model must be trained again")
    if checkpoint.source.library == "transformers" and is_own(checkpoint.model):
        task = next((TASKS[name] for name in TASKS if is_for(checkpoint.source, name)), None)
        lacks = lacks_for_measuring(checkpoint.model, (*task.inputs, "labels")) if task is not None else None
        if lacks is not None:
            notes.append(f"{type(checkpoint.model).__name__} can be factorised, but not trained and measured: {lacks}")
    if from_scratch:
        notes.append("initialised from its config, no pretrained weight is left: the model must be trained")
    if checkpoint.unused:
        listed = ", ".join(checkpoint.unused[:3]) + (", ..." if len(checkpoint.unused) > 3 else "")
        notes.append(
            f"passed through, though the model class does not use them: {len(checkpoint.unused)} tensors ({listed})"
        )
    return tuple(notes)
