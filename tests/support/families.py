"""Tiny models of families that have no task of ours, and inputs for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as tf
from PIL import Image
from support import tiny, zoo

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PROCESSOR = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "resample": 2}
PROCESSOR |= {"image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**VISION, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 1}
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    config = tf.CLIPConfig(text_config={**text, "eos_token_id": 3}, vision_config=vision, projection_dim=24)
    tf.CLIPModel(config).save_pretrained(folder)
    tiny.tokenizer(around=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSOR, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False})
    )
    return folder


def save_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = tf.T5Config(**{**zoo.T5, "vocab_size": tiny.VOCABULARY}, decoder_start_token_id=1, pad_token_id=1)
    tf.T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_whisper(folder: Path) -> Path:
    zoo.save_transformers("whisper", folder)
    return folder


def save_features(folder: Path) -> Path:
    """A timm model without classes."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = with_statistics(timm.create_model("test_resnet", num_classes=0))
    save_for_hf(model, folder, model_config={"input_size": [3, 32, 32], "num_classes": 0}, safe_serialization=True)
    return folder


def with_statistics(model: Any) -> Any:
    """The model with means and variances of its own in batch norm, as training leaves them."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    return model.eval()


def save_segformer(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    kernels = {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    config = tf.SegformerConfig(**sizes, **kernels, decoder_hidden_size=16, num_labels=4)
    model = tf.SegformerForSemanticSegmentation(config)
    model.decode_head.classifier.weight.data *= 100
    with_statistics(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSOR, "image_processor_type": "SegformerImageProcessor"})
    )
    return folder


def sentences(count: int = 16) -> list[str]:
    words = " ".join(tiny.documents()).split()
    return [" ".join(words[5 * i : 5 * i + 3 + i % 4]) for i in range(count)]


def pictures(count: int = 16) -> list[Image.Image]:
    noise = torch.randint(0, 256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in noise]


def write_columns(file: Path, **columns: Any) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(file)
    return file


def texts(folder: Path) -> Path:
    return write_columns(folder / "text.parquet", text=sentences())


def images(folder: Path) -> Path:
    return write_columns(folder / "images.parquet", image=pictures())


def captions(folder: Path) -> Path:
    return write_columns(folder / "captions.parquet", image=pictures(), text=sentences())


def features(folder: Path) -> Path:
    noise = torch.randn(16, 16, 40, generator=torch.Generator().manual_seed(1))
    return write_columns(folder / "features.parquet", input_features=noise.tolist())
