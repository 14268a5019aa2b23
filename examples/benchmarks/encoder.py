"""A sentence encoder without a head, cut in half and refined: how near its embeddings stay to the dense model's.

A small BERT is distilled from the embedded GPT-2: it learns the mean of that model's last hidden states of each
sentence. It is factorised at `--budget` by the command, with and without `--refine`, on sentences without labels.
`evaluate --against` measures the cosine of its hidden states to the dense ones, on sentences that neither has seen.

    python examples/pydocs_text.py --output pydocs-text
    python examples/benchmarks/encoder.py --text pydocs-text [--save]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from harness import finish, parser
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

MODEL = Path(__file__).parents[1] / "pydocs-gpt2"
TOKENS, BATCH = 48, 32


def sentences(file: Path) -> list[str]:
    """The lines of a text that are long enough to mean something."""
    lines = dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if 30 < len(line) < 160]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def distil(text: list[str], folder: Path, steps: int, seed: int) -> float:
    """Train the encoder and write it with its tokenizer; return the mean cosine to the teacher over the last steps."""
    torch.manual_seed(seed)
    teacher, tokenizer = AutoModel.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    width = teacher.config.n_embd
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    reached = []
    for _ in range(steps):
        chosen = [text[i] for i in torch.randint(len(text), (BATCH,)).tolist()]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = pooled(teacher(**inputs).last_hidden_state, inputs["attention_mask"])
        found = cosine_similarity(pooled(model(**inputs).last_hidden_state, inputs["attention_mask"]), wanted).mean()
        optimizer.zero_grad()
        (1 - found).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
        reached.append(float(found))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return mean(reached[-50:])


def run(*words: object) -> str:
    command = [sys.executable, "-m", "lrsurgery", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--text", type=Path, required=True, help="folder that pydocs_text.py wrote")
    options.add_argument("--budgets", type=float, nargs="+", default=(0.5, 0.25))
    options.add_argument("--distil-steps", type=int, default=1500)
    options.add_argument("--refine-steps", type=int, default=400)
    options.add_argument("--seeds", type=int, default=3, help="of the encoder and of the calibration samples")
    arguments = options.parse_args()
    text = {name: sentences(arguments.text / f"{name}.txt") for name in ("train", "valid")}
    cosines: dict[tuple[float, str], list[float]] = {}
    taught = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name, lines in text.items():
            (place / f"{name}.txt").write_text("\n".join(lines[:2000]) + "\n", encoding="utf-8")
        for seed in range(arguments.seeds):
            taught.append(distil(text["train"], place / "dense", arguments.distil_steps, seed))
            for budget in arguments.budgets:
                for how, more in (("cut", ()), ("--refine", ("--refine", "--refine-steps", arguments.refine_steps))):
                    data = ("--calibration", place / "train.txt", "--seed", seed, "--no-loss-check", "--quiet")
                    target = ("--output", place / "half", "--overwrite")
                    run("factorise", place / "dense", "--budget", budget, *data, *more, *target)
                    where = ("--data", place / "valid.txt", "--against", place / "dense", "--task", "none")
                    values = json.loads(run("evaluate", place / "half", *where, "--json"))["models"][0]["values"]
                    cosines.setdefault((budget, how), []).append(values["last_hidden_state.cosine"])
                    print(seed, budget, how, values, file=sys.stderr, flush=True)
    rows = [
        {
            "budget": budget,
            "how": how,
            "cosine to dense": f"{mean(found):.4f} ± {stdev(found) if len(found) > 1 else 0:.4f}",
        }
        for (budget, how), found in cosines.items()
    ]
    finish("encoder", rows, arguments, cosine_to_teacher=mean(taught))


if __name__ == "__main__":
    main()
