"""Tensor and expert parallelism: two processes compute what one does, train as one does and save the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import moe, tiny
from support.warm import program

import lrsurgery
import lrsurgery.hf
from lrsurgery.surgery.apply import factorised_layers

IDS = torch.arange(4, 36).reshape(2, 16) % 90
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
import transformers as tf
from packaging.version import Version
from transformers.distributed import DistributedConfig
import lrsurgery.hf

old = Version(tf.__version__) < Version("5.21")


def options_for(how, folder):
    if how == "auto":
        return {"tp_plan": "auto"}
    if how == "config":
        return {"distributed_config": DistributedConfig(tp_size=2)}
    if how == "rules":
        rules = tf.AutoConfig.from_pretrained(folder).base_model_tp_plan
        rules = {f"model.{name}": style for name, style in rules.items()}
        return {"distributed_config": DistributedConfig(tp_size=2, tp_plan=rules)}
    if old:
        return {"distributed_config": DistributedConfig(tp_size=2, enable_expert_parallel=True)}
    return {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}


for how, folder in json.loads(sys.argv[1]):
    model = tf.AutoModelForCausalLM.from_pretrained(folder, **options_for(how, folder)).eval()
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids[:1, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)
    factors = {name: p for name, p in model.named_parameters() if name.endswith((".u.weight", ".v.weight"))}
    factors = {name: p for name, p in factors.items() if hasattr(p, "placements")}
    sharded = [n for n, p in factors.items() if not all(placement.is_replicate() for placement in p.placements)]
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    model.save_pretrained(folder + "/again")
    if dist.get_rank() == 0:
        found = {"logits": logits, "tokens": tokens, "sharded": sharded, "loss": loss.detach(), "gradients": gradients}
        torch.save(found, folder + "/found.pt")
    dist.barrier()
dist.destroy_process_group()
"""


def save_llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **{**moe.BASE, "num_hidden_layers": 2, "hidden_size": 48, "num_key_value_heads": 4, "head_dim": 12, **options}
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_experts(folder: Path, family: str) -> Path:
    moe.build(family).save_pretrained(folder)
    return folder


CASES = {
    # how it is asked for, what it is factorised with, how many factors are sharded
    "balanced": ("auto", {"form": "balanced"}, 14),
    "pivoted": ("config", {"form": "pivoted"}, 14),
    "both in one place": ("config", {"form": "pivoted", "exclude": ["*layers.0.self_attn*", "*layers.1.mlp*"]}, 7),
    "rules of one's own": ("rules", {"form": "pivoted"}, 14),
    "heads and tables": ("config", {"form": "pivoted", "heads": True, "embeddings": True}, 15),
    "tied": ("config", {"form": "pivoted", "heads": True, "embeddings": True}, 14),
}


FAMILIES = [("qwen3_moe", "config"), ("qwen3_moe", "experts"), ("gpt_oss", "experts")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[object, Path]:
    """A folder for each case, with what two processes made of it; all are run by the same two."""
    root, jobs, made = tmp_path_factory.mktemp("parallel"), [], dict[object, Path]()
    for case, (how, options, _) in CASES.items():
        folder = root / case.replace(" ", "-").replace("'", "")
        model = lrsurgery.load_model(save_llama(folder / "dense", tie_word_embeddings=case == "tied"))
        lrsurgery.factorise_(model, rank=0.4, **options)
        lrsurgery.save_model(model, folder / "half", form=options["form"])
        made[case] = folder / "half"
        jobs.append((how, str(folder / "half")))
    for family, how in FAMILIES:
        folder = root / f"{family}-{how}"
        model = lrsurgery.load_model(save_experts(folder / "dense", family))
        lrsurgery.factorise_(model, rank=0.5, form="balanced")
        lrsurgery.save_model(model, folder / "half", form="balanced")
        made[family, how] = folder / "half"
        jobs.append((how, str(folder / "half")))
    for folder in made.values():
        torch.save(IDS, folder / "ids.pt")
    script = root / "parallel.py"
    script.write_text(SCRIPT)
    done: Any = program(*tiny.TORCHRUN, script, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def compare(folder: Path) -> dict[str, Any]:
    found = torch.load(folder / "found.pt")
    alone = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], alone(IDS).logits, rtol=1e-4, atol=1e-4)
        tokens = alone.generate(IDS[:1, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert found["tokens"].tolist() == tokens.tolist()
        again = tf.AutoModelForCausalLM.from_pretrained(folder / "again").eval()
        torch.testing.assert_close(again(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-4)
    loss = alone(IDS, labels=IDS).loss
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-4, atol=1e-4)
    loss.backward()
    compared, layers = 0, factorised_layers(alone)
    changed = {name for name, layer in factorised_layers(again).items() if layer.side != layers[name].side}
    for name, parameter in alone.named_parameters():
        gradient = found["gradients"].get(name)
        if gradient is not None and name.removesuffix(".weight")[:-2] not in changed:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
            compared += 1
    found["compared"] = compared
    found["sides"] = {name: layer.side for name, layer in factorised_layers(again).items()}
    found["form"] = {name: layer.side for name, layer in layers.items()}
    return found  # type: ignore[no-any-return]


@pytest.mark.process
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(folders: dict[object, Path], case: str) -> None:
    _, options, sharded = CASES[case]
    found = compare(folders[case])
    assert len(found["sharded"]) == sharded, found["sharded"]
    assert found["compared"] >= (30 if options["form"] == "balanced" else 10)
    for name, side in found["form"].items():  # pivots stay where they fit
        rowwise = name.endswith(("o_proj", "down_proj"))
        fits = side == ("rows" if rowwise else "columns") or not name.startswith("model.layers")
        assert found["sides"][name] == (side if fits else None), name


@pytest.mark.process
@pytest.mark.parametrize(("family", "how"), FAMILIES)
def test_experts(folders: dict[object, Path], family: str, how: str) -> None:
    found = compare(folders[family, how])
    banks = [name for name in found["sharded"] if ".experts." in name]
    assert len(banks) == (8 if how == "experts" else 4), banks  # both factors by expert, or one of them
    assert {name for name in found["gradients"] if ".experts." in name} >= set(banks)
