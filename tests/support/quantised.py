"""Tiny checkpoints in the formats of other quantisers, made by hand, and the dense folders that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import moe, tiny
from torch import Tensor

State = dict[str, Tensor]
FLOAT8 = torch.float8_e4m3fn
SIZES: dict[str, Any] = {
    **moe.BASE,
    "vocab_size": tiny.VOCABULARY,
    "intermediate_size": 80,
    "max_position_embeddings": tiny.BLOCK,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BLOCK = (32, 16)  # of compressed-tensors
EXPONENT = 127  # of E8M0, at 1
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of 4-bit elements, whose highest bit is the sign


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Each scale (..., blocks, blocks) over its block, cut to a weight's shape."""
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def block_scales(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The fp32 scale of each block, by which its largest number becomes 448, the largest of float8."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape[-2:], block, strict=True))
    scales = torch.empty(*weight.shape[:-2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[..., i, j] = part.float().abs().amax((-2, -1)) / 448
    return scales


def to_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(elements, scales, the bf16 weight that they stand for)."""
    scales = block_scales(weight, block)
    wide = spread(scales, block, tuple(weight.shape))
    elements = (weight.float() / wide).to(FLOAT8)
    return elements, scales, (elements.float() * wide).bfloat16()


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(elements, exponents, the bf16 experts (E, n, m) that they stand for)."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))  # (E, m, n / 32, 32)
    exponents = groups.abs().amax(-1).log2().floor() - 2
    small = groups / exponents.exp2()[..., None]
    codes = (small.abs()[..., None] - LEVELS).abs().argmin(-1)
    dense = LEVELS[codes] * small.sign() * exponents.exp2()[..., None]
    codes = codes + 8 * (small < 0)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return packed, (exponents + EXPONENT).to(torch.uint8), dense.flatten(2).transpose(1, 2).contiguous().bfloat16()


@dataclass(frozen=True)
class Made:
    """A quantised folder, and the same model in bf16 as an ordinary one."""

    quantised: Path
    dense: Path
    packed: tuple[str, ...]  # keys of the dense weights that are quantised


def is_matrix(key: str) -> bool:
    return key.endswith("proj.weight") or ".kv_a_proj_with_mqa.weight" in key or "_b_proj.weight" in key


def fp8(block: tuple[int, int]) -> tuple[Callable[[str, Tensor], tuple[State, Tensor] | None], dict[str, Any]]:
    def quantise(key: str, weight: Tensor) -> tuple[State, Tensor] | None:
        if not is_matrix(key):
            return None
        elements, scales, dense = to_float8(weight, block)
        return {key: elements, f"{key}_scale_inv": scales}, dense

    return quantise, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}


def compressed(strategy: str) -> tuple[Callable[[str, Tensor], tuple[State, Tensor] | None], dict[str, Any]]:
    def quantise(key: str, weight: Tensor) -> tuple[State, Tensor] | None:
        if not is_matrix(key):
            return None
        block = {"channel": (1, weight.shape[1]), "tensor": tuple(weight.shape), "block": BLOCK}[strategy]
        # compressed-tensors keeps scales in the model's dtype
        scales = block_scales(weight, block).bfloat16()
        elements = (weight.float() / spread(scales, block, tuple(weight.shape))).clamp(-448, 448).to(FLOAT8)
        stored = scales.reshape(1) if strategy == "tensor" else scales
        activation = {f"{key.removesuffix('weight')}input_scale": torch.ones(1)}
        wide = spread(scales, block, tuple(weight.shape))
        return {key: elements, f"{key}_scale": stored, **activation}, (elements.float() * wide).bfloat16()

    structure = {"block_structure": list(BLOCK)} if strategy == "block" else {}
    weights: dict[str, Any] = {
        **structure,
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {**weights, "dynamic": True}}
    return quantise, {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def mxfp4() -> tuple[Callable[[str, Tensor], tuple[State, Tensor] | None], dict[str, Any]]:
    def quantise(key: str, weight: Tensor) -> tuple[State, Tensor] | None:
        if not key.endswith("_proj"):
            return None
        elements, exponents, dense = to_mxfp4(weight)
        return {f"{key}_blocks": elements, f"{key}_scales": exponents}, dense

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return quantise, {"quant_method": "mxfp4", "modules_to_not_convert": skipped}


def _deepseek() -> Any:
    return tf.DeepseekV3Config(**{**moe.DEEPSEEK, **SIZES, "num_key_value_heads": 4, "head_dim": 8})


def _gpt_oss() -> Any:
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 32}
    return tf.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)


KINDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "fp8": (lambda: tf.Qwen3Config(**SIZES), fp8((8, 16))),
    "fp8 with blocks cut off": (lambda: tf.LlamaConfig(**SIZES), fp8((32, 32))),
    "fp8 mixture": (_deepseek, fp8((8, 8))),
    "float8 a channel": (lambda: tf.Qwen3Config(**SIZES), compressed("channel")),
    "float8 a tensor": (lambda: tf.LlamaConfig(**SIZES), compressed("tensor")),
    "float8 a block": (lambda: tf.LlamaConfig(**SIZES), compressed("block")),
    "mxfp4": (_gpt_oss, mxfp4()),
}


def make(kind: str, place: Path) -> Made:
    """Write a model of this kind, quantised and dense."""
    configure, (quantise, quantisation) = KINDS[kind]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(configure()).bfloat16()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.normal_(std=0.2)
    dense, quantised = place / "dense", place / "quantised"
    for folder in (dense, quantised):
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    state = load_file(dense / "model.safetensors")
    small: State = {}
    packed = []
    for key, weight in list(state.items()):
        found = quantise(key, weight)
        if found is None:
            small[key] = weight
        else:
            packed.append(key)
            stored, state[key] = found
            small |= stored
    assert packed
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    save_file(
        {key: value.contiguous() for key, value in small.items()}, quantised / "model.safetensors", {"format": "pt"}
    )
    change_config(quantised, quantization_config=quantisation)
    return Made(quantised, dense, tuple(packed))


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change_tensors(folder: Path, change: Callable[[State], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
