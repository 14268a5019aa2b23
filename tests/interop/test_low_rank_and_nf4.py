"""`export --quantise nf4`: factors in bitsandbytes' 4 bits, written, loaded and run by transformers' own quantizer."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from support import tiny
from support.few_bits import CASES, TOKENS, bytes_in, kept_in, logits, save_half, save_llama
from support.interop import need
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrsurgery
import lrsurgery.hf
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import find_heads


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("bitsandbytes")
    where = tmp_path_factory.mktemp("nf4")
    save_half(where, request.param)
    lrsurgery.export_quantised(where / "half", where / "nf4", "nf4")
    return where


@torch.no_grad()
def rounded(weight: Tensor) -> Tensor:
    """What bitsandbytes makes of a weight (out, in), in 4 bits and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))  # type: ignore[no-any-return]


def round_(model: Any) -> None:
    """Round all linear layers of a model but those that keep their dtype, each once."""
    kept = kept_in(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in kept:
            turned = isinstance(module, Conv1D)
            found = rounded(module.weight.T if turned else module.weight)
            module.weight = nn.Parameter(found.T if turned else found)


def test_it_computes_what_bitsandbytes_does_to_each_weight(folder: Path, request: pytest.FixtureRequest) -> None:
    model = lrsurgery.load_model(folder / "half")
    plain = logits(model)
    round_(model)
    loaded: Any = lrsurgery.load_model(folder / "nf4")
    close = 2e-2 if "bf16" in request.node.callspec.id else 1e-5
    torch.testing.assert_close(logits(loaded), logits(model), rtol=close, atol=close)
    assert not torch.equal(logits(loaded), plain)
    one = logits(model)[:, :1]  # a single token takes another path in bitsandbytes
    with torch.no_grad():
        found = torch.cat([loaded(row[:1][None]).logits.float() for row in TOKENS])
    torch.testing.assert_close(found, one, rtol=close, atol=close)


def test_the_files_have_half_a_byte_a_weight(folder: Path) -> None:
    layers = factorised_layers(lrsurgery.load_model(folder / "half"))
    with safe_open(folder / "nf4" / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    checked = 0
    for name, layer in layers.items():
        for part in () if layer.tied else ("u", "v"):
            if f"{name}.{part}.weight" in tensors:  # a shared v is stored once
                packed, entries = tensors[f"{name}.{part}.weight"], getattr(layer, part).weight.numel()
                assert (packed.dtype, packed.numel()) == (torch.uint8, math.ceil(entries / 2))
                scales = tensors[f"{name}.{part}.weight.absmax"]
                assert (scales.dtype, scales.numel()) == (torch.float32, math.ceil(entries / 64))
                checked += 1
    assert checked >= 4
    config = json.loads((folder / "nf4" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("lrsurgery", 3)
    assert config["then"]["bnb_4bit_quant_type"] == "nf4"
    assert not config["then"]["bnb_4bit_use_double_quant"]
    for file_name in ("rank_report.json", "README.md"):
        assert "bitsandbytes' nf4" in (folder / "nf4" / file_name).read_text()


def test_it_loads_in_plain_transformers_and_saves_again(folder: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "nf4")
    wanted = logits(model)
    with torch.no_grad():
        model(TOKENS[:1, :1])
    model.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), wanted)
    with pytest.raises(SourceError, match="quantised factors"):
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    with torch.no_grad():
        hidden = tf.AutoModel.from_pretrained(folder / "nf4")(TOKENS).last_hidden_state
        assert torch.equal(hidden, model(TOKENS, output_hidden_states=True).hidden_states[-1])


def test_weight_and_report_read_packed_factors(folder: Path) -> None:
    loaded, half = (lrsurgery.load_model(folder / name) for name in ("nf4", "half"))
    round_(half)
    plain = factorised_layers(half)
    for name, layer in factorised_layers(loaded).items():
        wanted, found = (each.weight.detach() + 0 for each in (plain[name], layer))
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
        assert layer.matrix_shape == plain[name].matrix_shape
    report, wanted_report = lrsurgery.rank_report(loaded), lrsurgery.rank_report(half)
    assert report.parameters_after == wanted_report.parameters_after
    assert report.parameters_before == wanted_report.parameters_before
    for row, other in zip(report.rows, wanted_report.rows, strict=True):
        assert (row.rank, row.parameters_after) == (other.rank, other.parameters_after)
        if row.status == "dense" and row.kind == "Linear4bit":
            assert row.reason == "quantised weight (nf4)"
            assert sorted(row.shape) == sorted(other.shape)  # of a Conv1D turned
        if row.after is not None and other.after is not None:
            assert row.after.stable == pytest.approx(other.after.stable, rel=1e-2)


def test_a_cpu_for_which_bitsandbytes_packs_anew_is_no_danger(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "nf4").eval()
    found = logits(model)
    model.save_pretrained(tmp_path / "again")
    monkeypatch.undo()
    assert torch.equal(found, logits(lrsurgery.load_model(folder / "nf4")))
    assert torch.equal(found, logits(lrsurgery.load_model(tmp_path / "again")))


def test_lora_trains_on_packed_factors(folder: Path, request: pytest.FixtureRequest) -> None:
    if "bf16" in request.node.callspec.id or "tied" in request.node.callspec.id:
        pytest.skip("one dtype, one table is enough")
    peft = need("peft")
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder / "nf4")
    before = logits(model)
    names = [f"{name}.{part}" for name, layer in factorised_layers(model).items() for part in "uv"]
    names = [name for name in names if name in dict(model.named_modules())]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    assert torch.equal(logits(adapted), before)  # LoRA begins at 0
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


def test_commands_run_it_or_say_what_they_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    for arguments in (
        ("export", folder / "nf4", "--to", "dense", "--output", tmp_path / "out"),
        ("finetune", folder / "nf4", "--data", text, "--steps", "1", "--output", tmp_path / "out"),
    ):
        assert tiny.run(*arguments) == 2
        assert "so it can be run and measured, no more" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert tiny.run("report", folder / "nf4") == 0
    printed = capsys.readouterr()
    assert "bitsandbytes' nf4" in " ".join((printed.out + printed.err).split())


def test_evaluate_and_bench_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("bitsandbytes")
    save_half(tmp_path, "pivoted")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    lrsurgery.export_quantised(tmp_path / "half", tmp_path / "nf4", "nf4")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    found = {name: lrsurgery.evaluate(tmp_path / name, text) for name in ("half", "nf4")}
    assert found["nf4"].parameters == found["half"].parameters
    assert found["nf4"].values["loss"] == pytest.approx(found["half"].values["loss"], rel=0.05)
    assert found["nf4"].values["loss"] != found["half"].values["loss"]
    command = ("bench", tmp_path / "nf4", "--against", tmp_path / "dense", "--seconds", "0.2", "--layers", "--json")
    assert tiny.run(*command) == 0
    capsys.readouterr()


def test_heads_of_classifiers_keep_their_dtype(tmp_path: Path) -> None:
    need("bitsandbytes")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model: Any = tf.BertForSequenceClassification(config).eval()
    lrsurgery.factorise_(model, rank=0.4)
    lrsurgery.save_model(model, tmp_path / "half")
    lrsurgery.export_quantised(tmp_path / "half", tmp_path / "nf4", "nf4")
    loaded = lrsurgery.load_model(tmp_path / "nf4")
    assert type(loaded.classifier) is nn.Linear
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert "classifier" in find_heads(loaded)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_budget_in_bytes_knows_nf4(tmp_path: Path, name: str) -> None:
    need("bitsandbytes")
    tiny.save_gpt2(tmp_path / "dense", dropout=0.0) if name == "gpt2" else save_llama(tmp_path / "dense")
    names = ("wte", "wpe", "embed", "head")
    tables = sum(bytes_in(tmp_path / "dense", lambda key: any(name in key for name in names)))
    limit = tables + (15_000 if name == "gpt2" else 20_000)
    lrsurgery.factorise_checkpoint(
        tmp_path / "dense", tmp_path / "half", budget=f"bytes:{limit}:nf4", multiple_of=1, loss_check=False
    )
    lrsurgery.export_quantised(tmp_path / "half", tmp_path / "nf4", "nf4")
    found = sum(bytes_in(tmp_path / "nf4", lambda key: True))
    assert 0.9 * limit < found <= limit
    assert sum(bytes_in(tmp_path / "half", lambda key: True)) > limit  # before


def test_without_the_package_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_half(tmp_path, "pivoted")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert tiny.run("export", tmp_path / "half", "--quantise", "nf4", "--output", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--quantise nf4 needs bitsandbytes" in said
    assert "pip install 'lrsurgery[quantise]'" in said
    with pytest.raises(SurgeryError, match=r"int4: .* are nf4"):
        lrsurgery.export_quantised(tmp_path / "half", tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
