"""What is asked of transformers and timm beyond their documented interfaces: here it is told what breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from support import zoo
from torch import nn

from lrsurgery.checkpoints.upstream import timm as timm_side
from lrsurgery.checkpoints.upstream import transformers as hf_side


def test_keys_lead_where_the_loader_puts_them(tmp_path: Path) -> None:
    """A checkpoint without the base model's prefix, as the hub has GPT-2's: every key against a real load."""
    model: Any = zoo.build_transformers("gpt2")
    keys = hf_side.KeyMap(model)
    for name in keys.state:
        assert keys.target(name) == (name, None)
        bare = name.removeprefix("transformer.")
        assert keys.target(bare) == (name, None)
    assert keys.target("nothing.of.it") == (None, None)


def test_fused_experts_are_converted_as_the_loader_converts_them(tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("mixtral")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    keys = hf_side.KeyMap(model)
    groups: dict[str, list[tuple[str, str, torch.Tensor]]] = {}
    for key, tensor in stored.items():
        target, pattern = keys.target(key)
        if target is not None and pattern is not None:
            groups.setdefault(target, []).append((key, pattern, tensor))
    assert groups, "this transformers fuses no experts as it loads them; the test has lost its case"
    for target, pieces in groups.items():
        for name, value in keys.convert(target, pieces).items():
            assert torch.equal(value, keys.state[name])


@pytest.mark.parametrize(
    ("mapping", "known"),
    [
        ("CAUSAL_LM", "GPT2LMHeadModel"),
        ("MASKED_LM", "BertForMaskedLM"),
        ("SEQUENCE_CLASSIFICATION", "BertForSequenceClassification"),
        ("IMAGE_CLASSIFICATION", "ViTForImageClassification"),
    ],
)
def test_classes_under_a_head(mapping: str, known: str) -> None:
    assert known in hf_side.head_classes(mapping)


def test_model_types_and_classes() -> None:
    assert hf_side.is_native("gpt2")
    assert not hf_side.is_native("nothing-of-the-kind")
    config = transformers.GPT2Config(architectures=["GPT2LMHeadModel"])
    assert hf_side.model_class(config, Path(), None) is transformers.GPT2LMHeadModel
    assert hf_side.model_class(transformers.GPT2Config(), Path(), None) is transformers.GPT2Model
    with pytest.raises(AttributeError, match="NoSuchModel"):
        hf_side.model_class(transformers.GPT2Config(architectures=["NoSuchModel"]), Path(), None)


def test_unexpected_keys_are_passed_over(tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("bert")
    hf_side.ignore_unexpected(model, {"^extra$"})
    assert "^extra$" in model._keys_to_ignore_on_load_unexpected


def test_checkpointed_blocks_run_again_without_dropout() -> None:
    """Gradients of a model in evaluation mode are the same with blocks run again, and each block runs twice."""
    model: Any = zoo.build_transformers("llama").eval()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(zoo.IDS, use_cache=False).logits.square().sum().backward()
        found: torch.Tensor = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        return found

    # a layer inside: running again ends early, before the block's own hooks
    model.model.layers[0].mlp.up_proj.register_forward_hook(count)
    wanted = gradient()
    assert calls == 1
    hf_side.checkpoint_blocks_(model)
    torch.testing.assert_close(gradient(), wanted)
    assert calls == 3


def test_timm_config_names_its_architecture() -> None:
    found = timm_side.config_for_hub(timm.create_model("test_resnet", num_classes=4))
    assert (found["architecture"], found["num_classes"]) == ("test_resnet", 4)
    json.dumps(found)


def test_timm_converts_older_layouts_by_a_function_beside_the_model() -> None:
    convert = timm_side.checkpoint_filter(timm.create_model("vit_tiny_patch16_224"))
    assert convert is not None
    state = {"head.weight": torch.zeros(3, 192)}
    assert "head.weight" in convert(state, timm.create_model("vit_tiny_patch16_224", num_classes=3))
    assert timm_side.checkpoint_filter(nn.Linear(2, 2)) is None
