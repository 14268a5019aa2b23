"""Models built from a factorised config without its weights, and casts of models that are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from support import tiny

import lrsurgery
import lrsurgery.hf
from lrsurgery.errors import PlanError
from lrsurgery.surgery.apply import factorised_layers, specs_of

TOKENS = torch.arange(2, 34).reshape(2, 16)
FORMS = ["balanced", "pivoted"]


def write(folder: Path, form: str, *, embeddings: bool = False, share: bool = False) -> Path:
    """A factorised folder of a language model."""
    source = tiny.save_alike(folder / "dense") if share else tiny.save_gpt2(folder / "dense", dropout=0.0)
    options = ["--rank", "0.5", "--form", form, *(["--include-embeddings"] if embeddings else [])]
    if share:
        options = ["--budget", "0.5", "--form", form, "--calibration", source / "train.txt", "--importance", "fisher"]
    assert tiny.run("factorise", source, *options, "--output", folder / "low") == 0
    return folder / "low"


def from_config(folder: Path) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["layers", "tables", "shared layers"])
def test_from_config_keeps_the_layers(tmp_path: Path, form: str, what: str) -> None:
    folder = write(tmp_path, form, embeddings=what == "tables", share=what == "shared layers")
    model, loaded = from_config(folder), lrsurgery.load_model(folder)
    assert specs_of(model) == specs_of(loaded)
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in loaded.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in loaded.parameters())
    if what == "shared layers":
        assert any(spec.v_of for spec in specs_of(model).values())
    config = tf.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    torch.manual_seed(0)
    dense = tf.AutoModelForCausalLM.from_config(config)
    for name, layer in factorised_layers(model).items():
        wanted = dense.get_submodule(name).weight.std()
        torch.testing.assert_close(layer.matrix.std(), wanted, rtol=0.35, atol=0)  # a sample of a few hundred
        assert layer.bias is None or not layer.bias.any()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not torch.allclose(model(TOKENS).logits, loaded(TOKENS).logits, atol=1e-3)

    model.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [{"": "cpu"}, None], ids=["a device map", "none"])
def test_accelerate_fills_an_empty_model(tmp_path: Path, form: str, places: Any) -> None:
    folder = write(tmp_path, form)
    with accelerate.init_empty_weights(include_buffers=places is not None):
        model = from_config(folder)
    assert all(p.is_meta for p in model.parameters())
    if places is None:
        model.to_empty(device="cpu")
    model.tie_weights()
    filled = accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map=places).eval()
    assert torch.equal(filled(TOKENS).logits, lrsurgery.load_model(folder)(TOKENS).logits)


def test_a_config_of_a_smaller_model_is_refused(tmp_path: Path) -> None:
    config = tf.AutoConfig.from_pretrained(write(tmp_path, "pivoted"))
    config.n_layer = 1
    with pytest.raises(PlanError, match=r"transformer\.h\.1\.attn\.c_attn: .* GPT2LMHeadModel has no such layer"):
        tf.AutoModelForCausalLM.from_config(config)


def test_other_configs_are_left_alone(tmp_path: Path) -> None:
    folder = tiny.save_gpt2(tmp_path / "dense")
    assert not factorised_layers(from_config(folder))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_casts(tmp_path: Path, form: str, cast: str) -> None:
    """Of a model that was loaded, and of one that became low rank in memory."""
    folder = tiny.save_gpt2(tmp_path / "dense", dropout=0.0)
    made: Any = lrsurgery.load_model(folder)
    lrsurgery.factorise_(made, rank=0.5, form=form)
    lrsurgery.save_model(made, tmp_path / "low", form=form)
    for model in (made, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "low").eval()):
        wanted = model(TOKENS).logits
        found = getattr(model, cast)()
        assert found is model
        assert found.lm_head.weight is found.transformer.wte.weight
        orders = [layer.order for layer in factorised_layers(found).values() if layer.order is not None]
        assert len(orders) == (8 if form == "pivoted" else 0)
        assert all(order.dtype == torch.int32 for order in orders)
        tolerance = 1e-5 if cast in ("float", "double") else 0.02
        torch.testing.assert_close(found(TOKENS).logits.float(), wanted, rtol=tolerance, atol=tolerance)
