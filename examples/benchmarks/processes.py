"""Two processes of one thread against one process of one thread, on a GPT-2-medium-shaped checkpoint.

Imports are paid once a process and do not shrink, so the ratio is stated for the whole command and for what is left
when the same command's time on a tiny model is taken off: imports, torchrun's own start, and the meeting of the
processes.

    python examples/benchmarks/processes.py --save
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness import finish, in_turn, parser, ratio, run_measured
from weights import trained_weight

BAR = 1.8


def checkpoint(folder: Path, **shape: int) -> Path:
    """A GPT-2 of this shape, its block matrices with a trained spectrum."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    model = GPT2LMHeadModel(GPT2Config(**shape))
    for seed, module in enumerate(m for m in model.modules() if isinstance(m, Conv1D)):
        rows, columns = module.weight.shape
        module.weight.data = trained_weight(rows, columns, seed)
    model.save_pretrained(folder)
    return folder


def factorise(source: Path, scratch: Path, processes: int, rank: str) -> float:
    """Seconds of the whole command with so many processes of one thread."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        command = [
            "-m",
            "lrsurgery",
            "factorise",
            str(source),
            "--rank",
            rank,
            "--output",
            f"{out}/out",
            "--quiet",
            "--no-loss-check",
        ]
        command += ["--jobs", "1"]
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [*launch, *command]
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LRSURGERY_CACHE": f"{out}/cache"}
        return run_measured([sys.executable, *command], **environment)["wall_s"]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--layers", type=int, default=24, help="of the GPT-2-medium-shaped model")
    options.add_argument("--rank", default="0.4", help="under break-even for every matrix")
    arguments = options.parse_args()
    many = arguments.processes
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        big = checkpoint(place / "big", n_embd=1024, n_layer=arguments.layers, n_head=16)
        tiny = checkpoint(place / "tiny", n_embd=64, n_layer=2, n_head=2, vocab_size=50257)
        seconds = in_turn(
            {
                name: partial(factorise, source, place, count, arguments.rank)
                for name, source, count in (
                    ("one", big, 1),
                    ("many", big, many),
                    ("one, tiny", tiny, 1),
                    ("many, tiny", tiny, many),
                )
            },
            arguments.repeats,
            warm_up=0,
        )
    left = {name: [whole - median(seconds[f"{name}, tiny"]) for whole in seconds[name]] for name in ("one", "many")}
    words = {"one": "1 process of 1 thread", "many": f"{many} processes of 1 thread"}
    rows: list[dict[str, Any]] = []
    for what, figures, bar in (("the whole command", seconds, None), ("less its time on a tiny model", left, BAR)):
        found = ratio(figures["one"], figures["many"])
        for name in ("one", "many"):
            rows.append(
                {
                    "what": what,
                    "processes": words[name],
                    "seconds": median(figures[name]),
                    "times as fast": found["median"] if name == "many" else 1.0,
                    "bar": bar if name == "many" else None,
                }
            )
    finish("processes", rows, arguments, cores=os.cpu_count())


if __name__ == "__main__":
    main()
