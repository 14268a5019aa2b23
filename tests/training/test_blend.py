"""Self-guided training: both ends of the blend against the dense and the plain model, its steps, and resumed runs."""

from __future__ import annotations

import math
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
from lrsurgery.training.blend import Blend, dense_share
from lrsurgery.training.finetune import finetune

STEPS, BLENDED = 12, 7
# a process that kills itself after a step of the run
KILLED = """
import os, signal, sys
from lrsurgery.training.loop import callbacks
from lrsurgery.training import switch
from lrsurgery.cli import app as cli
original, at = callbacks.RunCallback.on_step_end, int(sys.argv[1])
def rigged(self, args, state, control, **facts):
    if state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **facts)
def ended(checkpoint):
    os.kill(os.getpid(), signal.SIGKILL)
callbacks.RunCallback.on_step_end = rigged
if at < 0:
    switch.mark_complete = ended
sys.argv = ["lrsurgery", *sys.argv[2:]]
cli.main()
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    tiny.save_gpt2(folder / "other", dropout=0.0, blocks=1)
    tiny.save_bert(folder / "masked", "BertForMaskedLM")
    tiny.save_timm(folder / "timm")
    tiny.write_images(folder / "images")
    for name in ("gpt2", "masked", "timm"):
        lrsurgery.factorise_checkpoint(folder / name, folder / f"{name}-half", rank=0.5)
    lrsurgery.factorise_checkpoint(folder / "gpt2", folder / "table", rank=0.5, embeddings=True)
    return folder


def answers(model: Any, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if name == "timm":
            found: torch.Tensor = model(torch.randn(2, 3, 32, 32, generator=generator))
        else:
            found = model(input_ids=torch.randint(6, 300, (2, tiny.BLOCK), generator=generator)).logits
        return found


def without_dropout(model: Any) -> Any:
    """The model as it trains, but for its dropout and its BatchNorm."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("name", ["gpt2", "masked", "timm"], ids=["Conv1D", "linear", "convolutions"])
def test_both_ends_of_the_blend(bench: Path, name: str) -> None:
    dense = without_dropout(lrsurgery.load_model(bench / name))
    plain = without_dropout(lrsurgery.load_model(bench / f"{name}-half"))
    model = without_dropout(lrsurgery.load_model(bench / f"{name}-half"))
    blend = Blend(model, dict(dense.named_modules()), name)
    first, last = answers(dense, name), answers(plain, name)
    assert not torch.allclose(first, last, atol=1e-3)
    assert torch.equal(answers(model, name), first)
    blend.share = 0.0
    assert torch.equal(answers(model, name), last)
    blend.share = 1.0
    layers = len(factorised_layers(model))
    assert len(blend.idle) == 0
    assert sum(key.endswith(".guide.weight") for key in model.state_dict()) == layers
    blend.remove_()
    assert torch.equal(answers(model, name), last)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_layer_is_a_mean_of_both(bench: Path) -> None:
    """Outputs, and the gradients of all three weights, by autograd on the mean of two dense weights."""
    model = without_dropout(lrsurgery.load_model(bench / "gpt2-half"))
    dense = lrsurgery.load_model(bench / "gpt2")
    blend = Blend(model, dict(dense.named_modules()), "gpt2")
    blend.share = 0.3
    name, layer = next(iter(factorised_layers(model).items()))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    w = dict(dense.named_modules())[name].weight.detach().clone().requires_grad_()  # (in, out) of a Conv1D
    product = (layer.weight + 0).detach().clone().requires_grad_()
    bias = 0.3 * dict(dense.named_modules())[name].bias.detach() + 0.7 * layer.bias.detach()
    wanted = x @ (0.3 * w + 0.7 * product) + bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    wanted.square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.guide.weight.grad, w.grad, atol=1e-4, rtol=1e-4)
    (layer.weight + 0).backward(product.grad)  # the factors' gradients once more
    for part in (layer.u, layer.v):
        assert part.weight.grad is not None
    twice = [part.weight.grad.clone() for part in (layer.u, layer.v)]
    for part in (layer.u, layer.v):
        part.weight.grad = None
    layer(x).square().sum().backward()
    for part, both in zip((layer.u, layer.v), twice, strict=True):
        torch.testing.assert_close(2 * part.weight.grad, both, atol=1e-3, rtol=1e-3)


def test_the_share_is_half_a_cosine() -> None:
    assert [dense_share(step, 4) for step in (0, 4, 5, 99)] == [1.0, 0.0, 0.0, 0.0]
    assert dense_share(2, 4) == pytest.approx(0.5)
    assert dense_share(1, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert dense_share(3, 4) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def given(bench: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(bench / "train.txt"), "batch_size": 4, "lr": 1e-2, "schedule": "constant", **more}


@pytest.mark.parametrize("how", ["rank", "against", "teacher"])
def test_the_first_step_is_that_of_the_dense_model(bench: Path, tmp_path: Path, how: str) -> None:
    """Dense training by the same Trainer is the truth; the factors have no gradient yet."""
    model = {"rank": "gpt2"}.get(how, "gpt2-half")
    what = {"rank": ["0.5"]} if how == "rank" else {how: str(bench / "gpt2")}
    common = given(bench, optimizer="sgd", decay="none", weight_decay=0.0, steps=2, save_steps=1)
    weights = {"teacher_weight": 0.0} if how == "teacher" else {}
    blended = {"model": str(bench / model), "blend": 1, **what, **weights}
    finetune({**common, **blended}, tmp_path / "out", listener=SILENT, keep_checkpoints=True)
    dense = {"model": str(bench / "gpt2"), "dense": True}
    finetune({**common, **dense}, tmp_path / "dense", listener=SILENT, keep_checkpoints=True)
    ours = load_file(tmp_path / "out.run" / "blended" / "checkpoint-1" / "model.safetensors")
    theirs = load_file(tmp_path / "dense.run" / "dense" / "checkpoint-1" / "model.safetensors")
    before = load_file(bench / "gpt2" / "model.safetensors")
    guides = 0
    for key, tensor in theirs.items():
        owner, _, kind = key.rpartition(".")
        guide = ours.get(f"{owner}.guide.{kind}")
        guides += guide is not None
        torch.testing.assert_close(ours[key] if guide is None else guide, tensor, atol=1e-6, rtol=1e-5)
    assert guides >= 8
    moved = [key for key, tensor in theirs.items() if key in before and not torch.equal(tensor, before[key])]
    assert len(moved) > 20
    after = load_file(tmp_path / "out.run" / "factorised" / "checkpoint-1" / "model.safetensors")
    assert not any(".guide." in key for key in after)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in after.items())
    assert not any(".guide." in key for key in load_file(tmp_path / "out" / "model.safetensors"))


def arguments(bench: Path, output: str, *more: object) -> list[str]:
    data = ["--data", bench / "train.txt", "--eval-data", bench / "valid.txt"]
    length = f"--steps {STEPS} --blend {BLENDED} --save-steps 3 --eval-steps 3 --log-steps 1 --batch-size 4".split()
    rest = ["--rank", "0.5", "--lr", "3e-3", *length, "--output", bench / output, *more]
    return list(map(str, ["finetune", bench / "gpt2", *data, *rest]))


@pytest.fixture(scope="module")
def whole(bench: Path) -> Path:
    done = program(*tiny.PROGRAM, *arguments(bench, "whole"))
    assert done.returncode == 0, done.stderr
    return bench / "whole"


@pytest.mark.process
@pytest.mark.parametrize("at", [5, -1, 8, 11], ids=["in the blend", "at its end", "just after", "long after"])
def test_a_resumed_run_is_the_uninterrupted_run(bench: Path, whole: Path, at: int) -> None:
    output = f"stopped-{at}"
    stopped = program(sys.executable, "-c", KILLED, at, *arguments(bench, output))
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    resumed = program(*tiny.PROGRAM, "finetune", "--resume", "--output", bench / output)
    assert resumed.returncode == 0, resumed.stderr
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, bench / output))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    assert (bench / output / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_figures_are_those_of_the_factors(bench: Path, tmp_path: Path) -> None:
    """A blend that has not ended measures what would be published; the first figure is that of the surgery."""
    data = given(bench, eval_data=str(bench / "valid.txt"), steps=4, eval_steps=2, model=str(bench / "gpt2-half"))
    blended = finetune({**data, "blend": 3, "against": str(bench / "gpt2")}, tmp_path / "blended", listener=SILENT)
    plain = finetune(data, tmp_path / "plain", listener=SILENT)
    assert blended.stages["factorised"] == plain.stages["factorised"]
    assert blended.stages["healed"] != plain.stages["healed"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no dense weights", {"model": "gpt2-half"}, "holds no dense weights; name the dense model with --against"),
    ("another model", {"model": "gpt2-half", "against": "other"}, "h.1.attn.c_attn of "),
    ("dense", {"dense": True}, "blend: does not go with --dense or --dense-steps"),
    ("no rank", {}, "is dense; say with --rank what to factorise it to"),
    ("too long", {"rank": ["0.5"], "blend": 9}, "blend 9: must be below the 9 steps"),
    ("embedding", {"model": "table", "against": "gpt2"}, "is of a kind without self-guided training"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_cannot_be_blended(bench: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    settings = given(bench, model="gpt2", steps=9, blend=2) | change
    for key in ("model", "against"):
        if key in settings:
            settings[key] = str(bench / settings[key])
    with pytest.raises(SurgeryError) as e:
        finetune(settings, tmp_path / "out", listener=SILENT)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()
