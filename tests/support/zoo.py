"""Tiny models of every architecture that the tool promises, built from configs, with inputs for a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 11, 4], [7, 7, 41, 3, 26, 90, 12, 8]])
SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {**SMALL, "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
T5: dict[str, Any] = {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
VIT: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@dataclass(frozen=True)
class Case:
    """A transformers model: its class, config and inputs."""

    cls: str
    config: Callable[[], Any]
    inputs: dict[str, Tensor]


def _text(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": IDS, **more}


def _image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TRANSFORMERS: dict[str, Case] = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=32, eos_token_id=2),
        _text(),
    ),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=96, eos_token_id=2), _text()
    ),
    "opt": Case(
        "OPTForCausalLM",
        lambda: tf.OPTConfig(**SMALL, ffn_dim=96, max_position_embeddings=32, word_embed_proj_dim=48, pad_token_id=0),
        _text(),
    ),
    "llama": Case("LlamaForCausalLM", lambda: tf.LlamaConfig(**LLAMA), _text()),
    "mistral": Case("MistralForCausalLM", lambda: tf.MistralConfig(**LLAMA), _text()),
    "qwen3": Case("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**LLAMA, head_dim=12), _text()),
    "gemma3": Case("Gemma3ForCausalLM", lambda: tf.Gemma3TextConfig(**LLAMA, head_dim=12), _text()),
    "falcon": Case("FalconForCausalLM", lambda: tf.FalconConfig(**SMALL, eos_token_id=2), _text()),
    "phi3": Case("Phi3ForCausalLM", lambda: tf.Phi3Config(**LLAMA), _text()),
    "bert": Case("BertForMaskedLM", lambda: tf.BertConfig(**BERT), _text()),
    "roberta": Case("RobertaForMaskedLM", lambda: tf.RobertaConfig(**BERT), _text()),
    "distilbert": Case(
        "DistilBertForSequenceClassification",
        lambda: tf.DistilBertConfig(vocab_size=96, dim=48, n_layers=2, n_heads=4, hidden_dim=96),
        _text(),
    ),
    "deberta-v2": Case(
        "DebertaV2ForSequenceClassification",
        lambda: tf.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
        _text(),
    ),
    "t5": Case("T5ForConditionalGeneration", lambda: tf.T5Config(**T5), _text(decoder_input_ids=IDS)),
    "bart": Case(
        "BartForConditionalGeneration",
        lambda: tf.BartConfig(
            vocab_size=96,
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=32,
        ),
        _text(),
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            vocab_size=96,
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        {"input_features": _noise(2, 16, 40), "decoder_input_ids": IDS},
    ),
    "vit": Case("ViTForImageClassification", lambda: tf.ViTConfig(**VIT, image_size=32, patch_size=8), _image(32)),
    "vivit": Case(
        "VivitForVideoClassification",
        lambda: tf.VivitConfig(**VIT, image_size=16, num_frames=4, tubelet_size=[2, 8, 8]),
        {"pixel_values": _noise(2, 4, 3, 16, 16)},
    ),
    "swin": Case(
        "SwinForImageClassification",
        lambda: tf.SwinConfig(image_size=32, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4),
        _image(32),
    ),
    "convnext": Case(
        "ConvNextForImageClassification",
        lambda: tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32),
        _image(32),
    ),
    "clip": Case(
        "CLIPModel",
        lambda: tf.CLIPConfig(
            text_config={**BERT, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**VIT, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        ),
        {**_text(), **_image(32)},
    ),
    "wav2vec2": Case(
        "Wav2Vec2ForCTC",
        lambda: tf.Wav2Vec2Config(
            vocab_size=40,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
        ),
        {"input_values": _noise(2, 400)},
    ),
    "mixtral": Case("MixtralForCausalLM", lambda: tf.MixtralConfig(**LLAMA, num_local_experts=4), _text()),
    "mamba": Case(
        "MambaForCausalLM",
        lambda: tf.MambaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=2, state_size=8, pad_token_id=0),
        _text(),
    ),
}

# timm name -> (options that make it small, image size)
NARROW: dict[str, Any] = {"channels": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}
TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": (NARROW, 32),
    "resnet50": (NARROW, 32),
    "wide_resnet50_2": (NARROW, 32),
    "vgg11": ({"mlp_ratio": 0.02}, 32),
    "densenet121": ({"block_config": (2, 2)}, 32),
    "mobilenetv2_100": ({}, 32),
    "mobilenetv3_small_100": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "convnext_atto": ({"dims": (16, 32, 32, 48), "depths": (1, 1, 1, 1)}, 32),
    "regnetx_002": ({}, 32),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    "deit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
        32,
    ),
    "mixer_s16_224": ({"img_size": 32}, 32),
    "resnext50_32x4d": (NARROW, 32),
}


def build_transformers(name: str) -> nn.Module:
    """The model with weights whose layers differ enough from each other that a mix-up shows."""
    torch.manual_seed(0)
    case = TRANSFORMERS[name]
    model: nn.Module = getattr(tf, case.cls)(case.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_transformers(name: str, folder: Path) -> nn.Module:
    model: Any = build_transformers(name)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


def build_timm(name: str, **more: Any) -> nn.Module:
    """The model with batch norm statistics of its own, so that depth does not blow activations up."""
    import timm

    torch.manual_seed(0)
    options, size = TIMM[name]
    model = timm.create_model(name, pretrained=False, num_classes=7, **options, **more)
    with torch.no_grad():
        model.train()
        model(torch.randn(8, 3, size, size))
    return model.eval()


def save_timm(name: str, folder: Path) -> nn.Module:
    from timm.models import save_for_hf

    model = build_timm(name)
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model computes, as one tensor: logits, or image-text similarities."""
    with torch.no_grad():
        result: Any = model(**inputs)
    logits: Tensor = result.logits if hasattr(result, "logits") else result.logits_per_image
    return logits


def images(name: str) -> Tensor:
    size = TIMM[name][1]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
