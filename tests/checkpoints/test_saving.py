"""`save_pretrained(state_dict=...)` writes what it is given, and a load never goes on with random factors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import moe, tiny
from support.warm import program
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lrsurgery
import lrsurgery.hf
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import factorised_layers


def save_experts(folder: Path) -> Path:
    moe.build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "gpt2 with its table", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("saving")
    dense = save_experts(where / "dense") if request.param == "experts" else tiny.save_gpt2(where / "dense")
    model = lrsurgery.load_model(dense)
    lrsurgery.factorise_(model, rank=0.4, embeddings="table" in request.param or None)
    lrsurgery.save_model(model, where / "half")
    return where / "half"


def load(folder: Path, **options: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **options)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def test_zeros_are_written_as_zeros(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    zeros = {key: torch.zeros_like(t) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=dict(zeros))
    same(load(tmp_path / "zeros").state_dict(), zeros)
    same(model.state_dict(), before)
    model.save_pretrained(tmp_path / "own")  # without one, its own again
    same(load(tmp_path / "own").state_dict(), before)


def test_by_position_after_copies_and_pickles(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    zeros = {key: torch.zeros_like(t) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    for name, twin in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        twin.save_pretrained(tmp_path / name)
        same(load(tmp_path / name).state_dict(), twin.state_dict())
        twin.save_pretrained(tmp_path / f"{name}-zeros", True, dict(zeros))
        same(load(tmp_path / f"{name}-zeros").state_dict(), zeros)


def test_an_average_of_weights(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average.update_parameters(model)
    given = average.module.state_dict()
    model.save_pretrained(tmp_path / "ema", state_dict=dict(given))
    again = load(tmp_path / "ema").state_dict()
    same(again, given)
    assert not any(torch.equal(again[name], tensor) for name, tensor in model.named_parameters() if tensor.ndim > 1)


def test_a_dense_state_dict_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    dense = lrsurgery.load_model(folder.parent / "dense")
    with pytest.raises(SourceError, match="dense weight, but the model's layer is factorised"):
        model.save_pretrained(tmp_path / "half", state_dict=dense.state_dict())


def test_a_dense_model_again_saves_as_any_other(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    lrsurgery.densify_(model)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=dict(zeros))
    same(load(tmp_path / "zeros").state_dict(), zeros)


def damage(folder: Path, output: Path, key: str, how: str) -> None:
    output.mkdir()
    for file in folder.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(key)
    if how == "renamed":  # as tools do that quantise by hand
        tensors[f"{key.removesuffix('.weight')}.qweight"] = tensor.to(torch.int8)
    elif how == "of another shape":
        tensors[key] = torch.zeros(3, 5)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["renamed", "missing", "of another shape"])
@pytest.mark.parametrize("part", ["u.weight", "v.weight"])
def test_a_layer_without_its_factors_is_an_error(folder: Path, tmp_path: Path, part: str, how: str) -> None:
    keys = [key for key in load_file(folder / "model.safetensors") if key.endswith(part)]
    for number, key in enumerate((keys[0], keys[-1])):
        damage(folder, tmp_path / str(number), key, how)
        for options in (
            {},
            {"ignore_mismatched_sizes": True},
            {"device_map": {"": "cpu"}, "ignore_mismatched_sizes": True},
        ):
            with pytest.raises((SourceError, RuntimeError)) as error:
                load(tmp_path / str(number), **options)
            # of another shape, transformers' own errors may come first, which name the tensor in a table that is logged
            theirs = how == "of another shape" and isinstance(error.value, RuntimeError)
            assert theirs or key.removesuffix(".weight") in str(error.value)


FSDP = """
import sys
import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
import lrsurgery.hf

folder, output = sys.argv[1:]
dist.init_process_group("gloo")
model = tf.AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for module in model.modules():
    if isinstance(module, torch.nn.ModuleList):
        for block in module:
            fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
model.save_pretrained(output, is_main_process=dist.get_rank() == 0, state_dict=gathered)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.process
def test_two_fsdp_processes_write_the_gathered_weights(tmp_path: Path) -> None:
    model = lrsurgery.load_model(tiny.save_gpt2(tmp_path / "dense"))
    lrsurgery.factorise_(model, rank=0.4)
    lrsurgery.save_model(model, tmp_path / "half")
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    done: Any = program(*tiny.TORCHRUN, script, tmp_path / "half", tmp_path / "double")
    assert done.returncode == 0, done.stderr
    before, after = load(tmp_path / "half"), load(tmp_path / "double")
    assert len(factorised_layers(after)) == len(factorised_layers(before))
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.mul_(2)
    same(after.state_dict(), before.state_dict())
