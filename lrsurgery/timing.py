"""Timing of one workload, or of two against each other, with a confidence interval.

Machines drift and run other work. Two workloads are therefore interleaved in rounds of A B B A, which cancels linear
drift within a round. Each round gives one ratio, from the median call of each turn. Rounds repeat until the confidence
interval of the median ratio is narrow enough. Medians ignore the outliers that other processes cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

CONFIDENCE = 0.95
TAIL = 40  # 1 / 40 of the probability lies outside the interval on each side
LEAST_ROUNDS = 7
LOOKS = 1.25  # rounds grow by this factor between tests of the interval: frequent tests would stop at a lucky one
SAMPLE = 1e-2  # seconds of calls in one sample, far above the clock's resolution


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Workload:
    """A workload: `run` takes the result of `prepare` (not workload) and yields after every `per` units of work."""

    run: Callable[[Any], Iterator[None]]
    prepare: Callable[[], Any] = _nothing
    per: int = 1

    @staticmethod
    def calls(module: Callable[[Any], object], x: Any, count: int = 1) -> Workload:
        """A workload of `count` calls of a module on one input, without gradients."""

        @torch.inference_mode()
        def run(_: object) -> Iterator[None]:
            for _ in range(count):
                module(x)
            yield

        return Workload(run, per=count)

    def once(self) -> int:
        """Run once to the end and return the units of work done."""
        return self.per * sum(1 for _ in self.run(self.prepare()))


@dataclass(frozen=True)
class Timings:
    """Measurements of one or two workloads, in seconds per unit of work."""

    seconds: tuple[list[float], ...]  # per workload, one value per yield
    rounds: int
    reached: bool  # whether the interval of the ratio (of the seconds, for one workload) reached the precision
    ratio: float | None = None  # seconds of the second over seconds of the first: median over the rounds
    interval: tuple[float, float] | None = None  # of that median, at CONFIDENCE


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with probability `CONFIDENCE` or more, for any distribution.

    Exact for independent values: the number of values below the median is binomial. Source: interval of the sign test,
    Conover, Practical Nonparametric Statistics (1999), section 3.2. Needs at least 6 values.
    """
    ordered, n = sorted(values), len(values)
    below, count, left_out = 0, 1, -1
    while TAIL * (below + count) <= 2**n:
        left_out += 1
        below += count
        count = count * (n - left_out) // (left_out + 1)
    assert left_out >= 0, f"{n} values"
    return ordered[left_out], ordered[n - 1 - left_out]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share (0 to 1) of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def compare(
    workloads: Sequence[Workload],
    *,
    precision: float,
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time one workload, or two against each other, until the interval's relative half width is at most `precision`.

    Stops after `seconds`, but never before `LEAST_ROUNDS` rounds.
    """
    calls = []
    for workload in workloads:
        _sample(workload, 2, device, clock)  # the first calls load kernels
        whole = min(workload.per * sum(_sample(workload, 1, device, clock)) for _ in range(2))
        calls.append(math.ceil(SAMPLE / max(1e-7, whole)))
    samples: tuple[list[float], ...] = tuple([] for _ in workloads)
    values: list[float] = []
    begun, look = clock(), LEAST_ROUNDS
    while True:
        sums = [0.0 for _ in workloads]
        for turn in (0, 1, 1, 0) if len(workloads) == 2 else (0,):
            sample = _sample(workloads[turn], calls[turn], device, clock)
            samples[turn].extend(sample)
            sums[turn] += median(sample)
        values.append(sums[1] / sums[0] if len(workloads) == 2 else sums[0])
        late = clock() - begun >= seconds
        if len(values) < look and not (late and len(values) >= LEAST_ROUNDS):
            continue
        low, high = median_interval(values)
        reached = math.sqrt(high / low) - 1 <= precision
        if reached or late:
            break
        look = math.ceil(len(values) * LOOKS)
    if len(workloads) == 1:
        return Timings(samples, len(values), reached)
    return Timings(samples, len(values), reached, median(values), (low, high))


def _sample(workload: Workload, calls: int, device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds per unit of work, one value per yield of `calls` consecutive calls."""
    seconds = []
    for _ in range(calls):
        steps = workload.run(workload.prepare())
        _wait(device)
        begun = clock()
        for _ in steps:
            _wait(device)
            now = clock()
            seconds.append((now - begun) / workload.per)
            begun = now
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
