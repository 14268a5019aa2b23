"""Tiny models with all that training needs: a tokenizer trained on real text, an image processor, data beside them."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lrsurgery.cli.app import main

SPECIAL = ["<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
VOCABULARY = 320
BLOCK = 32
PROGRAM = [sys.executable, "-m", "lrsurgery"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: object) -> int:
    """The program in this process; its exit code."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lrsurgery", *map(str, arguments)])
            main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("main() returned")


def documents() -> list[str]:
    return [
        topics[name].strip() for name in ("assert", "pass", "del", "break", "continue", "global", "raise", "return")
    ]


def write_text(folder: Path) -> tuple[Path, Path]:
    """train.txt and valid.txt, real English of a few thousand tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n\n".join(documents()[:6]), encoding="utf-8")
    (folder / "valid.txt").write_text("\n\n".join(documents()[6:]), encoding="utf-8")
    return folder / "train.txt", folder / "valid.txt"


def tokenizer(*, around: bool = False) -> Any:
    """Byte-level BPE; with `around`, [CLS] and [SEP] stand around each text, as for BERT."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents(), trainer)
    named: dict[str, str] = {"eos_token": SPECIAL[0], "pad_token": "[PAD]"}
    if around:
        made.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
        )
        named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=BLOCK, **named)


def save_biased_bert(folder: Path) -> Path:
    """A classifier without a tokenizer, whose biases are not 0 as those of a fresh one are."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, intermediate_size=40))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, *, dropout: float = 0.1, seed: int = 0, blocks: int = 2, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=blocks,
        n_head=2,
        n_positions=BLOCK,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_alike(folder: Path, name: str = "llama") -> Path:
    """A language model whose layers with the same inputs read the same few directions of them; text beside it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config}[name](**sizes, **heads)
    model = tf.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(12, 32, generator=generator) * 0.025
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
            if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter.add_(torch.randn(len(parameter), 12, generator=generator) @ basis)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_text(folder)
    return folder


def save_bert(folder: Path, cls: str, **options: Any) -> Path:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=BLOCK,
        pad_token_id=1,
        **options,
    )
    getattr(tf, cls)(config).save_pretrained(folder)
    tokenizer(around=True).save_pretrained(folder)
    return folder


def save_vit(folder: Path, classes: int = 3) -> Path:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=classes,
    )
    tf.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_timm(folder: Path, classes: int = 3) -> Path:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=classes)
    config = {"input_size": [3, 32, 32], "num_classes": classes}
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


def write_images(folder: Path, count: int = 8, classes: int = 3, size: int = 16) -> Path:
    """An image folder: each class has a colour of its own, with noise."""
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 60, (size, size, 3), generator=generator, dtype=torch.uint8)
            pixels[..., label % 3] += 150
            Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    return folder


def write_sentences(file: Path) -> Path:
    """Sentences about two subjects, as jsonl with text and label."""
    rows = [{"text": f"the {w} statement raises {i}", "label": "raise"} for i, w in enumerate("abcdefgh")]
    rows += [
        {"text": f"return a value from {w} {i} and more of it", "label": "return"} for i, w in enumerate("abcdefgh")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
