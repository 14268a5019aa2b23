"""Tiny mixtures of experts of every family with fused experts, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from support.zoo import IDS
from torch import Tensor, nn

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR: dict[str, Any] = {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
}

FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "mixtral": ("MixtralForCausalLM", lambda: tf.MixtralConfig(**LOCAL)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda: tf.Qwen3MoeConfig(**FOUR)),
    "qwen3_next": ("Qwen3NextForCausalLM", lambda: tf.Qwen3NextConfig(**FOUR, **LINEAR)),
    "gpt_oss": ("GptOssForCausalLM", lambda: tf.GptOssConfig(**LOCAL)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", lambda: tf.DeepseekV2Config(**DEEPSEEK, topk_method="greedy")),
    "deepseek_v3": ("DeepseekV3ForCausalLM", lambda: tf.DeepseekV3Config(**DEEPSEEK)),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        lambda: tf.Glm4MoeConfig(**{**FOUR, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    ),
    "olmoe": ("OlmoeForCausalLM", lambda: tf.OlmoeConfig(**FOUR)),
    "phimoe": ("PhimoeForCausalLM", lambda: tf.PhimoeConfig(**LOCAL)),
    "llama4": (
        "Llama4ForCausalLM",
        lambda: tf.Llama4TextConfig(**{**LOCAL, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}),
    ),
    "granitemoe": ("GraniteMoeForCausalLM", lambda: tf.GraniteMoeConfig(**LOCAL)),
    "jamba": (
        "JambaForCausalLM",
        lambda: tf.JambaConfig(
            **{**FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1},
            expert_layer_offset=0,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        lambda: tf.Lfm2MoeConfig(
            **{**FOUR, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, conv_L_cache=3
        ),
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        lambda: tf.MiniMaxConfig(**LOCAL, layer_types=["full_attention", "linear_attention"], block_size=4),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        lambda: tf.Ernie4_5_MoeConfig(
            **{**BASE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
        ),
    ),
}


def build(name: str) -> nn.Module:
    """A model whose experts differ, at the size of weights where their activations are far from linear."""
    torch.manual_seed(0)
    cls, config = FAMILIES[name]
    model: nn.Module = getattr(tf, cls)(config()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
