"""The execution environment of a job: devices, dtypes, processes, threads, versions, the user's own Python files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
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
from lrsurgery.text import expanded

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOL_BYTES = 1 << 30  # memory limit of concurrent decompositions; two run at once even where they exceed it
MOST_JOBS = 10_000
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device, parallelism and cache of a job. Raises SurgeryError for invalid values."""

    device: torch.device
    jobs: int | None = None  # concurrent layers; None: as many as threads and memory allow
    cache: bool = True  # keep singular values on disk
    keep_vectors: bool = False  # keep singular vectors on disk too

    def __post_init__(self) -> None:
        if self.jobs is not None and not 1 <= self.jobs <= MOST_JOBS:
            raise SurgeryError(f"jobs {str(self.jobs)[:20]}: write an integer from 1 to {MOST_JOBS:,}")
        if self.keep_vectors and not self.cache:
            raise SurgeryError("--keep-vectors writes to the cache; remove --no-cache")

    def in_order(self, work: Callable[[Item], Result], items: Sequence[Item], needs: Sequence[int]) -> Iterator[Result]:
        """Run `work` on each item in a thread pool and yield the results in order; `needs` is the bytes per item."""
        threads = torch.get_num_threads()
        return in_order(work, items, self.at_once(needs, threads), threads)

    def at_once(self, needs: Sequence[int], threads: int) -> int:
        """Number of concurrent layers on a CPU: `jobs`, or as many as `needs` (bytes per layer) allows; 1 on a GPU."""
        return (self.jobs or layers_at_once(needs, threads)) if self.device.type == "cpu" else 1

    def for_process(self, local_rank: int) -> torch.device:
        """The device of one process; see `device_of_process`."""
        return device_of_process(self.device, local_rank)


def device_of_process(device: torch.device, local_rank: int) -> torch.device:
    """The device of one process: with several GPUs, the one with its local rank."""
    if device.type == "cuda" and device.index is None and local_rank < torch.cuda.device_count():
        return torch.device("cuda", local_rank)
    return device


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:1". Raises SurgeryError if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not re.fullmatch("[0-9]{0,4}", index):
        raise SurgeryError(f"unknown device '{name}'; write auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise SurgeryError(f"device '{name}': this machine has {count} CUDA devices")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype for a key of `DTYPES`; None keeps each tensor's own. Raises SurgeryError for an unknown key."""
    if name not in DTYPES:
        raise SurgeryError(f"unknown dtype '{name}'; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def check_seed(seed: int) -> None:
    """Raise SurgeryError for a seed that torch's generators do not take."""
    if not 0 <= seed < 1 << 63:
        raise SurgeryError(f"seed {str(seed)[:20]}: write an integer from 0 to 2^63 - 1")


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def processor() -> str:
    """Model name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where times were taken, without a name that tells whose machine it is."""

    processor: str
    cores: int | None
    threads: int
    gpu: str | None
    system: str
    python: str
    torch: str


def machine_of(device: torch.device) -> Machine:
    """This machine, with what decides the times on one of its devices."""
    return Machine(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
    )


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that determine its results."""
    from importlib.metadata import version

    from lrsurgery import __version__

    others = ("torch", "transformers", "timm", "safetensors")
    return {"lrsurgery": __version__, **{name: version(name) for name in others}}


imported: list[str] = []  # the user's files that this process has imported; child processes import them too


def import_file(file: Path) -> None:
    """Import one of the user's Python files, which registers models, under its file name.

    Raises SourceError if the file is missing or raises an exception.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SourceError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # timm looks a model's function up by its module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # any exception is the file's fault, and it does not end the program
        del sys.modules[file.stem]
        raise SourceError(f"{file}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    imported.append(str(file.resolve()))


def layers_at_once(needs: Sequence[int], threads: int) -> int:
    """Number of layers to decompose concurrently, given the bytes per layer and the number of threads.

    An eigensolver gains little from a second thread and stalls beside other processes; a second layer scales better.
    Measured on two cores (examples/benchmarks/decompositions.py): two layers with one thread each take 0.5 to 1.0 of
    the time of one after the other with two threads. The same number of threads per layer gives the same bytes.
    """
    return max(1, min(threads, len(needs), max(2, POOL_BYTES // max(needs, default=1))))


def cache_folder() -> Path:
    """`$LRSURGERY_CACHE`, or `lrsurgery` in the user's cache folder. The folder may not exist yet."""
    import platformdirs

    own = os.environ.get("LRSURGERY_CACHE")
    return expanded(own) if own else platformdirs.user_cache_path("lrsurgery", appauthor=False)


@contextmanager
def layer_pool(at_once: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool whose workers split torch's threads. On exit, running work finishes, queued work is cancelled."""
    before = torch.get_num_threads()
    share = max(1, threads // at_once)
    pool = ThreadPoolExecutor(at_once, "layer", initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], at_once: int, threads: int) -> Iterator[Result]:
    """Yield the results of `work` on each item, in order; at most `at_once` items run ahead of the consumer."""
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
    """The rank of this process and the number of processes of a job; by default a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> Processes:
        """Read the environment variables of torchrun and accelerate.

        Raises SurgeryError if they are incomplete, no numbers or contradict each other.
        """
        rank, size, local_rank = numbers_of_processes()
        if size == 1:
            return Processes()
        if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT"):
            raise SurgeryError(f"WORLD_SIZE is {size} but MASTER_ADDR or MASTER_PORT is not set; start with torchrun")
        return Processes(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, name: str) -> None:
        """Wait until every process has reached the barrier of this name.

        Polls instead of blocking, so that a signal ends the wait: torchrun signals the other processes when one dies.
        """
        if self.size == 1:
            return
        store = _store(self)
        name = f"lrsurgery/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        for stage in ("come", "seen"):  # rank 0 may hold the store, so it leaves last
            store.add(f"{name}/{stage}", 1)
            while (stage == "come" or self.is_main) and store.add(f"{name}/{stage}", 0) < self.size:
                time.sleep(0.02)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place, and return it; every process calls this in the same order."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=_group(self))
        return tensor

    def any(self, value: bool) -> bool:
        """Whether a condition holds in any process."""
        return self.mean(float(value)) > 0

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        return value if self.size == 1 else float(self.sum_(torch.tensor(value, dtype=torch.float64))) / self.size


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def numbers_of_processes() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as the environment has them.

    Raises SurgeryError for other values than torchrun sets.
    """
    found: list[int] = []
    for name, default in _VARIABLES:
        text = os.environ.get(name) or str(default)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise SurgeryError(f"environment variable {name} is {text[:60]!r}, not a number; unset it")
        found.append(int(text))
    rank, size, local_rank = found
    if not rank < size:
        raise SurgeryError(f"environment variable RANK is {rank}, and WORLD_SIZE {size}: ranks are below the size")
    return rank, size, local_rank


@cache
def _store(processes: Processes) -> Any:
    """The TCP store, hosted by the launcher's agent or else by rank 0."""
    import torch.distributed as dist

    hosts = processes.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch's stubs leave it out
    return store(host, port, None, hosts, timeout=timedelta(minutes=10))


@cache
def _group(processes: Processes) -> Any:
    """The group of all processes, over the same store."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.PrefixStore(f"group{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store(processes))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=processes.rank, world_size=processes.size)
    return dist.group.WORLD
