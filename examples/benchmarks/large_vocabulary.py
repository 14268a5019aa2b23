"""Fisher calibration of a model whose logits dwarf it: Gemma-3-270M's shape, random weights, 262,144 tokens.

Memory is that of whole commands, without mapped files: of calibration, whatever the number of samples, since batches
run one after another, of evaluation, and of healing with the dense model as teacher. Time is that of
`collect_statistics` over a plain training forward and backward, weight gradients and whole logits included, on the same
tokens in turn. Tokens are random.

    python examples/benchmarks/large_vocabulary.py --save
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers as tf
from calibration_cost import run_watched, write_tokens
from harness import finish, in_turn, parser, ratio

from lrsurgery import collect_statistics
from lrsurgery.checkpoints.upstream.transformers import checkpoint_blocks_
from lrsurgery.progress import SILENT

SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
BATCHES = 4  # of one sequence, in each round of the times
BARS = {"peak GB, own": 4.0, "time over forward and backward": 1.6}


def command(*words: str | Path) -> dict[str, float]:
    return run_watched([sys.executable, "-m", "lrsurgery", *map(str, words), "--quiet"])


def whole_commands(model: tf.PreTrainedModel, samples: int, length: int, batch: int) -> list[dict[str, Any]]:
    """Memory of calibration, of evaluation and of two steps of healing, each as one process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, cut, healed = (Path(temporary) / name for name in ("model", "cut", "healed"))
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        tokens = write_tokens(folder, SHAPE["vocab_size"], max(samples, 2 * batch) * length)
        size = ("--block-size", str(length))
        factorise = ("factorise", folder, "--budget", "0.8", "--no-loss-check", "--no-cache", "--output", cut)
        several = ("--batch-size", str(batch))
        heal = (
            "finetune",
            cut,
            "--data",
            tokens,
            "--teacher",
            folder,
            "--steps",
            "2",
            "--lr",
            "1e-4",
            "--output",
            healed,
        )
        found = {
            f"calibration, {samples} x {length} tokens": command(
                *factorise, "--calibration", tokens, "--samples", str(samples), *size
            ),
            f"evaluate, {batch} x {length} tokens a batch": command("evaluate", cut, "--data", tokens, *several, *size),
            f"finetune --teacher, {batch} x {length} tokens a step": command(*heal, *several, *size),
        }
    return [
        {"command": name, "peak GB, own": each["own_bytes"] / 1e9, "with files": each["peak_bytes"] / 1e9}
        for name, each in found.items()
    ]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--samples", type=int, default=4, help="of the command whose memory is measured")
    options.add_argument("--block-size", type=int, default=512)
    options.add_argument("--batch-size", type=int, default=8, help="of evaluation and healing")
    arguments = options.parse_args()
    torch.manual_seed(0)
    model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SHAPE)).eval()
    rows = whole_commands(model, arguments.samples, arguments.block_size, arguments.batch_size)
    model.float()
    batches = [{"input_ids": torch.randint(2, SHAPE["vocab_size"], (1, arguments.block_size))} for _ in range(BATCHES)]

    def train() -> None:
        model.train().requires_grad_(True)
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            model.zero_grad()

    def calibrate() -> None:
        model.eval()
        checkpoint_blocks_(model)  # as the command does at this size
        collect_statistics(model, batches, listener=SILENT)
        model.gradient_checkpointing_disable()

    seconds = in_turn({"train": train, "calibrate": calibrate}, arguments.repeats)
    over = ratio(seconds["calibrate"], seconds["train"])
    times = {
        "seconds a sample": median(seconds["calibrate"]) / BATCHES,
        "forward and backward": median(seconds["train"]) / BATCHES,
        "time over forward and backward": over["median"],
        "smallest": over["min"],
        "largest": over["max"],
    }
    rows = [{**row, **(times if number == 0 else dict.fromkeys(times))} for number, row in enumerate(rows)]
    parameters = sum(p.numel() for p in model.parameters())
    finish("large_vocabulary", rows, arguments, bars=BARS, parameters=parameters)


if __name__ == "__main__":
    main()
