"""Fisher calibration of a model whose logits dwarf it: Gemma-3-270M's shape, random weights, 262,144 tokens.

Memory is that of the whole command, without mapped files, whatever the number of samples: batches run one after
another. Time is that of `collect_statistics` over a plain training forward and backward, weight gradients and whole
logits included, on the same tokens in turn. Tokens are random.

    python examples/benchmarks/large_vocabulary.py --save
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

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


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--samples", type=int, default=4, help="of the command whose memory is measured")
    options.add_argument("--block-size", type=int, default=512)
    arguments = options.parse_args()
    torch.manual_seed(0)
    model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SHAPE)).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model.to(torch.bfloat16).save_pretrained(folder)
        tokens = write_tokens(folder, SHAPE["vocab_size"], arguments.samples * 512)
        words = [sys.executable, "-m", "lrsurgery", "factorise", str(folder), "--budget", "0.8", "--no-loss-check"]
        words += ["--calibration", str(tokens), "--samples", str(arguments.samples), "--no-cache", "--quiet"]
        words += ["--block-size", str(arguments.block_size), "--output", str(Path(temporary) / "out")]
        memory = run_watched(words)
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
    row = {
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "samples": f"{arguments.samples} of {arguments.block_size} tokens",
        "peak GB, own": memory["own_bytes"] / 1e9,
        "with files": memory["peak_bytes"] / 1e9,
        "seconds a sample": median(seconds["calibrate"]) / BATCHES,
        "forward and backward": median(seconds["train"]) / BATCHES,
        "time over forward and backward": over["median"],
        "smallest": over["min"],
        "largest": over["max"],
    }
    finish("large_vocabulary", [row], arguments, bars=BARS)


if __name__ == "__main__":
    main()
