"""The HTML report: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import math
import random
from typing import Any

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&amp;${1}'\"\u2028"
WIDE = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
LADDER = ("0.25", "0.5", "0.75", "params:0.5")


def spectrum(full: int, slope: float, cut: int | None = None) -> dict[str, Any]:
    """Falling singular values at about fifty positions, as a report has them."""
    last = min(full, cut or full)
    index = sorted({1 + round((last - 1) * (i / 49) ** 2) for i in range(50)})
    return {"index": index, "value": [10 * i**-slope * math.exp(-2.5 * i / full) for i in index]}


def effective(draw: random.Random, full: int) -> dict[str, Any]:
    share = draw.uniform(0.3, 0.6)
    return {
        "nuclear": full * share,
        "entropy": full * (share + 0.2),
        "stable": full * share**3,
        "condition": 1e3 * share,
    }


def factorised(draw: random.Random, name: str, rows: int, columns: int) -> dict[str, Any]:
    full = min(rows, columns)
    rank = draw.randrange(full // 4, full // 2)
    slope = draw.uniform(0.1, 0.7)
    kept = draw.uniform(0.7, 0.999)
    return {
        "name": name, "kind": "conv1d", "shape": [rows, columns], "status": "factorised", "reason": None,
        "full_rank": full, "rank": rank, "break_even": rows * columns // (rows + columns),
        "parameters_before": rows * columns, "parameters_after": rank * (rows + columns),
        "flops_before": 2 * rows * columns, "flops_after": 2 * rank * (rows + columns),
        "energy_kept": kept, "relative_error": math.sqrt(1 - kept), "spectral_error": draw.uniform(0.01, 0.3),
        "before": effective(draw, full), "after": effective(draw, rank),
        "spectrum_before": spectrum(full, slope), "spectrum_after": spectrum(full, slope, rank),
        "overlap": {
            "output": {"largest": draw.uniform(20, 90), "median": draw.uniform(1, 20)},
            "input": {"largest": draw.uniform(20, 90), "median": draw.uniform(1, 20)},
            "leading": [{"k": k, "output": 1 - k / 900, "input": 1 - k / 700} for k in (1, 4, 16, 64, rank)],
        },
        "ladder": None, "damage": draw.uniform(1, 90), "damage_high": draw.random() < 0.1,
    }  # fmt: skip


def dense(name: str, rows: int, columns: int, reason: str) -> dict[str, Any]:
    """A layer that stayed as it was: most of what a row can have is null."""
    size = rows * columns
    layer = dict.fromkeys(factorised(random.Random(0), name, rows, columns))
    same = {"parameters_before": size, "parameters_after": size, "flops_before": 2 * size, "flops_after": 2 * size}
    return {
        **layer,
        "name": name,
        "kind": "linear",
        "shape": [rows, columns],
        "status": "dense",
        "reason": reason,
        **same,
    }


def training_run(name: str, decay: str, shift: float, names: list[str]) -> dict[str, Any]:
    """A run that is dense for 100 steps, then factorised and healed."""
    steps = list(range(0, 401, 25))

    def loss(step: int) -> float:
        return 3.6 + shift + (1.2 * math.exp(-(step - 100) / 90) if step >= 100 else -0.1)

    stages = [(step, "dense") for step in steps if step <= 100] + [
        (step, "factorised") for step in steps if step >= 100
    ]
    evaluations = [
        {"step": step, "stage": stage, "loss": at, "perplexity": math.exp(at), "top1": 0.9 - at / 10}
        for step, stage in stages
        for at in [3.5 + shift if stage == "dense" else loss(step)]
    ]
    figures = {
        stage: {"loss": at, "perplexity": math.exp(at), "top1": 0.9 - at / 10}
        for stage, at in (("dense", 3.5), ("factorised", 4.8), ("healed", loss(400)))
    }
    layers = {}
    for i, layer in enumerate(names):
        start = 100 + 20 * i
        layers[layer] = {
            "step": steps,
            **{
                key: [start * part * (1 - shift * s / 500) for s in steps]
                for key, part in (("nuclear_rank", 1), ("entropy_rank", 1.6), ("stable_rank", 0.3), ("frobenius_norm", 0.2),
                                  ("spectral_norm", 0.02), ("u_norm", 0.1), ("v_norm", 0.11))
            },
            "spectrum": {"index": [1, 2, 4, 8, 16, 32], "values": [[9 / k - s / 4000 for k in (1, 2, 4, 8, 16, 32)] for s in steps]},
        }  # fmt: skip
    settings = {"decay": decay, "decay_strength": 0.01, "lr": 5e-4, "optimizer": "adamw", "steps": 400, "teacher": None,
                "data": "train.txt", "seed": 0}  # fmt: skip
    return {
        "name": name, "settings": settings, "stages": figures, "evaluations": evaluations,
        "losses": [{"step": s, "loss": loss(s) + 0.05 * math.sin(s), "lr": 5e-4 * (1 - s / 420)} for s in range(0, 401, 5)],
        "layers": layers,
    }  # fmt: skip


def bench() -> dict[str, Any]:
    def run(work: str, batch: int, length: int | None, speedup: float, ideal: float) -> dict[str, Any]:
        now = 120.0 / speedup
        return {
            "work": work, "batch": batch, "length": length, "unit": "tokens", "flops": 10**10, "median_ms": now,
            "p95_ms": now * 1.1, "throughput": 1e5 / now,
            "against": {"flops": 15 * 10**9, "median_ms": 120.0, "p95_ms": 131.5, "throughput": 833.3},
            "speedup": speedup, "interval": [speedup - 0.06, speedup + 0.05], "confidence": 0.95, "rounds": 24,
            "reached": speedup > 1, "ideal": ideal,
        }  # fmt: skip

    layer = {"kind": "conv1d", "shape": [768, 3072], "rank": 300, "input": [1, 128, 768], "dense_ms": 1.31}
    return {
        "machine": {"processor": "Two-core server", "cores": 2, "threads": 2, "gpu": None, "system": "Linux", "python": "3.12", "torch": "2.11"},
        "options": {"rounds": "auto"},
        "model": {"name": "gpt2-half", "parameters": 82_000_000, "bytes": 328_000_000, "peak_memory": 612_000_000},
        "against": {"name": "gpt2", "parameters": 124_439_808, "bytes": 497_759_232, "peak_memory": None},
        "runs": [run("prefill", 1, 128, 1.31, 1.52), run("prefill", 8, 128, 1.44, 1.52), run("token by token", 1, 32, 0.94, 1.5)],
        "layers": [
            {**layer, "names": [f"transformer.h.{i}.mlp.c_fc" for i in range(4)], "factorised_ms": 0.9, "speedup": 1.45,
             "interval": [1.4, 1.5], "slower": False},
            {**layer, "names": ["transformer.h.0.attn.c_proj"], "factorised_ms": 1.6, "speedup": 0.82,
             "interval": [0.8, 0.84], "slower": True},
        ],
    }  # fmt: skip


def surgery_body(
    blocks: int, name: str = "gpt2-half", first: str | None = None, trained: bool = True
) -> dict[str, Any]:
    """A model after surgery, healed and timed: four layers a block and two outside of them."""
    draw = random.Random(blocks)
    layers = [
        factorised(draw, f"transformer.h.{block}.{kind}", *shape)
        if kind != "attn.c_proj" or block % 3
        else dense(f"transformer.h.{block}.{kind}", *shape, "over break-even")
        for block in range(blocks)
        for kind, shape in WIDE.items()
    ]
    layers += [dense("lm_head", 50257, 768, "output head"), factorised(draw, "pooler", 768, 768)]
    if first is not None:
        layers[0]["name"] = first
    names = [layer["name"] for layer in layers[:3]]
    before = sum(layer["parameters_before"] for layer in layers)
    after = sum(layer["parameters_after"] for layer in layers)
    return {
        "format_version": 2, "about": "factorised", "name": name,
        "totals": {
            "layers_factorised": sum(layer["status"] == "factorised" for layer in layers),
            "layers_dense": sum(layer["status"] == "dense" for layer in layers),
            "parameters_before": before, "parameters_after": after, "share": after / before, "bytes_before": before * 4,
            "bytes_after": after * 4, "flops_before": before * 2, "flops_after": after * 2, "energy_kept": 0.9312,
        },
        "ladder": None, "source": {"reference": "gpt2", "hub_id": None, "revision": "607a30d", "digest": "sha256:8e1a40c1"},
        "command": "lrsurgery factorise gpt2 gpt2-half --rank 0.5 --include 'transformer.*'",
        "options": {"rank": ["0.5"], "init": "spectral", "seed": 0, "exclude": []},
        "versions": {"lrsurgery": "0.1", "torch": "2.11", "transformers": "5.17"},
        "notes": ["1 layer lost more than half of its energy", "Speed was measured on another machine than training"],
        "layers": layers,
        "training": [training_run("healed-frobenius", "frobenius", 0.1, names), training_run("healed-l2", "l2", 0.3, names)] if trained else [],
        "bench": bench() if trained else None,
    }  # fmt: skip


def profile_body(blocks: int) -> dict[str, Any]:
    """A dense model before surgery, with what each rank of the ladder would give."""
    body = surgery_body(blocks, "gpt2", trained=False)
    shares = dict(zip(LADDER, (0.42, 0.66, 0.9, 0.5), strict=True))
    for layer in body["layers"]:
        for key in (
            "rank",
            "parameters_after",
            "energy_kept",
            "relative_error",
            "spectral_error",
            "after",
            "spectrum_after",
            "overlap",
            "flops_after",
            "damage",
            "damage_high",
        ):
            layer[key] = None
        if layer["full_rank"]:
            layer["status"] = "dense"
            layer["ladder"] = [
                {"rank": rank, "to": round(layer["full_rank"] * share * 0.6), "parameters": round(layer["parameters_before"] * share),
                 "energy_kept": 1 - (1 - share) ** 2, "relative_error": 1 - share, "damage": 100 * (1 - share)}
                for rank, share in shares.items()
            ]  # fmt: skip
    totals = {
        **body["totals"],
        "parameters_after": None,
        "share": None,
        "bytes_after": None,
        "flops_after": None,
        "energy_kept": None,
    }
    ladder = [
        {"rank": rank, "layers": 40 - i, "parameters": round(1e8 * share), "share": share, "energy_kept": 1 - (1 - share) ** 2,
         "relative_error": 1 - share, "damage": 100 * (1 - share)}
        for i, (rank, share) in enumerate(shares.items())
    ]  # fmt: skip
    return {**body, "about": "dense", "totals": totals, "ladder": ladder, "command": "lrsurgery report gpt2"}


def runs_body() -> dict[str, Any]:
    """Several training runs compared, and no layers."""
    names = ["transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"]
    decays = ("frobenius", "l2", "none")
    runs = [training_run(f"decay-{decay}", decay, 0.1 + 0.1 * i, names) for i, decay in enumerate(decays)]
    return {
        "format_version": 2,
        "about": "runs",
        "name": "three decays",
        "totals": None,
        "layers": [],
        "training": runs,
        "bench": None,
    }
