"""PEFT's LoRA, torchao and optimum-quanto on the parts of factorised layers, in both forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.interop import need
from torch import Tensor, nn

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers

FORMS = ["balanced", "pivoted"]
TOKENS = torch.arange(2, 34).reshape(2, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gpt2(tmp_path_factory.mktemp("gpt2") / "dense", dropout=0.0)


def load(source: Path, form: str) -> Any:
    model = lrsurgery.load_model(source)
    lrsurgery.factorise_(model, rank=0.4, form=form)
    sides = {layer.side for layer in factorised_layers(model).values()}
    assert sides == ({None} if form == "balanced" else {"rows", "columns"})
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
def test_lora_trains_merges_and_is_saved(source: Path, tmp_path: Path, form: str) -> None:
    peft = need("peft")
    model = load(source, form)
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["u", "v"], init_lora_weights=True))
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 4 * len(factorised_layers(model))  # a pair for u and one for v
    torch.testing.assert_close(logits(adapted), before)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(adapted)
    assert not torch.allclose(trained, before, atol=1e-2)

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(source, form), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)

    merged = adapted.merge_and_unload()
    assert all(type(part) is nn.Linear for layer in factorised_layers(merged).values() for part in (layer.u, layer.v))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    lrsurgery.save_model(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(lrsurgery.load_model(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-4)


def parts(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("u", "v")


def check(quantised: nn.Module, plain: nn.Module) -> None:
    """The quantised model computes what the plain one does on the quantiser's own dequantised weights."""
    before = logits(plain)
    with torch.no_grad():
        for mine, other in zip(*(factorised_layers(m).values() for m in (quantised, plain)), strict=True):
            for part in ("u", "v"):
                weight: Any = getattr(mine, part).weight
                assert type(weight) is not nn.Parameter
                getattr(other, part).weight.copy_(weight.dequantize())
    found = logits(quantised)
    assert float((found - before).norm()) > 1e-3
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)
    assert repr(quantised)


@pytest.mark.parametrize("form", FORMS)
def test_torchao_int8_weights(source: Path, form: str) -> None:
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(source, form)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=parts)
    check(model, load(source, form))


@pytest.mark.parametrize("form", FORMS)
def test_quanto_int8_weights(source: Path, form: str) -> None:
    quanto = need("optimum.quanto")
    model = load(source, form)
    quanto.quantize(model, weights=quanto.qint8, include=["*.u", "*.v"])
    quanto.freeze(model)
    check(model, load(source, form))
