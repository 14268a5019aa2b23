"""From checkpoint to checkpoint, one tensor at a time: the one path for models of every size.

Layers are decomposed as jobs, several at once and in several processes, and leave their factors as pieces in a work
folder. Meanwhile the first process goes through all tensors in the order of the output, lets those that stay as they
are pass through, and puts each layer's factors in their place as soon as its piece is there. So reading, arithmetic and
writing overlap, no tensor but a tied copy is read twice, a killed run goes on from its pieces, and the output's bytes
do not depend on who did what.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lrsurgery import __version__
from lrsurgery.assembly import Assembly, aliases_of
from lrsurgery.calibrate import Calibration
from lrsurgery.cards import model_card
from lrsurgery.checkpoints import Checkpoint, Entry, choose_names, list_entries, open_checkpoint, output_config
from lrsurgery.data import digest_of, fingerprint
from lrsurgery.errors import Interrupted, OutputError, SurgeryError
from lrsurgery.jobs import (
    first_error,
    still_to_do,
    wait_some,
)
from lrsurgery.moments import FILE_NAME as STATISTICS
from lrsurgery.moments import Statistics
from lrsurgery.options import DTYPES, Options
from lrsurgery.pieces import WorkFolder
from lrsurgery.plan import Kept, Plan, Replaced
from lrsurgery.report import FILE_NAME, Report
from lrsurgery.rows import plan_report
from lrsurgery.settling import as_agreed, calibrated, resampled, settled
from lrsurgery.skeletons import check_not_converted
from lrsurgery.sources import Source, resolve
from lrsurgery.spectra import SpectrumCache
from lrsurgery.staging import check_output, copy_companions, staged
from lrsurgery.steps import Note, Progress, result_of
from lrsurgery.team import Team
from lrsurgery.tensors import write_text


def plan_checkpoint(reference: str, options: Options) -> Report:
    """What `factorise` would do. Weights are read only where the rank policy needs their singular values, or a budget
    or calibration asks what they lose."""
    return result_of(iter_plan(reference, options))


def iter_plan(reference: str, options: Options) -> Generator[Progress | Note, None, Report]:
    """As `plan_checkpoint`, a step a batch of calibration."""
    options.check()
    source = resolve_source(reference, options)
    checkpoint, plan = _open(source, options)
    statistics = None
    if plan.needs_spectra or options.calibration.wanted:
        entries = list_entries(checkpoint, {row.name for row in plan.replaced})
        with tempfile.TemporaryDirectory(prefix="lrsurgery-") as folder:
            statistics = yield from calibrated(source, plan, options, Path(folder))
            plan = settled(plan, entries, options, checkpoint.parameters, statistics)
    return plan_report(
        plan, checkpoint.parameters, command=options.command, options=options.recorded(), about="plan",
        name=checkpoint.source.name, calibration=None if statistics is None else statistics.facts,
    )  # fmt: skip


def resolve_source(reference: str, options: Options) -> Source:
    return resolve(
        reference, revision=options.revision, architecture=options.architecture, weights=not options.from_scratch
    )


def _open(source: Source, options: Options) -> tuple[Checkpoint, Plan]:
    check_not_converted(source)
    checkpoint = open_checkpoint(
        source,
        trust_remote_code=options.trust_remote_code,
        from_scratch_seed=options.seed if options.from_scratch else None,
    )
    return checkpoint, options.plan_for(checkpoint.model, checkpoint.tied)


def iter_factorise(
    reference: str, output: Path, options: Options, team: Team | None = None
) -> Generator[Progress | Note, None, Report]:
    """As `factorise_checkpoint`, one layer a step; the report is the generator's value.

    Every process of a team calls it; the first one writes the output. Raises SurgeryError, and Interrupted where
    Ctrl-C or SIGTERM came after statistics or layers were finished, which are kept; an abandoned generator leaves
    nothing behind.
    """
    options.check()
    team = team or Team()
    if not team.leads:
        # Once the first process has looked at everything: what is wrong is said once, what it fetched or measured is
        # at hand, and it has listed what is to be done.
        team.meet("begin")
    source = resolve_source(reference, options)
    check_output(output, source, options.overwrite)
    checkpoint, plan = _open(source, options)
    entries = list_entries(checkpoint, {row.name for row in plan.replaced})
    parameters = checkpoint.parameters
    work = WorkFolder(output)
    if not team.leads:
        plan, statistics = as_agreed(plan, options, work)
        _help(_assembly(checkpoint, plan, options, entries, statistics), work, team)
        team.meet("end")  # when the output is there
        return Report.read(output)
    with _kept_when_interrupted(work, len(plan.replaced)):
        work.open(_task(source, options), resume=options.resume)
        statistics = yield from calibrated(source, plan, options, work.path / "statistics")
        sequential = options.calibration.sequential and statistics is not None
        if plan.needs_spectra and (options.min_speedup is not None or options.budget is not None or sequential):
            # speeds cannot be measured beside decompositions, a budget is shared out over all layers, and a block is
            # replaced before the next one is looked at
            plan = settled(plan, entries, options, parameters, statistics)
        if sequential and statistics is not None:
            statistics = yield from resampled(source, plan, options, statistics, work.path / "sequential")
        work.set_ranks({row.name: row.rank if isinstance(row, Replaced) else row.reason for row in plan.rows})
        rows = {row.name: row for row in plan.replaced}
        stream = _assembly(checkpoint, plan, options, entries, statistics)
        to_do = still_to_do(stream.jobs, work.file)
        work.set_to_do([job.number for job in to_do])
        team.meet("begin")
        with staged(output, overwrite=options.overwrite) as stage:
            _check_space(stage, stream)
            yield from stream.run(stage, work, team)
            layers = {
                row.name: {"kind": row.kind, "rank": row.rank}
                for row in (stream.settled[name] for name in rows)
                if isinstance(row, Replaced)
            }
            if not layers:
                raise SurgeryError(
                    f"nothing to factorise at {plan.spec.asked}: every layer stays dense ({_why(stream)})"
                )
            report = plan_report(
                plan.with_rows(stream.settled),
                parameters,
                stream.measured,
                bytes_before=stream.bytes_before,
                bytes_after=stream.bytes_after,
                source={
                    "reference": reference,
                    "hub_id": source.hub_id,
                    "revision": source.revision,
                    "digest": stream.digest,
                },
                command=options.command,
                options=options.recorded(),
                versions=versions(),
                notes=_notes(options, checkpoint),
                calibration=None if statistics is None else statistics.facts,
            )
            copy_companions(source, stage)
            config = output_config(checkpoint, layers, DTYPES[options.dtype])
            write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")
            write_text(stage / FILE_NAME, report.to_json())
            write_text(stage / "README.md", model_card(report, source, output.name, config))
    if options.cache:
        SpectrumCache().trim()
    team.meet("end")
    return report


def _assembly(
    checkpoint: Checkpoint, plan: Plan, options: Options, entries: list[Entry], statistics: Statistics | None
) -> Assembly:
    rows = {row.name: row for row in plan.replaced}
    aliases = aliases_of(checkpoint.model, rows)
    buffers = {name for name, _ in checkpoint.model.named_buffers()}
    # last use of the dense skeleton: it is factorised here
    names = choose_names(checkpoint, entries, rows)
    return Assembly(checkpoint, plan, options, entries, aliases, buffers, names, statistics)


def _help(stream: Assembly, work: WorkFolder, team: Team) -> None:
    """What the other processes do: their share of the jobs."""
    try:
        with stream.at_work(work, team) as futures:
            while True:
                error = first_error(list(futures.values()))
                if error is not None:
                    raise error
                if all(future.done() for future in futures.values()):
                    return
                wait_some(list(futures.values()), 0.5)
    except SurgeryError as e:
        work.fail(str(e))
        raise


@contextmanager
def _kept_when_interrupted(work: WorkFolder, layers: int) -> Iterator[None]:
    """Removes the work folder in the end, but not when an interruption leaves statistics or finished layers in it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as e:
        kept = ["the statistics"] if (work.path / "statistics" / STATISTICS).exists() else []
        kept += [f"{work.count()} of {layers} layers"] if work.count() else []
        if kept:
            raise Interrupted(
                f"interrupted; {' and '.join(kept)} are kept: the same command with --resume goes on"
            ) from e
        work.remove()
        raise
    except BaseException:
        work.remove()
        raise
    work.remove()


def _task(source: Source, options: Options) -> dict[str, Any]:
    """What has to be the same for a piece to be of use; each is named where it differs."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return {
        **{name.replace("_", " "): value for name, value in options.recorded().items()},
        "source": [source.name, *map(list, files)],
        "calibration data": _data_of(options.calibration),
        "version of lrsurgery or torch": [__version__, torch.__version__],
    }


def _data_of(calibration: Calibration) -> str | None:
    if calibration.statistics is not None:
        return fingerprint([calibration.statistics / STATISTICS])
    return None if calibration.data is None else digest_of(calibration.data, calibration.split, calibration.how.subset)


def _why(stream: Assembly) -> str:
    reasons = sorted({row.reason for row in stream.settled.values() if isinstance(row, Kept)})
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")


def _check_space(stage: Path, stream: Assembly) -> None:
    free = shutil.disk_usage(stage).free
    if stream.expected_bytes > free:
        raise OutputError(
            f"{stage.parent}: {stream.expected_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        )


def _notes(options: Options, checkpoint: Checkpoint) -> tuple[str, ...]:
    notes = []
    if options.init != "spectral" and not options.from_scratch:
        notes.append(f"--init {options.init} gives up the pretrained values: the model must be trained again")
    if options.from_scratch:
        notes.append("initialised from its config, no pretrained weight is left: the model must be trained")
    if checkpoint.unused:
        listed = ", ".join(checkpoint.unused[:3]) + (", ..." if len(checkpoint.unused) > 3 else "")
        notes.append(
            f"passed through, though the model class does not use them: {len(checkpoint.unused)} tensors ({listed})"
        )
    return tuple(notes)


def versions() -> dict[str, str]:
    """Of this package and of those that decide the numbers."""
    from importlib.metadata import version

    others = ("torch", "transformers", "timm", "safetensors")
    return {"lrsurgery": __version__, **{name: version(name) for name in others}}
