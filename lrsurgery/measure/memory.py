"""Peak memory of a model and one forward pass, in a process of its own: `python -m lrsurgery.measure.memory REQUEST`.

On a CPU: the peak of the resident memory, minus what was resident once everything was imported. On a GPU: the most that
torch had allocated. A process inherits the peak of its parent, so Linux is asked to reset it (proc_pid_clear_refs(5));
on other systems the peak of a CPU is not known. Two measurements agree within 1 MB, since glibc is made to return freed
memory at once; by default it keeps tens of MB, and not always as many.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from lrsurgery.errors import SurgeryError
from lrsurgery.runtime import import_file, pick_device, pick_dtype

SMALL = 1 << 30  # bytes of weights; for larger ones, the 10 MB of code that a first pass loads do not matter


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """One model, the batch that it runs on, and the machine."""

    reference: str
    task: str
    trust_remote_code: bool
    device: str
    dtype: str  # a key of runtime.DTYPES
    threads: int
    batch: int
    length: int
    seed: int
    architecture: str | None = None
    prepare: bool = False
    imports: tuple[str, ...] = ()  # Python files that register models


def peak_memory(request: MemoryRequest) -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why they are not known). Raises SurgeryError where the model cannot run."""
    command = [sys.executable, "-m", "lrsurgery.measure.memory", json.dumps(asdict(request))]
    # PYTHONSAFEPATH: a file in the user's folder must not shadow one of Python's modules
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    unknown = f"{request.reference}: its peak memory is not known"
    if done.returncode < 0:
        return None, f"{unknown}: the process that measured it was ended by signal {-done.returncode}; out of memory?"
    try:
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return None, f"{unknown}: {lines[-1][:200]}"
    if "error" in answer:
        raise SurgeryError(answer["error"])
    peak = answer["peak"]
    return peak, None if peak is not None else f"{unknown}: this system does not tell"


def measure_peak(request: MemoryRequest) -> int | None:
    """The peak of this process, which must have done nothing else, in bytes; None where the system does not tell it."""
    import torch

    from lrsurgery.measure.workloads import Contender, make_workload, name_failures, prepare

    device = pick_device(request.device)
    torch.set_num_threads(request.threads)
    contender = Contender.of(request.reference, request.task, request.trust_remote_code, request.architecture)

    def load_and_run() -> None:
        model = contender.load(device, pick_dtype(request.dtype))
        if request.prepare:
            prepare([model])
        with name_failures(request.reference, f"{request.batch} x {request.length}"):
            x = contender.random_input(model, request.batch, request.length, request.seed)
            workload = make_workload(model, x, contender.works[0])
            assert workload is not None
            workload.once()

    if (contender.source.bytes or 0) < SMALL:
        load_and_run()  # loads the libraries' code
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # the run that counts must not reuse what this one freed
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        load_and_run()
        return torch.cuda.max_memory_allocated(device)
    before = _resident("VmRSS")
    if before is None or not _reset_peak():
        return None
    load_and_run()
    peak = _resident("VmHWM")
    return None if peak is None else peak - before


def _resident(field: str) -> int | None:
    """Resident memory of this process in bytes: VmRSS (now) or VmHWM (peak)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def main() -> None:
    """Answer a request with one line of JSON on stdout."""
    try:
        request = MemoryRequest(**json.loads(sys.argv[1]))
        for file in request.imports:
            import_file(Path(file))
        answer: dict[str, object] = {"peak": measure_peak(request)}
    except SurgeryError as e:
        answer = {"error": " ".join(str(e).split())}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
