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
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsurgery import __version__
from lrsurgery.assembly import Assembly, Progress, aliases_of
from lrsurgery.cards import model_card
from lrsurgery.checkpoints import Checkpoint, Entry, choose_names, list_entries, open_checkpoint, output_config
from lrsurgery.errors import Interrupted, OutputError, SurgeryError, WeightError
from lrsurgery.jobs import (
    Job,
    first_error,
    still_to_do,
    tensor_digest,
    wait_some,
)
from lrsurgery.layers import KINDS
from lrsurgery.linalg import singular_values
from lrsurgery.options import DTYPES, Options, pick_device
from lrsurgery.pieces import WorkFolder
from lrsurgery.plan import Kept, Plan, Replaced, settle_all
from lrsurgery.report import FILE_NAME, Report
from lrsurgery.rows import plan_report
from lrsurgery.skeletons import check_not_converted
from lrsurgery.sources import Source, resolve
from lrsurgery.spectra import SpectrumCache
from lrsurgery.staging import check_output, copy_companions, staged
from lrsurgery.team import Team
from lrsurgery.tensors import write_text


def plan_checkpoint(reference: str, options: Options) -> Report:
    """What `factorise` would do. Weights are read only where the rank policy needs their singular values."""
    options.check()
    checkpoint, plan = _open(resolve_source(reference, options), options)
    if plan.needs_spectra:
        plan = _settled(plan, list_entries(checkpoint, {row.name for row in plan.replaced}), options)
    return plan_report(
        plan, checkpoint.parameters, command=options.command, options=options.recorded(), about="plan",
        name=checkpoint.source.name,
    )  # fmt: skip


def _settled(plan: Plan, entries: list[Entry], options: Options) -> Plan:
    """The plan with every rank known, from the singular values, which are kept for the next time."""
    by_layer, device = _by_layer(entries), pick_device(options.device)
    cache = SpectrumCache() if options.cache else None

    def values_of(row: Replaced) -> Tensor:
        tensor = by_layer[row.name].read()
        digest = tensor_digest(tensor.dtype, tuple(tensor.shape), [tensor])
        known = cache.get(digest, row.kind) if cache else None
        if known is not None:
            return known.values
        try:
            values = singular_values(KINDS[row.kind].to_matrix(tensor.to(device)))
        except WeightError as e:
            raise WeightError(f"{row.name}: {e}") from e
        if cache:
            cache.put(digest, row.kind, values)
        return values

    return settle_all(plan, values_of)


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


def _by_layer(entries: list[Entry]) -> dict[str, Entry]:
    return {e.target.removesuffix(".weight"): e for e in entries if e.target and e.target.endswith(".weight")}


def iter_factorise(
    reference: str, output: Path, options: Options, team: Team | None = None
) -> Generator[Progress, None, Report]:
    """As `factorise_checkpoint`, one layer a step; the report is the generator's value.

    Every process of a team calls it; the first one writes the output. Raises SurgeryError, and Interrupted where
    Ctrl-C or SIGTERM came after layers were finished, which are kept; an abandoned generator leaves nothing behind.
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
    if plan.needs_spectra and options.min_speedup is not None:
        plan = _settled(plan, entries, options)  # speeds cannot be measured beside decompositions
    parameters = checkpoint.parameters
    rows = {row.name: row for row in plan.replaced}
    aliases = aliases_of(checkpoint.model, rows)
    buffers = {name for name, _ in checkpoint.model.named_buffers()}
    # last use of the dense skeleton: it is factorised here
    names = choose_names(checkpoint, entries, rows)
    stream = Assembly(checkpoint, plan, options, entries, aliases, buffers, names)
    work = WorkFolder(output)
    if not team.leads:
        _help(stream, work, team)
        team.meet("end")  # when the output is there
        return Report.read(output)
    with _kept_when_interrupted(work, stream.jobs):
        work.open(_task(source, options), resume=options.resume)
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
                    f"nothing to factorise at rank {plan.spec}: every layer stays dense ({_why(stream)})"
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
def _kept_when_interrupted(work: WorkFolder, jobs: list[Job]) -> Iterator[None]:
    """Removes the work folder in the end, but not when an interruption leaves finished layers in it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as e:
        if work.count():
            raise Interrupted(
                f"interrupted; {work.count()} of {len(jobs)} layers are kept: the same command with --resume goes on"
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
        "version of lrsurgery or torch": [__version__, torch.__version__],
    }


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
