"""PEFT's usual recipes and TRL's trainer on factorised models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny
from support.interop import need
from torch import Tensor, nn

import lrsurgery
from lrsurgery.hf import lora_targets
from lrsurgery.surgery.apply import factorised_layers, specs_of

FORMS = ["balanced", "pivoted"]
TOKENS = torch.arange(2, 34).reshape(2, 16)
LAYERS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", params=FORMS)
def low(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model: Any = lrsurgery.load_model(tiny.save_alike(folder / "dense"))
    lrsurgery.factorise_(model, rank=0.4, exclude=["*.1.self_attn.v_proj"], form=request.param)
    lrsurgery.save_model(model, folder / "low", form=request.param)
    tf.AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(folder / "low")
    return folder / "low"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def train(model: Any, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_error_names_the_remedy(low: Path) -> None:
    peft = need("peft")
    model = tf.AutoModelForCausalLM.from_pretrained(low)
    with pytest.raises(ValueError, match=r"target_modules=lrsurgery\.hf\.lora_targets\(model, \[\.\.\.\]\)"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert "lora_targets" not in repr(model)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("which", ["names", "all-linear", "PEFT's all-linear"])
def test_adapters_merge_and_keep_the_rank(low: Path, tmp_path: Path, which: str, dora: bool) -> None:
    peft = need("peft")
    model: Any = tf.AutoModelForCausalLM.from_pretrained(low)
    before, specs, frozen = logits(model), specs_of(model), copy.deepcopy(model.state_dict())
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    targets: Any = "all-linear"
    if which != "PEFT's all-linear":
        targets = lora_targets(model, LAYERS if which == "names" else which)
        ends = (*LAYERS, *(f"{name}.{part}" for name in LAYERS for part in "uv"))
        assert set(targets) == {name for name in linear if which != "names" or name.endswith(ends)}
        assert "model.layers.1.self_attn.v_proj" in targets
        assert "model.layers.0.self_attn.v_proj.u" in targets
    options = {"r": 2, "target_modules": targets, "use_dora": dora, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    pairs = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert len(pairs) == (len(targets) if which != "PEFT's all-linear" else len(linear))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    trained = logits(adapted)
    assert not torch.allclose(trained, before, atol=1e-2)

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(low), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)

    merged = adapted.merge_and_unload()
    assert specs_of(merged) == specs
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in frozen.items()}
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert specs_of(loaded) == specs
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-3, atol=1e-4)


def test_all_linear_leaves_a_tied_head_alone(tmp_path: Path) -> None:
    """Merged into the head's factors, an adapter would change the table of tokens."""
    peft = need("peft")
    model: Any = lrsurgery.load_model(tiny.save_gpt2(tmp_path / "dense", dropout=0.0))
    lrsurgery.factorise_(model, rank=0.4, embeddings=True)
    assert model.lm_head.u.weight is model.transformer.wte.u.weight
    targets = lora_targets(model, "all-linear")
    assert len(targets) == 2 * 8
    assert not [name for name in targets if "lm_head" in name or "wte" in name]
    before = model.transformer.wte.u.weight.clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    train(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.transformer.wte.u.weight, before)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
def test_trl_trains(low: Path, tmp_path: Path, adapters: bool) -> None:
    trl, peft = need("trl"), need("peft")
    from datasets import Dataset

    model: Any = tf.AutoModelForCausalLM.from_pretrained(low)
    before = copy.deepcopy(model.state_dict())
    settings: dict[str, Any] = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "learning_rate": 0.02}
    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1, "max_length": 32}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    config = peft.LoraConfig(r=2, target_modules=lora_targets(model, "all-linear"), task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"text": ["The statement is executed once more."] * 8}),
        processing_class=tf.AutoTokenizer.from_pretrained(low),
        peft_config=config if adapters else None,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    if adapters:
        assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "LORA"
        merged = trainer.model.merge_and_unload()
        wanted = logits(merged)
        lrsurgery.save_model(merged, tmp_path / "merged")
        found = lrsurgery.load_model(tmp_path / "merged")
    else:
        wanted, found = logits(trainer.model), lrsurgery.load_model(tmp_path / "saved")
    assert len(factorised_layers(found)) == 13
    torch.testing.assert_close(logits(found), wanted, rtol=1e-3, atol=1e-4)
    layer = "model.layers.0.mlp.down_proj.u.weight"
    assert not torch.equal(found.state_dict()[layer], before[layer])
