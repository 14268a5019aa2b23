"""How long decompositions take: a whole model against its competitors, single matrices, and the command's own floor.

model   The 48 matrices of a GPT-2-small-shaped model (124 M parameters) at rank 384, half of full rank, arithmetic
        alone. The twelve (768, 768) ones are over break-even at that rank, and every candidate leaves them dense.
        Against PyPI's greenformer: `auto_fact(solver="svd")` where the package imports, else the one call that it makes
        of each matrix, `torch.svd_lowrank(weight, q=rank, niter=10)`; and a loop of `torch.linalg.svd`.
single  One large matrix against `torch.linalg.svd`, at half and at a sixteenth of full rank.
floor   `factorise` on that model's checkpoint against what no way of doing it can leave out: one Gram product, one
        eigendecomposition and one factor product a matrix, all as plain torch calls, in the better of two arrangements
        (one matrix at a time on all cores, or one a core), and reading and writing the bytes. Files come from the page
        cache; writing waits for the disk. The command runs in new processes: from after the imports to the end, and
        whole.

A row's ratio is its seconds over those of the row that "over" names, round by round. Weights have a power law of
singular values over noise (weights.py). Errors are ||W - U V||_F over the smallest possible one (Eckart & Young), from
singular values in fp64; "excess error" is by how much the worst matrix of a case exceeds it.

    python examples/benchmarks/decompositions.py --save
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import finish, in_turn, parser, ratio, run_measured
from torch import Tensor
from weights import trained_weight

RANK = 384
GREENFORMER_BAR, SVD_BAR, FLOOR_BAR = 5.0, 3.5, 1.5
SINGLE_BARS = {(2048, 8192): 6.0, (4096, 4096): 1.8}  # over torch.linalg.svd at half of full rank
LOW = 16  # full rank over this is the low rank
CHILD = """
import sys, time
begun = time.perf_counter()
from transformers import GPT2LMHeadModel
from lrsurgery import factorise_checkpoint
imported = time.perf_counter()
factorise_checkpoint(sys.argv[1], sys.argv[2], rank=0.5)
print(imported - begun, time.perf_counter() - imported)
"""

Pair = tuple[Tensor, Tensor]  # u (out, rank), v (rank, in)
Solver = Callable[[Tensor, int], Pair]  # of a weight (out, in)


def ours(weight: Tensor, rank: int, *, svd: str = "auto") -> Pair:
    from lrsurgery.linalg import truncated_svd

    return truncated_svd(weight, rank, svd=svd)


def full_svd(weight: Tensor, rank: int) -> Pair:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def lowrank(weight: Tensor, rank: int, *, rounds: int = 10) -> Pair:
    """What greenformer 0.2.2 calls for solver="svd", with its default of ten rounds."""
    u, s, v = torch.svd_lowrank(weight, q=rank, niter=rounds)
    return u * s, v.T


def gpt2_shaped(**shape: int) -> Any:
    """A language model shaped as GPT-2 small, or as said, whose block matrices have a trained spectrum."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**shape))
    for seed, module in enumerate(block_matrices(model)):
        rows, columns = module.weight.shape
        module.weight.data = trained_weight(rows, columns, seed)
    return model.eval()


def block_matrices(model: Any) -> list[Any]:
    from transformers.pytorch_utils import Conv1D

    return [module for module in model.modules() if isinstance(module, Conv1D)]


def row(
    what: str,
    method: str,
    seconds: Sequence[float],
    over: tuple[str, Sequence[float]] | None = None,
    bar: float | None = None,
    excess: float | None = None,
) -> dict[str, Any]:
    found = ratio(seconds, over[1]) if over else {"median": None, "min": None, "max": None}
    return {
        "what": what,
        "method": method,
        "seconds": median(seconds),
        "ratio": found["median"],
        "smallest": found["min"],
        "largest": found["max"],
        "over": over[0] if over else None,
        "bar": bar,
        "excess error": excess,
    }


def compare(
    what: str,
    candidates: Mapping[str, tuple[Solver, float | None]],
    weights: Sequence[Tensor],
    rank: int,
    repeats: int,
    entries: Mapping[str, Callable[[], Any]] | None = None,
) -> list[dict[str, Any]]:
    """A row a candidate (its solver, its bar), compared with the first; `entries` are timed in their solvers' place."""
    runs: dict[str, Callable[[], Any]] = {
        name: partial(solve_each, solver, weights, rank) for name, (solver, _) in candidates.items()
    }
    seconds = in_turn({**runs, **(entries or {})}, repeats)
    first = next(iter(runs))
    least = [float(torch.linalg.svdvals(weight.double())[rank:].norm()) for weight in weights]
    rows = []
    for name, (solver, bar) in candidates.items():
        excess = max(error_of(w, solver(w, rank)) / e - 1 for w, e in zip(weights, least, strict=True))
        over = (first, seconds[first]) if name != first else None
        rows.append(row(what, name, seconds[name], over, bar, excess))
    return rows


def solve_each(solver: Solver, weights: Sequence[Tensor], rank: int) -> None:
    for weight in weights:
        solver(weight, rank)


def error_of(weight: Tensor, pair: Pair) -> float:
    """||W - U V||_F in fp64."""
    u, v = (factor.double() for factor in pair)
    return float((weight.double() - u @ v).norm())


def whole_model(model: Any, repeats: int) -> list[dict[str, Any]]:
    """Rows of the whole model: `factorise_` and its arithmetic, greenformer's, the loop."""
    import lrsurgery

    every = [module.weight.detach().T.contiguous() for module in block_matrices(model)]
    weights = [weight for weight in every if lrsurgery.ranks.break_even_rank(*weight.shape) >= RANK]

    # both entry points work in place, so each run uses up a copy
    def copies() -> list[Any]:
        return [deepcopy(model.transformer.h) for _ in range(repeats + 1)]

    for_us = copies()
    entries: dict[str, Callable[[], Any]] = {
        "lrsurgery.factorise_": lambda: lrsurgery.factorise_(for_us.pop(), rank=RANK)
    }
    try:
        from greenformer import auto_fact  # type: ignore[import-not-found]

        theirs, for_them = "greenformer.auto_fact", copies()
        entries[theirs] = lambda: auto_fact(for_them.pop(), rank=RANK, solver="svd")
    except ImportError as e:
        theirs = f"greenformer's solver call, torch.svd_lowrank(niter=10) (no import: {e})"
    candidates: dict[str, tuple[Solver, float | None]] = {
        "lrsurgery.factorise_": (ours, None),
        "lrsurgery.linalg.truncated_svd": (ours, None),
        theirs: (lowrank, GREENFORMER_BAR),
        "torch.linalg.svd": (full_svd, SVD_BAR),
    }
    what = f"GPT-2-small-shaped, {len(weights)} of {len(every)} matrices, rank {RANK}"
    return compare(what, candidates, weights, RANK, repeats, entries)


def single(repeats: int) -> list[dict[str, Any]]:
    """Rows of single matrices, at half of full rank and at a low one."""
    rows = []
    for (height, width), bar in SINGLE_BARS.items():
        weights = [trained_weight(height, width, 0)]
        half, low = min(height, width) // 2, min(height, width) // LOW
        at_half: dict[str, tuple[Solver, float | None]] = {
            "lrsurgery": (ours, None),
            "torch.linalg.svd": (full_svd, bar),
        }
        at_low: dict[str, tuple[Solver, float | None]] = {
            "lrsurgery": (ours, None),
            "lrsurgery, svd='fast'": (partial(ours, svd="fast"), None),
            "torch.svd_lowrank(niter=2)": (partial(lowrank, rounds=2), None),
            "torch.svd_lowrank(niter=10)": (lowrank, None),
            "torch.linalg.svd": (full_svd, None),
        }
        rows += compare(f"{height}x{width}, rank {half}", at_half, weights, half, repeats)
        rows += compare(f"{height}x{width}, rank {low}", at_low, weights, low, repeats)
    return rows


def floor(model: Any, repeats: int, scratch: Path) -> list[dict[str, Any]]:
    """Rows of the floor's parts, of the floor, and of the command over it."""
    source = scratch / "gpt2"
    model.save_pretrained(source)
    file = source / "model.safetensors"
    every = [module.weight.detach().T for module in block_matrices(model)]
    # as wide matrices; the square ones stay dense
    wide = [w if w.shape[0] < w.shape[1] else w.T for w in every if w.shape[0] != w.shape[1]]
    wide = [w.contiguous() for w in wide]
    grams = [w @ w.T for w in wide]
    bases = [torch.linalg.eigh(g).eigenvectors[:, -RANK:] for g in grams]
    output_bytes = file.stat().st_size - 4 * sum(w.numel() - RANK * sum(w.shape) for w in wide)
    threads = torch.get_num_threads()
    inside: list[tuple[float, float]] = []
    whole: list[float] = []

    def one_a_core() -> None:
        torch.set_num_threads(1)
        list(pool.map(least_work, wide))
        torch.set_num_threads(threads)

    # OpenMP has a number of threads for each thread that calls it, MKL one for all
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(least_work, wide[:threads]))
        torch.set_num_threads(threads)
        arrangements = {
            f"all three, 1 matrix x {threads} threads": lambda: [least_work(w) for w in wide],
            f"all three, {threads} matrices x 1 thread": one_a_core,
        }
        parts: dict[str, Callable[[], Any]] = {
            "Gram products": lambda: [w @ w.T for w in wide],
            "eigendecompositions": lambda: [torch.linalg.eigh(g) for g in grams],
            "factor products": lambda: [b.T @ w for b, w in zip(bases, wide, strict=True)],
            **arrangements,
            "reading": partial(_read, file),
            "writing": partial(_write, scratch / "written", output_bytes),
        }
        command: dict[str, Callable[[], Any]] = {
            "after its imports": lambda: inside.append(_in_new_process(source, scratch)),
            "as a process": lambda: whole.append(_as_process(source, scratch)),
        }
        seconds = in_turn({**parts, **command}, repeats)
    what = f"checkpoint of {file.stat().st_size / 1e6:.0f} MB, {len(wide)} matrices"
    rows = [row(what, name, seconds[name]) for name in parts]
    arithmetic = min((seconds[name] for name in arrangements), key=median)
    least = [sum(three) for three in zip(arithmetic, seconds["reading"], seconds["writing"], strict=True)]
    over = ("the floor", least)
    imports, after = ([pair[i] for pair in inside[-repeats:]] for i in (0, 1))
    rows.append(row(what, "the floor: the better arrangement, reading, writing", least))
    rows.append(row(what, "factorise, its imports", imports))
    rows.append(row(what, "factorise, after its imports", after, over, FLOOR_BAR))
    rows.append(row(what, "factorise, as a process", whole[-repeats:], over))
    return rows


def least_work(wide: Tensor) -> Pair:
    """A Gram product, an eigendecomposition and a factor product, of a wide matrix, and nothing else."""
    basis = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -RANK:]
    return basis, basis.T @ wide


def _read(file: Path) -> None:
    buffer = bytearray(1 << 24)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def _write(file: Path, size: int) -> None:
    block = bytes(1 << 24)
    with file.open("wb", buffering=0) as opened:
        for begin in range(0, size, len(block)):
            opened.write(block[: size - begin])
        os.fsync(opened.fileno())


def _in_new_process(source: Path, scratch: Path) -> tuple[float, float]:
    """Seconds of the imports, and of all else."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        words = [sys.executable, "-c", CHILD, str(source), f"{out}/out"]
        environment = {**os.environ, **_unknown(out), "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    imports, after = done.stdout.split()[-2:]
    return float(imports), float(after)


def _as_process(source: Path, scratch: Path) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        words = ["factorise", str(source), "--rank", "0.5", "--output", f"{out}/out", "--quiet", "--no-loss-check"]
        return run_measured([sys.executable, "-m", "lrsurgery", *words], **_unknown(out))["wall_s"]


def _unknown(folder: str) -> dict[str, str]:
    """An empty cache, so that no spectrum is known beforehand."""
    return {"LRSURGERY_CACHE": f"{folder}/cache"}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--part", action="append", choices=("model", "single", "floor"), help="all if left out")
    arguments = options.parse_args()
    parts = arguments.part or ["model", "single", "floor"]
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        model = gpt2_shaped() if {"model", "floor"} & set(parts) else None
        if "model" in parts:
            rows += whole_model(model, arguments.repeats)
        if "single" in parts:
            rows += single(arguments.repeats)
        if "floor" in parts:
            rows += floor(model, arguments.repeats, Path(scratch))
    finish("decompositions", rows, arguments)


if __name__ == "__main__":
    main()
