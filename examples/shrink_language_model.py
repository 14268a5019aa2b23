"""Shrink a language model by several amounts, see what each costs, and load the result as transformers' own.

    python examples/shrink_language_model.py --output shrunk

The model is examples/pydocs-gpt2, measured on the beginning of its held-out text. Nothing is trained: healing is what
examples/heal_pydocs.py does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrsurgery
import lrsurgery.hf  # enables transformers' own from_pretrained for factorised checkpoints

DENSE = Path(__file__).parent / "pydocs-gpt2"
RANKS = ("0.75", "params:0.75", "params:0.5", "energy:0.9")  # of full rank, of the parameters, of the energy
CHARACTERS = 12_000
PROMPT = "The return value is"


def continuation(model: Path, prompt: str) -> str:
    """Continue the prompt greedily with the model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)  # a factorised folder loads as any other
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        written = network.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(str(tokenizer.decode(written[0])).split())


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Shrink examples/pydocs-gpt2 by several amounts.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models")
    parser.add_argument("--rank", nargs="+", default=RANKS, help="what to try (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of the text (default: %(default)s)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    text = args.output / "valid.txt"
    text.write_text((DENSE / "valid.txt").read_text(encoding="utf-8")[: args.characters], encoding="utf-8")

    found = {"dense": lrsurgery.evaluate(DENSE, text)}
    for rank in args.rank:
        folder = args.output / f"rank-{rank.replace(':', '-')}"
        # layers at which the rank would save nothing stay dense; the folder's rank_report.json and card say which
        lrsurgery.factorise_checkpoint(DENSE, folder, rank=rank, overwrite=True)
        found[rank] = lrsurgery.evaluate(folder, text)

    print(f"{'rank':14}{'parameters':>12}{'bytes':>12}{'perplexity':>12}")
    for name, row in found.items():
        print(f"{name:14}{row.parameters:>12,}{row.bytes:>12,}{row.values['perplexity']:>12.3f}")
    print(f"\n{args.rank[-1]} writes: {continuation(folder, PROMPT)}")


if __name__ == "__main__":
    main()
