"""Several layers at once on the threads of one process, and how many fit.

An eigensolver uses a second thread badly, and waits long where other processes are at work; a second layer does not.
Measured on two cores (examples/benchmarks/decompositions.py): two layers on one thread each take 0.5 to 1.0 of the time
of one after the other on two threads. With as many threads a layer, a layer's factors have the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from lrsurgery.plan import Replaced

MEMORY = 1 << 30  # bytes that the layers at work may take together, or two of the largest where they need more
Item = TypeVar("Item")
Result = TypeVar("Result")


def cost(row: Replaced) -> float:
    """Proportional to a decomposition's time: products over the long side, an eigensolver worth four of the short."""
    short, long = sorted((row.rows, row.columns))
    return float(short) ** 2 * (long + 4 * short)


def memory(row: Replaced, item_size: int, *, weighted: bool = False) -> int:
    """Bytes at a decomposition's peak: the tensor, its copy in fp32, the eigensolver's five squares, factors twice.

    In a metric all of that is in fp64, with both of the metric's moments, read in fp32 and damped.
    """
    short, long = sorted((row.rows, row.columns))
    wide = max(8 if weighted else 4, item_size)
    if weighted:
        squares = row.rows**2 + row.columns**2
        return 12 * squares + 3 * wide * short * long + wide * (5 * short**2 + 2 * (row.rank or short) * (short + long))
    return short * long * (item_size + wide) + wide * (5 * short**2 + 2 * (row.rank or short) * (short + long))


def layers_at_once(needs: Sequence[int], threads: int) -> int:
    """How many layers, which need these bytes each, this many threads should decompose at once."""
    return max(1, min(threads, len(needs), max(2, MEMORY // max(needs, default=1))))


@contextmanager
def layer_pool(at_once: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Workers with their share of the threads. Leaving waits for those at work and starts no other."""
    before = torch.get_num_threads()
    share = max(1, threads // at_once)
    pool = ThreadPoolExecutor(at_once, "layer", initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], at_once: int, threads: int) -> Iterator[Result]:
    """The results of `work` on each item, in the items' order, with at most `at_once` more than asked for under way."""
    with layer_pool(at_once, threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
