"""From checkpoint to checkpoint, one tensor at a time: the one path for models of every size.

Layers are decomposed as jobs, several at once and in several processes, and leave their factors as pieces in a work
folder. Meanwhile the first process goes through all tensors in the order of the output, lets those that stay as they
are pass through, and puts each layer's factors in their place as soon as its piece is there. So reading, arithmetic and
writing overlap, no tensor but a tied copy is read twice, a killed run goes on from its pieces, and the output's bytes
do not depend on who did what.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery import __version__
from lrsurgery.cards import model_card
from lrsurgery.checkpoints import Checkpoint, Entry, Names, choose_names, list_entries, open_checkpoint, output_config
from lrsurgery.errors import Interrupted, OutputError, SurgeryError, WeightError
from lrsurgery.jobs import (
    Decomposer,
    Job,
    at_work,
    check_finite,
    check_overflow,
    device_of,
    first_error,
    settled_row,
    share_out,
    still_to_do,
    stored_dtype,
    tensor_digest,
    wait_some,
)
from lrsurgery.layers import KINDS
from lrsurgery.linalg import singular_values
from lrsurgery.options import DTYPES, Options, pick_device
from lrsurgery.pieces import Piece, WorkFolder, load_piece
from lrsurgery.plan import Kept, Plan, Replaced, settle_all
from lrsurgery.report import FILE_NAME, Report, Row, plan_report
from lrsurgery.skeletons import check_not_converted
from lrsurgery.sources import Source, resolve
from lrsurgery.spectra import SpectrumCache
from lrsurgery.staging import check_output, copy_companions, staged
from lrsurgery.team import Team
from lrsurgery.tensors import ShardWriter, in_write_order, parse_size, write_text


@dataclass(frozen=True)
class Progress:
    """A layer was dealt with."""

    name: str
    done: int
    total: int


def plan_checkpoint(reference: str, options: Options) -> Report:
    """What `factorise` would do. Weights are read only where the rank policy needs their singular values."""
    options.check()
    checkpoint, plan = _open(resolve_source(reference, options), options)
    if plan.needs_spectra:
        entries = _by_layer(list_entries(checkpoint, {row.name for row in plan.replaced}))
        device = pick_device(options.device)
        cache = SpectrumCache() if options.cache else None

        def values_of(row: Replaced) -> Tensor:
            tensor = entries[row.name].read()
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

        plan = settle_all(plan, values_of)
    return plan_report(plan, checkpoint.parameters, command=options.command, options=options.recorded())


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
    rows = {row.name: row for row in plan.replaced}
    entries = list_entries(checkpoint, set(rows))
    parameters = checkpoint.parameters
    aliases = _aliases(checkpoint.model, rows)
    buffers = {name for name, _ in checkpoint.model.named_buffers()}
    # last use of the dense skeleton: it is factorised here
    names = choose_names(checkpoint, entries, rows)
    stream = _Stream(checkpoint, plan, options, entries, aliases, buffers, names)
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
                raise SurgeryError(f"nothing to factorise at rank {plan.spec}: every layer would be over break-even")
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
            write_text(stage / "README.md", model_card(report, source, output.name))
    if options.cache:
        SpectrumCache().trim()
    team.meet("end")
    return report


def _help(stream: _Stream, work: WorkFolder, team: Team) -> None:
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


def _aliases(model: nn.Module, rows: dict[str, Replaced]) -> dict[str, str]:
    """Every name of a planned layer -> the name in the plan, for layers that a model registers twice."""
    named = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: named[id(module)] for name, module in every if named[id(module)] in rows}


def _check_space(stage: Path, stream: _Stream) -> None:
    free = shutil.disk_usage(stage).free
    if stream.expected_bytes > free:
        raise OutputError(
            f"{stage.parent}: {stream.expected_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        )


class _Stream:
    """One pass over a checkpoint's tensors, in the order of the output."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        options: Options,
        entries: list[Entry],
        aliases: dict[str, str],
        buffers: set[str],
        names: dict[str, Names],
    ) -> None:
        self.settled: dict[str, Replaced | Kept] = {row.name: row for row in plan.replaced}
        self.measured: dict[str, Row] = {}
        self.bytes_before = self.bytes_after = 0
        self._checkpoint, self._plan, self._options = checkpoint, plan, options
        self._aliases, self._buffers, self._names = aliases, buffers, names
        self._digests: dict[str, str] = {}
        self._entries = {entry.key: entry for entry in entries}
        self._order = list(in_write_order([(stored_dtype(e.dtype, options), e.key) for e in entries]))
        # a weight goes before its layer's bias of the same width: by then it is known whether the layer stays dense
        self._order.sort(key=lambda key: (-self._width(key), self._layer_of(key)[1] == "bias"))
        self._by_target = {entry.target: entry for entry in entries if entry.target}
        weights: dict[str, Entry] = {}
        for key in self._order:
            layer, part = self._layer_of(key)
            if layer is not None and part == "weight":
                weights.setdefault(layer, self._entries[key])  # the same layer under a second name comes later
        self.jobs = [Job(number, self._planned(layer), entry) for number, (layer, entry) in enumerate(weights.items())]
        self._job_of = {job.row.name: job for job in self.jobs}

    def _planned(self, layer: str) -> Replaced:
        row = self.settled[layer]
        assert isinstance(row, Replaced)
        return row

    def _width(self, key: str) -> int:
        return stored_dtype(self._entries[key].dtype, self._options).itemsize

    def _layer_of(self, key: str) -> tuple[str | None, str]:
        """(planned layer, "weight" or "bias") that a key belongs to; None for what passes through."""
        module, _, part = (self._entries[key].target or "").rpartition(".")
        return self._aliases.get(module), part

    @property
    def digest(self) -> str:
        """Of every tensor as it was read, with its name."""
        found = hashlib.sha256()
        for key in self._order:
            if key in self._digests:
                found.update(f"{key} {self._digests[key]}\n".encode())
        return found.hexdigest()[:32]

    @property
    def expected_bytes(self) -> int:
        """Of the output, and of the pieces, which stay until it is there."""
        total = 0
        for key, entry in self._entries.items():
            layer, part = self._layer_of(key)
            row = self.settled.get(layer) if layer else None
            count, times = int(torch.Size(entry.shape).numel()), 1
            if isinstance(row, Replaced) and part == "weight":
                count, times = row.rank * (row.rows + row.columns) if row.rank is not None else count, 2
            total += times * count * stored_dtype(entry.dtype, self._options).itemsize
        return total

    @contextmanager
    def at_work(self, work: WorkFolder, team: Team) -> Iterator[dict[int, Future[None]]]:
        """Starts this process's share of the jobs in the background; job number -> when its piece is there."""
        to_do = work.to_do()
        jobs = share_out([job for job in self.jobs if job.number in to_do], team.size)[team.rank]
        where = device_of(self._options, team.local_rank)
        do = Decomposer(self._plan, self._options, self._checkpoint.source.reference, where)
        with at_work(jobs, do, work.file, self._options.jobs) as futures:
            yield futures

    def run(self, stage: Path, work: WorkFolder, team: Team) -> Generator[Progress, None, None]:
        """Writes the output's shards into `stage`, a step for each layer."""
        writer = ShardWriter(stage, shard_size=parse_size(self._options.shard_size))
        seen: set[tuple[str, str]] = set()
        done = 0
        try:
            with self.at_work(work, team) as futures:
                for key in self._order:
                    entry, (layer, part) = self._entries[key], self._layer_of(key)
                    if layer is None or (part == "bias" and isinstance(self._settle(layer, work, futures), Kept)):
                        self._pass_through(writer, entry, key)
                        continue
                    if (layer, part) in seen:
                        continue  # the same layer under its second name
                    seen.add((layer, part))
                    if part == "weight":
                        piece = self._await(self._job_of[layer], work, futures)
                        self._place(writer, entry, piece, layer)
                        done += 1
                        yield Progress(layer, done, len(self.jobs))
                    else:
                        self._pass_through(writer, entry, self._names[layer].bias if part == "bias" else key)
            self.bytes_after = writer.finish()
        finally:
            writer.close()

    def _settle(self, layer: str, work: WorkFolder, futures: Mapping[int, Future[None]]) -> Replaced | Kept:
        row = self.settled[layer]
        if isinstance(row, Replaced) and row.rank is None:
            # a bias wider than its weight comes first, and its name hangs on what becomes of the layer
            return settled_row(row, self._await(self._job_of[layer], work, futures))[0]
        return row

    def _await(self, job: Job, work: WorkFolder, futures: Mapping[int, Future[None]]) -> Piece:
        """The piece of a job, once this process or another has made it."""
        future = futures.get(job.number)
        while True:
            if future is not None:
                error = first_error([f for number, f in futures.items() if number <= job.number])
                if error is not None:
                    raise error
            failure = work.failure()
            if failure is not None:
                raise SurgeryError(failure)
            if work.file(job.number).exists() and (future is None or future.done()):
                piece = load_piece(work.file(job.number), verify=False)  # it was verified where it was not just made
                assert piece is not None, job.row.name
                return piece
            if future is not None:
                wait_some([future], 0.5)
            else:
                time.sleep(0.02)

    def _place(self, writer: ShardWriter, entry: Entry, piece: Piece, layer: str) -> None:
        """Writes a layer's factors, or its dense weight where the spectrum said so."""
        row, measured = settled_row(self._job_of[layer].row, piece)
        self.settled[layer] = row
        if measured is None:
            self._pass_through(writer, entry, entry.key)
            return
        self._digests[entry.key] = piece.facts["digest"]
        self.bytes_before += piece.facts["bytes"]
        names = self._names[layer]
        if not self.measured:
            # the tripwire: a load that does not know this format fails on its shape, and not in silence
            writer.add(names.dense, torch.empty(0, dtype=piece.tensors["u"].dtype))
        self.measured[layer] = measured
        writer.add(names.u, piece.tensors["u"])
        writer.add(names.v, piece.tensors["v"])

    def _pass_through(self, writer: ShardWriter, entry: Entry, key: str) -> None:
        """Reads a tensor some at a time and writes it under this key, unless it is a copy of what it is tied to."""
        if self._is_copy(entry):
            self._digests[entry.key] = tensor_digest(entry.dtype, entry.shape, entry.slices())
            self.bytes_before += int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize
            return
        dtype = stored_dtype(entry.dtype, self._options)
        is_weight = entry.target is not None and entry.target not in self._buffers
        found = hashlib.sha256()

        def slices() -> Iterator[Tensor]:
            for part in entry.slices():
                self.bytes_before += part.numel() * part.element_size()
                if is_weight:
                    check_finite(part, entry.key, self._checkpoint.source.reference)
                found.update(tensor_digest(part.dtype, tuple(part.shape), [part]).encode())
                stored = part.to(dtype)
                if stored.dtype != part.dtype:
                    check_overflow(stored, entry.key)
                yield stored

        writer.add_slices(key, dtype, entry.shape, slices())
        self._digests[entry.key] = found.hexdigest()

    def _is_copy(self, entry: Entry) -> bool:
        """Whether this is a second copy of the tensor that it is tied to, which the loader restores by itself."""
        other = self._by_target.get(self._checkpoint.tied.get(entry.target or "", ""))
        if other is None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
            return False
        return all(torch.equal(a, b) for a, b in zip(entry.slices(), other.slices(), strict=True))


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
