"""Factorisation of a checkpoint, one tensor at a time, for models of any size.

Each layer is a job. Several threads and processes decompose layers and write the factors as pieces into a work folder.
Meanwhile rank 0 writes the output in order: it copies unchanged tensors and inserts the factors of each layer as soon
as its piece exists. Reading, computation and writing therefore overlap. Only tied copies are read twice, a killed job
resumes from its pieces, and the output's bytes do not depend on the distribution of jobs.

The file is long because it is one job from its first to its last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from lrsurgery.calibration import texts
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, list_entries
from lrsurgery.checkpoints.output import check_output, copy_companions, output_config
from lrsurgery.checkpoints.remote_code.folder import check_code, write_code
from lrsurgery.checkpoints.spectra import SpectrumCache, cache_limit
from lrsurgery.errors import CalibrationError, SurgeryError
from lrsurgery.factorise.check import check_loss, warnings
from lrsurgery.factorise.decide import decide, decision_of, describe_job, notes_on, open_plan, read_decisions
from lrsurgery.factorise.options import FactoriseOptions, choose_calibration, parse_options
from lrsurgery.factorise.refining import refine_stage, take_part
from lrsurgery.factorise.work.folder import WorkFolder, keep_work
from lrsurgery.factorise.work.jobs import find_pending
from lrsurgery.factorise.work.rewrite import Rewriter
from lrsurgery.files.digests import file_digests
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import json_text
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.report.card import model_card
from lrsurgery.report.rows import plan_report
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.runtime import Processes, versions
from lrsurgery.surgery.plan import Plan
from lrsurgery.surgery.rows import Kept, Replacement

Complete: TypeAlias = "Callable[[Path, Report], Report]"  # a written folder before it is published, its report


def factorise_checkpoint(
    source: str | Path, output: str | Path, *, listener: Listener = USUAL, **options: Any
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
    complete: Complete | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Write the factorised checkpoint of a model; see `factorise_checkpoint`.

    Every process of a job calls it; rank 0 writes the output. `complete` adds to the report what it measures of the
    written folder; if it raises, nothing is published. Raises SurgeryError; raises Interrupted if Ctrl-C or
    SIGTERM comes after statistics or layers are finished, which are kept.
    """
    processes, output = processes or Processes(), with_name(output)
    if not processes.is_main:
        # Wait for rank 0, which reports errors once, fills the caches and writes the job list.
        processes.barrier("begin")
        return _factorise(reference, output, options, processes, complete, listener)
    with disk_faults(output), locked(output):
        return _factorise(reference, output, options, processes, complete, listener)


def _factorise(
    reference: str,
    output: Path,
    options: FactoriseOptions,
    processes: Processes,
    complete: Complete | None,
    listener: Listener,
) -> Report:
    source = options.source.resolve(reference)
    options, note = choose_calibration(source, options)
    if options.refinement is not None and options.calibration is None:
        raise CalibrationError(f"--refine needs data; add --calibration DATA, for language models also {texts.NAME}")
    work = WorkFolder(output)
    finished = options.output.resume and work.is_published()
    check_output(output, source, options.output.overwrite or finished)
    limit = cache_limit()
    checkpoint, plan = open_plan(source, options)
    if options.output.remote_code:
        check_code(source)
    entries = list_entries(checkpoint, {row.name for row in plan.replacements})
    parameters = checkpoint.parameters
    if not processes.is_main:
        if not finished:
            plan, statistics = read_decisions(plan, options.calibration, work)
            _rewriter(checkpoint, plan, options, entries, statistics).do_jobs(work, processes)
            if options.refinement is not None:
                take_part(source, options, work, processes, listener)
        processes.barrier("end")  # rank 0 has written the output
        return Report.read(output)
    with keep_work(work, output, len(plan.replacements)):
        work.open(describe_job(source, options, processes.size), resume=options.output.resume)
        if finished:
            listener.note(f"{output}: the job is finished")
            for moment in ("begin", "end"):
                processes.barrier(moment)
            return Report.read(output)
        if note is not None and options.surgery.budget is not None:
            listener.note(note)
        plan, statistics = decide(source, checkpoint, plan, options, entries, work, listener)
        work.set_decisions(
            {row.name: decision_of(row) if isinstance(row, Replacement) else row.reason for row in plan.rows}
        )
        rewriter = _rewriter(checkpoint, plan, options, entries, statistics)
        work.set_to_do([job.number for job in find_pending(rewriter.jobs, work)])
        processes.barrier("begin")
        with staged(output, overwrite=options.output.overwrite) as stage:
            rewriter.check_space(stage)
            rewriter.run(stage, work, processes, listener)
            layers = {
                name: spec
                for row in rewriter.decided.values()
                if isinstance(row, Replacement) and row.rank is not None
                for name, spec in row.specs.items()
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
                notes=notes_on(options, checkpoint, plan),
                calibration=None if statistics is None else statistics.facts,
            )
            copy_companions(source, stage)
            config = output_config(source, checkpoint.model, layers, options.output.dtype)
            if options.output.remote_code:
                config = write_code(stage, config, checkpoint.model)
            write_text(stage / "config.json", json_text(config))
            rewriter.check(stage, work, options.source, listener)
            if options.refinement is not None:
                report = refine_stage(source, stage, options, work, processes, report, listener)
            report = replace(report, loss_check=check_loss(source, stage, options, listener))
            report = report if complete is None else complete(stage, report)
            report = replace(report, files=file_digests(stage))
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


def _rewriter(
    checkpoint: Checkpoint, plan: Plan, options: FactoriseOptions, entries: list[Entry], statistics: Statistics | None
) -> Rewriter:
    return Rewriter(checkpoint, plan, options.surgery, options.output, options.compute, entries, statistics)


def _list_reasons(rewriter: Rewriter) -> str:
    reasons = sorted({row.reason for row in rewriter.decided.values() if isinstance(row, Kept)})
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
