"""Halve the parameters of each layer of examples/pydocs-gpt2, heal it in four ways, and print what each comes to.

    python examples/pydocs_text.py --output pydocs-text
    python examples/heal_pydocs.py --text pydocs-text --output healed [--steps 300] [--json]

The same model, data, steps and learning rate for all: no decay, L2 and Frobenius decay of the factors, and Frobenius
decay with the dense model as teacher.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DENSE = Path(__file__).parent / "pydocs-gpt2"
STRENGTH = 0.1
WAYS: dict[str, list[str]] = {
    "none": ["--decay", "none"],
    "l2": ["--decay", "l2", "--decay-strength", str(STRENGTH)],
    "frobenius": ["--decay", "frobenius", "--decay-strength", str(STRENGTH)],
    "frobenius + teacher": ["--decay", "frobenius", "--decay-strength", str(STRENGTH), "--teacher", str(DENSE)],
}


def lrsurgery(*arguments: object) -> dict[str, Any]:
    """Run the program and return its JSON output."""
    command = [sys.executable, "-m", "lrsurgery", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Heal examples/pydocs-gpt2 in four ways.")
    parser.add_argument("--text", type=Path, required=True, help="folder that pydocs_text.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    half = args.output / "factorised"
    lrsurgery("factorise", DENSE, "--rank", "params:0.5", "--output", half, "--overwrite", "--quiet")
    steps = ["--steps", args.steps, "--eval-steps", args.steps, "--stride", 64, "--lr", 5e-4, "--schedule", "linear"]
    common = ["--data", args.text / "train.txt", "--eval-data", DENSE / "valid.txt", "--against", DENSE, *steps]
    found = {}
    for name, options in WAYS.items():
        output = args.output / name.replace(" + ", "-")
        made = lrsurgery("finetune", half, *common, *options, "--output", output, "--overwrite", "--quiet")
        found[name] = made["stages"]
    stages = next(iter(found.values()))
    rows = {"dense": stages["dense"], "factorised": stages["factorised"]}
    rows |= {f"healed, {name}": stages["healed"] for name, stages in found.items()}
    if args.json:
        print(json.dumps({name: row["perplexity"] for name, row in rows.items()}, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:29}{row['perplexity']:8.3f}")


if __name__ == "__main__":
    main()
