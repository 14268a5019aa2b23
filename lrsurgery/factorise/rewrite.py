"""One pass over a checkpoint in the order of the output: what stays passes through, factors take their place."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, Names, choose_names
from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.tensors import ShardWriter, in_write_order
from lrsurgery.errors import SurgeryError
from lrsurgery.factorise.jobs import (
    Decomposer,
    Job,
    WorkFolder,
    at_work,
    check_finite,
    check_overflow,
    first_error,
    row_of_piece,
    share_out,
    wait_some,
)
from lrsurgery.files import Piece, load_piece, tensor_digest
from lrsurgery.progress import Listener
from lrsurgery.report.schema import Row
from lrsurgery.runtime import Compute, Processes
from lrsurgery.surgery.plan import Kept, Plan, Replacement, SurgeryOptions


def aliases_of(model: nn.Module, rows: dict[str, Replacement]) -> dict[str, str]:
    """Every name of a planned layer -> the name in the plan, for layers that a model registers twice."""
    named = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: named[id(module)] for name, module in every if named[id(module)] in rows}


class Rewriter:
    """One pass over a checkpoint's tensors, in the order of the output."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        surgery: SurgeryOptions,
        output: OutputOptions,
        compute: Compute,
        entries: list[Entry],
        statistics: Statistics | None = None,
    ) -> None:
        """The last use of the checkpoint's dense skeleton: it is factorised here."""
        rows = {row.name: row for row in plan.replacements}
        self._aliases = aliases_of(checkpoint.model, rows)
        self._buffers = {name for name, _ in checkpoint.model.named_buffers()}
        self._names: dict[str, Names] = choose_names(checkpoint, entries, rows)
        self.decided: dict[str, Replacement | Kept] = dict(rows)
        self.measured: dict[str, Row] = {}
        self.bytes_before = self.bytes_after = 0
        self._checkpoint, self._plan, self._statistics = checkpoint, plan, statistics
        self._surgery, self._output, self._compute = surgery, output, compute
        self._digests: dict[str, str] = {}
        self._entries = {entry.key: entry for entry in entries}
        self._order = list(in_write_order([(output.stored(e.dtype), e.key) for e in entries]))
        self._order.sort(key=self._turn)
        self._by_target = {entry.target: entry for entry in entries if entry.target}
        weights: dict[str, Entry] = {}
        for key in self._order:
            layer, part = self._layer_of(key)
            if layer is not None and part == "weight":
                weights.setdefault(layer, self._entries[key])  # the same layer under a second name comes later
        self.jobs = [Job(number, self._planned(layer), entry) for number, (layer, entry) in enumerate(weights.items())]
        self._job_of = {job.row.name: job for job in self.jobs}

    def _planned(self, layer: str) -> Replacement:
        row = self.decided[layer]
        assert isinstance(row, Replacement)
        return row

    def _width(self, key: str) -> int:
        return self._output.stored(self._entries[key].dtype).itemsize

    def _turn(self, key: str) -> tuple[int, bool, bool]:
        """What passes through goes first, while layers are at work; a weight before its layer's bias, whose name hangs
        on what becomes of the layer. But wide before narrow, as the writer needs it."""
        layer, part = self._layer_of(key)
        return -self._width(key), layer is not None, part == "bias"

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
            row = self.decided.get(layer) if layer else None
            count, times = int(torch.Size(entry.shape).numel()), 1
            if isinstance(row, Replacement) and part == "weight":
                count, times = row.rank * (row.rows + row.columns) if row.rank is not None else count, 2
            total += times * count * self._output.stored(entry.dtype).itemsize
        return total

    @contextmanager
    def at_work(self, work: WorkFolder, processes: Processes) -> Iterator[dict[int, Future[None]]]:
        """Start this process's share of the jobs in the background; job number -> when its piece is there."""
        to_do = work.to_do()
        jobs = share_out([job for job in self.jobs if job.number in to_do], processes.size)[processes.rank]
        where = self._compute.for_process(processes.local_rank)
        reference = self._checkpoint.source.reference
        do = Decomposer(self._plan, self._surgery, self._output, self._compute, reference, where, self._statistics)
        weighted = self._statistics is not None
        with at_work(jobs, do, work.file, self._compute.jobs, weighted=weighted) as futures:
            yield futures

    def run(self, stage: Path, work: WorkFolder, processes: Processes, listener: Listener) -> None:
        """Write the output's shards into `stage`."""
        writer = ShardWriter(stage, shard_size=self._output.shard_size)
        written: set[tuple[str, str]] = set()
        done = 0
        try:
            with self.at_work(work, processes) as futures:
                for key in self._order:
                    entry, (layer, part) = self._entries[key], self._layer_of(key)
                    if layer is None or (part == "bias" and isinstance(self._decide(layer, work, futures), Kept)):
                        self._pass_through(writer, entry, key)
                        continue
                    if (layer, part) in written:
                        continue  # the same layer under its second name
                    written.add((layer, part))
                    if part == "weight":
                        piece = self._await(self._job_of[layer], work, futures)
                        self._place(writer, entry, piece, layer)
                        done += 1
                        listener.progress(layer, done, len(self.jobs))
                    else:
                        self._pass_through(writer, entry, self._names[layer].bias if part == "bias" else key)
            self.bytes_after = writer.finish()
        finally:
            writer.close()

    def _decide(self, layer: str, work: WorkFolder, futures: Mapping[int, Future[None]]) -> Replacement | Kept:
        row = self.decided[layer]
        if isinstance(row, Replacement) and row.rank is None:
            # a bias wider than its weight comes first, and its name hangs on what becomes of the layer
            return row_of_piece(row, self._await(self._job_of[layer], work, futures))[0]
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
        """Write a layer's factors, or its dense weight where the spectrum said so."""
        row, measured = row_of_piece(self._job_of[layer].row, piece)
        self.decided[layer] = row
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
        """Read a tensor some at a time and writes it under this key, unless it is a copy of what it is tied to."""
        if self._is_copy(entry):
            self._digests[entry.key] = tensor_digest(entry.dtype, entry.shape, entry.slices())
            self.bytes_before += int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize
            return
        dtype = self._output.stored(entry.dtype)
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
