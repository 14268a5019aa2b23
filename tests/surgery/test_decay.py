"""Frobenius decay against autograd on the product itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from support import tiny, warm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedLayer

KINDS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 14), "channel", (3, 10)),
    "conv1d": (lambda: Conv1D(14, 10), "channel", (3, 10)),
    "conv1d-channel": (lambda: nn.Conv1d(6, 9, 3), "channel", (2, 6, 7)),
    "conv3d-channel": (lambda: nn.Conv3d(6, 9, (1, 3, 2)), "channel", (2, 6, 3, 4, 5)),
    "conv2d-channel": (lambda: nn.Conv2d(6, 9, (3, 2)), "channel", (2, 6, 7, 7)),
    "conv2d-channel, grouped": (lambda: nn.Conv2d(6, 48, (3, 2), groups=3), "channel", (2, 6, 7, 7)),
    "conv1d-channel, grouped": (lambda: nn.Conv1d(8, 32, 3, groups=2), "channel", (2, 8, 7)),
    "conv-transpose1d-channel": (lambda: nn.ConvTranspose1d(10, 6, 3), "channel", (2, 10, 7)),
    "conv-transpose2d-channel": (lambda: nn.ConvTranspose2d(10, 6, (3, 2)), "channel", (2, 10, 7, 7)),
    "conv2d-spatial": (lambda: nn.Conv2d(6, 9, (3, 2)), "spatial", (2, 6, 7, 7)),
}
RATE, STRENGTH = 0.1, 0.3


def build(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, FactorisedLayer, Tensor]:
    torch.manual_seed(0)
    make, conv, shape = KINDS[kind]
    model = nn.Sequential(make()).to(dtype)
    lrsurgery.factorise_(model, rank=4, conv=conv)
    (layer,) = factorised_layers(model).values()
    assert layer.kind == kind.partition(",")[0]
    return model, layer, torch.randn(shape, dtype=dtype)


def penalty_gradients(layer: FactorisedLayer) -> tuple[Tensor, Tensor]:
    """By autograd, through the dense weight."""
    penalty = STRENGTH / 2 * layer.weight.square().sum()
    return torch.autograd.grad(penalty, (layer.u.weight, layer.v.weight))


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-13 * wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_one_step_is_the_penaltys_gradient(kind: str, decoupled: bool) -> None:
    """With SGD both ways come to the same: a step on the loss with the penalty in it."""
    model, layer, x = build(kind)
    loss = model(x).square().sum() * 1e-3
    loss.backward()
    wanted = [
        p - RATE * (p.grad + g)  # type: ignore[operator]
        for p, g in zip((layer.u.weight, layer.v.weight), penalty_gradients(layer), strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    lrsurgery.FrobeniusDecay(model, STRENGTH, decoupled=decoupled).attach(optimizer)
    optimizer.step()
    assert close(layer.u.weight, wanted[0])
    assert close(layer.v.weight, wanted[1])


def test_adamw_decays_beside_its_moments() -> None:
    """Decoupled: AdamW's own step, and the decay beside it, by each group's learning rate."""
    steps = {}
    for strength in (0.0, STRENGTH):
        model, layer, x = build("linear")
        before = layer.u.weight.clone(), layer.v.weight.clone()
        moved = penalty_gradients(layer)
        groups = [{"params": [layer.u.weight], "lr": 0.01}, {"params": [layer.v.weight], "lr": 0.002}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        lrsurgery.FrobeniusDecay(model, strength).attach(optimizer)
        model(x).square().sum().backward()
        optimizer.step()
        steps[strength] = [after - b for after, b in zip((layer.u.weight, layer.v.weight), before, strict=True)]
    for plain, decayed, rate, gradient in zip(steps[0.0], steps[STRENGTH], (0.01, 0.002), moved, strict=True):
        assert torch.allclose(decayed - plain, -rate * gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("grouped", [0, 10**9], ids=["one by one", "in batches"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_many_layers_of_one_shape(monkeypatch: pytest.MonkeyPatch, decoupled: bool, grouped: int) -> None:
    """Each moves by its own product, rate and freedom, whether or not it is computed in one batch with the others."""
    monkeypatch.setattr("lrsurgery.surgery.decay.GROUPED", grouped)
    model = nn.ModuleList(build(kind)[0] for kind in KINDS for _ in range(4))
    for number, p in enumerate(model.parameters()):  # factors that differ, some of them frozen
        p.data.mul_(1 + number / 10)
        p.requires_grad_(number % 5 != 0)
    layers = list(factorised_layers(model).values())
    factors = [f for layer in layers for f in (layer.u.weight, layer.v.weight)]
    trained = [f for f in factors if f.requires_grad]
    rates = {id(f): RATE * (1 + number % 2) for number, f in enumerate(trained)}
    penalty = sum((STRENGTH / 2 * layer.weight.square().sum() for layer in layers), torch.zeros(()))
    moved = dict(zip(map(id, trained), torch.autograd.grad(penalty, trained), strict=True))
    wanted = [f - rates.get(id(f), 0.0) * moved.get(id(f), 0.0) for f in factors]
    for f in trained:
        f.grad = torch.zeros_like(f)
    optimizer = torch.optim.SGD([{"params": trained[k::2], "lr": RATE * (1 + k)} for k in (0, 1)])
    lrsurgery.FrobeniusDecay(model, STRENGTH, decoupled=decoupled).attach(optimizer)
    optimizer.step()
    for found, want in zip(factors, wanted, strict=True):
        assert close(found, want)


@pytest.mark.parametrize("many", [1, 3])
def test_bf16_factors_are_rounded_once(many: int) -> None:
    """A decay far below bf16's step size still moves the numbers that it should, as fp64 says."""
    model = nn.ModuleList(build("linear", torch.bfloat16)[0] for _ in range(many))
    layers = list(factorised_layers(model).values())
    wanted = []
    for layer in layers:
        u, v = layer.u.weight.detach().double(), layer.v.weight.detach().double()
        wanted += [u - RATE * STRENGTH * u @ v @ v.T, v - RATE * STRENGTH * u.T @ u @ v]
        layer.u.weight.grad, layer.v.weight.grad = torch.zeros_like(layer.u.weight), torch.zeros_like(layer.v.weight)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    lrsurgery.FrobeniusDecay(model, STRENGTH).attach(optimizer)
    optimizer.step()
    found = [f for layer in layers for f in (layer.u.weight, layer.v.weight)]
    for f, want in zip(found, wanted, strict=True):
        assert torch.equal(f, want.to(torch.bfloat16))


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_rate_in_a_tensor(decoupled: bool) -> None:
    """As capturable optimizers and torch.compile want it."""
    results = []
    for rate in (RATE, torch.tensor(RATE, dtype=torch.float64)):
        model, _, x = build("linear")
        optimizer = torch.optim.SGD(model.parameters(), rate)
        lrsurgery.FrobeniusDecay(model, STRENGTH, decoupled=decoupled).attach(optimizer)
        model(x).square().sum().backward()
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert close(results[1], results[0])


def test_a_frozen_factor_rests() -> None:
    model, layer, x = build("linear")
    layer.u.weight.requires_grad_(False)
    before = layer.u.weight.clone()
    wanted = layer.v.weight - RATE * STRENGTH * (before.T @ before) @ layer.v.weight
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    lrsurgery.FrobeniusDecay(model, STRENGTH).attach(optimizer)
    (model(x).sum() * 0).backward()
    optimizer.step()
    assert torch.equal(layer.u.weight, before)
    assert close(layer.v.weight, wanted)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_grad_scaler(fused: bool, decoupled: bool) -> None:
    """A scaled step is the plain step; one that the scaler skips for an Inf changes nothing."""
    results = []
    for scaled in (False, True):
        model, layer, x = build("linear", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), RATE, fused=fused)
        lrsurgery.FrobeniusDecay(model, STRENGTH, decoupled=decoupled).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        for factor in (1.0, float("inf")) if scaled else (1.0,):
            held = layer.u.weight.detach().clone()
            optimizer.zero_grad()
            scaler.scale((model(x) * factor).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(layer.u.weight, held) == (factor == float("inf"))
        results.append([p.detach().clone() for p in model.parameters()])
    for plain, scaled_too in zip(*results, strict=True):
        assert torch.allclose(plain, scaled_too, rtol=1e-6, atol=1e-7)


def test_detached_it_decays_no_more() -> None:
    model, layer, x = build("linear")
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    decay = lrsurgery.FrobeniusDecay(model, STRENGTH).attach(optimizer)
    decay.detach()
    before = layer.u.weight.clone()
    (model(x).sum() * 0).backward()
    optimizer.step()
    assert torch.equal(layer.u.weight, before)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_refused_strength(strength: float) -> None:
    with pytest.raises(SurgeryError, match="decay strength"):
        lrsurgery.FrobeniusDecay(build("linear")[0], strength)


def test_refused_models_and_optimizers() -> None:
    dense: Any = nn.Linear(4, 4)
    with pytest.raises(SurgeryError, match="no factorised layers"):
        lrsurgery.FrobeniusDecay(dense, 0.1)
    with pytest.raises(SurgeryError, match="holds no factor"):
        lrsurgery.FrobeniusDecay(build("linear")[0], 0.1).attach(torch.optim.SGD(dense.parameters(), 0.1))


SHARDED = """
import gc
import torch, torch.distributed as dist
import lrsurgery
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.randn(4, 294, generator=torch.Generator().manual_seed(1))

def train(model, x, decoupled):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    lrsurgery.FrobeniusDecay(model, 0.3, decoupled=decoupled).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

def build(conv):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (6, 7, 7)), nn.Conv2d(6, 9, (3, 2)), nn.Flatten(), nn.Linear(270, 15))
    lrsurgery.factorise_(model, rank=5, conv=conv, allow_larger=True)
    return model

def compare():
    mesh = init_device_mesh("cpu", (2,))
    for conv in ("channel", "spatial"):
        for decoupled in (True, False):
            wanted = train(build(conv), x, decoupled)
            sharded = build(conv)
            fully_shard(sharded, mesh=mesh)
            for model in (sharded, DistributedDataParallel(build(conv))):
                found = train(model, x[2 * rank : 2 * rank + 2], decoupled)
                for p, q in zip(found, wanted, strict=True):
                    assert (p - q).abs().max() < 1e-6, (type(model), conv, decoupled, p.shape)

compare()
gc.collect()  # a reducer that outlives its process group aborts the process at exit
dist.destroy_process_group()
"""


@pytest.mark.process
def test_two_processes_decay_once(tmp_path: Path) -> None:
    """DDP and FSDP2 over two real processes, with factors that do not divide evenly, against one process."""
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    done = warm.program(*tiny.TORCHRUN, script)
    assert done.returncode == 0, done.stderr


def test_an_optimizer_that_accelerate_wrapped() -> None:
    """The step is that of the bare optimizer with the decay, and once detached that of one without."""
    after = []
    for wrapped in (False, True):
        model, layer, x = build("linear")
        optimizer: Any = torch.optim.SGD(model.parameters(), RATE)
        stepped = optimizer
        if wrapped:
            stepped = accelerate.Accelerator(cpu=True).prepare(optimizer)
            assert type(stepped) is not type(optimizer)
        decay = lrsurgery.FrobeniusDecay(model, STRENGTH).attach(stepped)
        model(x).square().sum().mul(1e-3).backward()
        moved = penalty_gradients(layer)[0]
        before = layer.u.weight - RATE * layer.u.weight.grad
        stepped.step()
        assert close(layer.u.weight, before - RATE * moved)
        after.append(layer.u.weight.clone())
        decay.detach()
        stepped.zero_grad()
        stepped.step()
        assert torch.equal(layer.u.weight, after[-1])
    assert torch.equal(*after)
