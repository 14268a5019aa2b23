"""Sections of gpu.py, each a list of cells: a cell measures what is compared side by side, and gives its rows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import big_checkpoint
import running
import torch
from decompositions import Solver, block_matrices, error_of, full_svd, gpt2_shaped, ours, solve_each
from gpu_cells import TINY_GPT2, TINY_LLAMA, Cell, Row, Setup, peak_of, rounds, row, timed
from gpu_speed import prefill_and_decode
from harness import run_measured
from processes import checkpoint
from torch import Tensor
from weights import trained_weight

import lrsurgery
from lrsurgery.progress import SILENT

STRENGTH = 1e-8  # of Frobenius decay: too small to change the factors over many rounds
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
LLAMA_1B |= {"num_key_value_heads": 4, "vocab_size": 32000}
# the command, then the peak of what torch allocated on the GPU into the file that the first argument names
COMMAND = """
import sys, torch
from lrsurgery.cli.app import main
file = sys.argv.pop(1)
try:
    main()
finally:
    open(file, "w").write(str(torch.cuda.max_memory_allocated()))
"""


def decompositions(setup: Setup) -> list[Cell]:
    """Truncated decompositions against cuSOLVER's: a whole model, then single large matrices."""
    shapes = [(2048, 8192), (4096, 4096), (4096, 11008)] if not setup.tiny else [(32, 96)]
    model = partial(_whole_model, setup, {} if not setup.tiny else TINY_GPT2)
    cells = [Cell(name=setup.shaped("GPT-2-small"), run=model, kind="model", guess=20)]
    for shape in shapes:
        for share in (2, 16):
            rank = min(shape) // share
            name = f"{shape[0]}x{shape[1]}, rank {rank}"
            cells.append(Cell(name=name, run=partial(_single, setup, name, shape, rank), kind="single", guess=10))
    return cells


@torch.no_grad()
def _whole_model(setup: Setup, shape: dict[str, int]) -> list[Row]:
    model = gpt2_shaped(**shape).to(setup.device)
    rank = model.config.n_embd // 2
    every = [module.weight.detach().T.contiguous() for module in block_matrices(model)]
    weights = [weight for weight in every if lrsurgery.ranks.break_even_rank(*weight.shape) >= rank]
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for weight in weights:
        wide = weight if weight.shape[0] < weight.shape[1] else weight.T
        alike.setdefault((wide.shape[0], wide.shape[1]), []).append(wide)
    stacks = [torch.stack(group) for group in alike.values()]
    copies = [deepcopy(model.transformer.h) for _ in range(setup.repeats + 1)]  # it works in place
    cusolver = "torch.linalg.svd"
    runs: dict[str, Callable[[], Any]] = {
        "lrsurgery.factorise_": lambda: lrsurgery.factorise_(copies.pop(), rank=rank, listener=SILENT),
        "lrsurgery.linalg.truncated_svd": partial(solve_each, ours, weights, rank),
        "stacks of one shape, plain torch": lambda: [_least_work(stack, rank) for stack in stacks],
        cusolver: partial(solve_each, full_svd, weights, rank),
    }
    seconds = rounds(runs, setup.repeats, 25)
    error = max(error_of(w, ours(w, rank)) / error_of(w, full_svd(w, rank)) for w in weights)
    errors = {"lrsurgery.factorise_": error, "lrsurgery.linalg.truncated_svd": error}
    what = f"{setup.shaped('GPT-2-small')}, {len(weights)} of {len(every)} matrices, rank {rank}"
    return [row(what, name, **timed(seconds, name, cusolver), error=errors.get(name)) for name in runs]


def _least_work(wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a stack (count, short, long) by its Gram products, one batched eigendecomposition and products."""
    basis = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:]
    return basis, basis.mT @ wide


@torch.no_grad()
def _single(setup: Setup, what: str, shape: tuple[int, int], rank: int) -> list[Row]:
    weight = trained_weight(*shape, 0).to(setup.device)
    solvers: dict[str, Solver] = {
        "lrsurgery": ours,
        "lrsurgery, svd='fast'": partial(ours, svd="fast"),
        "torch.linalg.svd": full_svd,
    }
    seconds = rounds({name: partial(solver, weight, rank) for name, solver in solvers.items()}, setup.repeats, 8)
    least = error_of(weight, full_svd(weight, rank))
    return [
        row(
            what, name, **timed(seconds, name, "torch.linalg.svd"), error=error_of(weight, solver(weight, rank)) / least
        )
        for name, solver in solvers.items()
    ]


def factorise(setup: Setup) -> list[Cell]:
    """The command on a Llama-7B-shaped checkpoint of random weights: all layers on the GPU; one, on the GPU and CPU."""
    if setup.tiny:
        what = setup.shaped("GPT-2-small")
        return [Cell(name=what, run=partial(_commands, setup, what, {"cpu": ()}), kind="all", guess=0)]
    what = f"Llama-7B-shaped, {setup.layers} layers"
    one = f"{what}, those of one factorised"
    of_one = dict.fromkeys(("cuda", "cpu"), ("--include", "model.layers.0.*"))
    return [
        Cell(name=what, run=partial(_commands, setup, what, {"cuda": ()}), kind="all", guess=60),
        Cell(name=one, run=partial(_commands, setup, one, of_one), kind="one", guess=60),
    ]


def _commands(setup: Setup, what: str, more: Mapping[str, tuple[str, ...]]) -> list[Row]:
    """A row for each device, with its further words."""
    if setup.tiny:
        source = checkpoint(setup.scratch / "gpt2", **TINY_GPT2)
    else:
        source = big_checkpoint.make(setup.scratch, setup.layers)
    output, peak = setup.scratch / "out", setup.scratch / "peak"
    rows, seconds = [], {}
    for device, words in more.items():
        command = ["factorise", str(source), "--rank", "0.5", "--output", str(output), "--device", device]
        command += ["--quiet", "--no-cache", "--no-loss-check", *words]
        figures = run_measured([sys.executable, "-c", COMMAND, str(peak), *command])
        seconds[device] = [figures["wall_s"]]
        totals = json.loads((output / "rank_report.json").read_text(encoding="utf-8"))["totals"]
        shutil.rmtree(output)
        on_gpu = int(peak.read_text(encoding="utf-8")) / 1e9 if device != "cpu" else None
        note = f"{totals['layers_factorised']} matrices of {totals['bytes_before'] / 1e9:.3g} GB; imports are counted"
        peaks = {"peak GPU GB": on_gpu, "peak CPU GB": figures["peak_bytes"] / 1e9}
        rows.append(row(what, f"--device {device}", **peaks, note=note))
    for each, device in zip(rows, seconds, strict=True):
        each.update(timed(seconds, device, list(seconds)[-1]))
    return rows


def training(setup: Setup) -> list[Cell]:
    """A training step with Frobenius decay: its time over that of the dense model, and peak GPU memory."""
    cells = []
    for precision in ("fp32", "bf16 autocast"):
        what = f"{setup.shaped('GPT-2-small')}, {running.TRAINED if not setup.tiny else 2} sequences, {precision}"
        run = partial(_steps, setup, what, precision != "fp32")
        cells.append(Cell(name=what, run=run, kind=precision, guess=20))
    return cells


def _steps(setup: Setup, what: str, bf16: bool) -> list[Row]:
    from transformers import GPT2Config

    config = GPT2Config(**(TINY_GPT2 if setup.tiny else {}))
    shape = (running.TRAINED, running.TOKENS) if not setup.tiny else (2, 16)
    x = torch.randint(0, config.vocab_size, shape, device=setup.device)
    variants = {"dense": ("dense", 0.0), "params:0.5, no decay": ("params:0.5", 0.0)}
    variants |= {f"{rank}, Frobenius decay": (rank, STRENGTH) for rank in ("params:0.5", "params:0.25")}

    def make(rank: str, strength: float) -> Callable[[], None]:
        model = running.build(config, rank, setup.device).train()
        return running.training_step(model, x, bf16, frobenius=strength)

    peaks: dict[str, float | None] = {}
    for name, variant in variants.items():  # one at a time, so that a peak is that of one model
        step = make(*variant)
        step()  # makes AdamW's moments
        peaks[name] = peak_of(step)
        del step
    seconds = rounds({name: make(*variant) for name, variant in variants.items()}, setup.repeats, 10)
    speed = {name: x.numel() / median(taken) for name, taken in seconds.items()}
    return [
        row(what, name, **timed(seconds, name, "dense"), **{"tokens/s": speed[name], "peak GPU GB": peaks[name]})
        for name in variants
    ]


def calibration(setup: Setup) -> list[Cell]:
    """Statistics of a 1B-shaped model over a forward and backward on the same tokens; fp32 is what the command uses."""
    cells = []
    for dtype in (torch.float32, torch.bfloat16):
        what = f"{setup.shaped('Llama-1B')}, {str(dtype).removeprefix('torch.')}"
        cells.append(Cell(name=what, run=partial(_statistics, setup, what, dtype), kind=what, guess=30))
    return cells


def _statistics(setup: Setup, what: str, dtype: torch.dtype) -> list[Row]:
    from transformers import LlamaConfig

    config = LlamaConfig(**(TINY_LLAMA if setup.tiny else LLAMA_1B))
    count, shape = (4, (4, 512)) if not setup.tiny else (2, (2, 16))
    model = running.build(config, "dense", setup.device).to(dtype).eval()
    batches = [{"input_ids": torch.randint(0, config.vocab_size, shape, device=setup.device)} for _ in range(count)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    def forward_and_backward() -> None:
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    runs: dict[str, Callable[[], Any]] = {"forward": forward, "forward and backward": forward_and_backward}
    for importance in ("activations", "fisher"):
        runs[importance] = partial(lrsurgery.collect_statistics, model, batches, importance=importance, listener=SILENT)
    peaks = {name: peak_of(run) for name, run in runs.items()}
    seconds = rounds(runs, setup.repeats, 20, warm_up=0)  # each has run once
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return [
        row(
            what,
            name,
            **timed(seconds, name, "forward and backward"),
            **{"tokens/s": tokens / median(seconds[name]), "peak GPU GB": peaks[name]},
        )
        for name in runs
    ]


# each section, and its share of the time that those before it leave; the last takes whatever is left
SECTIONS: dict[str, tuple[Callable[[Setup], list[Cell]], float]] = {
    "decompositions": (decompositions, 0.17),
    "factorise": (factorise, 0.2),
    "training": (training, 0.1),
    "calibration": (calibration, 0.13),
    "prefill and decode": (prefill_and_decode, 0.4),
}
