"""Decomposition jobs, one per layer or group that shares one v: scheduling over processes, thread pools, pieces.

A piece is a file in a work folder. The processes share the folder, and it survives a kill.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import Entry
from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.spectra import SpectrumLookup
from lrsurgery.errors import WeightError
from lrsurgery.factorise.work.folder import WorkFolder
from lrsurgery.factorise.work.running import Running
from lrsurgery.files.digests import tensor_digest
from lrsurgery.files.json import Json
from lrsurgery.files.pieces import Piece, load_piece, save_piece
from lrsurgery.linalg.inits import WITHOUT_DIRECTIONS
from lrsurgery.linalg.weighted import Metric
from lrsurgery.report.rows import measured_row, shared_row
from lrsurgery.report.schema import Row
from lrsurgery.runtime import Compute, layer_pool, layers_at_once
from lrsurgery.surgery.apply import decompose, decomposition_bytes, decomposition_cost
from lrsurgery.surgery.experts.stack import slices_of
from lrsurgery.surgery.layers import Stored, factor_weights, product_factors
from lrsurgery.surgery.plan import Plan, SurgeryOptions
from lrsurgery.surgery.ranks import RankSpec
from lrsurgery.surgery.rows import Kept, Replacement, whole_of
from lrsurgery.surgery.shared.forms import Part, decompose_together, product_of, split_biases, store_together


@dataclass(frozen=True)
class Job:
    """One layer to decompose; `number` names its piece."""

    number: int
    row: Replacement
    entry: Entry
    bias: Entry | None = None
    group: tuple[Job, ...] = ()  # of the first of layers that share one v: all of them, which it decomposes

    @property
    def layers(self) -> tuple[Job, ...]:
        """The jobs whose pieces this one writes."""
        return self.group or (self,)

    @property
    def is_led(self) -> bool:
        """Whether another layer's job writes its piece."""
        return self.row.joint is not None and not self.row.leads

    @property
    def whole(self) -> Replacement:
        """What it decomposes, as one layer."""
        return whole_of([job.row for job in self.layers])


def group_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, of which the first of each group knows the others."""
    by_name = {job.row.name: job for job in jobs}
    return [
        replace(job, group=tuple(by_name[name] for name in job.row.joint.names))
        if job.row.joint is not None and job.row.leads
        else job
        for job in jobs
    ]


def schedule(jobs: Sequence[Job], processes: int) -> list[list[Job]]:
    """Assign jobs to processes by LPT scheduling (Graham 1969).

    The most expensive job comes first, each goes to the least loaded process; original order within a process.
    """
    loads = [(0.0, number) for number in range(processes)]
    shares: list[list[Job]] = [[] for _ in range(processes)]
    for job in sorted(jobs, key=lambda job: (-decomposition_cost(job.whole), job.number)):
        load, owner = heapq.heappop(loads)
        shares[owner].append(job)
        heapq.heappush(loads, (load + decomposition_cost(job.whole), owner))
    return [sorted(share, key=lambda job: job.number) for share in shares]


class Decomposer:
    """Function that does one job: it reads a tensor and returns a piece. Safe to call from several threads."""

    def __init__(
        self,
        plan: Plan,
        surgery: SurgeryOptions,
        output: OutputOptions,
        compute: Compute,
        reference: str,
        device: torch.device,
        owner: str,
        statistics: Statistics | None = None,
    ) -> None:
        """`owner` is the digest of what the whole job depends on."""
        self._owner = owner
        self._plan, self._surgery, self._output, self._compute = plan, surgery, output, compute
        self._reference, self._device, self._statistics = reference, device, statistics

    def __call__(self, job: Job) -> list[Piece]:
        """Decompose the layers of a job. Raises WeightError or another SurgeryError that names the layer or tensor."""
        return self._together(job) if job.group else [self._alone(job)]

    def _together(self, job: Job) -> list[Piece]:
        """The pieces of layers that share one v, which stands in that of the first."""
        assert self._statistics is not None
        assert job.row.rank is not None
        tensors = [each.entry.read() for each in job.group]
        dense = [tensor.to(self._device) for tensor in tensors]
        names = [each.row.name for each in job.group]
        metrics = [self._statistics.metric(name, job.row.kind) for name in names]
        given = [metric for metric in metrics if isinstance(metric, Metric)]
        assert len(given) == len(names)
        try:
            factors, _ = decompose_together(names, job.row.layout, dense, job.row.rank, given)
        except WeightError:
            for each, tensor in zip(job.group, tensors, strict=True):
                check_finite(tensor, each.entry.key, self._reference)
            raise
        like = torch.empty(0, dtype=self._output.stored(dense[0].dtype), device="meta")
        sizes = [each.row.rows for each in job.group]
        parts = store_together(factors, sizes, like, pivoted=job.row.pivots is not None)
        biases = self._biases(job, parts)
        pieces = []
        for each, tensor, part, bias, metric in zip(job.group, tensors, parts, biases, given, strict=True):
            for factor in (part.u, part.v):
                check_overflow(factor, each.row.name)
            lookup = SpectrumLookup(tensor, each.row.layout, self._compute, self._device)
            row = each.row.with_pivots(part.pivots)
            matrix = row.layout.to_matrix(tensor.to(self._device))
            measured = shared_row(row, matrix, product_of(part), lookup.values(), metric)
            facts: Json = {
                **identity_of(each, self._owner),
                "digest": lookup.digest or tensor_digest(tensor.dtype, tensor.shape, [tensor]),
                "bytes": tensor.numel() * tensor.element_size(),
                "rank": row.rank,
                "row": measured.to_dict(),
                "pivots": part.pivots,
            }
            held = {"u": part.u, "order": part.order, "v": part.v if row.leads else None, **bias}
            pieces.append(Piece(facts, {name: value.cpu() for name, value in held.items() if value is not None}))
        return pieces

    def _biases(self, job: Job, parts: Sequence[Part]) -> list[dict[str, Tensor]]:
        """The biases of the pieces of a pivoted group: each has a part of every dense one."""
        entries = [each.bias for each in job.group]
        if job.row.pivots is None or None in entries:
            return [{} for _ in entries]
        read = []
        for entry in entries:
            assert entry is not None
            bias = entry.read()
            check_finite(bias, entry.key, self._reference)
            read.append(bias.to(self._output.stored(entry.dtype)))
        shared, own = split_biases(read, parts)
        assert shared is not None
        found = [{"u_bias": bias} for bias in own]
        found[0]["v_bias"] = shared
        for each, biases in zip(job.group, found, strict=True):
            for bias in biases.values():
                check_overflow(bias, f"{each.row.name}.bias")
        return found

    def _alone(self, job: Job) -> Piece:
        tensor, row = job.entry.weight(), job.row
        lookup = SpectrumLookup(tensor, row.layout, self._compute, self._device, row.groups)
        known = lookup.spectrum()
        facts: Json = {
            **identity_of(job, self._owner),
            "digest": lookup.digest or tensor_digest(tensor.dtype, tuple(tensor.shape), slices_of(tensor)),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        dense: Any = tensor.to(self._device)

        def choose(values: Tensor) -> int:
            assert isinstance(self._plan.target, RankSpec)
            return row.rank_by(self._plan.target, values)

        try:
            decomposition = decompose(
                row,
                dense,
                init=self._surgery.init,
                seed=self._surgery.seed,
                rank=choose,
                metric=self._statistics.metric_of(row) if self._statistics is not None else row.prior,
                svd=self._surgery.svd,
                known=known,
                keep=self._compute.keep_vectors,
            )
        except WeightError:
            for part in slices_of(tensor):  # its error names the tensor in the file
                check_finite(part, job.entry.key, self._reference)
            raise
        if known is None or decomposition.spectrum is not None:
            lookup.keep(decomposition)
        values = decomposition.values if decomposition.weighted is None else decomposition.weighted
        decided = row if row.rank is not None else self._plan.decide(row, values)
        if isinstance(decided, Kept):
            return Piece({**facts, "kept": decided.reason}, {})
        dtype = self._output.stored(dense.dtype)
        meta = torch.empty(dense.shape, dtype=dtype, device="meta")
        stored = factor_weights(row.layout, meta, decomposition.factors, decided.pivots)
        if dtype != decomposition.factors.u.dtype:
            for factor in (stored.u, stored.v):
                check_overflow(factor, row.name)
        has_gradients = self._statistics is not None and self._statistics.has_gradients
        factors = product_factors(row.layout, stored, decided.pivots)
        matrix = row.layout.matrix_of(dense, row.groups)
        measured = measured_row(decided, matrix, factors, decomposition, in_loss=has_gradients)
        if self._surgery.init in WITHOUT_DIRECTIONS:
            measured = replace(measured, energy_kept=None, spectral_error=None)
        return Piece({**facts, "rank": decided.rank, "row": measured.to_dict()}, tensors_of(stored))


def tensors_of(stored: Stored) -> dict[str, Tensor]:
    """The tensors of a piece."""
    return {name: tensor.cpu() for name, tensor in stored._asdict().items() if tensor is not None}


def identity_of(job: Job, owner: str) -> Json:
    """Whose a piece is: the whole job, its layer and the rank that was asked for it, None if its spectrum decides."""
    row, entry = job.row, job.entry
    return {
        "job": owner,
        "layer": row.name,
        "kind": row.kind,
        "shape": list(entry.shape),
        "dtype": str(entry.dtype),
        "asked": row.rank,
        "side": row.side,
        "together": None if row.joint is None else list(row.joint.names),
    }


def row_of_piece(row: Replacement, piece: Piece) -> tuple[Replacement | Kept, Row | None]:
    """The rows of the plan and of the report for a finished piece; None in the report if the layer stays dense."""
    if "kept" in piece.facts:
        return Kept(row.name, row.kind, row.shape, row.parameters, piece.facts["kept"]), None
    if row.joint is not None:
        pivots = piece.facts["pivots"]
        row = row.with_pivots(None if pivots is None else (pivots[0], pivots[1]))
    return replace(row, rank=piece.facts["rank"]), Row.from_dict(piece.facts["row"])


def check_finite(tensor: Tensor, key: str, reference: str) -> None:
    """Raise WeightError that names the tensor if it holds NaN or Inf."""
    # the sum of magnitudes needs no copy and is finite only if all entries are; if it overflows, test each entry
    if not tensor.is_floating_point() or not tensor.numel():
        return
    total = torch.linalg.vector_norm(tensor, 1, dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not math.isfinite(float(total)) and not bool(torch.isfinite(tensor).all()):
        raise WeightError(f"{reference}: {key} holds NaN or Inf; repair the checkpoint first")


def check_overflow(stored: Tensor, key: str) -> None:
    """Raise WeightError if the conversion to the stored dtype overflowed."""
    if not bool(torch.isfinite(stored).all()):
        raise WeightError(f"{key}: overflows {stored.dtype}; choose another --dtype")


@contextmanager
def start_jobs(
    jobs: Sequence[Job],
    do: Callable[[Job], Sequence[Piece]],
    file_of: Callable[[int], Path],
    at_once: int | None,
    *,
    weighted: bool = False,
) -> Iterator[Running]:
    """Start the jobs in a thread pool. On exit, running jobs finish."""
    threads = torch.get_num_threads()
    needs = [
        decomposition_bytes(job.whole, job.entry.dtype.itemsize, weighted=weighted or job.row.by_order) for job in jobs
    ]

    def run(job: Job) -> None:
        for each, piece in zip(job.layers, do(job), strict=True):
            save_piece(file_of(each.number), piece)

    with layer_pool(at_once or layers_at_once(needs, threads), threads) as pool:
        futures = {job.number: pool.submit(run, job) for job in jobs}
        every = {each.number: futures[job.number] for job in jobs for each in job.layers}
        yield Running(dict(sorted(every.items())))


def find_pending(jobs: Sequence[Job], work: WorkFolder) -> list[Job]:
    """The jobs whose pieces are missing, damaged, or of another job, layer or tensor."""
    owner = work.job
    return [
        job
        for job in jobs
        if not job.is_led and not all(_has_piece(each, work.file(each.number), owner) for each in job.layers)
    ]


def _has_piece(job: Job, file: Path, owner: str) -> bool:
    piece = load_piece(file)
    if piece is None:
        return False
    if any(piece.facts.get(name) != value for name, value in identity_of(job, owner).items()):
        return False
    return bool(piece.facts["digest"] == tensor_digest(job.entry.dtype, job.entry.shape, job.entry.slices()))
