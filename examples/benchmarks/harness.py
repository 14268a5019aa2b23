"""What the benchmarks share: runs in turn, ratios, peak memory, the machine in words, a results file.

Machines drift, so candidates run interleaved (A B A B ...) and are compared as ratios within one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark: `--json`, `--repeats`, `--save`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print the results as one JSON object")
    made.add_argument("--repeats", type=int, default=5, help="rounds after one that is not counted")
    made.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/NAME.json beside the scripts")
    return made


def in_turn(candidates: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Measure the seconds of each candidate in each round; the candidates take turns within a round."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, repeats):
        for name, run in candidates.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Compute the median, smallest and largest ratio over / under, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


# a process inherits the peak of its parent, so a small process stands between a benchmark and its command
_MEASURER = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:], stderr=subprocess.STDOUT).pid, 0)
wall = time.perf_counter() - begun
figures = [os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]
print("\\n" + json.dumps(figures), flush=True)
os._exit(0)
"""


def run_measured(command: Sequence[str], **environment: str) -> dict[str, float]:
    """Run a command and measure wall seconds, CPU seconds and peak resident bytes of its largest process.

    Raises RuntimeError with the command's output if it fails.
    """
    words = [sys.executable, "-I", "-S", "-c", _MEASURER, *command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    printed, _, figures = done.stdout.rstrip().rpartition("\n")
    code, wall, cpu, peak = json.loads(figures)
    if code:
        raise RuntimeError(f"{' '.join(command)} exited with {code}:\n{printed[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": float(peak * unit)}


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that decide the numbers."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "timm")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows of the same columns as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def finish(name: str, rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace, **facts: Any) -> None:
    """Print the table (with --json, everything) and, with --save, write results/NAME.json."""
    body = {"benchmark": name, "command": " ".join(sys.argv), "machine": machine(), **facts, "rows": list(rows)}
    text = json.dumps(body, indent=2) + "\n"
    if arguments.json:
        sys.stdout.write(text)
    else:
        print(table(rows))
        print(f"\n{', '.join(f'{k} {v}' for k, v in body['machine'].items() if v is not None)}")
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
