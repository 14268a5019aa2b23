"""Folders of pivoted models: they load everywhere that folders of balanced ones do, and compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import tiny
from support.checks import outputs

import lrsurgery
from lrsurgery.checkpoints.load import open_factorised
from lrsurgery.checkpoints.source import resolve
from lrsurgery.errors import SurgeryError
from lrsurgery.report.read import read_report
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.change import pivot_layers_


@pytest.fixture(scope="module", params=["gpt2", "bert", "timm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a balanced model and of the same one pivoted."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "timm":
        model: Any = lrsurgery.load_model(tiny.save_timm(folder / "dense"))
    elif request.param == "gpt2":
        model = lrsurgery.load_model(tiny.save_gpt2(folder / "dense"))
    else:
        model = lrsurgery.load_model(tiny.save_biased_bert(folder / "dense"))
    lrsurgery.factorise_(model, rank=0.4, conv="channel")  # spatial layers are balanced alone
    lrsurgery.save_model(model, folder / "balanced", form="balanced")
    pivot_layers_(model)
    assert {layer.side for layer in factorised_layers(model).values()} >= {"rows"}
    lrsurgery.save_model(model, folder / "pivoted")
    return folder / "balanced", folder / "pivoted"


def test_they_load_and_compute_the_same_in_fewer_bytes(pair: tuple[Path, Path]) -> None:
    balanced, pivoted = (lrsurgery.load_model(folder) for folder in pair)
    torch.testing.assert_close(outputs(pivoted), outputs(balanced), rtol=1e-4, atol=1e-4)
    for name, layer in factorised_layers(pivoted).items():
        assert layer.form == "pivoted", name
        assert layer.order is not None
        assert sorted(layer.order.tolist()) == list(range(len(layer.order)))
    old, new = (sum(p.numel() for p in model.parameters()) for model in (balanced, pivoted))
    assert old - new == sum(layer.rank**2 for layer in factorised_layers(pivoted).values())


def test_the_oldest_version_that_knows_the_form_is_written(pair: tuple[Path, Path]) -> None:
    first, second = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in pair)
    assert (first["format_version"], second["format_version"]) == (1, 2)
    assert all(spec.keys() == {"kind", "rank"} for spec in first["layers"].values())
    for spec in second["layers"].values():
        assert spec["form"] == "pivoted"
        assert spec["side"] in ("rows", "columns")


def test_from_pretrained_and_another_dtype(pair: tuple[Path, Path]) -> None:
    import lrsurgery.hf

    balanced, pivoted = pair
    wanted = lrsurgery.load_model(balanced)
    if isinstance(wanted, tf.PreTrainedModel):
        model = type(wanted).from_pretrained(pivoted, dtype=torch.bfloat16)
        assert {layer.form for layer in factorised_layers(model).values()} == {"pivoted"}
        assert {layer.order.dtype for layer in factorised_layers(model).values()} == {torch.int32}  # type: ignore[union-attr]
        got = outputs(model).float()
        assert float((got - outputs(wanted)).norm() / outputs(wanted).norm()) < 0.05
        base = tf.AutoModel.from_pretrained(pivoted)
        assert {layer.form for layer in factorised_layers(base).values()} == {"pivoted"}


def test_again_saved_they_are_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    lrsurgery.save_model(lrsurgery.load_model(pair[1]), tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (pair[1], tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_exported_they_are_dense(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in pair:
        lrsurgery.export_dense(folder, tmp_path / folder.name)
    balanced, pivoted = (lrsurgery.load_model(tmp_path / folder.name) for folder in pair)
    assert not factorised_layers(pivoted)
    torch.testing.assert_close(outputs(pivoted), outputs(balanced), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(balanced.named_parameters(), pivoted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_report_counts_what_is_stored(pair: tuple[Path, Path]) -> None:
    balanced, pivoted = (read_report([str(f)], Compute(device=torch.device("cpu"), cache=False)) for f in pair)
    model = lrsurgery.load_model(pair[1])
    assert pivoted.parameters_after == sum(p.numel() for p in model.parameters())
    assert pivoted.parameters_before == balanced.parameters_before
    for old, new in zip(balanced.factorised, pivoted.factorised, strict=True):
        assert (old.form, new.form) == ("balanced", "pivoted")
        assert new.rank is not None
        assert old.parameters_after is not None
        assert new.parameters_after == old.parameters_after - new.rank**2
        assert new.flops_after == (old.flops_after or 0) - 2 * new.rank**2
        assert new.after is not None
        assert old.after is not None
        assert new.after.entropy == pytest.approx(old.after.entropy, rel=1e-3)


def test_factors_are_read_one_layer_at_a_time(pair: tuple[Path, Path]) -> None:
    opened, model = open_factorised(resolve(str(pair[1]))), lrsurgery.load_model(pair[1])
    for name, layer in factorised_layers(model).items():
        u, v = opened.factors[name](torch.device("cpu"))
        torch.testing.assert_close(layer.layout.to_weight(u @ v, layer), layer.weight + 0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["missing", "shape", "values", "side", "form"])
def test_damaged_folders_are_refused(pair: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in pair[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "rank_report.json").unlink(missing_ok=True)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    key = next(key for key in tensors if key.endswith(".order"))
    spec = next(iter(config["quantization_config"]["layers"].values()))
    if fault == "missing":
        del tensors[key]
    elif fault == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif fault == "values":
        tensors[key][0] = tensors[key][1]
    elif fault == "side":
        del spec["side"]
    else:
        spec["form"] = "diagonal"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError, match=fault if fault in ("side", "form") else "order"):
        lrsurgery.load_model(folder)
    with pytest.raises(SurgeryError):
        lrsurgery.export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_save_pretrained_after_a_change_of_form(tmp_path: Path) -> None:
    """transformers is told of the form, both ways, without save_model."""
    import lrsurgery.hf

    model: Any = lrsurgery.load_model(tiny.save_gpt2(tmp_path / "dense"))
    lrsurgery.factorise_(model, rank=0.4)
    wanted = outputs(model)
    for change, form in ((lrsurgery.pivot_, "pivoted"), (lrsurgery.balance_, "balanced")):
        change(model)
        model.save_pretrained(tmp_path / form)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / form)
        assert {layer.form for layer in factorised_layers(again).values()} == {form}
        torch.testing.assert_close(outputs(again), wanted, rtol=1e-4, atol=1e-4)


def test_save_model_writes_a_form_and_leaves_the_module_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module: Any = lrsurgery.load_model(pair[0])
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    told = getattr(getattr(module, "config", None), "quantization_config", None)
    lrsurgery.save_model(module, tmp_path / "default")
    lrsurgery.save_model(module, tmp_path / "balanced", form="balanced")
    for name, p in module.named_parameters():
        assert p is before[name][0], name
        assert torch.equal(p, before[name][1])
    assert {layer.form for layer in factorised_layers(module).values()} == {"balanced"}
    if told is not None:
        assert module.config.quantization_config.specs == told.specs
    written, asked = (lrsurgery.load_model(tmp_path / name) for name in ("default", "balanced"))
    assert {layer.form for layer in factorised_layers(written).values()} == {"pivoted"}
    torch.testing.assert_close(outputs(written), outputs(module), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(asked), outputs(module))
    with pytest.raises(SurgeryError, match="unknown form"):
        lrsurgery.save_model(module, tmp_path / "other", form="diagonal")
    assert not (tmp_path / "other").exists()


def test_save_model_leaves_other_peoples_modules_in_layers_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter on u, such as LoRA's, would be lost in another form."""
    module: Any = lrsurgery.load_model(pair[0])
    name, layer = next(iter(factorised_layers(module).items()))
    u: Any = copy.deepcopy(layer.u)
    u.__class__ = type("Adapted", (type(u),), {})
    layer.u = u
    lrsurgery.save_model(module, tmp_path / "out")
    assert layer.u is u
    found = {key: layer.form for key, layer in factorised_layers(lrsurgery.load_model(tmp_path / "out")).items()}
    assert found.pop(name) == "balanced"
    assert set(found.values()) == {"pivoted"}
