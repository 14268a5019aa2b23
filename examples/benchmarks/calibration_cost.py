"""Time and peak memory of calibration beside the surgery itself: whole commands, as processes.

A GPT-2-small-shaped model with either importance, and a 7B-Llama-shaped bf16 checkpoint (13.5 GB; 27 GB in the fp32
that it runs in, more than many machines have) with `--importance activations`, which works block by block. Of the large
model the three largest matrices of the last layer are factorised, so that all other layers have to run before. Tokens
are random: their content does not matter here.

"own" is anonymous memory; "with files" adds the pages of the checkpoint that are mapped at the time (transformers maps
all of them once as it loads), which the system can take back.

    python examples/benchmarks/calibration_cost.py --folder /somewhere/with/15GB --save
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from big_checkpoint import VOCABULARY, make
from harness import finish, parser, run_measured
from processes import checkpoint


def write_tokens(model: Path, vocabulary: int, count: int) -> Path:
    """Write rows of random tokens beside the model, and a tokenizer of as many words into it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(model)
    drawn = random.Random(0)
    rows = ({"input_ids": [drawn.randrange(2, vocabulary) for _ in range(512)]} for _ in range(count // 512 + 1))
    file = model.parent / f"{model.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_watched(command: list[str]) -> dict[str, float]:
    """Run a command as `run_measured` does; also measure the peak of its memory without mapped files."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_measured, command)
        own = 0
        while not running.done():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    own = max(own, memory.rss - memory.shared)
            time.sleep(0.05)
        return {**running.result(), "own_bytes": float(own)}


def measure(
    what: str, model: Path, tokens: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace, *more: str
) -> None:
    """Add a row for plain surgery and one for each importance."""
    importances = arguments.importances if what != "Llama-7B-shaped" else ["activations"]
    samples, size = str(arguments.samples), str(arguments.block_size)
    for importance in ("none", *importances):
        output = tokens.parent / "out"
        shutil.rmtree(output, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "lrsurgery",
            "factorise",
            str(model),
            "--rank",
            "0.5",
            "--quiet",
            "--no-cache",
            "--no-loss-check",
        ]
        command += ["--output", str(output), *more]
        if importance != "none":
            command += ["--calibration", str(tokens), "--importance", importance, "--samples", samples]
            command += ["--block-size", size]
        figures = run_watched(command)
        report = json.loads((output / "rank_report.json").read_text(encoding="utf-8"))
        shutil.rmtree(output)
        rows.append(
            {
                "model": what,
                "parameters, M": report["totals"]["parameters_before"] / 1e6,
                "matrices factorised": report["totals"]["layers_factorised"],
                "calibration": f"{importance}, {samples} sequences of {size}" if importance != "none" else "none",
                "seconds": figures["wall_s"],
                "peak GB, own": figures["own_bytes"] / 1e9,
                "with files": figures["peak_bytes"] / 1e9,
            }
        )


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--folder", type=Path, help="keeps the checkpoints here; else they are temporary")
    made.add_argument("--layers", type=int, default=32, help="of the Llama; 0 leaves it out")
    made.add_argument("--samples", type=int, default=16)
    made.add_argument("--block-size", type=int, default=256)
    made.add_argument("--importances", nargs="*", default=["activations", "fisher"], help="for the small model")
    arguments = made.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.folder or Path(temporary)
        count = 2 * arguments.samples * arguments.block_size
        small = checkpoint(place / "gpt2")
        measure("GPT-2-small-shaped", small, write_tokens(small, 50257, count), rows, arguments)
        if arguments.layers:
            large = make(place, arguments.layers)
            tokens = write_tokens(large, VOCABULARY, count)
            measure(
                "Llama-7B-shaped", large, tokens, rows, arguments, "--include", f"model.layers.{arguments.layers - 1}.*"
            )
    finish("calibration_cost", rows, arguments, memory_gb=psutil.virtual_memory().total / 1e9)


if __name__ == "__main__":
    main()
