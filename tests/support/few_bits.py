"""Small factorised folders to quantise, and what their files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.layers import Spec

from . import moe, tiny

TOKENS = torch.arange(2, 34).reshape(2, 16)
CASES: dict[str, dict[str, Any]] = {
    "balanced": {"form": "balanced"},
    "pivoted": {"form": "pivoted"},
    "tied table": {"form": "pivoted", "embeddings": True, "heads": True},
    "llama": {"form": "pivoted"},
    "llama, bf16": {"form": "pivoted"},
    "shared v": {"form": "balanced"},
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits.float()  # type: ignore[no-any-return]


def save_half(where: Path, case: str) -> None:
    """Write a dense model to `where / "dense"`, and a factorised one to `where / "half"`."""
    if "llama" in case or "shared" in case:
        save_llama(where / "dense", torch.bfloat16 if "bf16" in case else torch.float32)
    else:
        tiny.save_gpt2(where / "dense", dropout=0.0)
    model = lrsurgery.load_model(where / "dense")
    options = CASES[case]
    if case == "shared v":
        share_(model)
    else:
        lrsurgery.factorise_(model, rank=0.4, **options)
    lrsurgery.save_model(model, where / "half", form=options["form"])


def save_llama(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    made: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**{**moe.BASE, "tie_word_embeddings": False}))
    made.to(dtype).save_pretrained(folder)


def share_(model: Any) -> None:
    """Give the projections of the first block's attention one v, with random factors."""
    block = "model.layers.0.self_attn"
    others = {f"{block}.{name}_proj": Spec("linear", 12, v_of=f"{block}.q_proj") for name in "kv"}
    swap_(model, {f"{block}.q_proj": Spec("linear", 12), **others})
    for layer in factorised_layers(model).values():
        layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)


def kept_in(model: Any) -> set[int]:
    """Ids of the modules that keep their dtype: the output head, its parts, and those of tied layers."""
    layers = factorised_layers(model).values()
    tied = {id(part) for layer in layers if layer.tied for part in (layer.u, layer.v)}
    return tied | {id(each) for each in model.get_output_embeddings().modules()}


def bytes_in(folder: Path, wanted: Callable[[str], bool]) -> Iterator[int]:
    """Bytes of each tensor in a folder whose key is wanted."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if wanted(key):
                tensor = file.get_tensor(key)
                yield tensor.numel() * tensor.element_size()
