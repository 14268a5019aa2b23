"""How long something takes, and how much faster one thing is than another, with an interval.

Machines drift and have other work. So two candidates run interleaved, in rounds of A B B A, which cancels any drift
that is even over a round and gives neither the better place; each round gives one ratio; rounds go on until the
interval of the ratios' median is narrow enough. Of each turn the median call counts, and of the rounds the median
ratio: what something else disturbed is a value far out, which neither a median nor its interval minds.
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
TAIL = 40  # 1 / 40 on each side is outside
LEAST_ROUNDS = 7
LOOKS = 1.25  # each look at the interval is after this many times the rounds: many looks would find luck
SAMPLE = 1e-2  # seconds of calls that make one sample, far above the clock's resolution


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Timed:
    """A candidate: `run` takes what `prepare` gave it (not timed) and yields after each `per` times of its work."""

    run: Callable[[Any], Iterator[None]]
    prepare: Callable[[], Any] = _nothing
    per: int = 1

    @staticmethod
    def calls(module: Callable[[Any], object], x: Any, count: int = 1) -> Timed:
        """So many calls of a module on one input, without gradients."""

        @torch.inference_mode()
        def run(_: object) -> Iterator[None]:
            for _ in range(count):
                module(x)
            yield

        return Timed(run, per=count)

    def once(self) -> int:
        """Run to the end, and says how many times it did its work."""
        return self.per * sum(1 for _ in self.run(self.prepare()))


@dataclass(frozen=True)
class Timings:
    """What was found of one or two candidates, seconds each time the work is done."""

    seconds: tuple[list[float], ...]  # of each candidate, one value a yield
    rounds: int
    reached: bool  # whether the interval (of the ratio; of one candidate alone, of its seconds) got narrow enough
    ratio: float | None = None  # the second's seconds over the first's: median over the rounds
    interval: tuple[float, float] | None = None  # of that median, at CONFIDENCE


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with at least `CONFIDENCE`, whatever the distribution.

    Exact for independent values, from the binomial distribution of how many lie below the median. Source: the sign
    test's interval, Conover, Practical Nonparametric Statistics (1999), section 3.2. Needs 6 values at least.
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
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def compare(
    candidates: Sequence[Timed],
    *,
    precision: float,
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time one candidate, or two against each other, until the interval's half width is at most `precision` of it.

    Ends after `seconds`, but never before `LEAST_ROUNDS` rounds.
    """
    calls = []
    for candidate in candidates:
        _sample(candidate, 2, device, clock)  # the first calls load kernels
        whole = min(candidate.per * sum(_sample(candidate, 1, device, clock)) for _ in range(2))
        calls.append(math.ceil(SAMPLE / max(1e-7, whole)))
    found: tuple[list[float], ...] = tuple([] for _ in candidates)
    values: list[float] = []
    begun, look = clock(), LEAST_ROUNDS
    while True:
        sums = [0.0 for _ in candidates]
        for turn in (0, 1, 1, 0) if len(candidates) == 2 else (0,):
            sample = _sample(candidates[turn], calls[turn], device, clock)
            found[turn].extend(sample)
            sums[turn] += median(sample)
        values.append(sums[1] / sums[0] if len(candidates) == 2 else sums[0])
        late = clock() - begun >= seconds
        if len(values) < look and not (late and len(values) >= LEAST_ROUNDS):
            continue
        low, high = median_interval(values)
        reached = math.sqrt(high / low) - 1 <= precision
        if reached or late:
            break
        look = math.ceil(len(values) * LOOKS)
    if len(candidates) == 1:
        return Timings(found, len(values), reached)
    return Timings(found, len(values), reached, median(values), (low, high))


def _sample(candidate: Timed, calls: int, device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds of the work, each time that it was done in some runs in a row; with `per`, the mean of so many times."""
    found = []
    for _ in range(calls):
        steps = candidate.run(candidate.prepare())
        _wait(device)
        begun = clock()
        for _ in steps:
            _wait(device)
            now = clock()
            found.append((now - begun) / candidate.per)
            begun = now
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
