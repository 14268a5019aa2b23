"""Measure the perplexity of one or more causal language models on a text file.

    python examples/perplexity.py TEXT MODEL [MODEL ...] [--block-size N] [--device DEVICE] [--json]

The text is tokenised as a whole with each model's own tokenizer and cut into consecutive, non-overlapping sequences.
Within a sequence every token but the first is predicted from the ones before it; the reported loss is the mean over all
predicted tokens of the text, the last, shorter sequence included, and the perplexity is its exponential.

Losses are per token, so they compare only models that share a tokenizer: a checkpoint before and after surgery does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured for one model; ``tokens`` counts the whole text, ``predicted`` what the loss averages over."""

    parameters: int
    block_size: int
    tokens: int
    predicted: int
    loss: float
    perplexity: float


def read_text(path: Path) -> str:
    """Read ``path`` as UTF-8 with its line endings as they are: translating them would change the tokens."""
    return path.read_bytes().decode("utf-8")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise ``text``; no BOS/EOS is added, and tokens spelled out in it (``<|endoftext|>``) are recognised."""
    # verbose=False: the text is longer than the model on purpose, so the usual length warning would be noise.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def maximum_positions(model: Any) -> int | None:
    """The longest sequence the model was made for, by the names that transformers' configurations use."""
    for name in ("max_position_embeddings", "n_positions"):
        size = getattr(model.config, name, None)
        if isinstance(size, int):
            return size
    return None


@torch.no_grad()
def measure(model: Any, ids: list[int], block_size: int | None = None) -> Measurement:
    """Measure ``model`` on the token ids of a text, in non-overlapping sequences of ``block_size`` tokens."""
    limit = maximum_positions(model)
    size = block_size or limit
    if size is None:
        raise SystemExit("the model's configuration names no maximum length: pass --block-size")
    if limit is not None and size > limit:
        raise SystemExit(f"sequences of {size} tokens are too long for a model of at most {limit}")
    was_training = model.training
    model.eval()
    total, predicted = 0.0, 0
    # One sequence at a time: no padding and no batch dimension, so nothing but the text and the model affects the sum.
    for start in range(0, len(ids), size):
        sequence = torch.tensor([ids[start : start + size]], device=model.device)
        if sequence.shape[1] < 2:
            continue  # a lone last token has nothing before it to be predicted from
        logits = model(input_ids=sequence, use_cache=False).logits[0, :-1].float()
        # Summed in float64, token by token, so that a short last sequence weighs exactly what its tokens weigh.
        total += float(cross_entropy(logits, sequence[0, 1:], reduction="none").double().sum())
        predicted += sequence.shape[1] - 1
    model.train(was_training)
    if not predicted:
        raise SystemExit("the text is too short: it has no token to predict")
    loss = total / predicted
    # exp overflows above about 709 nats per token: a model broken that far has no finite perplexity to print.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    parameters = sum(p.numel() for p in model.parameters())  # tied weights are one parameter and count once
    return Measurement(parameters, size, len(ids), predicted, loss, perplexity)


def measure_folder(text: str, name: str, block_size: int | None, device: str) -> Measurement:
    """Load the checkpoint ``name`` with its tokenizer and measure it on ``text``."""
    # Enables from_pretrained for factorised checkpoints. Imported here because measure() itself has no need of it.
    import lrsurgery.hf  # noqa: F401

    logging.disable_progress_bar()  # a table is all that is wanted here
    tokenizer = AutoTokenizer.from_pretrained(name)
    # float32 whatever the checkpoint stores, so that differences come from the weights and not from the arithmetic.
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return measure(model.to(device), encode(tokenizer, text), block_size)


def print_table(results: dict[str, Measurement]) -> None:
    """Print one aligned line per model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("parameters", "tokens", "sequence", "loss/token", "perplexity"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, m in results.items():
        counts = f"{m.parameters:,}", f"{m.tokens:,}", str(m.block_size)
        table.add_row(name, *counts, f"{m.loss:.4f}", f"{m.perplexity:.3f}")
    # No highlighting and no markup: a folder name is printed as it is, and the output stays plain when piped.
    Console(highlight=False, markup=False).print(table)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Perplexity of causal language models on a text file.")
    parser.add_argument("text", type=Path, metavar="TEXT", help="UTF-8 text file")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or hub name")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per sequence (default: the model's maximum)"
    )
    parser.add_argument("--device", default="cpu", help="torch device to measure on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per model, instead of a table")
    args = parser.parse_args()
    if args.block_size is not None and args.block_size < 2:
        parser.error("--block-size must be at least 2")
    if not args.text.is_file():
        parser.error(f"no such file: {args.text}")
    text = read_text(args.text)
    results = {name: measure_folder(text, name, args.block_size, args.device) for name in args.models}
    if args.json:
        print(json.dumps([{"model": name, **dataclasses.asdict(m)} for name, m in results.items()], indent=2))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
