"""Jobs that a pool of threads works on: what is done, and the first that failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait


class Running:
    """The jobs that this process has started, by number, in the order in which they were started.

    `wait_for` is called for one job after the other, and looks at each future about once in all.
    """

    def __init__(self, futures: Mapping[int, Future[None]]) -> None:
        self._futures = futures
        self._waiting = deque(futures.items())  # those not known to have succeeded

    def __contains__(self, number: int) -> bool:
        return number in self._futures

    def wait_for(self, number: int, seconds: float) -> bool:
        """Wait for a job, at most for some seconds, and tell whether it is done.

        Raises the exception of the first job that failed, of those up to this one.
        """
        wait([self._futures[number]], timeout=seconds)
        while self._waiting and self._waiting[0][0] <= number and self._waiting[0][1].done():
            self._waiting[0][1].result()
            self._waiting.popleft()
        if self._futures[number].done():
            self._futures[number].result()
            return True
        return False

    def wait_for_all(self) -> None:
        """Wait until all jobs are done, or one has failed. Raises the exception of the first that failed."""
        wait(self._futures.values(), return_when=FIRST_EXCEPTION)
        for future in self._futures.values():
            if future.done():
                future.result()
