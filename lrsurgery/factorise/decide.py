"""What a job decides before any layer is decomposed: which layers, by which statistics, at which ranks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from lrsurgery import __version__
from lrsurgery.calibration.allocate import Weights, allocate_ranks
from lrsurgery.calibration.statistics import FILE_NAME as STATISTICS
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.build import check_not_converted
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, list_entries, open_checkpoint, weights_by_layer
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.own import is_own, lacks_for_measuring
from lrsurgery.data.datasets import digest_of
from lrsurgery.data.tasks import TASKS, is_for
from lrsurgery.data.text.tokens import load_tokenizer
from lrsurgery.errors import DataError
from lrsurgery.factorise.calibrate import calibrate
from lrsurgery.factorise.options import Calibration, FactoriseOptions, choose_calibration
from lrsurgery.factorise.work.folder import SPEEDS, Decision, WorkFolder
from lrsurgery.files.digests import fingerprint
from lrsurgery.files.json import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.rows import plan_report
from lrsurgery.report.schema import Report
from lrsurgery.surgery.plan import Plan, find_heads, layers_of_several_names
from lrsurgery.surgery.rows import Kept, Replacement, join_rows
from lrsurgery.surgery.speed import POSITIONS, SpeedTable, describe, make_timer, plan_layers


def plan_checkpoint(reference: str, options: FactoriseOptions, listener: Listener = SILENT) -> Report:
    """Report what `factorise` would do.

    Reads weights only if the rank policy, a budget or calibration needs their singular values. Raises SurgeryError.
    """
    source = options.source.resolve(reference)
    options, note = choose_calibration(source, options)
    checkpoint, plan = open_plan(source, options)
    if note is not None:
        listener.note(note)
    statistics = None
    if plan.needs_spectra or options.calibration is not None:
        entries = list_entries(checkpoint, {row.name for row in plan.replacements})
        with tempfile.TemporaryDirectory(prefix="lrsurgery-") as folder:
            statistics = calibrate_plan(source, plan, options, Path(folder), "", listener)
            weights = weights_of(checkpoint, entries, options)
            plan = allocate_ranks(plan, weights, options.compute, statistics, share=options.surgery.shares)
    return replace(
        plan_report(plan, checkpoint.parameters),
        command=options.output.command,
        options=options.recorded(),
        about="plan",
        name=checkpoint.source.name,
        notes=notes_on(options, checkpoint, plan),
        calibration=None if statistics is None else statistics.facts,
    )


def open_plan(source: Source, options: FactoriseOptions) -> tuple[Checkpoint, Plan]:
    check_not_converted(source)
    checkpoint = open_checkpoint(source, options.source)
    plan = plan_layers(
        checkpoint.model,
        options.surgery,
        tied=checkpoint.tied,
        device=options.compute.device,
        dtype=options.output.dtype,
    )
    return checkpoint, plan if options.calibration is not None else with_order(plan, checkpoint, options)


def with_order(plan: Plan, checkpoint: Checkpoint, options: FactoriseOptions) -> Plan:
    """The plan whose tables know that frequent tokens come first, where a tokenizer of the checkpoint numbers them."""
    tables = {row.name: row for row in plan.replacements if row.layout.lookup}
    if not tables:
        return plan
    try:
        words = len(load_tokenizer(checkpoint.source, options.source.trust_remote_code))
    except DataError:
        return plan
    # a vocabulary is padded by a few rows, but a table of other codes has another size
    fitting = {name: row for name, row in tables.items() if words <= row.rows <= 1.1 * words + 16}
    return plan.with_rows({name: replace(row, by_order=True) for name, row in fitting.items()})


def calibrate_plan(
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


def weights_of(
    checkpoint: Checkpoint, entries: list[Entry], options: FactoriseOptions, speeds: Path | None = None
) -> Weights:
    """Access to the dense weights in a checkpoint's files; `speeds` keeps the times that a budget of time uses."""
    timer = None
    if _is_timed(options):
        table = SpeedTable(options.compute.device, options.output.dtype, kept=speeds)
        timer = make_timer(checkpoint.model, options.surgery.conv, table)
    output = options.output
    by_layer = weights_by_layer(checkpoint, entries)
    return Weights(
        read=lambda name: by_layer[name].weight(),
        widths={name: entry.dtype.itemsize for name, entry in by_layer.items()},
        stored_widths={name: output.stored(entry.dtype).itemsize for name, entry in by_layer.items()},
        parameters=checkpoint.parameters,
        stored_bytes=sum(torch.Size(e.shape).numel() * output.stored(e.dtype).itemsize for e in entries),
        device=options.compute.device,
        timer=timer,
        alone=layers_of_several_names(checkpoint.model),
        heads=frozenset(find_heads(checkpoint.model)),
    )


def _is_timed(options: FactoriseOptions) -> bool:
    budget = options.surgery.budget
    return budget is not None and budget.kind == "time"


def decide(
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
    speeds cannot be measured beside decompositions, where a budget needs the spectra of all layers, and where
    convolution schemes compare.
    """
    statistics = calibrate_plan(source, plan, options, work.path / "statistics", work.job, listener)
    schemes = any(row.others for row in plan.replacements)
    early = options.surgery.min_speedup is not None or options.surgery.budget is not None or schemes
    if plan.needs_spectra and early:
        weights = weights_of(checkpoint, entries, options, work.path / SPEEDS)
        plan = allocate_ranks(plan, weights, options.compute, statistics, share=options.surgery.shares)
    return plan, statistics


def decision_of(row: Replacement) -> Decision:
    """What other processes have to know of a row to factorise."""
    if row.joint is None or row.rank is None:
        return row.kind, row.rank
    return row.kind, row.rank, list(row.joint.names)


def read_decisions(plan: Plan, calibration: Calibration | None, work: WorkFolder) -> tuple[Plan, Statistics | None]:
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
    return plan, Statistics.read(work.path / "statistics")


def describe_job(source: Source, options: FactoriseOptions, processes: int) -> Json:
    """Everything that a piece depends on; `WorkFolder.open` names the entry that differs."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return {
        **{name.replace("_", " "): value for name, value in options.recorded().items()},
        "source": [source.name, *map(list, files)],
        **({"device of the times": describe(options.compute.device)} if _is_timed(options) else {}),
        "calibration data": None if options.calibration is None else _digest_data(options.calibration),
        **({"number of processes": processes} if options.refinement is not None else {}),
        "version of lrsurgery or torch": [__version__, torch.__version__],
    }


def _digest_data(calibration: Calibration) -> str:
    if calibration.statistics is not None:
        return fingerprint([calibration.statistics / STATISTICS])
    return digest_of(calibration.data, calibration.split, calibration.how.subset)


def notes_on(options: FactoriseOptions, checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    notes = list(checkpoint.notes)
    banks = [row for row in plan.replacements if row.layout.stacked]
    if banks:
        notes.append(
            f"{len(banks)} banks of fused experts have one rank for all experts of a bank, a multiple of"
            f" {banks[0].layout.multiple_of} whatever --multiple-of says, as grouped products need it"
        )
    ordered = [row.name for row in plan.replacements if row.by_order]
    if ordered:
        notes.append(
            f"{', '.join(ordered)}: without data, tokens count by their number, since tokenizers give low numbers to"
            " frequent tokens"
        )
    formed = [row for row in plan.replacements if row.layout.multiplied]
    if formed:
        notes.append(
            f"{len(formed)} weights of recurrent modules or nn.MultiheadAttention are multiplied out on every call:"
            " they save parameters, and calls on short inputs take longer; --exclude leaves them dense"
        )
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
