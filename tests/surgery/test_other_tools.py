"""Torch's own tools on both forms: compilers, exporters, transforms, copies, wrapped parts, several processes.

The truth is the dense layer of the same weight, which has neither parts nor an order.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from support import tiny
from support.warm import program
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedLayer

# name -> (dense layer, form, shape of an input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "balanced": (lambda: nn.Linear(20, 12), "balanced", (4, 3, 20)),
    "rows": (lambda: nn.Linear(20, 12), "pivoted", (4, 3, 20)),
    "columns": (lambda: nn.Linear(12, 20), "pivoted", (4, 3, 12)),
    "rows of a convolution": (lambda: nn.Conv2d(4, 20, 3, padding=1), "pivoted", (4, 4, 6, 5)),
    "columns of a convolution": (lambda: nn.Conv2d(12, 20, 1), "pivoted", (4, 12, 6, 5)),
}
LINEAR = ["balanced", "rows", "columns"]


def build(name: str) -> tuple[FactorisedLayer, nn.Module, Tensor]:
    """A factorised layer, a dense one of the same weight and bias, an input."""
    torch.manual_seed(0)
    make, form, shape = LAYERS[name]
    model = nn.Sequential(make()).double()
    lrsurgery.factorise_(model, rank=7, form=form, conv="channel", allow_larger=True)
    dense = copy.deepcopy(model)
    lrsurgery.densify_(dense)
    (layer,) = factorised_layers(model).values()
    assert layer.side == (None if form == "balanced" else name.split(maxsplit=1)[0])
    return layer, dense[0], torch.randn(*shape, dtype=torch.float64)


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(run(x).square().sum(), [x, *parts])


def same(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_without_breaks(name: str) -> None:
    layer, dense, x = build(name)
    torch.compiler.reset()  # the limit of recompilations is one for all layers of a class
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for part in (x, x[:3]):
        same(compiled(part), dense(part))
        parts = list(layer.parameters())
        same(gradients(compiled, part, *parts)[1:], gradients(layer, part, *parts)[1:])
        same(gradients(compiled, part)[0], gradients(dense, part)[0])


@pytest.mark.process
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """All forms in one model, so that it compiles once."""
    pairs = [build(name) for name in (*LINEAR, "rows of a convolution")]
    layers = nn.ModuleList([layer for layer, _, _ in pairs])

    def run(*xs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]

    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(run, fullgraph=True)(*(x for _, _, x in pairs))
        same(found, [dense(x) for _, dense, x in pairs])


@pytest.mark.parametrize("name", LAYERS)
def test_exported_with_a_free_batch_size(name: str) -> None:
    layer, dense, x = build(name)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    same(program.module()(x[:3]), dense(x[:3]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_traced(name: str) -> None:
    layer, dense, x = build(name)
    same(torch.jit.trace(layer, (x,))(x[:3]), dense(x[:3]))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_scripted(name: str) -> None:
    layer, dense, x = build(name)
    scripted = torch.jit.script(layer)  # type: ignore[no-untyped-call]
    same(scripted(x), dense(x))
    same(gradients(scripted, x)[0], gradients(dense, x)[0])
    if x.ndim == 4:
        same(scripted(x.to(memory_format=torch.channels_last)), dense(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_a_scripted_table(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 12))
    lrsurgery.factorise_(model, rank=5, embeddings=True, form=form)
    dense = copy.deepcopy(model)
    lrsurgery.densify_(dense)
    tokens = torch.arange(30)
    torch.testing.assert_close(torch.jit.script(model)(tokens), dense(tokens))  # type: ignore[no-untyped-call]


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "to(dtype)": lambda module: module.to(torch.float32),
    "type(dtype)": lambda module: module.type(torch.float32),
}


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "balanced"])
def test_casts_leave_the_order_alone(name: str, how: str) -> None:
    layer, dense, x = build(name)
    assert layer.order is not None
    before = layer.order.clone()
    CASTS[how](layer)
    assert layer.order.dtype == torch.int32
    assert torch.equal(layer.order, before)
    dtype = layer.u.weight.dtype
    assert dtype != torch.float64
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x.to(dtype)).double(), dense(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_function_transforms(name: str) -> None:
    """vmap, and gradients of each example."""
    layer, dense, x = build(name)
    same(vmap(layer)(x), dense(x))
    parameters = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(layer, parameters, (one,)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for at in range(len(x)):
        alone = gradients(layer, x[at], *layer.parameters())[1:]
        same(tuple(each[key][at] for key in parameters), alone)


@pytest.mark.parametrize("name", [name for name in LAYERS if "convolution" in name])
def test_channels_last_stays_so(name: str) -> None:
    layer, dense, x = build(name)
    x = x.to(memory_format=torch.channels_last)
    y = layer.to(memory_format=torch.channels_last)(x)  # type: ignore[call-overload]
    assert y.is_contiguous(memory_format=torch.channels_last)
    same(y, dense(x))
    same(gradients(layer, x)[0], gradients(dense, x)[0])


def _assigned(layer: FactorisedLayer) -> FactorisedLayer:
    made = copy.deepcopy(layer).to("meta")
    made.load_state_dict(layer.state_dict(), assign=True)
    return made


def _filled(layer: FactorisedLayer) -> FactorisedLayer:
    made = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    made.load_state_dict(layer.state_dict())
    return made


def _offloaded(layer: FactorisedLayer) -> FactorisedLayer:
    made = copy.deepcopy(layer)
    accelerate.cpu_offload(made, torch.device("cpu"), offload_buffers=True)
    assert made.u.weight.is_meta
    return made


COPIES: dict[str, Callable[[FactorisedLayer], FactorisedLayer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "load_state_dict(assign=True) on the meta device": _assigned,
    "to_empty and load_state_dict": _filled,
    "accelerate's offloading": _offloaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_copies_compute_the_same(name: str, how: str) -> None:
    layer, dense, x = build(name)
    same(layer(x), dense(x))
    found = COPIES[how](layer)
    with torch.no_grad():
        same(found(x), dense(x))
    assert found.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "balanced"])
def test_the_order_is_read_anew(name: str) -> None:
    """Nothing made of it outlives a change, made in whatever way."""
    layer, _, x = build(name)
    other = build(name)[0]
    assert layer.order is not None
    assert other.order is not None
    other.order = other.order.flip(0)
    before, wanted = layer(x), other(x)
    assert not torch.allclose(before, wanted)
    layer.order.data.copy_(other.order)
    assert torch.equal(layer(x), wanted)


class Adapted(nn.Module):
    """A minimal LoRA: no attribute of the layer it wraps, and no type of it either."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features).to(base.weight))
        self.up = nn.Parameter(torch.randn(base.out_features, 2).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


@pytest.mark.parametrize("parts", ["u", "v", "uv"])
@pytest.mark.parametrize("name", LINEAR)
def test_wrapped_parts(name: str, parts: str) -> None:
    """Equal to the layer of which they were merged into the weights, in values and gradients."""
    layer, _, x = build(name)
    merged = copy.deepcopy(layer)
    for part in parts:
        wrapped = Adapted(getattr(layer, part))
        setattr(layer, part, wrapped)
        with torch.no_grad():
            getattr(merged, part).weight += wrapped.up @ wrapped.down
    same(layer(x), merged(x))
    same(gradients(layer, x)[0], gradients(merged, x)[0])
    assert all(p.grad_fn is None for p in layer.parameters())
    layer(x).sum().backward()
    assert all(bool(p.grad.any()) for key, p in layer.named_parameters() if "down" in key or "up" in key)


@pytest.mark.parametrize("part", ["u", "v"])
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_parts_are_called(name: str, part: str) -> None:
    layer, _, x = build(name)
    with torch.no_grad():
        getattr(layer, part).register_forward_hook(lambda module, given, output: output * 0)
        bare = copy.deepcopy(layer)
        getattr(bare, part)._forward_hooks.clear()
        for p in getattr(bare, part).parameters():
            p.zero_()
        same(layer(x), bare(x))


PARALLEL = """
import copy, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import lrsurgery

torch.manual_seed(0)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()
lrsurgery.factorise_(model, rank=5, form=sys.argv[1])
sides = [layer.side for layer in lrsurgery.factorised_layers(model).values()]
assert sides == (["columns", "rows"] if sys.argv[1] == "pivoted" else [None, None]), sides
x = torch.randn(8, 12, dtype=torch.float64)


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = model(x)
    y.square().mean().backward()
    optimizer.step()
    return y.detach()


alone, parallel, sharded = (copy.deepcopy(model) for _ in range(3))
whole = step(alone, x)
mine = x[4 * rank : 4 * rank + 4]
torch.testing.assert_close(step(DistributedDataParallel(parallel), mine), whole[4 * rank : 4 * rank + 4])
for (name, p), q in zip(parallel.named_parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, msg=name)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for layer in (sharded[0], sharded[2]):
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(type(p).__name__ == "DTensor" for p in sharded.parameters())
torch.testing.assert_close(step(sharded, mine), whole[4 * rank : 4 * rank + 4])
found = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    wanted = alone.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, msg=key)
    assert not torch.equal(wanted["0.u.weight"], model.state_dict()["0.u.weight"])
    print("the same")
dist.destroy_process_group()
"""


@pytest.mark.process
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_two_processes_are_one(tmp_path: Path, form: str) -> None:
    """DDP and FSDP2: outputs, gradients, a step and the gathered state are those of one process."""
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    done: Any = program(*tiny.TORCHRUN, script, form)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 1
