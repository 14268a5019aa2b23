"""How fast a mixture of experts is at half of its parameters: a block in the shape of Qwen3-MoE, beside the dense one.

64 experts of (768, 1024) and (1024, 384), 8 a token, with random weights: only the shapes count. `batched_mm` copies
the weights of every token's experts, so it is timed with few tokens alone.

    python examples/benchmarks/experts.py [--bf16] [--save]
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import harness
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import lrsurgery

TOKENS, FEW = (8, 512), 64
WAYS = ("eager", "grouped_mm", "batched_mm")


def build(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The dense block and the factorised one."""
    config = Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8)
    torch.manual_seed(0)
    dense = Qwen3MoeSparseMoeBlock(config)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.03)
    half = copy.deepcopy(dense)
    lrsurgery.factorise_(half, rank="params:0.5", include=["experts.*"], init="he")
    return tuple(each.to(dtype).eval().requires_grad_(False) for each in (dense, half))  # type: ignore[return-value]


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--bf16", action="store_true", help="weights and inputs in bf16")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.bf16 else torch.float32
    dense, half = build(dtype)
    banks: list[Any] = [half.experts, dense.experts]
    sizes = [sum(p.numel() for p in each.parameters()) for each in banks]
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        for block in (dense, half):
            block.experts.config._experts_implementation = way  # type: ignore[union-attr]
        for tokens in TOKENS:
            if way == "batched_mm" and tokens > FEW:
                continue
            x = torch.randn(1, tokens, 1024).to(dtype)
            seconds = harness.in_turn(
                {"dense": functools.partial(dense, x), "half": functools.partial(half, x)}, given.repeats, warm_up=2
            )
            found = harness.ratio(seconds["dense"], seconds["half"])
            rows.append({"implementation": way, "tokens": tokens, "parameters": sizes[0] / sizes[1], **found})
    harness.finish("experts", rows, given, dtype=str(dtype))


if __name__ == "__main__":
    main()
