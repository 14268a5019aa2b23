"""Peak memory of loading a model and one forward pass, in a process of its own: `python -m lrsurgery.peak REQUEST`.

On a CPU the peak of what is resident, less what was before, when everything was imported; on a GPU what torch has
allocated there at most. A process's peak starts at that of the one that starts it, so Linux is asked to count anew
(proc_pid_clear_refs(5)); on other systems a CPU's peak is not known. Two runs agree within 1 MB, since glibc is told to
give back at once what is freed: left to itself it keeps tens of MB, more in one run than in the next.
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
from lrsurgery.imports import import_file

SMALL = 1 << 30  # bytes of weights; beside larger ones the 10 MB of code that a first run brings in are nothing


@dataclass(frozen=True)
class Request:
    """One model and the batch that it is run on."""

    reference: str
    task: str
    trust_remote_code: bool
    device: str
    dtype: str  # a key of options.DTYPES
    threads: int
    batch: int
    length: int
    seed: int
    imports: tuple[str, ...] = ()  # files that register models


def peak_memory(request: Request) -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why they are not known). Raises SurgeryError where the model cannot be run."""
    command = [sys.executable, "-m", "lrsurgery.peak", json.dumps(asdict(request))]
    # a module in the folder where the user stands is not to be taken for one of Python's
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


def measured(request: Request) -> int | None:
    """The peak of this process, which has done nothing else, in bytes; None where the system does not tell."""
    import torch

    from lrsurgery.factorise.options import DTYPES, pick_device
    from lrsurgery.measure.workloads import Contender, explained, make_pass

    device = pick_device(request.device)
    torch.set_num_threads(request.threads)
    contender = Contender.of(request.reference, request.task, request.trust_remote_code)

    def run() -> None:
        model = contender.load(device, DTYPES[request.dtype])
        with explained(request.reference, f"{request.batch} x {request.length}"):
            x = contender.random_input(model, request.batch, request.length, request.seed)
            timed = make_pass(model, x, contender.works[0])
            assert timed is not None
            timed.once()

    if sum(file.stat().st_size for file in contender.source.files) < SMALL:
        run()  # brings in what of the libraries' code it takes
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to serve the run that counts
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = _resident("VmRSS")
        if before is None or not _forget_peak():
            return None
    run()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident("VmHWM")
    return None if peak is None else peak - before  # type: ignore[operator]


def _resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (at most) of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def main() -> None:
    """Answers on stdout with one line of JSON."""
    try:
        request = Request(**json.loads(sys.argv[1]))
        for file in request.imports:
            import_file(Path(file))
        answer: dict[str, object] = {"peak": measured(request)}
    except SurgeryError as e:
        answer = {"error": " ".join(str(e).split())}
    print(f"\n{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
