"""Every row that needs a GPU, in one command of at most ten minutes on one card.

decompositions      lrsurgery's truncated decompositions against cuSOLVER's (`torch.linalg.svd` on the card).
factorise           The command on a Llama-7B-shaped checkpoint of --layers layers: seconds, peak CPU and GPU memory.
training            A step with Frobenius decay of a GPT-2-small-shaped model, fp32 and under bf16 autocast, over dense.
calibration         Statistics of a 1B-shaped model, over a forward and backward on the same tokens.
prefill and decode  Whole models in bf16, dense against both forms: eager, compiled, with CUDA graphs.

Each section runs in a process of its own, so what one leaves on the card, or breaks, is not there for the next. A
section has a share of the time that is left, and its process is ended when that is over. Every cell that time left out,
or that failed, is a row that says so. "Times as fast" is the seconds of what "as" names over those of the row, round by
round; "error" is over that of cuSOLVER. With --tiny, all sections run on the CPU at sizes that prove the script alone.

    python examples/benchmarks/gpu.py [--minutes 10] [--sections NAME ...] [--layers 4] [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_cells import COLUMNS, Cell, Row, Setup, row
from gpu_sections import SECTIONS

MARGIN = 2.0  # seconds between a section's end and that of its process


def report(**line: Any) -> None:
    """Tell the parent process, by one line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def work_through(section: str, cells: list[Cell], deadline: float) -> None:
    """Run a section's cells as far as the time goes, and report the rows of each."""
    report(section=section, cells=[cell.name for cell in cells])
    took: dict[str, float] = {}
    for cell in cells:
        left, needs = deadline - time.time(), took.get(cell.kind, cell.guess)
        if left < needs:
            note = f"left out for want of time: takes about {needs:.0f} s, {max(0.0, left):.0f} s are left"
            report(section=section, cell=cell.name, rows=[row(cell.name, "", note=note)])
            continue
        begun, fault = time.time(), None
        try:
            rows = cell.run()
        except Exception as e:
            fault = _in_a_line(e)
            rows = [row(cell.name, "", note=f"failed: {fault}")]
        report(section=section, cell=cell.name, rows=rows)
        took[cell.kind] = time.time() - begun
        sys.stderr.write(f"{cell.name}: {took[cell.kind]:.1f} s{f'; {fault}' if fault else ''}\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises, and so ends the process, if the card is lost to it
            torch.cuda.empty_cache()


def _in_a_line(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
    text = lines[0][:150] + (f" ... {lines[-1][:200]}" if len(lines) > 1 else "")
    return f"{type(e).__name__}: {text}"


def run_sections(names: list[str], deadline: float, scratch: Path, words: list[str]) -> list[Row]:
    """Run sections in one process, ended at the deadline, and return a row at least for each of their cells."""
    command = [sys.executable, __file__, *words, "--child", ",".join(names), str(deadline - MARGIN), str(scratch)]
    environment = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **os.environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        printed, _ = process.communicate(timeout=max(0.0, deadline - time.time()))
        end = f"failed: the process of this section ended first, with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        _end(process)
        printed, _ = process.communicate()
        end = "left out for want of time: the process was ended while this, or what comes before it, ran"
    finally:
        _end(process)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    rows = []
    for name in names:
        mine = [line for line in lines if line["section"] == name]
        cells = next((line["cells"] for line in mine if "cells" in line), ["all of it"])
        found = {line["cell"]: line["rows"] for line in mine if "cell" in line}
        rows += [{**each, "section": name} for cell in cells for each in found.get(cell) or [row(cell, "", note=end)]]
    return rows


def _end(process: subprocess.Popen[str]) -> None:
    """End the process with all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all sections together")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--layers", type=int, default=4, help="of the Llama-7B-shaped models")
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint here; else it is temporary")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to prove that the script runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = parse()
    if given.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.stderr.write("gpu.py: no CUDA device here; run it on a machine with one, or with --tiny on the CPU\n")
        return 2
    if given.child:
        names, deadline, scratch = given.child
        repeats = given.repeats if not given.tiny else 2
        setup = Setup(tiny=given.tiny, layers=given.layers, repeats=repeats, scratch=Path(scratch))
        torch.manual_seed(0)
        for name in names.split(","):
            work_through(name, SECTIONS[name][0](setup), float(deadline))
        return 0
    end = time.time() + 60 * given.minutes
    rows: list[Row] = []
    sections = [name for name in SECTIONS if name in given.sections]
    # what a section leaves on a card, or breaks, is gone with its process; tiny ones share the time of their imports
    groups = [[name] for name in sections] if not given.tiny else [sections]
    with tempfile.TemporaryDirectory() as temporary:
        for number, group in enumerate(groups):
            shares = [sum(SECTIONS[name][1] for name in each) for each in groups[number:]]
            seconds = (end - time.time()) * shares[0] / sum(shares)
            rows += run_sections(group, time.time() + seconds, given.folder or Path(temporary), sys.argv[1:])
    notes = [each["note"] or "" for each in rows]
    left_out, failed = (sum(note.startswith(word) for note in notes) for word in ("left out", "failed"))
    name = "gpu" if not given.tiny else "gpu_tiny"
    harness.finish(name, [{c: each[c] for c in COLUMNS} for each in rows], given, left_out=left_out, failed=failed)
    if left_out or failed:
        sys.stderr.write(f"{left_out} left out for want of time (more --minutes, fewer --sections); {failed} failed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
