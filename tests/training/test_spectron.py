"""Spectron: its steps against singular value decompositions, AdamW for all else, and whole runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.warm import program

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.progress import SILENT
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.training.finetune import finetune
from lrsurgery.training.optimizers.spectron import Spectron, orthogonalised, spectral_layers

STEPS = 9
# a process that kills itself after a step of the run
KILLED = """
import os, signal, sys
from lrsurgery.training.loop import callbacks
from lrsurgery.cli import app as cli
original = callbacks.RunCallback.on_step_end
def rigged(self, args, state, control, **facts):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **facts)
callbacks.RunCallback.on_step_end = rigged
cli.main()
"""


class Layers(torch.nn.Module):
    """A layer of each kind that has plain factors, and weights that are no factors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = torch.nn.Linear(40, 24), torch.nn.Linear(24, 24, bias=False)
        self.channel, self.spatial = torch.nn.Conv2d(6, 16, 3, padding=1), torch.nn.Conv2d(6, 16, 3, padding=1)
        self.norm = torch.nn.LayerNorm(24)

    def forward(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        lines = self.norm(self.square(self.linear(x).relu()))
        return (lines**2).mean() + (self.channel(images) ** 2).mean() + (self.spatial(images) ** 3).mean()


def low_rank() -> Layers:
    torch.manual_seed(0)
    model = Layers()
    lrsurgery.factorise_(model, rank=5, include=["linear", "square", "channel"], conv="channel", form="balanced")
    lrsurgery.factorise_(model, rank=5, include=["spatial"], conv="spatial", form="balanced")
    return model


def gradients_(model: Layers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randn(7, 40, generator=generator), torch.randn(2, 6, 8, 8, generator=generator)).backward()


def matrices(model: Layers) -> dict[str, torch.Tensor]:
    return {name: layer.matrix.detach().double() for name, layer in factorised_layers(model).items()}


@pytest.mark.parametrize("shape", [(40, 5), (5, 40), (24, 24)], ids=["tall", "wide", "square"])
def test_orthogonalised_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ orthogonalised(matrix) @ vh.mT
    big = s > s[0] / 50
    assert bool((inner.diagonal()[big] > 0.6).all())
    assert bool((inner.diagonal() < 1.25).all())
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-4
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_the_product_moves_by_no_more_than_its_bound(lr: float) -> None:
    model = low_rank()
    assert len(spectral_layers(model)) == 4
    optimizer = Spectron(
        [{"params": [*model.parameters()], "weight_decay": 0.0}], [*spectral_layers(model).values()], lr=lr
    )
    for step in range(6):
        gradients_(model, step)
        before = matrices(model)
        optimizer.step()
        for name, after in matrices(model).items():
            moved = float(torch.linalg.matrix_norm(after - before[name], 2))
            assert moved <= 1.25 * lr, name
            assert moved >= 0.1 * lr, name


def test_a_step_is_the_rule() -> None:
    """Two steps by hand of one layer, with spectral norms by SVD and the orthogonalised mean by the function above."""
    model = low_rank()
    layer = factorised_layers(model)["linear"]
    u, v = layer.u.weight.detach().clone(), layer.v.weight.detach().clone()
    group = {"params": [*model.parameters()], "weight_decay": 0.1}
    optimizer = Spectron([group], [*spectral_layers(model).values()], lr=0.01, scale=3.0, betas=(0.8, 0.999))
    means = [torch.zeros_like(u), torch.zeros_like(v)]
    for step in range(2):
        gradients_(model, step)
        means = [0.8 * m + 0.2 * p.weight.grad for m, p in zip(means, (layer.u, layer.v), strict=True)]
        rate = 0.01 * 3.0 / (torch.linalg.matrix_norm(u, 2) + torch.linalg.matrix_norm(v, 2) + 1)
        u, v = ((1 - 0.01 * 0.1) * w - rate * orthogonalised(m) for w, m in zip((u, v), means, strict=True))
        optimizer.step()
        torch.testing.assert_close(layer.u.weight, u, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(layer.v.weight, v, atol=2e-5, rtol=1e-3)


def test_all_else_is_adamw() -> None:
    """To the last bit, beside an AdamW of torch; the gradients of factors are there again after the step."""
    ours, theirs = low_rank(), low_rank()
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    factors = {f"{name}.{part}.weight" for name in spectral_layers(ours) for part in ("u", "v")}
    optimizer = Spectron([{"params": [*ours.parameters()]}], [*spectral_layers(ours).values()], **settings)
    named = dict(theirs.named_parameters())
    other = torch.optim.AdamW([p for name, p in named.items() if name not in factors], **settings)
    for step in range(3):
        gradients_(ours, step)
        for name, p in ours.named_parameters():
            named[name].grad = p.grad.clone() if p.grad is not None else None
        optimizer.step()
        other.step()
        assert all(dict(ours.named_parameters())[name].grad is not None for name in factors)
    for name, p in ours.named_parameters():
        assert torch.equal(p, named[name]) == (name not in factors), name


def test_frobenius_decay_acts_once_a_step() -> None:
    """Without a gradient to speak of, a factor moves by the decay alone; torch's AdamW has hooks of its own by now."""
    torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    model = low_rank()
    layer = factorised_layers(model)["linear"]
    optimizer = Spectron(
        [{"params": [*model.parameters()]}], [*spectral_layers(model).values()], lr=0.1, weight_decay=0.0
    )
    lrsurgery.FrobeniusDecay(model, 0.05).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    u, v = layer.u.weight.detach().double().requires_grad_(), layer.v.weight.detach().double().requires_grad_()
    (0.5 * (u @ v).square().sum()).backward()
    optimizer.step()
    assert u.grad is not None
    torch.testing.assert_close(layer.u.weight.double(), u - 0.1 * 0.05 * u.grad, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spectron")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    return folder


def given(bench: Path, **more: Any) -> dict[str, Any]:
    own = {"model": str(bench / "gpt2"), "data": str(bench / "train.txt"), "eval_data": str(bench / "valid.txt")}
    return {**own, "batch_size": 4, "lr": 3e-3, "optimizer": "spectron", **more}


def test_a_model_learns(bench: Path, tmp_path: Path) -> None:
    settings = given(bench, from_scratch=True, rank=["0.5"], steps=40, eval_steps=40)
    stages = finetune(settings, tmp_path / "out", listener=SILENT).stages
    assert stages["healed"]["perplexity"] < 0.6 * stages["factorised"]["perplexity"]


def test_dense_steps_come_first(bench: Path, tmp_path: Path) -> None:
    settings = given(bench, from_scratch=True, rank=["0.5"], steps=20, dense_steps=8, eval_steps=20)
    stages = finetune(settings, tmp_path / "out", listener=SILENT).stages
    assert stages["healed"]["loss"] < stages["factorised"]["loss"]


def test_what_has_no_factors_is_refused(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="spectron: is for factors"):
        finetune(given(bench, dense=True, steps=2), tmp_path / "out", listener=SILENT)
    with pytest.raises(SurgeryError, match="spectron: is for factors"):
        finetune(given(bench, from_scratch=True, steps=2), tmp_path / "out", listener=SILENT)
    with pytest.raises(SurgeryError, match="set optim: is another optimizer"):
        finetune(given(bench, rank=["0.5"], steps=2, set={"optim": "sgd"}), tmp_path / "out", listener=SILENT)
    assert not (tmp_path / "out.run").exists()


@pytest.mark.process
def test_a_resumed_run_is_the_uninterrupted_run(bench: Path) -> None:
    def arguments(output: str) -> list[str]:
        words = ["finetune", bench / "gpt2", "--data", bench / "train.txt", "--output", bench / output]
        rest = f"--rank 0.5 --optimizer spectron --lr 3e-3 --steps {STEPS} --save-steps 3 --batch-size 4".split()
        return [*map(str, words), *rest]

    whole = program(*tiny.PROGRAM, *arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    stopped = program(sys.executable, "-c", KILLED, *arguments("stopped"))
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    resumed = program(*tiny.PROGRAM, "finetune", "--resume", "--output", bench / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    left, right = (load_file(bench / name / "model.safetensors") for name in ("whole", "stopped"))
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
