"""Train a small GPT-2 in low rank from scratch under two decays, and compare what they leave of its layers' ranks.

    python examples/train_low_rank.py --output low-rank

The text is Python's own documentation, by examples/pydocs_text.py; the model and its tokenizer are made from it. Each
layer starts as the truncated SVD of a random one (spectral init); then decay applies to each factor by itself (l2), or
to the product of the two (frobenius). For all of the text: --steps 2000 --characters 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydocs_text import SEPARATOR, make_split, make_tokenizer
from transformers import GPT2Config

import lrsurgery

DECAYS = ("l2", "frobenius")
STRENGTH = 1.0
LENGTH = 64  # tokens of a sequence


def write_inputs(folder: Path, characters: int) -> Path:
    """Write train.txt and valid.txt, cut to `characters` (0: whole), and the config and tokenizer of the model."""
    train, valid = make_split()
    for name, documents, most in (("train", train, characters), ("valid", valid, characters // 20)):
        text = SEPARATOR.join(documents)
        (folder / f"{name}.txt").write_text(text[:most] if most else text, encoding="utf-8")
    tokenizer = make_tokenizer(train[:100])
    eot = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LENGTH,
        n_embd=96,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eot,
        eos_token_id=eot,
        architectures=["GPT2LMHeadModel"],
    )
    tokenizer.save_pretrained(folder / "model")
    config.save_pretrained(folder / "model")
    return folder / "model"


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Train in low rank from scratch under two decays.")
    parser.add_argument("--output", type=Path, required=True, help="folder for text and models")
    parser.add_argument("--rank", default="0.5", help="(default: %(default)s, half of full rank)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--characters", type=int, default=200_000, help="of the text (default: %(default)s)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    model = write_inputs(args.output, args.characters)
    rows = {}
    for decay in DECAYS:
        settings = {
            "model": str(model),
            "from_scratch": True,
            "rank": [args.rank],
            "init": "spectral",
            "steps": args.steps,
            "data": str(args.output / "train.txt"),
            "eval_data": str(args.output / "valid.txt"),
            "lr": 1e-2,
            "schedule": "linear",
            "warmup_steps": args.steps // 10,
            "eval_steps": args.steps,
            "decay": decay,
            "decay_strength": STRENGTH,
            "set": {"adam_beta2": 0.95},
        }
        # also in the folder: the weights, a recipe that runs this again, and metrics.jsonl with each layer's ranks
        rows[decay] = lrsurgery.finetune(settings, args.output / decay, overwrite=True)

    print(f"{'decay':12}{'eval loss':>10}{'nuclear':>10}{'entropy':>10}{'stable':>10}   mean rank of the products U V")
    for decay, outcome in rows.items():
        ranks = [row.after for row in outcome.report.factorised if row.after is not None]
        means = [sum(getattr(r, name) for r in ranks) / len(ranks) for name in ("nuclear", "entropy", "stable")]
        print(f"{decay:12}{outcome.stages['healed']['loss']:>10.3f}{''.join(f'{mean:>10.2f}' for mean in means)}")


if __name__ == "__main__":
    main()
