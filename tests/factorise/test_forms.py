"""The pivoted form from checkpoint to checkpoint: more rank for the same parameters, and the same as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.checks import outputs

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers


@pytest.fixture(scope="module", params=["gpt2", "bert", "timm"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "dense"
    if request.param == "timm":
        return tiny.save_timm(folder)
    if request.param == "gpt2":
        return tiny.save_gpt2(folder)
    return tiny.save_biased_bert(folder)


def test_from_files_as_in_memory(source: Path, tmp_path: Path) -> None:
    written = lrsurgery.factorise_checkpoint(source, tmp_path / "low", rank=0.6, form="pivoted", check=True)
    from_files, in_memory = lrsurgery.load_model(tmp_path / "low"), lrsurgery.load_model(source)
    lrsurgery.factorise_(in_memory, rank=0.6, form="pivoted")
    layers = factorised_layers(in_memory)
    assert {name: layer.spec for name, layer in factorised_layers(from_files).items()} == {
        name: layer.spec for name, layer in layers.items()
    }
    torch.testing.assert_close(outputs(from_files), outputs(in_memory), rtol=1e-3, atol=1e-3)
    assert written.parameters_after == sum(p.numel() for p in from_files.parameters())
    for row in written.factorised:
        assert row.form == layers[row.name].form
        dense, low = (model.get_submodule(row.name).weight + 0 for model in (lrsurgery.load_model(source), from_files))
        assert row.relative_error == pytest.approx(float((dense - low).norm() / dense.norm()), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("how", [{"rank": "params:0.7"}, {"budget": 0.7}], ids=["each layer", "budget"])
def test_more_rank_and_less_error_for_the_same_parameters(source: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    dense, found = lrsurgery.load_model(source), {}
    for form in ("balanced", "pivoted"):
        options: dict[str, Any] = {**how, "form": form, "conv": "channel", "calibration": "none", "loss_check": False}
        found[form] = lrsurgery.factorise_checkpoint(source, tmp_path / form, **options)
    old, new = found["balanced"], found["pivoted"]
    before = sum(row.parameters_before for row in new.rows if row.status == "factorised")
    kept = sum(row.parameters_after or 0 for row in new.factorised)
    assert kept <= 0.75 * before  # biases are counted, too
    lost = {}
    for form in found:
        model = lrsurgery.load_model(tmp_path / form)
        lost[form] = sum(
            float((dense.get_submodule(name).weight - layer.weight).detach().norm()) ** 2  # type: ignore[operator]
            for name, layer in factorised_layers(model).items()
        )
    assert lost["pivoted"] < lost["balanced"]
    assert sum(r.rank or 0 for r in new.factorised) > sum(r.rank or 0 for r in old.factorised)


def test_square_layers_save_below_full_rank_and_stay_dense_at_it(source: Path, tmp_path: Path) -> None:
    report = lrsurgery.factorise_checkpoint(source, tmp_path / "low", rank=0.9, form="pivoted", loss_check=False)
    assert report.factorised
    for row in report.factorised:
        assert row.parameters_after is not None
        assert row.parameters_after < row.parameters_before
    for row in report.dense:
        assert row.reason is not None
        assert "break-even" not in row.reason


def test_weights_of_two_bytes_beside_orders_of_four(source: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(
        source, tmp_path / "low", rank=0.5, form="pivoted", dtype="bfloat16", loss_check=False
    )
    lrsurgery.factorise_checkpoint(source, tmp_path / "wide", rank=0.5, form="pivoted", loss_check=False)
    tensors = load_file(tmp_path / "low" / "model.safetensors")
    orders = [tensor for key, tensor in tensors.items() if key.endswith(".order")]
    assert orders
    assert all(order.dtype == torch.int32 for order in orders)
    low, wide = lrsurgery.load_model(tmp_path / "low"), lrsurgery.load_model(tmp_path / "wide")
    assert float((outputs(low) - outputs(wide)).norm()) < 0.1 * float(outputs(wide).norm())


def test_the_same_job_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        lrsurgery.factorise_checkpoint(source, tmp_path / name, rank=0.5, form="pivoted", loss_check=False)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    damaged = load_file(tmp_path / "first" / "model.safetensors")
    save_file(damaged, tmp_path / "again.safetensors", {"format": "pt"})  # safetensors' own writer reads all of it
