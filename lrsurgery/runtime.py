"""The machine that a job runs on: devices, dtypes, processes, threads, versions, the user's own Python files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrsurgery.errors import SourceError, SurgeryError

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOL_BYTES = 1 << 30  # that the layers at work may take together, or two of the largest where they need more
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where arithmetic runs, and how much of it at once."""

    device: torch.device
    jobs: int | None = None  # layers at once; None: as threads and memory allow
    cache: bool = True  # of singular values, between runs
    keep_vectors: bool = False  # singular vectors in it too

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise SurgeryError(f"jobs {self.jobs}: write an integer of at least 1")
        if self.keep_vectors and not self.cache:
            raise SurgeryError("--keep-vectors keeps them in the cache; leave --no-cache out")

    def in_order(self, work: Callable[[Item], Result], items: Sequence[Item], needs: Sequence[int]) -> Iterator[Result]:
        """The results of `work` on each item, in the items' order; `needs` are the bytes that each takes."""
        threads = torch.get_num_threads()
        return in_order(work, items, self.at_once(needs, threads), threads)

    def at_once(self, needs: Sequence[int], threads: int) -> int:
        """How many layers, which need these bytes each, to decompose at once: one on a GPU, unless `jobs` says more."""
        return (self.jobs or layers_at_once(needs, threads)) if self.device.type == "cpu" else 1

    def for_process(self, local_rank: int) -> torch.device:
        """The device of one of several processes: with several GPUs, one each."""
        if self.device.type == "cuda" and self.device.index is None and local_rank < torch.cuda.device_count():
            return torch.device("cuda", local_rank)
        return self.device


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:1". Raises SurgeryError where this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise SurgeryError(f"unknown device '{name}'; write auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise SurgeryError(f"device '{name}': this machine has {count} CUDA devices")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype of a key of `DTYPES`; None keeps each tensor's own. Raises SurgeryError."""
    if name not in DTYPES:
        raise SurgeryError(f"unknown dtype '{name}'; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def processor() -> str:
    """What this machine's processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of this package and of those that decide the numbers."""
    from importlib.metadata import version

    from lrsurgery import __version__

    others = ("torch", "transformers", "timm", "safetensors")
    return {"lrsurgery": __version__, **{name: version(name) for name in others}}


imported: list[str] = []  # user's files that were run, for processes that this one starts


def import_file(file: Path) -> None:
    """Run a Python file of the user's own, which registers models, as the module of its name.

    Raises SourceError where it is missing or fails.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SourceError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # timm looks a model's function up by its module
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever it is, that file is at fault
        del sys.modules[file.stem]
        raise SourceError(f"{file}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    imported.append(str(file.resolve()))


def layers_at_once(needs: Sequence[int], threads: int) -> int:
    """How many layers, which need these bytes each, this many threads should decompose at once.

    An eigensolver uses a second thread badly, and waits long where other processes are at work; a second layer does
    not. Measured on two cores (examples/benchmarks/decompositions.py): two layers on one thread each take 0.5 to 1.0 of
    the time of one after the other on two threads. With as many threads a layer, its factors have the same bytes.
    """
    return max(1, min(threads, len(needs), max(2, POOL_BYTES // max(needs, default=1))))


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


@dataclass(frozen=True)
class Processes:
    """This process among those of one job under torchrun, as its environment variables tell; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> Processes:
        """As torchrun and accelerate tell each process. Raises SurgeryError where they tell half of it."""
        rank, size, local_rank = (int(os.environ.get(name) or default) for name, default in _VARIABLES)
        if size == 1:
            return Processes()
        if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT"):
            raise SurgeryError(f"WORLD_SIZE is {size} and there is no MASTER_ADDR and MASTER_PORT; start with torchrun")
        return Processes(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, name: str) -> None:
        """Wait until every process has come to the barrier of this name.

        Polls instead of blocking, so that a signal ends the wait: that is how torchrun stops the rest when a process is
        lost.
        """
        if self.size == 1:
            return
        store = _store(self)
        name = f"lrsurgery/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        for stage in ("come", "seen"):  # the process that holds the store leaves last
            store.add(f"{name}/{stage}", 1)
            while (stage == "come" or self.is_main) and store.add(f"{name}/{stage}", 0) < self.size:
                time.sleep(0.02)


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


@cache
def _store(processes: Processes) -> Any:
    """The store that the launcher's agent holds, or rank 0 where the agent holds none."""
    import torch.distributed as dist

    ours = processes.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch's stubs leave it out
    return store(host, port, None, ours, timeout=timedelta(minutes=10))
