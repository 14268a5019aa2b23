"""Training of factorised experts: the command, the switch from dense ones, the bound of the decay, their dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import moe, tiny
from support.checks import run

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.training.loop.dynamics import layer_dynamics, steepest_decay
from lrsurgery.training.switch import switch_optimizer

EXPERTS = ["*.experts.*_proj"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("experts") / "dense"
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**{**moe.FOUR, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": tiny.BLOCK})
    tf.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.write_text(folder)
    return folder


def test_factorised_experts_are_healed(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 0.5, "include": EXPERTS, "allow_larger": True, "loss_check": False}
    lrsurgery.factorise_checkpoint(dense, tmp_path / "half", **options)
    data = dense / "train.txt"
    how = ["--steps", 12, "--batch-size", 4, "--lr", 0.01, "--decay", "frobenius", "--device", "cpu"]
    run("finetune", tmp_path / "half", "--data", data, "--output", tmp_path / "healed", *how)
    before: Any = lrsurgery.load_model(tmp_path / "half")
    after: Any = lrsurgery.load_model(tmp_path / "healed")
    assert factorised_layers(after).keys() == factorised_layers(before).keys()
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {f"{name}.{part}.weight" for name in factorised_layers(after) for part in "uv"} <= changed
    assert "model.layers.0.mlp.gate.weight" in changed, "the router is trained"
    models = [
        run("evaluate", each, "--data", dense / "valid.txt")["models"][0] for each in (dense, tmp_path / "healed")
    ]
    assert models[1]["values"]["loss"] < models[0]["values"]["loss"] - 0.1


def test_dense_experts_are_factorised_on_the_way(dense: Path, tmp_path: Path) -> None:
    how = ["--steps", 4, "--dense-steps", 2, "--batch-size", 2, "--device", "cpu"]
    how += ["--rank", 0.5, "--include", EXPERTS[0], "--allow-larger"]
    run("finetune", dense, "--data", dense / "train.txt", "--output", tmp_path / "out", *how)
    layers = factorised_layers(lrsurgery.load_model(tmp_path / "out"))
    assert {layer.kind for layer in layers.values()} == {"experts"}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_first_moments_are_those_of_the_gradients_of_each_expert(family: str) -> None:
    """One step from rest at full rank, where both models have the same gradients."""
    model: Any = moe.build(family).double()
    model.config._experts_implementation = "eager"  # grouped kernels take no fp64

    def step() -> tuple[Any, list[Any]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        model.zero_grad()
        model(input_ids=moe.IDS, use_cache=False).logits.sin().sum().backward()
        optimizer.step()
        return optimizer.state_dict(), [([name for name, _ in model.named_parameters()], {"weight_decay": 0.0})]

    saved, before = step()
    lrsurgery.factorise_(model, rank=1.0, allow_larger=True, include=EXPERTS)
    wanted, after = step()
    switched, reset = switch_optimizer(saved, model, before, after, 1.0)
    assert reset == []
    for index, name in enumerate(after[0][0]):
        truth = wanted["state"][index]["exp_avg"]
        scale = float(truth.abs().max())
        torch.testing.assert_close(switched["state"][index]["exp_avg"], truth, atol=1e-4 * scale, rtol=0, msg=name)


def test_the_router_may_be_frozen() -> None:
    model: Any = moe.build("qwen3_moe")
    lrsurgery.factorise_(model, rank=0.5, allow_larger=True, include=EXPERTS)
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]
    kept = [router.detach().clone() for router in routers]
    for router in routers:
        router.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(input_ids=moe.IDS, labels=moe.IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(router, old) for router, old in zip(routers, kept, strict=True))


def test_the_dynamics_of_a_bank_are_those_of_its_experts() -> None:
    model = moe.build("gpt_oss")
    lrsurgery.factorise_(model, rank=0.5, allow_larger=True, include=EXPERTS)
    found, steepest = layer_dynamics(model), 0.0
    for name, layer in factorised_layers(model).items():
        u, v = (factor.detach().double() for factor in layer.factors)
        assert found[name]["frobenius_norm"] == pytest.approx(float((u @ v).norm()), rel=1e-4)
        steepest = max(steepest, *(float(torch.linalg.svdvals(factor).max()) ** 2 for factor in (u, v)))
    assert steepest_decay(model)[1] == pytest.approx(steepest, rel=1e-4)
