"""The layers to be decomposed as jobs: shared out over processes, several at once in each, their results as pieces."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsurgery.checkpoints import Entry
from lrsurgery.errors import SurgeryError, WeightError
from lrsurgery.inits import WITHOUT_DIRECTIONS
from lrsurgery.layers import KINDS, factor_weights
from lrsurgery.moments import Statistics
from lrsurgery.options import DTYPES, Options, pick_device
from lrsurgery.pieces import Piece, load_piece, save_piece
from lrsurgery.plan import Kept, Plan, Replaced
from lrsurgery.report import Row
from lrsurgery.rows import measured_row
from lrsurgery.spectra import SpectrumCache
from lrsurgery.surgery import decompose
from lrsurgery.tensors import as_bytes
from lrsurgery.threads import cost, layer_pool, layers_at_once, memory


@dataclass(frozen=True)
class Job:
    """One layer to decompose; `number` names its piece."""

    number: int
    row: Replaced
    entry: Entry


def share_out(jobs: Sequence[Job], processes: int) -> list[list[Job]]:
    """The jobs of each process: the dearest first, each to whoever has least (Graham 1969), then in their own order."""
    loads = [(0.0, number) for number in range(processes)]
    shares: list[list[Job]] = [[] for _ in range(processes)]
    for job in sorted(jobs, key=lambda job: (-cost(job.row), job.number)):
        load, owner = heapq.heappop(loads)
        shares[owner].append(job)
        heapq.heappush(loads, (load + cost(job.row), owner))
    return [sorted(share, key=lambda job: job.number) for share in shares]


class Decomposer:
    """Does one job: tensor in, piece in the work folder. Threads share it."""

    def __init__(
        self, plan: Plan, options: Options, reference: str, device: torch.device, statistics: Statistics | None = None
    ) -> None:
        self._plan, self._options, self._reference, self._device = plan, options, reference, device
        self._statistics = statistics
        self._cache = SpectrumCache(keep_vectors=options.keep_vectors) if options.cache else None

    def __call__(self, job: Job) -> Piece:
        """Raises WeightError or another SurgeryError that names the layer or its tensor."""
        tensor = job.entry.read()
        facts: dict[str, Any] = {
            "digest": tensor_digest(tensor.dtype, tuple(tensor.shape), [tensor]),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        row, dense = job.row, tensor.to(self._device)
        known = self._cache.get(facts["digest"], row.kind) if self._cache else None

        def choose(values: Tensor) -> int:
            return self._plan.spec.rank_of(row.name, row.rows, row.columns, values)

        keep = self._cache is not None and self._cache.keep_vectors
        metric = self._statistics.metric(row.name) if self._statistics is not None else None
        effort: dict[str, Any] = {"svd": self._options.svd, "known": known, "keep": keep, "metric": metric}
        try:
            result = decompose(row, dense, self._options.init, self._options.seed, choose, **effort)
        except WeightError:
            check_finite(tensor, job.entry.key, self._reference)  # says which file's tensor
            raise
        if self._cache and (known is None or result.spectrum is not None):
            self._cache.put(facts["digest"], row.kind, result)
        chooses = result.values if result.weighted is None else result.weighted
        settled = row if row.rank is not None else self._plan.settle(row, chooses)
        if isinstance(settled, Kept):
            return Piece({**facts, "kept": settled.reason}, {})
        dtype = stored_dtype(dense.dtype, self._options)
        u, v = factor_weights(settled.kind, torch.empty(dense.shape, dtype=dtype, device="meta"), result.factors)
        if dtype != result.factors.u.dtype:
            for factor in (u, v):
                check_overflow(factor, row.name)
        kind = KINDS[settled.kind]
        has_gradients = self._statistics is not None and self._statistics.has_gradients
        measured = measured_row(settled, kind.to_matrix(dense), kind.to_matrices(u, v), result, in_loss=has_gradients)
        if self._options.init in WITHOUT_DIRECTIONS:
            measured = replace(measured, energy_kept=None, spectral_error=None)
        return Piece({**facts, "rank": settled.rank, "row": measured.to_dict()}, {"u": u.cpu(), "v": v.cpu()})


def settled_row(row: Replaced, piece: Piece) -> tuple[Replaced | Kept, Row | None]:
    """The plan's row and the report's once the piece is known."""
    if "kept" in piece.facts:
        return Kept(row.name, row.kind, row.shape, row.parameters, piece.facts["kept"]), None
    return replace(row, rank=piece.facts["rank"]), Row.from_dict(piece.facts["row"])


def stored_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """The dtype in which a tensor of this dtype is written."""
    wanted = DTYPES[options.dtype]
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def tensor_digest(dtype: torch.dtype, shape: tuple[int, ...], slices: Sequence[Tensor] | Iterator[Tensor]) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, which may come some at a time."""
    found = hashlib.sha256(f"{dtype} {shape} ".encode())
    for part in slices:
        if part.numel():
            found.update(as_bytes(part))
    return found.hexdigest()


def check_finite(tensor: Tensor, key: str, reference: str) -> None:
    # the sum of magnitudes is finite only where all are, and needs no copy; where it overflows each one is looked at
    if not tensor.is_floating_point() or not tensor.numel():
        return
    total = torch.linalg.vector_norm(tensor, 1, dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not math.isfinite(float(total)) and not bool(torch.isfinite(tensor).all()):
        raise WeightError(f"{reference}: {key} holds NaN or Inf; repair the checkpoint first")


def check_overflow(stored: Tensor, key: str) -> None:
    if not bool(torch.isfinite(stored).all()):
        raise WeightError(f"{key}: overflows {stored.dtype}; choose another --dtype")


@contextmanager
def at_work(
    jobs: Sequence[Job], do: Callable[[Job], Piece], file_of: Callable[[int], Path], at_once: int | None,
    *, weighted: bool = False,
) -> Iterator[dict[int, Future[None]]]:  # fmt: skip
    """Starts the jobs, some at once; job number -> when its piece is there. What is at work in the end is finished."""
    threads = torch.get_num_threads()
    needs = [memory(job.row, job.entry.dtype.itemsize, weighted=weighted) for job in jobs]

    def run(job: Job) -> None:
        save_piece(file_of(job.number), do(job))

    with layer_pool(at_once or layers_at_once(needs, threads), threads) as pool:
        yield {job.number: pool.submit(run, job) for job in jobs}


def device_of(options: Options, local_rank: int) -> torch.device:
    """The device of this process: with several, one each."""
    device = pick_device(options.device)
    if device.type == "cuda" and device.index is None and local_rank < torch.cuda.device_count():
        return torch.device("cuda", local_rank)
    return device


def still_to_do(jobs: Sequence[Job], file_of: Callable[[int], Path]) -> list[Job]:
    """The jobs whose pieces are not there yet, or are damaged."""
    return [job for job in jobs if load_piece(file_of(job.number)) is None]


def first_error(futures: Sequence[Future[None]]) -> SurgeryError | None:
    """What stopped the first job that was stopped, of those that have ended."""
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if isinstance(error, SurgeryError):
                return error
            if error is not None:
                raise error
    return None


def wait_some(futures: Sequence[Future[None]], seconds: float) -> None:
    """Waits until one more of these has ended, or some time has passed."""
    wait([f for f in futures if not f.done()], timeout=seconds, return_when=FIRST_COMPLETED)
