"""Peak memory of `lrsurgery refine` on a few blocks of a 7B-Llama-shaped bf16 checkpoint, and the time of the whole.

The blocks are factorised first. Of both models one block at a time is in memory, as of a model that does not fit: the
command is told that --free GB are free. Memory does not grow with the blocks, the time does; that of all 32 blocks at
400 steps is extrapolated from the time of a block, as if all of it were steps, and the column says so. Samples are
random tokens.

    python examples/benchmarks/big_refine.py --folder /somewhere/with/20GB --save
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from big_checkpoint import VOCABULARY, make
from calibration_cost import run_watched, write_tokens
from harness import finish, parser

REFINE = """
import sys
from lrsurgery.factorise.work import opened
opened.free_memory = lambda device, free=float(sys.argv.pop(1)): int(free * 1e9)
from lrsurgery.cli.app import main
main()
"""
BLOCKS, STEPS = 32, 400  # of the model whose time is extrapolated


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, help="keeps the checkpoints here; else they are temporary")
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--rank", default="params:0.5")
    options.add_argument("--free", type=float, default=8.0, help="GB that the command takes for free")
    options.add_argument("--samples", type=int, default=16)
    options.add_argument("--steps", type=int, default=1, help="of Adam, in each block")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.folder or Path(temporary)
        dense, half, output = make(place, arguments.layers), place / "refine-half", place / "refine-out"
        data = write_tokens(dense, VOCABULARY, arguments.samples * 512)
        program = [sys.executable, "-m", "lrsurgery", "factorise", str(dense), "--rank", arguments.rank]
        if not half.is_dir():
            words = [*program, "--include", "model.layers.*", "--no-loss-check", "--quiet", "--output", str(half)]
            subprocess.run(words, check=True)
        shutil.rmtree(output, ignore_errors=True)
        sizes = ["--samples", str(arguments.samples), "--block-size", "512"]
        where = ["--against", str(dense), "--calibration", str(data), "--output", str(output)]
        words = ["refine", str(half), *where, *sizes, "--refine-steps", str(arguments.steps), "--quiet"]
        figures = run_watched([sys.executable, "-c", REFINE, str(arguments.free), *words])
        report: dict[str, Any] = json.loads((output / "rank_report.json").read_text(encoding="utf-8"))
        shutil.rmtree(output)
    blocks = report["refinement"]["blocks"]
    each = figures["wall_s"] / len(blocks)
    row = {
        "blocks": len(blocks),
        "samples": f"{arguments.samples} of 512 tokens",
        "steps a block": arguments.steps,
        "seconds a block": each,
        "peak GB, own": figures["own_bytes"] / 1e9,
        "with files": figures["peak_bytes"] / 1e9,
        f"days for {BLOCKS} blocks of {STEPS} steps at most, extrapolated": each
        * BLOCKS
        * STEPS
        / arguments.steps
        / 86_400,
    }
    finish("big_refine", [row], arguments, bars={"peak GB, own": 12.0}, blocks=blocks)


if __name__ == "__main__":
    main()
