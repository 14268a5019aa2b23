"""How much faster a factorised layer runs than the dense one, measured on this device and kept for the next run.

Fewer operations are not always less time: at a high rank, or in a small layer, two products can take longer than one.
Measured is a forward pass of `POSITIONS` tokens; of a conv, of one image whose output has about as many positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.errors import SurgeryError
from lrsurgery.files import cache_folder, json_text, read_json, replace_file
from lrsurgery.runtime import processor
from lrsurgery.surgery.kinds import KINDS, SIDE, kind_of
from lrsurgery.surgery.layers import build_dense
from lrsurgery.surgery.plan import Plan, Refusal, Replacement, SurgeryOptions, find_heads, make_plan
from lrsurgery.timing import Timed, compare

POSITIONS = SIDE * SIDE
PRECISION, SECONDS = 0.01, 0.5  # rounds go on until the ratio is known so well, and for at most so long
FORMAT_VERSION = 1

Speedup: TypeAlias = "Callable[[nn.Module, str, int], float]"  # of a dense layer's shape, its kind, a rank


def plan_layers(
    model: nn.Module,
    options: SurgeryOptions,
    *,
    tied: Mapping[str, str] | None = None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan for a model; where a minimal speedup is asked for, layers are timed on `device`, slow ones stay dense.

    `dtype` None times each layer in its own. Raises PlanError and RankError as `plan_rows` does.
    """
    refuse = None
    if options.min_speedup is not None:
        refuse = refusal(model, options.conv, options.min_speedup, device, SpeedTable(device, dtype))
    return make_plan(model, options, heads=find_heads(model), tied=tied, refuse=refuse)


def refusal(model: nn.Module, conv: str, least: float, device: torch.device, speedup: Speedup) -> Refusal:
    """Say of a planned layer why it stays dense: at its rank it is not `least` times as fast; None where it is.

    Only the shapes of the model's layers are looked at, and none of its weights is kept alive.
    """
    shapes = {}
    for name, module in model.named_modules():
        kind = kind_of(module, conv)
        if kind is not None and module.weight.is_floating_point():
            shapes[name] = build_dense(kind.build(module, 1))

    def refuse(row: Replacement) -> str | None:
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
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock beside the file, where the folder can be written."""
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(file.with_suffix(".lock")))
        yield


@torch.inference_mode()
def measured_speedup(dense: nn.Module, kind: str, rank: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median over rounds of dense seconds / factorised seconds. Draws from no global generator."""
    generator = torch.Generator(device).manual_seed(0)

    def filled(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)

    layout = KINDS[kind]
    pair = [layout.build(dense, rank), build_dense(layout.build(dense, 1))]
    for module in pair:
        module.to(dtype).to_empty(device=device)
        for p in module.parameters():
            p.copy_(filled(*p.shape))
    x = filled(*layout.sample_input(pair[1], POSITIONS))
    found = compare([Timed.calls(module, x) for module in pair], precision=PRECISION, seconds=SECONDS, device=device)
    assert found.ratio is not None
    return found.ratio
