"""Decomposition jobs, one per layer: scheduling over processes, thread pools, and pieces as results.

A piece is a file in a work folder. The processes share the folder, and it survives a kill.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.calibration.statistics import FILE_NAME as STATISTICS
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import Entry
from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.spectra import SpectrumLookup
from lrsurgery.errors import Interrupted, OutputError, SurgeryError, WeightError
from lrsurgery.files.digests import tensor_digest
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import Json, json_text, read_json
from lrsurgery.files.locks import remove_empty
from lrsurgery.files.marks import check_ours, remove_entries, write_mark
from lrsurgery.files.pieces import Piece, load_piece, save_piece
from lrsurgery.files.writing import replace_file
from lrsurgery.linalg.inits import WITHOUT_DIRECTIONS
from lrsurgery.report.rows import measured_row
from lrsurgery.report.schema import Row
from lrsurgery.runtime import Compute, layer_pool, layers_at_once
from lrsurgery.surgery.apply import decompose, decomposition_bytes, decomposition_cost
from lrsurgery.surgery.layers import factor_weights
from lrsurgery.surgery.plan import Kept, Plan, Replacement, SurgeryOptions
from lrsurgery.surgery.ranks import RankSpec

WORK = "work"  # what a work folder's mark says
# what a job writes; job.json says what the others are, so it goes last
ENTRIES = ("to_do.json", "ranks.json", "failed", "statistics", "sequential", "*.safetensors", "*.half", "job.json")


class WorkFolder:
    """A hidden sibling of an output folder with a description of the job and one piece per finished layer.

    Its user holds the lock of the output.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.parent / f".{output.name}.factorising"
        self._output = output
        self._made: list[Path] = []
        self.owned = False  # opened by this process, which may therefore remove it

    def open(self, task: Json, *, resume: bool) -> None:
        """Create the folder for this job, or with `resume` take over the folder of an interrupted one.

        Raises OutputError if the folder belongs to another job, or was not made by this program.
        """
        file = self.path / "job.json"
        wanted: Json = json.loads(json.dumps(dict(task)))
        check_ours(self.path, WORK)
        try:
            left = read_json(file) if self.path.exists() else None
        except SurgeryError:
            left = {}  # killed before job.json was written
        if left:
            if left.get("host") != socket.gethostname() and not resume:
                raise OutputError(
                    f"{self._output}: started on {left.get('host')}; if that job has ended, continue with --resume"
                    f" or remove {self.path}"
                )
            if resume and left.get("task") != wanted:
                was = next((k for k in wanted if (left.get("task") or {}).get(k) != wanted[k]), "")
                raise OutputError(
                    f"{self._output}: the interrupted job had another {was}; pass the same options, or remove --resume"
                    " to start over"
                )
        try:
            self._made += [p for p in (self._output.parent, *self._output.parent.parents) if not p.exists()]
            if not resume or not left:
                remove_entries(self.path, ENTRIES)
            self.path.mkdir(parents=True, exist_ok=True)
            self.owned = True
            write_mark(self.path, WORK)
            replace_file(file, json_text({"task": wanted, "host": socket.gethostname()}))
        except OSError as e:
            raise OutputError(f"{self._output}: cannot be written ({e.strerror})") from e

    def file(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"

    def count(self) -> int:
        """Number of pieces in the folder."""
        return sum(1 for _ in self.path.glob("*.safetensors"))

    def set_to_do(self, numbers: Sequence[int]) -> None:
        """Write the job list: the numbers of the missing pieces."""
        (self.path / "to_do.json").write_text(json.dumps(list(numbers)), encoding="utf-8")
        (self.path / "failed").unlink(missing_ok=True)

    def set_ranks(self, ranks: Mapping[str, int | str | None]) -> None:
        """Write the decision for each layer: a rank, the reason to stay dense, or None if its spectrum decides."""
        (self.path / "ranks.json").write_text(json.dumps(dict(ranks)), encoding="utf-8")

    def ranks(self) -> dict[str, int | str | None]:
        """Read the decisions of `set_ranks`."""
        ranks: dict[str, int | str | None] = json.loads((self.path / "ranks.json").read_text(encoding="utf-8"))
        return ranks

    def to_do(self) -> set[int]:
        """Read the job list of `set_to_do`."""
        return set(json.loads((self.path / "to_do.json").read_text(encoding="utf-8")))

    def fail(self, message: str) -> None:
        """Report an error to the other processes, as far as the folder can be written."""
        with contextlib.suppress(OSError):
            (self.path / "failed").write_text(message, encoding="utf-8")

    def failure(self) -> str | None:
        """The error of another process, if any."""
        file = self.path / "failed"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def kept(self, layers: int) -> str:
        """What there is to resume from, of so many layers; empty for nothing."""
        parts = ["the statistics"] if (self.path / "statistics" / STATISTICS).exists() else []
        parts += [f"{self.count()} of {layers} layers"] if self.count() else []
        return " and ".join(parts)

    def remove(self) -> None:
        """Remove the folder if this process opened it, and the parent folders made for it if there is no output."""
        if not self.owned:
            return
        remove_entries(self.path, ENTRIES)
        if not self._output.exists():
            remove_empty(self._made)


@contextmanager
def keep_work(work: WorkFolder, output: Path, layers: int) -> Iterator[None]:
    """Remove the work folder at the end, unless statistics or finished layers in it can be resumed.

    Raises Interrupted after a signal, OutputError for a disk that refuses; both say what is kept.
    """
    try:
        with disk_faults(output):
            yield
    except (KeyboardInterrupt, SystemExit) as e:
        if kept := work.kept(layers):
            raise Interrupted(f"interrupted; {kept} are kept; run the same command with --resume to continue") from e
        work.remove()
        raise
    except OutputError as e:
        if work.owned and (kept := work.kept(layers)):
            raise OutputError(
                f"{e}; {kept} are kept; once it can be written, run the same command with --resume"
            ) from e.__cause__
        work.remove()
        if e.__cause__ is not None:  # a disk that refuses
            raise OutputError(f"{e}; nothing is kept") from e.__cause__
        raise
    except BaseException:
        work.remove()
        raise
    work.remove()


@dataclass(frozen=True)
class Job:
    """One layer to decompose; `number` names its piece."""

    number: int
    row: Replacement
    entry: Entry


def schedule(jobs: Sequence[Job], processes: int) -> list[list[Job]]:
    """Assign jobs to processes by LPT scheduling (Graham 1969).

    The most expensive job comes first, each goes to the least loaded process; original order within a process.
    """
    loads = [(0.0, number) for number in range(processes)]
    shares: list[list[Job]] = [[] for _ in range(processes)]
    for job in sorted(jobs, key=lambda job: (-decomposition_cost(job.row), job.number)):
        load, owner = heapq.heappop(loads)
        shares[owner].append(job)
        heapq.heappush(loads, (load + decomposition_cost(job.row), owner))
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
        statistics: Statistics | None = None,
    ) -> None:
        self._plan, self._surgery, self._output, self._compute = plan, surgery, output, compute
        self._reference, self._device, self._statistics = reference, device, statistics

    def __call__(self, job: Job) -> Piece:
        """Decompose the layer. Raises WeightError or another SurgeryError that names the layer or its tensor."""
        tensor, row = job.entry.read(), job.row
        lookup = SpectrumLookup(tensor, row.layout, self._compute, self._device)
        known = lookup.spectrum()
        facts: Json = {
            "digest": lookup.digest or tensor_digest(tensor.dtype, tensor.shape, [tensor]),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        dense = tensor.to(self._device)

        def choose(values: Tensor) -> int:
            assert isinstance(self._plan.target, RankSpec)
            return self._plan.target.rank_of(row.name, row.rows, row.columns, values)

        try:
            decomposition = decompose(
                row,
                dense,
                init=self._surgery.init,
                seed=self._surgery.seed,
                rank=choose,
                metric=self._statistics.metric(row.name) if self._statistics is not None else None,
                svd=self._surgery.svd,
                known=known,
                keep=self._compute.keep_vectors,
            )
        except WeightError:
            check_finite(tensor, job.entry.key, self._reference)  # its error names the tensor in the file
            raise
        if known is None or decomposition.spectrum is not None:
            lookup.keep(decomposition)
        values = decomposition.values if decomposition.weighted is None else decomposition.weighted
        decided = row if row.rank is not None else self._plan.decide(row, values)
        if isinstance(decided, Kept):
            return Piece({**facts, "kept": decided.reason}, {})
        dtype = self._output.stored(dense.dtype)
        u, v = factor_weights(row.layout, torch.empty(dense.shape, dtype=dtype, device="meta"), decomposition.factors)
        if dtype != decomposition.factors.u.dtype:
            for factor in (u, v):
                check_overflow(factor, row.name)
        has_gradients = self._statistics is not None and self._statistics.has_gradients
        factors = row.layout.to_matrices(u, v)
        measured = measured_row(decided, row.layout.to_matrix(dense), factors, decomposition, in_loss=has_gradients)
        if self._surgery.init in WITHOUT_DIRECTIONS:
            measured = replace(measured, energy_kept=None, spectral_error=None)
        return Piece({**facts, "rank": decided.rank, "row": measured.to_dict()}, {"u": u.cpu(), "v": v.cpu()})


def row_of_piece(row: Replacement, piece: Piece) -> tuple[Replacement | Kept, Row | None]:
    """The rows of the plan and of the report for a finished piece; None in the report if the layer stays dense."""
    if "kept" in piece.facts:
        return Kept(row.name, row.kind, row.shape, row.parameters, piece.facts["kept"]), None
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
    do: Callable[[Job], Piece],
    file_of: Callable[[int], Path],
    at_once: int | None,
    *,
    weighted: bool = False,
) -> Iterator[dict[int, Future[None]]]:
    """Start the jobs in a thread pool; yield job number -> future of its piece. On exit, running jobs finish."""
    threads = torch.get_num_threads()
    needs = [decomposition_bytes(job.row, job.entry.dtype.itemsize, weighted=weighted) for job in jobs]

    def run(job: Job) -> None:
        save_piece(file_of(job.number), do(job))

    with layer_pool(at_once or layers_at_once(needs, threads), threads) as pool:
        yield {job.number: pool.submit(run, job) for job in jobs}


def find_pending(jobs: Sequence[Job], file_of: Callable[[int], Path]) -> list[Job]:
    """The jobs whose pieces are missing or damaged."""
    return [job for job in jobs if load_piece(file_of(job.number)) is None]


def first_error(futures: Sequence[Future[None]]) -> SurgeryError | None:
    """The SurgeryError of the first failed job, if any; other exceptions are raised."""
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if isinstance(error, SurgeryError):
                return error
            if error is not None:
                raise error
    return None


def wait_some(futures: Sequence[Future[None]], seconds: float) -> None:
    """Wait until another of these futures is done, at most for some seconds."""
    wait([f for f in futures if not f.done()], timeout=seconds, return_when=FIRST_COMPLETED)
