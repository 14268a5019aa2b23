"""Healing of pivoted models: trained balanced where that is no larger than dense, published as they were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny

import lrsurgery
from lrsurgery.errors import RecipeError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import Spec
from lrsurgery.training.run_folder import RunFolder


def logits(folder: Path) -> torch.Tensor:
    model: Any = lrsurgery.load_model(folder)
    with torch.no_grad():
        return model(torch.arange(2, 34).reshape(2, 16)).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("forms")
    tiny.write_text(folder)
    source = tiny.save_gpt2(folder / "dense", dropout=0.0)
    for form in ("balanced", "pivoted"):
        lrsurgery.factorise_checkpoint(source, folder / form, rank=0.4, form=form, loss_check=False)
    # above the balanced break-even of square layers
    lrsurgery.factorise_checkpoint(source, folder / "large", rank=0.6, form="pivoted", loss_check=False)
    return folder


def heal(root: Path, model: str, output: str, **settings: Any) -> tuple[Path, list[str]]:
    notes: list[str] = []

    class Listener(lrsurgery.progress.Listener):  # type: ignore[name-defined,misc]
        def note(self, text: str) -> None:
            notes.append(text)

    asked = {"model": str(root / model), "data": str(root / "train.txt"), "eval_data": str(root / "valid.txt")}
    asked |= {"block_size": 16, "batch_size": 2, "steps": 6, "save_steps": 3, "decay": "frobenius"}  # type: ignore[dict-item]
    outcome = lrsurgery.finetune({**asked, **settings}, root / output, keep_checkpoints=True)
    return root / output, list(outcome.report.notes)


@pytest.mark.process
def test_it_trains_as_the_balanced_model_does(root: Path) -> None:
    (first, _), (second, notes) = heal(root, "balanced", "a"), heal(root, "pivoted", "b")
    assert any("pivoted layers train balanced" in note for note in notes)
    before = float((logits(first) - logits(root / "balanced")).norm())
    assert float((logits(first) - logits(second)).norm()) < 0.02 * before
    model = lrsurgery.load_model(second)
    assert {layer.form for layer in factorised_layers(model).values()} == {"pivoted"}
    report = lrsurgery.rank_report(model)
    assert report.parameters_after == lrsurgery.rank_report(lrsurgery.load_model(root / "pivoted")).parameters_after
    (checkpoint,) = (root / "b.run" / "factorised").glob("checkpoint-3")
    assert not any(key.endswith(".order") for key in load_file(checkpoint / "model.safetensors"))


@pytest.mark.process
def test_what_would_be_larger_than_dense_trains_pivoted(root: Path) -> None:
    folder, notes = heal(root, "large", "c")
    assert any("pivoted layers train balanced" in note and "layers train as they are" in note for note in notes), notes
    before, after = (load_file(each / "model.safetensors") for each in (root / "large", folder))
    (checkpoint,) = (root / "c.run" / "factorised").glob("checkpoint-3")
    trained = load_file(checkpoint / "model.safetensors")
    square, tall = "transformer.h.0.attn.c_proj.order", "transformer.h.0.mlp.c_fc.order"
    assert torch.equal(trained[square], before[square])
    assert torch.equal(after[square], before[square])
    assert tall not in trained
    assert tall in after


@pytest.mark.process
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_the_form_that_is_asked_for(root: Path, form: str) -> None:
    folder, _ = heal(root, "large", f"asked-{form}", train_form=form)
    trained = load_file(root / f"asked-{form}.run" / "factorised" / "checkpoint-3" / "model.safetensors")
    assert any(key.endswith(".order") for key in trained) == (form == "pivoted")
    assert {layer.form for layer in factorised_layers(lrsurgery.load_model(folder)).values()} == {"pivoted"}


@pytest.mark.process
def test_an_interrupted_run_goes_on(root: Path) -> None:
    """From the checkpoint of a balanced model, beside a folder that holds a pivoted one."""
    whole, _ = heal(root, "pivoted", "whole")
    folder, _ = heal(root, "pivoted", "again", steps=6)
    first, second = (load_file(each / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_layers_of_a_run_that_an_older_version_began(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    run.path.mkdir()
    wanted = {"a": Spec("linear", 3), "b": Spec("conv2d-channel", 2, "rows")}
    run.write_layers(wanted)
    assert run.read_layers() == wanted
    (run.path / "layers.json").write_text('{"a": ["linear", 3]}')
    assert run.read_layers() == {"a": Spec("linear", 3)}
    (run.path / "layers.json").write_text('{"a": ["linear", 3, 4]}')
    with pytest.raises(RecipeError, match="must map layer names to a kind and a rank"):
        run.read_layers()


@pytest.mark.process
@pytest.mark.parametrize("dense_steps", [0, 3], ids=["from the first step", "after dense steps"])
def test_layers_that_the_run_makes_are_published_pivoted(root: Path, dense_steps: int) -> None:
    """With the ranks of `factorise --rank`, balanced in training where that is no larger than dense."""
    rank = ["0.5", "*.c_attn=0.9"]
    folder, notes = heal(root, "dense", f"made-{dense_steps}", rank=rank, dense_steps=dense_steps)
    lrsurgery.factorise_checkpoint(root / "dense", root / f"alike-{dense_steps}", rank=rank, loss_check=False)
    found, wanted = (factorised_layers(lrsurgery.load_model(each)) for each in (folder, root / f"alike-{dense_steps}"))
    assert {name: layer.spec for name, layer in found.items()} == {name: layer.spec for name, layer in wanted.items()}
    assert any("pivoted layers train balanced" in note and "layers train as they are" in note for note in notes), notes
    trained = load_file(root / f"made-{dense_steps}.run" / "factorised" / "checkpoint-6" / "model.safetensors")
    assert {key for key in trained if key.endswith(".order")} == {
        f"transformer.h.{i}.attn.c_attn.order" for i in range(2)
    }
    model = lrsurgery.load_model(root / "dense")
    layer = factorised_layers(lrsurgery.load_model(folder))["transformer.h.0.attn.c_proj"]
    low: Any = lrsurgery.load_model(folder)
    for name in found:  # it is the trained model, to rounding
        state = {key.removeprefix(f"{name}."): value for key, value in trained.items() if key.startswith(f"{name}.")}
        if "order" not in state:
            product = state["v.weight"].T @ state["u.weight"].T  # a Conv1D's weight is (in, out)
            torch.testing.assert_close(low.get_submodule(name).weight + 0, product, rtol=1e-4, atol=1e-5)
    assert layer.form == "pivoted"
    assert model.num_parameters() > low.num_parameters()


@pytest.mark.process
@pytest.mark.parametrize("model", ["dense", "pivoted"])
def test_balanced_on_request(root: Path, model: str) -> None:
    settings: dict[str, Any] = {"rank": ["0.4"]} if model == "dense" else {}
    folder, notes = heal(root, model, f"balanced-{model}", form="balanced", **settings)
    assert {layer.form for layer in factorised_layers(lrsurgery.load_model(folder)).values()} == {"balanced"}
    assert not any("pivoted" in note for note in notes)


def test_a_run_that_an_older_version_began_stays_balanced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    run.path.mkdir()
    (run.path / "recipe.yaml").write_text("model: m\ndata: d\nrank: ['0.5']\n")
    assert run.resumed_recipe({}).form == "balanced"
    (run.path / "recipe.yaml").write_text("model: m\ndata: d\n")
    assert run.resumed_recipe({}).form is None
