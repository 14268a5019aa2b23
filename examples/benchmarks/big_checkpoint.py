"""Peak memory of `lrsurgery factorise` on a 7B-Llama-shaped bf16 checkpoint, at full and at half depth.

The checkpoint (13.5 GB at 32 layers) is made on the first run, shard by shard, and kept where --folder says. Its
matrices have a power law of singular values over noise (weights.py); those of one shape share their spectrum, so that
making them costs little more than writing them. The half-depth one links to the same shards.

Every tensor of either checkpoint streams through the command in every run. How many are also factorised is --factorise:
a matrix costs about ten seconds on two cores, so the default factorises the first and the last layer (the largest
matrices there are), and `--factorise all` the whole model. At rank 0.5 the square ones are over break-even and stay
dense; --rank 0.4 takes them too.

    python examples/benchmarks/big_checkpoint.py --folder /somewhere/with/30GB --save
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import finish, parser, run_measured
from torch import Tensor
from weights import shuffled, trained_weight

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 4096, 11008, 32000, 32
LAYERS_A_SHARD = 2  # 0.8 GB
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
if len(sys.argv) > 2:  # as a forward pass would touch them
    sum(float(p.float().sum()) for p in model.parameters())
"""


def make(folder: Path, layers: int) -> Path:
    """Make the checkpoint `folder`/layers-N, unless it exists, in the memory of one shard."""
    target = folder / f"layers-{layers}"
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    groups = [range(i, min(i + LAYERS_A_SHARD, layers)) for i in range(0, layers, LAYERS_A_SHARD)]
    names = [f"model-{i:05d}-of-{len(groups) + 1:05d}.safetensors" for i in range(1, len(groups) + 2)]
    bases = {shape: trained_weight(*shape, seed, dtype=torch.bfloat16) for seed, shape in enumerate(_shapes())}
    weight_map: dict[str, str] = {}
    total = 0
    for name, group in zip(names, [*groups, None], strict=True):
        tensors = _ends(bases) if group is None else {k: t for i in group for k, t in _layer(i, bases).items()}
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    _write_texts(target, layers, weight_map, total)
    return target


def _shapes() -> list[tuple[int, int]]:
    return list(dict.fromkeys(MATRICES.values()))


def _layer(number: int, bases: dict[tuple[int, int], Tensor]) -> dict[str, Tensor]:
    made = {
        f"model.layers.{number}.{name}.weight": shuffled(bases[shape], 100 * number + i)
        for i, (name, shape) in enumerate(MATRICES.items())
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        made[f"model.layers.{number}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return made


def _ends(bases: dict[tuple[int, int], Tensor]) -> dict[str, Tensor]:
    """Embedding, head and last norm: rows of the layers' matrices, repeated."""
    rows = bases[INTERMEDIATE, HIDDEN]
    table = torch.cat([rows, rows.flip(0), -rows])[:VOCABULARY].contiguous()
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return {"model.embed_tokens.weight": table, "lm_head.weight": shuffled(table, 1), "model.norm.weight": norm}


def _write_texts(target: Path, layers: int, weight_map: dict[str, str], total: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.save_pretrained(target)  # last: a folder with a config is whole


def halve(whole: Path, layers: int) -> Path:
    """Make a checkpoint of the first `layers` layers and the ends of another, as links to its shards."""
    target = whole.with_name(f"layers-{layers}")
    if (target / "config.json").is_file():
        return target
    target.mkdir(exist_ok=True)
    old: dict[str, str] = json.loads((whole / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    kept = {k: f for k, f in old.items() if not k.startswith("model.layers.") or int(k.split(".")[2]) < layers}
    files = sorted(set(kept.values()))
    renamed = {f: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1)}
    for file, name in renamed.items():
        (target / name).unlink(missing_ok=True)
        os.link(whole / file, target / name)
    total = sum((target / name).stat().st_size for name in renamed.values())
    _write_texts(target, layers, {key: renamed[file] for key, file in kept.items()}, total)
    return target


def measure(folder: Path, layers: int, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure the command on this checkpoint: one row of peak, time and factorised matrices."""
    chosen = {"ends": [0, layers - 1], "one": [0], "all": list(range(layers))}[arguments.factorise]
    output = scratch / f"out-{layers}"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "lrsurgery",
        "factorise",
        str(folder),
        "--rank",
        arguments.rank,
        "--quiet",
        "--no-loss-check",
    ]
    command += ["--output", str(output), *arguments.option]
    if arguments.factorise != "all":
        command += [part for i in chosen for part in ("--include", f"model.layers.{i}.*")]
    figures = run_measured(command)
    report = json.loads((output / "rank_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return {
        "what": "lrsurgery factorise",
        "layers": layers,
        "GB of weights": report["totals"]["bytes_before"] / 1e9,
        "matrices factorised": report["totals"]["layers_factorised"],
        "rank": arguments.rank,
        "seconds": figures["wall_s"],
        "peak GB": figures["peak_bytes"] / 1e9,
    }


def load(folder: Path, layers: int, size: float) -> dict[str, Any]:
    """Measure loading the checkpoint with `from_pretrained` and touching its weights once: one row."""
    figures = run_measured([sys.executable, "-c", LOAD, str(folder), "touch"])
    return {
        "what": "from_pretrained",
        "layers": layers,
        "GB of weights": size,
        "matrices factorised": 0,
        "rank": None,
        "seconds": figures["wall_s"],
        "peak GB": figures["peak_bytes"] / 1e9,
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, help="keeps the checkpoints here; else they are temporary")
    options.add_argument("--layers", type=int, default=32, help="depth of the full checkpoint; half of it as well")
    options.add_argument("--rank", default="0.5")
    options.add_argument("--factorise", choices=("ends", "one", "all"), default="ends", help="which layers")
    options.add_argument("--option", action="append", default=[], help="one more word for the command, as --jobs=1")
    options.add_argument("--no-load", action="store_true", help="leave from_pretrained out")
    arguments = options.parse_args()
    if arguments.layers % (2 * LAYERS_A_SHARD):
        options.error(f"--layers has to be a multiple of {2 * LAYERS_A_SHARD}, so that half of them are whole shards")
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.folder or Path(temporary)
        full = make(place, arguments.layers)
        half = halve(full, arguments.layers // 2)
        rows = [
            measure(full, arguments.layers, arguments, place),
            measure(half, arguments.layers // 2, arguments, place),
        ]
        if not arguments.no_load:
            rows.append(load(full, arguments.layers, rows[0]["GB of weights"]))
    deep, shallow = (row["peak GB"] for row in rows[:2])
    finish(
        "big_checkpoint",
        rows,
        arguments,
        bars={"peak GB": 3.0, "full over half depth": 1.1},
        full_over_half=deep / shallow,
    )


if __name__ == "__main__":
    main()
