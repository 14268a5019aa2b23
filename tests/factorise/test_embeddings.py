"""Tables of tokens and the heads tied to them, in files: written, read by another process, undone, healed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import tiny
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.load import open_factorised
from lrsurgery.checkpoints.source import resolve
from lrsurgery.export.forms import export_form
from lrsurgery.export.targets import export_dense
from lrsurgery.report.schema import Report

READ = """
import sys, torch, lrsurgery.hf
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
torch.save(model.eval()(torch.arange(2, 34).reshape(2, 16)).logits, sys.argv[2])
"""
TABLE, HEAD = "transformer.wte", "lm_head"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 34).reshape(2, 16)).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["as saved", "under the head's name", "under both names"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_gpt2(tmp_path_factory.mktemp("gpt2") / "dense")
    tiny.write_text(folder)
    tensors = load_file(folder / "model.safetensors")
    if request.param != "as saved":
        weight = tensors[f"{TABLE}.weight"]
        tensors[f"{HEAD}.weight"] = weight.clone()
        if request.param == "under the head's name":
            del tensors[f"{TABLE}.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def low(source: Path) -> Path:
    tensors = load_file(source / "model.safetensors")
    form = "balanced" if f"{TABLE}.weight" not in tensors else "pivoted"
    output = source.parent / form
    options = ["--rank", "params:0.5", "--include-embeddings", "--form", form, "--check", "--quiet"]
    data = ["--calibration", source / "train.txt", "--samples", 16]
    assert tiny.run("factorise", source, "--output", output, *options, *data) == 0
    return output


def test_another_process_reads_what_the_program_writes(low: Path, tmp_path: Path) -> None:
    config = json.loads((low / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["layers"][TABLE]["kind"] == "embedding"
    assert config["layers"][HEAD]["tied_to"] == TABLE
    subprocess.run([sys.executable, "-c", READ, low, tmp_path / "logits.pt"], check=True)
    here = lrsurgery.load_model(low)
    wanted = logits(here)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=1e-5, atol=1e-5)
    keys = [key for key in load_file(low / "model.safetensors") if key.startswith((TABLE, HEAD))]
    assert sum(key.endswith(("u.weight", "v.weight")) for key in keys) == 2  # stored once
    export_dense(low, tmp_path / "dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is dense.transformer.wte.weight
    torch.testing.assert_close(logits(dense.eval()), wanted, rtol=1e-3, atol=1e-4)
    other = {"pivoted": "balanced", "balanced": "pivoted"}[low.name]
    export_form(low, tmp_path / "other", form=other)
    torch.testing.assert_close(logits(lrsurgery.load_model(tmp_path / "other")), wanted, rtol=1e-3, atol=1e-4)
    assert tiny.run("report", tmp_path / "other", "--verify", "--quiet") == 0
    lrsurgery.save_model(here, tmp_path / "saved", form=low.name)
    torch.testing.assert_close(logits(lrsurgery.load_model(tmp_path / "saved")), wanted, rtol=1e-3, atol=1e-4)


def test_the_report_counts_the_table_once_and_its_head_not_at_all(source: Path, low: Path) -> None:
    report, model, dense = Report.read(low), lrsurgery.load_model(low), lrsurgery.load_model(source)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_before == sum(p.numel() for p in dense.parameters())
    rows = {row.name: row for row in report.rows}
    assert rows[HEAD].reason == f"tied to {TABLE}"
    wanted = dense.transformer.wte.weight.detach()
    error = float((wanted - model.transformer.wte.weight).detach().norm() / wanted.norm())
    assert rows[TABLE].relative_error == pytest.approx(error, rel=1e-3)
    again = lrsurgery.rank_report(model, dense)
    assert again.parameters_after == report.parameters_after
    assert {row.name: row.rank for row in again.factorised} == {row.name: row.rank for row in report.factorised}
    assert tiny.run("report", low, "--against", source, "--quiet") == 0
    read = open_factorised(resolve(str(low)))
    factors = read.factors[HEAD](torch.device("cpu"))
    torch.testing.assert_close(factors.u @ factors.v, model.lm_head.weight + 0, rtol=1e-4, atol=1e-5)


def test_it_heals_and_stays_tied(low: Path, tmp_path: Path) -> None:
    data = low.parent / "dense" / "train.txt"
    options = ["--steps", 2, "--batch-size", 2, "--decay-strength", 0.01, "--block-size", 16, "--quiet"]
    assert tiny.run("finetune", low, "--data", data, "--output", tmp_path / "healed", *options) == 0
    healed = lrsurgery.load_model(tmp_path / "healed")
    table, head = healed.get_submodule(TABLE), healed.get_submodule(HEAD)
    assert head.u.weight is table.u.weight
    assert table.form == head.form == low.name
    before = lrsurgery.load_model(low)
    assert not torch.allclose(before.get_submodule(TABLE).weight + 0, table.weight + 0, atol=1e-7)
    assert sum(p.numel() for p in healed.parameters()) == sum(p.numel() for p in before.parameters())


def test_files_and_memory_agree(source: Path, tmp_path: Path) -> None:
    """What the program writes of a rank by hand, and what a model in memory becomes by it."""
    written = tmp_path / "written"
    options = ["--rank", "params:0.5", "--include-embeddings", "--no-loss-check", "--quiet"]
    source = shutil.copytree(source, tmp_path / "dense", ignore=shutil.ignore_patterns("tokenizer*"))  # as in memory
    assert tiny.run("factorise", source, "--output", written, *options) == 0
    model = lrsurgery.load_model(source)
    lrsurgery.factorise_(model, rank="params:0.5", embeddings=True, form="pivoted")
    torch.testing.assert_close(logits(lrsurgery.load_model(written)), logits(model), rtol=1e-3, atol=1e-4)


def test_a_budget_over_the_model_takes_them(source: Path, tmp_path: Path) -> None:
    options = [
        "--budget",
        0.6,
        "--budget-of",
        "model",
        "--calibration",
        source / "train.txt",
        "--samples",
        16,
        "--quiet",
    ]
    assert tiny.run("factorise", source, "--output", tmp_path / "low", *options) == 0
    report = Report.read(tmp_path / "low")
    assert 0.55 * report.parameters_before < (report.parameters_after or 0) <= 0.6 * report.parameters_before
    assert {row.name: row.status for row in report.rows}[TABLE] == "factorised"


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_without_data_the_tokenizers_order_weighs_the_rows(source: Path, tmp_path: Path, has_tokenizer: bool) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(source, dense)
    for file in dense.glob("tokenizer*"):
        if not has_tokenizer:
            file.unlink()
    given = ["--include-embeddings", "--rank", "8", "--include", TABLE, "--output", tmp_path / "low", "--quiet"]
    assert tiny.run("factorise", dense, *given) == 0
    table = tf.AutoModelForCausalLM.from_pretrained(dense).transformer.wte.weight.double()
    weights = torch.ones(len(table)).double()
    if has_tokenizer:
        weights /= torch.arange(len(table)) + 0.1 * len(table)
    scale = weights.sqrt()[:, None]
    u, s, v = torch.linalg.svd(table * scale, full_matrices=False)
    best = (u[:, :8] * s[:8] @ v[:8]) / scale  # Eckart-Young in the weighted norm
    torch.testing.assert_close(
        lrsurgery.load_model(str(tmp_path / "low")).transformer.wte.matrix.double(), best, atol=1e-5, rtol=1e-4
    )
    said = "tokens count by their number" in (tmp_path / "low" / "rank_report.json").read_text()
    assert said is has_tokenizer


def test_without_the_option_tables_stay(source: Path, tmp_path: Path) -> None:
    options = ["--rank", "params:0.5", "--no-loss-check", "--quiet"]
    assert tiny.run("factorise", source, "--output", tmp_path / "layers", *options) == 0
    rows = {row.name: row.reason for row in Report.read(tmp_path / "layers").rows}
    assert rows[TABLE] == "embedding"


def test_damaged_ties_are_refused(low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in low.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((low / "config.json").read_text())
    config["quantization_config"]["layers"][HEAD]["rank"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank_report.json").unlink()  # its digest would tell of the change first
    assert tiny.run("evaluate", folder, "--data", low.parent / "dense/valid.txt") == 2
    assert f"{HEAD}: tied to {TABLE}, whose rank or form is another" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("source", ["as saved"], indirect=True)
def test_a_search_measures_what_is_written(source: Path, tmp_path: Path) -> None:
    """Copies in memory have tied tables as the file of the chosen budget has."""
    output = tmp_path / "low"
    options = ["--max-loss", "0.06%", "--include-embeddings", "--calibration", source / "train.txt", "--samples", 8]
    data = ["--eval-data", source / "valid.txt", "--block-size", 32]
    assert tiny.run("factorise", source, "--output", output, *options, *data, "--no-loss-check", "--quiet") == 0
    choice = json.loads((output / "rank_report.json").read_text())["choice"]
    (point,) = (each for each in choice["points"] if each["budget"] == choice["budget"])
    assert choice["values"]["loss"] == pytest.approx(point["values"]["loss"], rel=1e-5)
    assert TABLE in json.loads((output / "config.json").read_text())["quantization_config"]["layers"]
