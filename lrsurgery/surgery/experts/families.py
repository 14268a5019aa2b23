"""Which modules of transformers' models hold fused experts, and how their parameters lie."""

from __future__ import annotations

from torch import nn

from lrsurgery.surgery.kinds.common import is_one_of

# experts of transformers without its mark, whose weights are (experts, in, out)
TRANSPOSED = {("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")}
ACTIVE = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


def is_transposed(module: nn.Module) -> bool | None:
    """Whether the weights of fused experts are (experts, in, out), not (experts, out, in); None for other modules.

    `use_experts_implementation` marks the experts of transformers' families with this attribute.
    """
    if is_one_of(module, TRANSPOSED):
        return True
    mark = getattr(module, "is_transposed", None)
    return mark if isinstance(mark, bool) and hasattr(module, "has_bias") and hasattr(module, "_apply_gate") else None


def active_experts(module: nn.Module) -> int:
    """How many experts work on one token, by the module or its config; 1 if neither tells."""
    for holder in (module, getattr(module, "config", None)):
        for name in ACTIVE:
            count = getattr(holder, name, None)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return count
    return 1
