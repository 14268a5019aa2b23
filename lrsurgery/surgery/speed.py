"""Measured times of factorised layers and dense ones on this device, cached on disk.

Fewer operations are not always faster: at a high rank, or in a small layer, two products can take longer than one.
Timed is a forward pass of `POSITIONS` tokens, or of one image with about as many output positions for a convolution.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lrsurgery.errors import SurgeryError
from lrsurgery.files.json import json_text, read_json
from lrsurgery.files.writing import replace_file
from lrsurgery.runtime import cache_folder, processor
from lrsurgery.surgery.kinds.convolution import SIDE
from lrsurgery.surgery.kinds.folds import plain_of
from lrsurgery.surgery.kinds.table import KINDS, kind_of
from lrsurgery.surgery.layers import Kind, Spec, build_dense
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.plan import Plan, Refusal, SurgeryOptions, find_heads, make_plan
from lrsurgery.surgery.rows import Replacement
from lrsurgery.timing import Timings, Workload, compare

POSITIONS = SIDE * SIDE
PRECISION, SECONDS = 0.01, 0.5  # relative precision of the ratio, and time limit, of one measurement
TIMED = 8  # ranks of a layer that a budget of time measures, besides rank 1; others lie between
FORMAT_VERSION = 1

Speedup: TypeAlias = (
    "Callable[[nn.Module, Spec], float]"  # dense layer (only its shape counts), what it becomes -> speedup
)


def plan_layers(
    model: nn.Module,
    options: SurgeryOptions,
    *,
    tied: Mapping[str, str] | None = None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Make the plan of a model. With `options.min_speedup`, layers are timed on `device` and slow ones stay dense.

    Layers are timed in `dtype`, by default each in its own. Raises PlanError and RankError as `plan_rows` does.
    """
    refuse = None
    if options.min_speedup is not None:
        refuse = make_refusal(model, options.conv, options.min_speedup, device, SpeedTable(device, dtype))
    return make_plan(model, options, heads=find_heads(model), tied=tied, refuse=refuse)


def make_refusal(model: nn.Module, conv: str, least: float, device: torch.device, speedup: Speedup) -> Refusal:
    """A function that refuses layers which are less than `least` times as fast at their rank.

    It keeps only the shapes of the model's layers, so no weight stays in memory.
    """
    shapes = _shapes(model, conv)

    def refuse(row: Replacement) -> str | None:
        assert row.rank is not None
        ratio = speedup(shapes[row.name], Spec(row.kind, row.rank, row.pivots, groups=row.groups))
        if ratio >= least:
            return None
        size = f"{1 / ratio:.2f}x slower" if ratio < 1 else f"{ratio:.2f}x as fast, under {least:g}x,"
        return f"{size} at rank {row.rank} on {device.type}"

    return refuse


def _shapes(model: nn.Module, conv: str) -> dict[str, nn.Module]:
    """Each layer that can be factorised, on the meta device."""
    found = {}
    for name, module in dense_layers(model).items():
        kind = kind_of(module, conv)
        plain = plain_of(module)
        if kind is not None and plain.weight.is_floating_point():
            found[name] = build_dense(kind.build(plain, 1))
    return found


class LayerTimes(NamedTuple):
    """Seconds for one position of a layer: a token, or an output position of a convolution."""

    dense: float
    ranks: list[float]  # at each of the ranks asked for; no rank is faster than one below it


Timer: TypeAlias = Callable[[Replacement, Sequence[int]], LayerTimes]


def make_timer(model: nn.Module, conv: str, table: SpeedTable) -> Timer:
    """A function that tells the times of a layer at ascending ranks, most of them between two that are measured."""
    shapes = _shapes(model, conv)

    def times(row: Replacement, ranks: Sequence[int]) -> LayerTimes:
        dense = shapes[row.name]
        whole = table.seconds(dense) / POSITIONS
        if not ranks:
            return LayerTimes(whole, [])
        timed = sorted({ranks[0], *(ranks[(len(ranks) - 1) * k // TIMED] for k in range(1, TIMED + 1))})
        pivoted = row.side is not None
        sides = [row.side if pivoted and r < row.full_rank else None for r in timed]
        specs = [Spec(row.kind, r, side, groups=row.groups) for r, side in zip(timed, sides, strict=True)]
        measured = np.maximum.accumulate([whole / table(dense, spec) for spec in specs])
        return LayerTimes(whole, np.interp(ranks, timed, measured).tolist())

    return times


class SpeedTable:
    """Measured speedups on one device, kept in the cache folder and reused.

    A damaged file, or one of another version, is replaced. If the folder cannot be written, the table lasts for this
    process. Processes of one machine take turns by a file lock, so that they use the same figures and do not disturb
    each other's measurements.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, *, kept: Path | None = None) -> None:
        """Layers are timed in `dtype`, by default each in its own.

        What is looked up is also kept in the file `kept`, and read from it first, so that a job can be done again with
        the same figures.
        """
        self._device, self._dtype, self._kept = device, dtype, kept
        self._file = cache_folder() / "speed.json"
        self._known: dict[str, float] = {}
        self._used = _read(kept) if kept is not None else {}

    def __call__(self, dense: nn.Module, spec: Spec) -> float:
        """Seconds of `dense` over seconds of the layer that it becomes; of `dense` only shape and dtype matter."""
        form = f", pivoted {spec.side}" if spec.side else ""
        dtype = self._dtype_of(dense)
        return self._look_up(
            f"{spec.kind} {dense} rank {spec.rank}{form}",
            dtype,
            lambda: measure_speedup(dense, spec, self._device, dtype),
        )

    def seconds(self, dense: nn.Module) -> float:
        """Seconds of `dense` itself."""
        dtype = self._dtype_of(dense)
        return self._look_up(f"seconds of {dense}", dtype, lambda: measure_seconds(dense, self._device, dtype))

    def _dtype_of(self, dense: nn.Module) -> torch.dtype:
        dtype = self._dtype or dense.weight.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _look_up(self, what: str, dtype: torch.dtype, measure: Callable[[], float]) -> float:
        key = f"{what}, {POSITIONS} positions, {dtype}, {describe(self._device)}"
        if key in self._used:
            return self._used[key]
        if key not in self._known:
            with _lock(self._file):
                self._known |= _read(self._file)
                if key not in self._known:
                    self._known[key] = measure()
                    _write(self._file, self._known)
        self._used[key] = self._known[key]
        if self._kept is not None:
            _write(self._kept, self._used)
        return self._used[key]


def describe(device: torch.device) -> str:
    """Everything else that affects a time: device, threads, torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _read(file: Path) -> dict[str, float]:
    try:
        body = read_json(file)
        if body["format_version"] == FORMAT_VERSION:
            return {str(key): float(value) for key, value in body["speedups"].items() if 0 < float(value) < math.inf}
    except (SurgeryError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _write(file: Path, speedups: dict[str, float]) -> None:
    with contextlib.suppress(SurgeryError):
        replace_file(file, json_text({"format_version": FORMAT_VERSION, "speedups": speedups}))


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold a lock beside the file, if the folder can be written."""
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(file.with_suffix(".lock")))
        yield


@torch.inference_mode()
def measure_speedup(dense: nn.Module, spec: Spec, device: torch.device, dtype: torch.dtype) -> float:
    """Measure dense seconds / factorised seconds, the median over rounds. Uses no global random generator."""
    layout = KINDS[spec.kind]
    timings = _time([layout.make(dense, spec.rank, spec.side), _like(dense, layout)], layout, device, dtype)
    assert timings.ratio is not None
    return timings.ratio


@torch.inference_mode()
def measure_seconds(dense: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Measure seconds of a dense layer, the median over calls."""
    layout = kind_of(dense)
    assert layout is not None
    return median(_time([_like(dense, layout)], layout, device, dtype).seconds[0])


def _like(dense: nn.Module, layout: Kind) -> nn.Module:
    return build_dense(layout.build(dense, 1))


def _time(modules: list[nn.Module], layout: Kind, device: torch.device, dtype: torch.dtype) -> Timings:
    """Time forward passes of modules on the meta device, with random weights; the last is dense."""
    generator = torch.Generator(device).manual_seed(0)

    def random_tensor(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)

    for module in modules:
        module.to(dtype).to_empty(device=device)
        for p in module.parameters():
            p.copy_(random_tensor(*p.shape))
        for order in module.buffers():  # any permutation moves as many numbers
            order.copy_(torch.randperm(len(order), device=device, generator=generator))
    x = random_tensor(*layout.sample_input(modules[-1], POSITIONS))
    workloads = [Workload.calls(module, x) for module in modules]
    return compare(workloads, precision=PRECISION, seconds=SECONDS, device=device)
