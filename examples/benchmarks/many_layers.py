"""Seconds of factorise, export, load and report against the number of tensors: is the time in proportion to it?

The models are GPT-2 of width 16, so that next to nothing is computed, and what is left is the work for each tensor. CPU
seconds of this process, imports left out, so that other work on the machine does not count. `slope` is the exponent of
seconds against tensors between one row and the next: 1 is in proportion, 2 is quadratic.

    python examples/benchmarks/many_layers.py --save
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import finish, parser

BLOCKS = (100, 400, 1667)  # of 12 tensors each, beside 4 of the model
WIDTH = 16


def many_layers(folder: Path, blocks: int) -> Path:
    """A GPT-2 of this many blocks, written without building the model."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {"wte.weight": (64, WIDTH), "wpe.weight": (32, WIDTH), "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    layers = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for block in range(blocks):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{block}.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
        for name, (rows, columns) in layers.items():
            shapes[f"h.{block}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            shapes[f"h.{block}.{name}.bias"] = (columns * WIDTH,)
    folder.mkdir()
    tensors = {f"transformer.{name}": torch.randn(*shape) / 10 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": WIDTH, "n_layer": blocks, "n_head": 2}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0, **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def measure(place: Path, blocks: int) -> dict[str, float]:
    """CPU seconds of each job on a model of this many blocks."""
    import torch

    import lrsurgery
    from lrsurgery.report.read import read_report
    from lrsurgery.report.views.terminal import report_parts
    from lrsurgery.runtime import Compute

    dense, low = many_layers(place / f"dense-{blocks}", blocks), place / f"low-{blocks}"
    compute = Compute(device=torch.device("cpu"), cache=False)

    def report(model: Path, against: Path | None = None) -> None:
        found = read_report([str(model)], compute, against=str(against) if against else None)
        report_parts(found, 120)
        found.to_json()

    jobs: dict[str, Callable[[], Any]] = {
        "factorise": lambda: lrsurgery.factorise_checkpoint(dense, low, rank=4, cache=False),
        "export": lambda: lrsurgery.export_dense(low, place / f"out-{blocks}"),
        "load": lambda: lrsurgery.load_model(low),
        "report": lambda: report(low),
        "report --against": lambda: report(low, dense),
    }
    seconds = {}
    for name, job in jobs.items():
        begun = time.process_time()
        job()
        seconds[name] = time.process_time() - begun
    return seconds


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        measure(Path(temporary), 2)  # imports, first uses
        for blocks in BLOCKS:
            row: dict[str, Any] = {"tensors": 12 * blocks + 4, **measure(Path(temporary), blocks)}
            before = rows[-1] if rows else None
            total = sum(value for name, value in row.items() if name != "tensors")
            row["all"] = total
            grown = None if before is None else row["tensors"] / before["tensors"]
            row["slope"] = (
                None if before is None or grown is None else math.log(total / before["all"]) / math.log(grown)
            )
            rows.append(row)
    finish("many_layers", rows, arguments)


if __name__ == "__main__":
    main()
