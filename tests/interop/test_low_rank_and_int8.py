"""`export --quantise int8`: factors in torchao's 8 bits, written, loaded and run by transformers' own quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from support import tiny
from support.few_bits import CASES, bytes_in, kept_in, logits, save_half, save_llama
from support.interop import need

import lrsurgery
import lrsurgery.hf
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.surgery.apply import factorised_layers


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("torchao")
    where = tmp_path_factory.mktemp("int8")
    save_half(where, request.param)
    lrsurgery.export_quantised(where / "half", where / "int8")
    return where


def test_it_computes_what_torchao_does_in_memory(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = lrsurgery.load_model(folder / "half")
    plain = logits(model)
    kept = kept_in(model)
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and id(m) not in kept,
    )
    loaded: Any = lrsurgery.load_model(folder / "int8")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(loaded), plain)
    torch.testing.assert_close(logits(loaded), plain, rtol=0.1, atol=0.1)


def test_the_files_have_a_byte_a_weight(folder: Path, request: pytest.FixtureRequest) -> None:
    with safe_open(folder / "int8" / "model.safetensors", "pt") as file:
        narrow = {key: file.get_slice(key).get_dtype() for key in file.keys() if key.endswith("_weight_qdata")}  # noqa: SIM118
        assert narrow
        assert set(narrow.values()) == {"I8"}
    config = json.loads((folder / "int8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lrsurgery"
    assert config["format_version"] == 3
    assert config["then"]["quant_method"] == "torchao"
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("half", "int8")]
    assert sizes[1] < sizes[0] or "bf16" in request.node.callspec.id  # where scales and names outweigh tiny factors
    assert (folder / "int8" / "rank_report.json").is_file()
    assert "int8" in (folder / "int8" / "README.md").read_text()


def test_it_loads_in_plain_transformers_and_saves_again(folder: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "int8")
    model.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    state = model.state_dict()
    with pytest.raises(SourceError, match="quantised factors"):
        model.save_pretrained(tmp_path / "given", state_dict=state)


def test_weight_and_report_read_quantised_factors(folder: Path) -> None:
    loaded, half = (lrsurgery.load_model(folder / name) for name in ("int8", "half"))
    plain = factorised_layers(half)
    for name, layer in factorised_layers(loaded).items():
        wanted, found = (each.weight.detach() + 0 for each in (plain[name], layer))
        assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.02, name
    report, wanted_report = lrsurgery.rank_report(loaded), lrsurgery.rank_report(half)
    assert [row.rank for row in report.rows] == [row.rank for row in wanted_report.rows]
    for row, other in zip(report.factorised, wanted_report.factorised, strict=True):
        if row.after is not None and other.after is not None:
            assert row.after.stable == pytest.approx(other.after.stable, rel=0.05)


def test_commands_run_it_or_say_what_they_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    for arguments in (
        ("export", folder / "int8", "--to", "dense", "--output", tmp_path / "out"),
        ("export", folder / "int8", "--quantise", "int8", "--output", tmp_path / "out"),
        ("finetune", folder / "int8", "--data", text, "--steps", "1", "--output", tmp_path / "out"),
    ):
        assert tiny.run(*arguments) == 2
        assert "so it can be run and measured, no more" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert tiny.run("report", folder / "int8") == 0
    printed = capsys.readouterr()
    assert "int8 with a scale a row" in " ".join((printed.out + printed.err).split())


def test_evaluate_and_bench_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("torchao")
    save_half(tmp_path, "pivoted")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    lrsurgery.export_quantised(tmp_path / "half", tmp_path / "int8")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    found = {name: lrsurgery.evaluate(tmp_path / name, text).values["loss"] for name in ("half", "int8")}
    assert found["int8"] == pytest.approx(found["half"], rel=0.01)
    assert found["int8"] != found["half"]
    command = ("bench", tmp_path / "int8", "--against", tmp_path / "dense", "--seconds", "0.2", "--layers", "--json")
    assert tiny.run(*command) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_budget_in_bytes_knows_int8(tmp_path: Path, name: str) -> None:
    need("torchao")
    if name == "gpt2":
        tiny.save_gpt2(tmp_path / "dense", dropout=0.0)
    else:
        save_llama(tmp_path / "dense")
    names = ("wte", "wpe", "embed", "head")
    tables = sum(bytes_in(tmp_path / "dense", lambda key: any(name in key for name in names)))
    limit = tables + 24_000
    lrsurgery.factorise_checkpoint(
        tmp_path / "dense", tmp_path / "half", budget=f"bytes:{limit}:int8", multiple_of=1, loss_check=False
    )
    lrsurgery.export_quantised(tmp_path / "half", tmp_path / "int8")
    found = sum(bytes_in(tmp_path / "int8", lambda key: True))
    assert 0.9 * limit < found <= limit
    assert sum(bytes_in(tmp_path / "half", lambda key: True)) > limit  # before


def test_other_schemes_and_dense_folders_are_refused(tmp_path: Path) -> None:
    need("torchao")
    dense = tiny.save_gpt2(tmp_path / "dense")
    with pytest.raises(SourceError, match="not a factorised checkpoint"):
        lrsurgery.export_quantised(dense, tmp_path / "out")
    for scheme in ("int4", "int3"):
        with pytest.raises(SurgeryError, match=f"--quantise {scheme}"):
            lrsurgery.export_quantised(dense, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()
