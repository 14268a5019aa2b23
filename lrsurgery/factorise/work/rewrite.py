"""Writing of the output in one pass: unchanged tensors are copied, planned layers are replaced by their factors."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.loading.check import check_folder
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, Names, choose_names, layer_of
from lrsurgery.checkpoints.output import OutputOptions, ShardWriter, in_write_order
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.errors import OutputError, SurgeryError
from lrsurgery.factorise.work.check import check_outputs
from lrsurgery.factorise.work.folder import WorkFolder
from lrsurgery.factorise.work.jobs import (
    Decomposer,
    Job,
    check_finite,
    check_overflow,
    group_jobs,
    row_of_piece,
    schedule,
    start_jobs,
)
from lrsurgery.factorise.work.running import Running
from lrsurgery.files.digests import as_bytes, digest_of_all, tensor_digest, tensor_header
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.pieces import Piece, load_piece
from lrsurgery.progress import Listener
from lrsurgery.report.schema import Row
from lrsurgery.runtime import Compute, Processes
from lrsurgery.surgery.layers import Stored, product_factors, split_bias
from lrsurgery.surgery.plan import Plan, SurgeryOptions
from lrsurgery.surgery.rows import Kept, Replacement
from lrsurgery.surgery.shared.forms import Part, product_of


def aliases_of(model: nn.Module, rows: dict[str, Replacement]) -> dict[str, str]:
    """Map every name of a planned layer to its name in the plan; a shared or tied layer has several names."""
    named = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    found = {name: named[id(module)] for name, module in every if named[id(module)] in rows}
    found |= {name: row.name for row in rows.values() for name, _ in row.tied}
    return found | {name: name for name, row in rows.items() if row.layout.parameter}  # no module


class Rewriter:
    """Writer of a factorised checkpoint, in one pass over the tensors in the order of the output."""

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
        """Factorises the checkpoint's skeleton, so make this its last use."""
        rows = {row.name: row for row in plan.replacements}
        self._aliases = aliases_of(checkpoint.model, rows)
        self._buffers = {name for name, _ in checkpoint.model.named_buffers()}
        self._names: dict[str, Names] = choose_names(checkpoint, entries, rows, self._aliases)
        self.decided: dict[str, Replacement | Kept] = dict(rows)
        self.measured: dict[str, Row] = {}
        self.bytes_before = self.bytes_after = 0
        self._checkpoint, self._plan, self._statistics = checkpoint, plan, statistics
        self._surgery, self._output, self._compute = surgery, output, compute
        self._digests: dict[str, str] = {}
        self._entries = {entry.key: entry for entry in entries}
        self._order = list(in_write_order([(output.stored(e.dtype), e.key) for e in entries]))
        self._order.sort(key=self._sort_key)
        self._by_target = {entry.target: entry for entry in entries if entry.target}
        weights: dict[str, Entry] = {}
        for key in self._order:
            layer, part = self._layer_of(key)
            if layer is not None and part == "weight":
                weights.setdefault(layer, self._entries[key])  # a shared layer counts under its first name
        self.jobs = group_jobs(
            [
                Job(number, self._planned_row(layer), entry, self._by_target.get(f"{layer}.bias"))
                for number, (layer, entry) in enumerate(weights.items())
            ]
        )
        self._job_of = {job.row.name: job for job in self.jobs}
        # a folder with the code of its layers has none, as nothing else loads it
        self._tripwire, self._all_folded = output.remote_code, all(job.entry.parts for job in self.jobs)

    def _planned_row(self, layer: str) -> Replacement:
        row = self.decided[layer]
        assert isinstance(row, Replacement)
        return row

    def _width(self, key: str) -> int:
        return self._output.stored(self._entries[key].dtype).itemsize

    def _sort_key(self, key: str) -> tuple[int, bool, bool]:
        """Sort key of the output: wide dtypes first (required by the writer), then tensors to copy, then layers.

        Copying first keeps the writer busy while layers are decomposed. A bias follows its weight, since its name
        depends on whether the layer is factorised.
        """
        layer, part = self._layer_of(key)
        return -self._width(key), layer is not None, part == "bias"

    def _names_of(self, entry: Entry) -> Names:
        """The keys of the factors under the name of the layer that this entry has."""
        return self._names[layer_of(entry.target, self._aliases)[0]]

    def _layer_of(self, key: str) -> tuple[str | None, str]:
        """(planned layer, "weight" or "bias") of a key; the layer is None for a tensor to copy."""
        name, part = layer_of(self._entries[key].target, self._aliases)
        return self._aliases.get(name), part

    @property
    def digest(self) -> str:
        """Digest of all source tensors and their names."""
        return digest_of_all(self._digests)

    @property
    def expected_bytes(self) -> int:
        """Disk space of the output and of the pieces, which are kept until the output is complete."""
        total = 0
        for key, entry in self._entries.items():
            layer, part = self._layer_of(key)
            row = self.decided.get(layer) if layer else None
            count, times = int(torch.Size(entry.shape).numel()), 1
            if isinstance(row, Replacement) and part == "weight":
                factors = row.factorised_parameters
                count, times = factors - row.bias if factors is not None else count, 2
            total += times * count * self._output.stored(entry.dtype).itemsize
        return total

    @contextmanager
    def start_jobs(self, work: WorkFolder, processes: Processes) -> Iterator[Running]:
        """Start this process's share of the jobs in the background."""
        to_do = work.to_do()
        jobs = schedule([job for job in self.jobs if job.number in to_do], processes.size)[processes.rank]
        where = self._compute.for_process(processes.local_rank)
        reference = self._checkpoint.source.reference
        do = Decomposer(
            self._plan, self._surgery, self._output, self._compute, reference, where, work.job, self._statistics
        )
        weighted = self._statistics is not None
        with start_jobs(jobs, do, work.file, self._compute.jobs, weighted=weighted) as running:
            yield running

    def do_jobs(self, work: WorkFolder, processes: Processes) -> None:
        """Do this process's share of the jobs, for processes other than rank 0."""
        try:
            with disk_faults(work.path), self.start_jobs(work, processes) as running:
                running.wait_for_all()
        except SurgeryError as e:
            work.fail(str(e))
            raise

    def check_space(self, stage: Path) -> None:
        """Raise OutputError if the disk has no room for the output and the pieces."""
        free = shutil.disk_usage(stage).free
        if self.expected_bytes > free:
            raise OutputError(
                f"{stage.parent}: {self.expected_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free;"
                " choose another --output"
            )

    def run(self, stage: Path, work: WorkFolder, processes: Processes, listener: Listener) -> None:
        """Write the shards of the output into `stage`."""
        orders = sum(
            4 * max(row.rows, row.columns) * (1 + len(row.tied))
            for row in self._plan.replacements
            if row.side is not None
        )
        writer = ShardWriter(stage, shard_size=self._output.shard_size, in_front=orders)
        written: set[str] = set()
        try:
            with self.start_jobs(work, processes) as running:
                for key in self._order:
                    entry, (layer, part) = self._entries[key], self._layer_of(key)
                    if layer is None or (part == "bias" and isinstance(self._decide(layer, work, running), Kept)):
                        self._copy(writer, entry, key)
                        continue
                    if part == "weight" and self._is_tied_copy(entry):
                        self._skip(entry)
                        continue
                    piece = self._wait_for_piece(self._job_of[layer], work, running)
                    if part == "weight":
                        self._write_layer(writer, entry, piece, layer)
                        written.add(layer)  # a shared layer comes once more under each other name
                        listener.progress(layer, len(written), len(self.jobs))
                    elif part == "bias":
                        self._write_bias(writer, entry, piece, layer)
                    else:
                        self._copy(writer, entry, key)
            self.bytes_after = writer.finish()
        finally:
            writer.close()

    def check(self, stage: Path, work: WorkFolder, source_options: SourceOptions, listener: Listener) -> None:
        """Check that the output loads; with --check, that it computes what the plan's own factors compute.

        Raises SurgeryError, so that no output is published which does not.
        """
        source, trust = self._checkpoint.source, source_options.trust_remote_code
        check_folder(stage, source.reference, unused=self._checkpoint.unused, trust_remote_code=trust)
        if self._output.check and source_options.from_scratch_seed is not None:
            listener.note("--check: not done, since a model from scratch has no weights to compare with")
        elif self._output.check:
            listener.note(
                check_outputs(source, stage, self._factors(work), self._output.dtype, trust_remote_code=trust)
            )

    def _factors(self, work: WorkFolder) -> dict[str, tuple[Tensor, Tensor]]:
        """The plan's own factors, layer -> (u.weight, v.weight), from the pieces of a finished job."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        pieces: dict[str, Piece] = {}
        for job in self.jobs:
            piece = load_piece(work.file(job.number))
            assert piece is not None, job.row.name
            pieces[job.row.name] = piece
        for job in self.jobs:
            piece = pieces[job.row.name]
            row, _ = row_of_piece(job.row, piece)
            if isinstance(row, Replacement) and row.joint is not None:
                v = pieces[row.joint.names[0]].tensors["v"]
                found[row.name] = product_of(Part(piece.tensors["u"], v, piece.tensors.get("order"), row.spec.pivots))
            elif isinstance(row, Replacement):
                factors = product_factors(row.layout, Stored(**piece.tensors), row.pivots)
                found[row.name] = row.layout.to_weights(factors, torch.Size(row.shape))
        return found

    def _decide(self, layer: str, work: WorkFolder, running: Running) -> Replacement | Kept:
        row = self.decided[layer]
        if isinstance(row, Replacement) and row.rank is None:
            # a bias with a wider dtype comes before its weight, and its name depends on the decision for the layer
            return row_of_piece(row, self._wait_for_piece(self._job_of[layer], work, running))[0]
        return row

    def _wait_for_piece(self, job: Job, work: WorkFolder, running: Running) -> Piece:
        """Wait until this process or another has written the piece of a job, and load it."""
        while True:
            ours = job.number in running
            done = running.wait_for(job.number, 0.5) if ours else work.file(job.number).exists()
            failure = work.failure()
            if failure is not None:
                raise SurgeryError(failure)
            if done:
                piece = load_piece(work.file(job.number), verify=False)  # old pieces were verified by `find_pending`
                assert piece is not None, job.row.name
                return piece
            if not ours:
                time.sleep(0.02)

    def _write_layer(self, writer: ShardWriter, entry: Entry, piece: Piece, layer: str) -> None:
        """Write a layer's factors, or its dense weight if its spectrum decided so."""
        row, measured = row_of_piece(self._job_of[layer].row, piece)
        self.decided[layer] = row
        if measured is None:
            self._copy(writer, entry, entry.key)
            return
        self._digests[entry.key] = piece.facts["digest"]
        self.bytes_before += piece.facts["bytes"]
        names = self._names_of(entry)
        if not self._tripwire and (not entry.parts or self._all_folded):
            # tripwire: a loader without lrsurgery fails on its shape instead of ignoring the factors silently
            self._tripwire = True
            writer.add(names.of("weight"), torch.empty(0, dtype=piece.tensors["u"].dtype))
        self.measured[layer] = measured
        writer.add(names.of("u.weight"), piece.tensors["u"])
        if "v" in piece.tensors:  # another layer's piece has that of a layer which shares it
            writer.add(names.of("v.weight"), piece.tensors["v"])
        if "order" in piece.tensors:  # wider than weights of 2 bytes, and known no sooner
            # each layer that is tied has an order of its own; the files have one of their names
            alike = [name for name, _ in self._job_of[layer].row.tied]
            for key in dict.fromkeys([names.of("order"), *(f"{name}.order" for name in alike and [layer, *alike])]):
                writer.add_in_front(key, piece.tensors["order"])

    def _write_bias(self, writer: ShardWriter, entry: Entry, piece: Piece, layer: str) -> None:
        """Write the bias of a factorised layer: of its u, and a part of its v where the pivots are rows."""
        row, _ = row_of_piece(self._job_of[layer].row, piece)
        names = self._names_of(entry)
        if not isinstance(row, Replacement) or row.pivots != "rows":
            self._copy(writer, entry, names.of("u.bias"))
            return
        bias = entry.read()
        check_finite(bias, entry.key, self._checkpoint.source.reference)
        self._digests[entry.key] = tensor_digest(entry.dtype, entry.shape, [bias])
        self.bytes_before += bias.numel() * bias.element_size()
        if row.joint is not None:
            for name, key in ((names.of("v.bias"), "v_bias"), (names.of("u.bias"), "u_bias")):
                if key in piece.tensors:
                    writer.add(name, piece.tensors[key])
            return
        parts = split_bias(row.layout, bias.to(self._output.stored(entry.dtype)), Stored(**piece.tensors), row.pivots)
        for name, part in zip((names.of("v.bias"), names.of("u.bias")), parts, strict=True):
            assert part is not None
            check_overflow(part, entry.key)
            writer.add(name, part)

    def _copy(self, writer: ShardWriter, entry: Entry, key: str) -> None:
        """Copy a tensor to the output under this key, slice by slice; skip a copy of the tensor it is tied to."""
        if entry.parts:  # of a layer that stays dense after all
            for part in entry.parts:
                self._copy(writer, part, part.key)
            return
        if self._is_tied_copy(entry):
            self._skip(entry)
            return
        dtype = self._output.stored(entry.dtype)
        is_weight = entry.target is not None and entry.target not in self._buffers
        hasher = hashlib.sha256(tensor_header(entry.dtype, entry.shape))

        def slices() -> Iterator[Tensor]:
            for part in entry.slices():
                self.bytes_before += part.numel() * part.element_size()
                if is_weight:
                    check_finite(part, entry.key, self._checkpoint.source.reference)
                hasher.update(as_bytes(part))
                stored = part.to(dtype)
                if stored.dtype != part.dtype:
                    check_overflow(stored, entry.key)
                yield stored

        writer.add_slices(key, dtype, entry.shape, slices())
        self._digests[entry.key] = hasher.hexdigest()

    def _skip(self, entry: Entry) -> None:
        self._digests[entry.key] = tensor_digest(entry.dtype, entry.shape, entry.slices())
        self.bytes_before += int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize

    def _is_tied_copy(self, entry: Entry) -> bool:
        """Whether this tensor equals the one it is tied to, so that the loader restores it."""
        other = self._by_target.get(self._checkpoint.tied.get(entry.target or "", ""))
        if other is None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
            return False
        return all(torch.equal(a, b) for a, b in zip(entry.slices(), other.slices(), strict=True))
