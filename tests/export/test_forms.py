"""`export --form`: the same model with its layers in the other form, and what goes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.checks import outputs, run
from torch import nn

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.files.digests import verify_folder
from lrsurgery.report.schema import Report
from lrsurgery.surgery.apply import factorised_layers

OLD = Path(__file__).parents[1] / "checkpoints" / "version_1"  # as lrsurgery wrote it before there were forms


@pytest.fixture(scope="module", params=["gpt2", "bert", "timm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose layers are pivoted, some by rows and some by columns, with biases."""
    root: Path = tmp_path_factory.mktemp(request.param)
    save = {"timm": tiny.save_timm, "gpt2": tiny.save_gpt2, "bert": tiny.save_biased_bert}[request.param]
    lrsurgery.factorise_checkpoint(save(root / "dense"), root / "low", rank=0.6, conv="channel", loss_check=False)
    return root / "low"


def forms(model: nn.Module) -> set[str]:
    return {layer.form for layer in factorised_layers(model).values()}


def test_there_and_back_it_computes_the_same(folder: Path, tmp_path: Path) -> None:
    run("export", folder, "--form", "balanced", "--output", tmp_path / "balanced")
    run("export", tmp_path / "balanced", "--form", "pivoted", "--output", tmp_path / "pivoted")
    first, second, third = map(lrsurgery.load_model, (folder, tmp_path / "balanced", tmp_path / "pivoted"))
    assert [forms(model) for model in (first, second, third)] == [{"pivoted"}, {"balanced"}, {"pivoted"}]
    torch.testing.assert_close(outputs(second), outputs(first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(third), outputs(first), rtol=1e-4, atol=1e-4)
    for name, layer in factorised_layers(second).items():
        u, v = (factor.detach().double() for factor in layer.factors)
        torch.testing.assert_close(u.T @ u, v @ v.T, rtol=1e-4, atol=1e-4, msg=name)
        before = factorised_layers(first)[name]
        torch.testing.assert_close(layer.weight + 0, before.weight + 0, rtol=1e-4, atol=1e-5, msg=name)
    config = json.loads((tmp_path / "balanced" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert all(spec.keys() == {"kind", "rank"} for spec in config["layers"].values())


def test_report_digests_and_files_go_with_it(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_text("a tokenizer's file")
    lrsurgery.export_form(folder, tmp_path / "balanced", form="balanced")
    (folder / "vocab.txt").unlink()
    assert (tmp_path / "balanced" / "vocab.txt").read_text() == "a tokenizer's file"
    assert verify_folder(tmp_path / "balanced").remarks == []
    assert verify_folder(tmp_path / "balanced").whole
    old, new = Report.read(folder), Report.read(tmp_path / "balanced")
    assert new.source == old.source
    model = lrsurgery.load_model(tmp_path / "balanced")
    assert new.parameters_after == sum(p.numel() for p in model.parameters())
    assert new.parameters_before == old.parameters_before
    layers = factorised_layers(model)
    for before, after in zip(old.factorised, new.factorised, strict=True):
        layer = layers[after.name]
        assert after.form == "balanced"
        rows, columns = layer.matrix_shape
        bias = 0 if layer.bias is None else layer.bias.numel()
        assert after.parameters_after == layer.rank * (rows + columns) + bias
        assert after.flops_after == 2 * layer.rank * (rows + columns)
        assert after.balance is not None
        assert after.balance < 1e-5
        assert (after.relative_error, after.before) == (before.relative_error, before.before)
    assert new.saved_by_form == 0
    assert "the pivoted form saves" not in (tmp_path / "balanced" / "README.md").read_text()
    stored = sum(
        tensor.numel() * tensor.element_size()
        for file in (tmp_path / "balanced").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert new.bytes_after == stored


def test_the_report_says_what_the_form_saves(folder: Path, tmp_path: Path) -> None:
    lrsurgery.export_form(folder, tmp_path / "balanced", form="balanced")
    sizes = [sum(p.numel() for p in lrsurgery.load_model(f).parameters()) for f in (tmp_path / "balanced", folder)]
    saved, report = sizes[0] - sizes[1], Report.read(folder)
    assert saved > 0
    totals = report.to_dict()["totals"]
    assert (totals["saved_by_form"], totals["share_saved_by_form"]) == (saved, saved / sizes[0])
    line = f"the pivoted form saves {saved:,} parameters ({saved / sizes[0]:.1%} of the model) against the balanced one"
    from lrsurgery.report.views import render

    for view in ("terminal", "markdown"):
        assert line in " ".join(render(report, view).split()), view
    assert line[1:] in (folder / "README.md").read_text()
    assert "pivoted form saves " in render(report, "html")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_and_small_shards(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Orders of 4 bytes stand beside weights of 2 and of 4."""
    source = folder.parent / "dense"
    for form in ("balanced", "pivoted"):
        options: dict[str, Any] = {"form": form, "dtype": dtype, "conv": "channel", "loss_check": False}
        lrsurgery.factorise_checkpoint(source, tmp_path / form, rank=0.5, **options)
        other = "pivoted" if form == "balanced" else "balanced"
        lrsurgery.export_form(tmp_path / form, tmp_path / f"to-{other}", form=other, shard_size="20KB")
        assert len(list((tmp_path / f"to-{other}").glob("*.safetensors"))) > 1
        old, new = lrsurgery.load_model(tmp_path / form), lrsurgery.load_model(tmp_path / f"to-{other}")
        assert forms(new) == {other}
        assert {p.dtype for p in new.parameters()} == {p.dtype for p in old.parameters()}
        near = 0.05 if dtype == "bfloat16" else 1e-5
        assert float((outputs(new) - outputs(old)).norm()) < near * float(outputs(old).norm())


def test_what_is_in_the_form_is_copied_as_it_is(folder: Path, tmp_path: Path) -> None:
    lrsurgery.export_form(folder, tmp_path / "same", form="pivoted")
    first, second = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "same"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_refused_in_one_line_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"is pivoted, as \d+ of \d+ layers are.*add --form balanced"):
        lrsurgery.export_form(folder, tmp_path / "old", format_version=1)
    with pytest.raises(SurgeryError, match="is pivoted"):
        lrsurgery.export_form(folder, tmp_path / "old", form="pivoted", format_version=1)
    with pytest.raises(SurgeryError, match="format 3: write 1"):
        lrsurgery.export_form(folder, tmp_path / "old", form="balanced", format_version=3)
    with pytest.raises(SurgeryError, match="unknown form 'diagonal'; known: balanced, pivoted"):
        lrsurgery.export_form(folder, tmp_path / "old", form="diagonal")
    with pytest.raises(SurgeryError, match="not a factorised checkpoint"):
        lrsurgery.export_form(folder.parent / "dense", tmp_path / "old", form="balanced")
    assert list(tmp_path.iterdir()) == []


def test_dense_and_a_form_exclude_each_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--form", "balanced"), ("--format", "1")):
        assert tiny.run("export", folder, "--to", "dense", *more, "--output", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "--to dense and --form" in said
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "rank_report.json").unlink()
    tensors = load_file(damaged / "model.safetensors")
    key = next(key for key in tensors if key.endswith(".v.weight"))
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match=f"{key} holds NaN"):
        lrsurgery.export_form(damaged, tmp_path / "out", form="balanced")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_report_gets_one(folder: Path, tmp_path: Path) -> None:
    lrsurgery.save_model(lrsurgery.load_model(folder), tmp_path / "saved")
    (tmp_path / "saved" / "rank_report.json").unlink()
    lrsurgery.export_form(tmp_path / "saved", tmp_path / "balanced", form="balanced")
    report = Report.read(tmp_path / "balanced")
    assert {row.form for row in report.factorised} == {"balanced"}
    assert report.parameters_after == sum(p.numel() for p in lrsurgery.load_model(tmp_path / "balanced").parameters())
    assert verify_folder(tmp_path / "balanced").whole


def test_a_folder_of_version_1_loads_and_goes_through_both_forms(tmp_path: Path) -> None:
    wanted = torch.tensor(json.loads(OLD.with_name("version_1_logits.json").read_text()))  # as that version had them

    def logits(folder: Path) -> torch.Tensor:
        model: Any = lrsurgery.load_model(folder)
        with torch.no_grad():
            return model(torch.arange(8)[None]).logits[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(logits(OLD), wanted, rtol=1e-4, atol=1e-4)
    lrsurgery.export_form(OLD, tmp_path / "new", form="pivoted")
    lrsurgery.export_form(tmp_path / "new", tmp_path / "old", form="balanced", format_version=1)
    for folder in (tmp_path / "new", tmp_path / "old"):
        torch.testing.assert_close(logits(folder), wanted, rtol=1e-4, atol=1e-4)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (OLD, tmp_path / "old"))
    assert new == old
    shapes = [
        {key: tensor.shape for key, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (OLD, tmp_path / "old")
    ]
    assert shapes[0] == shapes[1]
    assert Report.read(OLD).factorised[0].form is None
