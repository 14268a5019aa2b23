"""Folders that surgery writes: each name of a shared layer, files beside weights, checks before it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import tiny, zoo
from support.checks import assert_close, load, run
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.loading import check as loading
from lrsurgery.checkpoints.tensors import SafetensorsSource
from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.apply import factorised_layers

COAT = "coat_tiny"


def save_coat(folder: Path) -> nn.Module:
    """A network whose parallel blocks register one MLP under three names."""
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dims": [16, 32, 32, 32], "num_heads": 8, "num_classes": 5, "parallel_depth": 1}
    options |= {"serial_depths": [1, 1, 1, 1]}
    model = timm.create_model(COAT, **options).eval()
    folder.mkdir()
    # as timm's own writer, which stores a tensor under each of its names
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": COAT,
        "num_classes": 5,
        "model_args": {k: v for k, v in options.items() if k != "num_classes"},
    }
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    return model


def test_every_name_of_a_shared_layer_is_written(tmp_path: Path) -> None:
    model = save_coat(tmp_path / "coat")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    lrsurgery.factorise_checkpoint(tmp_path / "coat", tmp_path / "half", rank=0.5)
    lrsurgery.factorise_(model, rank=0.5, form="pivoted")
    stored = set(load_file(tmp_path / "half" / "model.safetensors"))
    assert set(model.state_dict()) <= stored
    names = {n for n, m in model.named_modules(remove_duplicate=False) if m in list(factorised_layers(model).values())}
    assert len(names) > len(factorised_layers(model)), "shares no layer any more: take another model here"
    half = lrsurgery.load_model(tmp_path / "half")
    with torch.no_grad():
        assert torch.equal(half(pixels), model(pixels))
    lrsurgery.export_dense(tmp_path / "half", tmp_path / "dense")
    back = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(back(pixels), model(pixels), 1e-4)


def test_dense_layers_of_a_shared_module_are_copied_under_every_name(tmp_path: Path) -> None:
    """Where the layer's own spectrum decides that it stays dense."""
    save_coat(tmp_path / "coat")
    lrsurgery.factorise_checkpoint(tmp_path / "coat", tmp_path / "half", rank="energy:0.9")
    assert isinstance(lrsurgery.load_model(tmp_path / "half"), nn.Module)


# the checks before an output is published


def break_writing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    from lrsurgery.factorise.work.rewrite import ShardWriter

    add = ShardWriter.add

    def broken(self: ShardWriter, name: str, tensor: Tensor) -> None:
        changed = change(name, tensor)
        if changed is not None:
            add(self, *changed)

    monkeypatch.setattr(ShardWriter, "add", broken)


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("fault", ["missing", "renamed", "reshaped"])
def test_output_that_would_not_load_is_not_written(
    library: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "missing": lambda name, tensor: None,
        "renamed": lambda name, tensor: (f"x.{name}", tensor),
        "reshaped": lambda name, tensor: (name, tensor[:1].clone()),
    }
    if library == "timm":
        tiny.save_timm(tmp_path / "dense")
    else:
        zoo.save_transformers("llama", tmp_path / "dense")
    done: list[str] = []

    def change(name: str, tensor: Tensor) -> Any:
        if name.endswith(".u.weight") and (not done or done[0] == name):
            done.append(name)
            return changes[fault](name, tensor)
        return name, tensor

    break_writing(monkeypatch, change)
    with pytest.raises(SurgeryError, match=r"the output would not load, so it is not written: .*u\.weight"):
        lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "clip", "vit", "wav2vec2", "gpt2"])
def test_check_runs_the_output(name: str, tmp_path: Path) -> None:
    zoo.save_transformers(name, tmp_path / "dense")
    noted = notes_of(tmp_path)
    (note,) = [n for n in noted if n.startswith("--check")]
    assert "differ by" in note, note


def notes_of(folder: Path, **options: Any) -> list[str]:
    from lrsurgery.progress import Listener

    noted: list[str] = []

    class Ears(Listener):
        def note(self, text: str) -> None:
            noted.append(text)

    lrsurgery.factorise_checkpoint(
        folder / "dense", folder / "half", rank=0.5, check=True, listener=Ears(), overwrite=True, **options
    )
    return noted


def test_check_of_a_timm_model(tmp_path: Path) -> None:
    tiny.save_timm(tmp_path / "dense")
    assert any("differ by" in note for note in notes_of(tmp_path))
    assert any("differ by" in note for note in notes_of(tmp_path, dtype="bfloat16"))


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_check_refuses_an_output_that_computes_something_else(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "timm":
        tiny.save_timm(tmp_path / "dense")
    else:
        zoo.save_transformers("llama", tmp_path / "dense")
    break_writing(monkeypatch, lambda name, tensor: (name, tensor * 1.5 if name.endswith(".u.weight") else tensor))
    with pytest.raises(SurgeryError, match="computes something else than the plan's own factors"):
        notes_of(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_the_check_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.save_transformers("llama", tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5)

    def refuse(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(SafetensorsSource, "_bytes", refuse)
    loading.check_folder(tmp_path / "half", "llama")


# what stands beside the weights


def test_adapter_beside_a_model_is_left_out_with_a_note(tmp_path: Path) -> None:
    zoo.save_transformers("gpt2", tmp_path / "dense")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "target_modules": ["c_attn"]}
    (tmp_path / "dense" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 48)}, tmp_path / "dense" / "adapter_model.safetensors")
    made = run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    (note,) = [note for note in made["notes"] if "adapter" in note]
    assert "adapter_config.json, adapter_model.safetensors" in note
    assert not list((tmp_path / "half").glob("adapter*"))
    load(tf.GPT2LMHeadModel, tmp_path / "half")
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(SurgeryError, match="a LoRA adapter beside a config; merge it"):
        run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "other")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_sentence_transformers_folder_is_copied_with_its_modules(tmp_path: Path) -> None:
    dense = tiny.save_bert(tmp_path / "dense", "BertModel")
    names = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": "sentence_transformers.X"} for i, path in enumerate(names)
    ]
    (dense / "modules.json").write_text(json.dumps(modules))
    (dense / "config_sentence_transformers.json").write_text("{}")
    for name in names[1:]:
        (dense / name).mkdir()
    (dense / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (dense / "2_Dense" / "config.json").write_text('{"in_features": 32}')
    save_file({"linear.weight": torch.ones(8, 32)}, dense / "2_Dense" / "model.safetensors")
    (dense / "onnx").mkdir()
    (dense / "onnx" / "model.onnx").write_bytes(b"the dense model")
    run("factorise", dense, "--rank", "0.5", "--output", tmp_path / "half")
    before, after = tree(dense), tree(tmp_path / "half")
    ours = {"model.safetensors", "config.json", "rank_report.json", "README.md", ".lrsurgery.json"}
    kept = {name: content for name, content in before.items() if name not in ours and not name.startswith("onnx")}
    assert {name: after[name] for name in kept} == kept
    assert set(after) - set(kept) == ours
    (dense / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SurgeryError, match="outside of the model's folder"):
        run("factorise", dense, "--rank", "0.5", "--output", tmp_path / "other")


def test_shard_that_the_index_does_not_name_is_left_alone(tmp_path: Path) -> None:
    model = zoo.build_transformers("llama")
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")  # type: ignore[operator]
    save_file({"lm_head.weight": torch.zeros(96, 48)}, tmp_path / "dense" / "model-00099-of-00099.safetensors")
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    half = load(tf.LlamaForCausalLM, tmp_path / "half")
    assert torch.equal(half.lm_head.weight, model.lm_head.weight)  # type: ignore[union-attr]
    assert not list((tmp_path / "half").glob("*00099*"))
