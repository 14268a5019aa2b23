"""How much faster a factorised layer runs than the dense one, measured on this device and kept for the next run.

Fewer operations are not always less time: at a high rank, or in a small layer, two products can take longer than one.
Measured is a forward pass of `POSITIONS` tokens; of a conv, of one image whose output has about as many positions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.cache import cache_folder
from lrsurgery.layers import KINDS, build_dense, kind_of
from lrsurgery.plan import Refusal, Replaced

SIDE = 16  # of a conv's output
POSITIONS = SIDE * SIDE
LEAST_ROUNDS, SECONDS = 7, 0.5  # rounds go on for these seconds, and are never fewer than these
SAMPLE = 1e-3  # seconds of calls that are timed together, far above the clock's own
FORMAT_VERSION = 1

Speedup: TypeAlias = "Callable[[nn.Module, str, int], float]"  # of a dense layer's shape, its kind, a rank


def refusal(model: nn.Module, conv: str, least: float, device: torch.device, speedup: Speedup) -> Refusal:
    """Says of a planned layer why it stays dense: at its rank it is not `least` times as fast; None where it is.

    Only the shapes of the model's layers are looked at, and none of its weights is kept alive.
    """
    shapes = {}
    for name, module in model.named_modules():
        kind = kind_of(module, conv)
        if kind is not None and module.weight.is_floating_point():
            shapes[name] = build_dense(KINDS[kind].build(module, kind, 1))

    def refuse(row: Replaced) -> str | None:
        assert row.rank is not None
        found = speedup(shapes[row.name], row.kind, row.rank)
        if found >= least:
            return None
        size = f"{1 / found:.2f}x slower" if found < 1 else f"{found:.2f}x as fast, under {least:g}x,"
        return f"{size} at rank {row.rank} on {device.type}"

    return refuse


class SpeedTable:
    """Measured speedups of one device, kept in the cache folder so that a second run measures nothing.

    A file that is damaged or of another version is started anew; where none can be written, the table lasts for a run.
    Processes of one machine take turns, so that they find the same figures and do not disturb each other's.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """`dtype` None is each layer's own."""
        self._device, self._dtype = device, dtype
        self._file = cache_folder() / "speed.json"
        self._known: dict[str, float] = {}

    def __call__(self, dense: nn.Module, kind: str, rank: int) -> float:
        """Seconds of `dense` over seconds of its factorised form; of `dense` only shape and dtype matter."""
        dtype = self._dtype or dense.weight.dtype
        assert isinstance(dtype, torch.dtype)
        key = f"{kind} {dense} rank {rank}, {POSITIONS} positions, {dtype}, {_words(self._device)}"
        if key not in self._known:
            with _alone(self._file):
                self._known |= _read(self._file)
                if key not in self._known:
                    self._known[key] = measured_speedup(dense, kind, rank, self._device, dtype)
                    _write(self._file, self._known)
        return self._known[key]


def _words(device: torch.device) -> str:
    """What else decides a time: the processor, the threads, the version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    """What this machine's processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, float]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        if body["format_version"] == FORMAT_VERSION:
            return {str(key): float(value) for key, value in body["speedups"].items() if 0 < float(value) < math.inf}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _write(file: Path, speedups: dict[str, float]) -> None:
    text = json.dumps({"format_version": FORMAT_VERSION, "speedups": speedups}, indent=2) + "\n"
    with contextlib.suppress(OSError):
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Holds a lock beside the file, where the folder can be written and the system has such locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(file.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


@torch.inference_mode()
def measured_speedup(dense: nn.Module, kind: str, rank: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median over rounds of dense seconds / factorised seconds. Draws from no global generator."""
    generator = torch.Generator(device).manual_seed(0)

    def filled(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)

    pair = [build_dense(KINDS[kind].build(dense, kind, 1)), KINDS[kind].build(dense, kind, rank)]
    for module in pair:
        module.to(dtype).to_empty(device=device)
        for p in module.parameters():
            p.copy_(filled(*p.shape))
    x = filled(*_input_shape(pair[0], kind))
    calls = []
    for module in pair:
        _seconds(module, x, 2)  # the first call loads kernels
        calls.append(max(1, math.ceil(SAMPLE / _seconds(module, x, 1))))
    ratios: list[float] = []
    begun = time.perf_counter()
    while len(ratios) < LEAST_ROUNDS or time.perf_counter() - begun < SECONDS:
        whole, factorised = (_seconds(module, x, n) / n for module, n in zip(pair, calls, strict=True))
        ratios.append(whole / factorised)
    return median(ratios)


def _input_shape(dense: Any, kind: str) -> tuple[int, ...]:
    if not isinstance(dense, nn.Conv2d):
        return (POSITIONS, KINDS[kind].matrix_shape(dense.weight.shape)[1])
    # at least the kernel's reach, where a huge one is not padded
    sides = (
        max(SIDE * s, d * (k - 1) + 1) for s, d, k in zip(dense.stride, dense.dilation, dense.kernel_size, strict=True)
    )
    return (1, dense.in_channels, *sides)


def _seconds(module: nn.Module, x: Tensor, calls: int) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begun = time.perf_counter()
    for _ in range(calls):
        module(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begun
