"""Layers that share one v: the outputs and gradients of their products, one pass of v, and what other tools do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lrsurgery
from lrsurgery.errors import PlanError, SurgeryError
from lrsurgery.linalg.weighted import Metric, joint_factors, joint_values, weighted_norm, weighted_values
from lrsurgery.surgery.apply import apply_plan_, factorised_layers, specs_of, swap_
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.surgery.forms.change import balance_layers_, in_form, pivot_layers_
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import AbsoluteRank, RankSpec
from lrsurgery.surgery.rows import join_rows
from lrsurgery.surgery.shared.modules import SharedLinear

NAMES = ("q", "k", "v")
INPUTS, OUTPUTS = 16, {"q": 12, "k": 5, "v": 20}


class Attention(nn.Module):
    """Three layers that are called with one tensor."""

    q: Any
    k: Any
    v: Any

    def __init__(self, bias: bool = True, conv1d: bool = False) -> None:
        super().__init__()
        for name, size in OUTPUTS.items():
            setattr(self, name, Conv1D(size, INPUTS) if conv1d else nn.Linear(INPUTS, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def metrics_of(dtype: torch.dtype = torch.float64) -> dict[str, Metric]:
    torch.manual_seed(1)
    c = torch.randn(40, INPUTS, dtype=dtype)
    found = {}
    for name, size in OUTPUTS.items():
        g = torch.randn(50, size, dtype=dtype)
        found[name] = Metric(c.T @ c / 40, g.T @ g / 50)
    return found


def share_(model: nn.Module, rank: int, form: str, names: tuple[str, ...] = NAMES) -> None:
    plan = make_plan(
        model, SurgeryOptions(target=RankSpec(AbsoluteRank(3)), form=form, include=names, allow_larger=True)
    )
    rows = [row for row in plan.replacements if row.name in names]
    plan = replace(plan, rows=tuple(join_rows(rows, rank)))
    apply_plan_(model, plan, init="spectral", seed=0, metric_of=metrics_of().get)


def pair(form: str, rank: int = 7, **how: Any) -> tuple[Attention, Attention, Tensor]:
    """The model with shared layers, one with dense layers of the same products, an input."""
    torch.manual_seed(0)
    model = Attention(**how).double()
    for p in model.parameters():
        nn.init.normal_(p)
    share_(model, rank, form)
    dense = copy.deepcopy(model)
    lrsurgery.densify_(dense)
    assert not factorised_layers(dense)
    return model, dense, torch.randn(2, 3, INPUTS, dtype=torch.float64)


FORMS = ["balanced", "pivoted"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 7, 15])
def test_the_products_are_the_best_of_this_rank_together(form: str, rank: int) -> None:
    """Against numpy's SVD of the whole stacked weight in its block-diagonal metric."""
    torch.manual_seed(0)
    model = Attention().double()
    weights, metrics = [getattr(model, name).weight.detach().clone() for name in NAMES], metrics_of()
    share_(model, rank, form)
    left = torch.block_diag(*[torch.linalg.cholesky(metrics[name].gradients).T for name in NAMES])
    inputs = metrics["q"].inputs
    assert inputs is not None
    values = torch.linalg.svdvals(left @ torch.cat(weights) @ torch.linalg.cholesky(inputs))
    torch.testing.assert_close(joint_values(weights, [metrics[n] for n in NAMES]), values, rtol=1e-9, atol=1e-9)
    lost = sum(
        weighted_norm(w - getattr(model, name).weight, metrics[name]) ** 2
        for name, w in zip(NAMES, weights, strict=True)
    )
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    rows = sum(OUTPUTS.values())
    assert numbers == rank * (INPUTS + rows - (rank if form == "pivoted" else 0))


def test_one_weight_alone_has_the_values_of_a_separate_layer() -> None:
    weight, metric = torch.randn(9, INPUTS, dtype=torch.float64), metrics_of()["q"]
    metric = Metric(metric.inputs, torch.eye(9, dtype=torch.float64) * 2)
    torch.testing.assert_close(joint_values([weight], [metric]), weighted_values(weight, metric))
    u, v = joint_factors([weight], 9, [metric]).factors
    torch.testing.assert_close(u @ v, weight)
    torch.testing.assert_close(u.T @ u, v @ v.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", [{}, {"bias": False}, {"conv1d": True}], ids=["biases", "no biases", "conv1d"])
def test_outputs_and_gradients_are_those_of_the_products(form: str, how: dict[str, Any]) -> None:
    model, dense, x = pair(form, **how)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    for name, layer in factorised_layers(model).items():
        assert (layer.form, layer.matrix_shape) == (form, (OUTPUTS[name], INPUTS))
        torch.testing.assert_close(layer.weight + 0, dense.get_submodule(name).weight, rtol=1e-9, atol=1e-9)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias, dense.get_submodule(name).bias, rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    upstream, parts = torch.randn_like(model(x)), list(model.parameters())
    ours = torch.autograd.grad(model(x), [x, *parts], upstream)
    ys = []
    for layer in factorised_layers(model).values():
        weight = layer.weight + 0
        ys.append(F.linear(x, weight.T if layer.kind == "conv1d" else weight, layer.bias))
    theirs = torch.autograd.grad(torch.cat(ys, -1), [x, *parts], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_forms_change_into_each_other_and_back(form: str) -> None:
    model, dense, x = pair(form)
    keys = set(model.state_dict())
    change, back = (pivot_layers_, balance_layers_)[:: 1 if form == "balanced" else -1]
    change(model)
    assert {layer.form for layer in factorised_layers(model).values()} == {*FORMS} - {form}
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    back(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    with in_form(model, *({*FORMS} - {form})):
        assert set(model.state_dict()) != keys
        torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)


def test_more_rank_than_a_small_layer_has_outputs() -> None:
    """A layer all of whose outputs are pivots has nothing left to make."""
    model, dense, x = pair("pivoted", rank=15)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    small = Attention().double()
    with torch.no_grad():
        small.k.weight.mul_(1e3)  # so its outputs come first among the pivots
        for name in ("q", "v"):
            small.get_submodule(name).weight[:, :3] *= 1e-3
    share_(small, 12, "pivoted")
    dense = copy.deepcopy(small)
    lrsurgery.densify_(dense)
    x.requires_grad_()
    torch.testing.assert_close(small(x), dense(x), rtol=1e-9, atol=1e-9)
    small(x).sum().backward()
    balance_layers_(small)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.fixture(params=FORMS)
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Attention, Attention, Tensor, list[int]]]:
    """A model with shared layers, the dense one, an input, and a list that grows by a call of v."""
    model, dense, x = pair(request.param)
    calls: list[int] = []
    handle = model.q.v.register_forward_hook(lambda *_: calls.append(1))
    yield model, dense, x, calls
    handle.remove()


Shared = tuple[Attention, Attention, Tensor, list[int]]


def test_v_runs_once_for_an_input(shared: Shared) -> None:
    model, _, x, calls = shared
    model(x)
    assert len(calls) == 1
    model(x)
    assert len(calls) == 2
    with torch.no_grad():
        model(x)
    assert len(calls) == 3
    assert model.q._last is None  # nothing is kept once all have used it
    assert "k.v.weight" not in model.state_dict()
    assert {name for name, _ in model.named_modules()} >= {"q.v", "q.u", "k.u"}


def test_another_input_or_mode_gets_an_output_of_its_own(shared: Shared) -> None:
    model, dense, x, calls = shared
    other = torch.randn_like(x)
    model.q(x)
    torch.testing.assert_close(model.k(other), dense.k(other), rtol=1e-9, atol=1e-9)
    x = x.clone()  # nothing is known of a new tensor
    with torch.no_grad():
        model.q(x)
    assert model.k(x).requires_grad  # not the one without a graph
    x = x.clone()
    model.q(x)
    x.mul_(2)  # in place
    torch.testing.assert_close(model.k(x), dense.k(x), rtol=1e-9, atol=1e-9)
    x = x.clone()
    before = len(calls)
    for layer in (model.q, model.q, model.k):
        layer(x)
    assert len(calls) == before + 2  # a layer that comes twice computes its own


def test_other_parameters_give_another_output(shared: Shared) -> None:
    model, dense, x, _ = shared
    model.q(x)
    with torch.no_grad():
        model.q.v.weight.mul_(3)
    found = model.k(x)
    lrsurgery.densify_(model)
    torch.testing.assert_close(found, model.k(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, dense.k(x))


def test_another_weight_of_v_gives_another_output(shared: Shared) -> None:
    model, _, x, _ = shared
    v = model.q.v
    other = nn.Parameter(v.weight.detach() * 2)
    with torch.no_grad():
        while other._version < v.weight._version:  # so that the number of changes does not tell them apart
            other.mul_(1)
    model.q(x)
    v.weight = other
    found = model.k(x)
    torch.testing.assert_close(found, model.k(x.clone()), rtol=1e-9, atol=1e-9)


def test_a_replaced_v_is_that_of_all(shared: Shared) -> None:
    """As adapters replace it."""
    model, _, x, _ = shared
    model.q(x)
    model.q.v = nn.Sequential(model.q.v, nn.Identity())
    assert model.k.v is model.q.v
    model.k(x).sum().backward()
    assert model.q.v[0].weight.grad is not None


def test_a_hook_may_change_what_an_output_was_made_of(shared: Shared) -> None:
    model, dense, x, _ = shared
    handle = model.q.u.register_forward_pre_hook(lambda _, args: args[0].mul_(0))
    with torch.no_grad():
        model.q(x)
        torch.testing.assert_close(model.k(x), dense.k(x), rtol=1e-9, atol=1e-9)
    handle.remove()


def test_inference_autocast_and_mixed_modes(shared: Shared) -> None:
    model, dense, x, _ = shared
    with torch.inference_mode():
        y = x * 1
        model.q(y)
        y.mul_(2)  # which no version tells of
        torch.testing.assert_close(model.k(y), dense.k(y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    model, x = model.float(), x.float()
    model.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.k(x)
        assert low.dtype == torch.bfloat16
        precise = model.q.v(x)
        assert precise.dtype == torch.bfloat16
    y = x.clone()
    with torch.autocast("cpu", torch.bfloat16):
        model.q(y)
    exact = model.k(y)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), dense.k(x.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.double(), dense.k(x.double()), rtol=0.05, atol=0.6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(shared: Shared, reentrant: bool) -> None:
    model, _, x, _ = shared
    x.requires_grad_()
    model(x).square().sum().backward()
    wanted = [p.grad for p in (x, *model.parameters())]
    for p in (x, *model.parameters()):
        p.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for p, gradient in zip((x, *model.parameters()), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    # one layer inside, the others outside
    for p in (x, *model.parameters()):
        p.grad = None
    parts = [checkpoint(model.q, x, use_reentrant=reentrant), model.k(x), model.v(x)]
    torch.cat(parts, -1).square().sum().backward()
    for p, gradient in zip((x, *model.parameters()), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_no_graph_outlives_its_backward(shared: Shared) -> None:
    model, _, x, _ = shared
    base = x.requires_grad_()
    y = base * 2
    alive = weakref.ref(y)
    model.q(y).sum().backward()  # the others are never called with it
    del y
    gc.collect()
    assert alive() is None
    assert model.q._last is None


def test_copies_and_pickles_are_groups_of_their_own(shared: Shared) -> None:
    model, dense, x, _ = shared
    calls_of = model.q.v._forward_hooks.copy()
    model.q.v._forward_hooks.clear()
    model.q(x)  # a call that is waiting belongs to no copy
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q._last is None
        assert other.k.leader is other.q
        assert other.k.v is other.q.v is not model.q.v
        for one, two in zip(other.k.group, other.q.group, strict=True):
            assert one is two
        torch.testing.assert_close(other(x), dense(x), rtol=1e-9, atol=1e-9)
    alone = copy.deepcopy(model.k)
    torch.testing.assert_close(alone(x), dense.k(x), rtol=1e-9, atol=1e-9)
    model.q.v._forward_hooks.update(calls_of)


def test_state_dicts_dtypes_and_meta(shared: Shared) -> None:
    model, dense, x, _ = shared
    specs = specs_of(model)
    assert specs["k"].v_of == "q"
    assert specs["q"].v_of is None
    other = Attention()
    with torch.device("meta"):
        other = Attention().double()
    swap_(other, specs)
    other.load_state_dict(model.state_dict(), assign=True)
    assert specs_of(other) == specs
    torch.testing.assert_close(other(x), dense(x), rtol=1e-9, atol=1e-9)
    other.half().double()
    torch.testing.assert_close(other(x), dense(x), rtol=1e-2, atol=0.2)
    other.to("meta")
    assert other.k.v.weight.is_meta
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), dense(x), rtol=1e-9, atol=1e-9)


def test_compilers_and_functorch(shared: Shared) -> None:
    model, dense, x, _ = shared
    model.q.v._forward_hooks.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-9, atol=1e-9)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), dense(x), rtol=1e-9, atol=1e-9)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x * 2), dense(x * 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.vmap(model)(x), dense(x), rtol=1e-9, atol=1e-9)
    scaled = {name: p * 2 for name, p in model.named_parameters()}
    model.q(x)
    twice = torch.func.functional_call(model.k, {"u.weight": model.k.u.weight * 2}, (x,))
    assert twice.shape == model.k(x).shape
    found = torch.func.functional_call(model, scaled, (x,))
    assert not torch.allclose(found, dense(x))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)


def test_data_parallel_is_refused(shared: Shared) -> None:
    with pytest.raises(SurgeryError, match="DistributedDataParallel"):
        shared[0].k._replicate_for_data_parallel()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_decay_is_of_every_product(form: str, decoupled: bool) -> None:
    model, _, _ = pair(form)
    layers = factorised_layers(model)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    total = torch.stack([(layer.weight + 0).square().sum() / 2 for layer in layers.values()]).sum()
    wanted = torch.autograd.grad(total, weights)
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    FrobeniusDecay(model, 0.1, decoupled=decoupled).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for part, was, gradient in zip(weights, before, wanted, strict=True):
        torch.testing.assert_close(part, was - 0.5 * 0.1 * gradient, rtol=1e-9, atol=1e-9)


def test_groups_that_cannot_be_are_refused() -> None:
    model, _, _ = pair("pivoted")
    specs = specs_of(model)

    def refuses(match: str, *, drop: str = "", dense: nn.Module | None = None, **changed: Any) -> None:
        with pytest.raises(PlanError, match=match):
            swap_(dense or Attention(), {name: s for name, s in {**specs, **changed}.items() if name != drop})

    refuses("no layer that stores one", k=specs["k"]._replace(v_of="nowhere"))
    refuses("no layer that stores one", drop="q")
    refuses("no layer that stores one", q=specs["q"]._replace(v_of="k"))
    refuses("kind, rank or form", k=specs["k"]._replace(rank=6))
    refuses("do not fill", k=specs["k"]._replace(pivots=(0, 7)))
    refuses("do not fill", k=specs["k"]._replace(pivots=None))
    refuses("and no layer has its v", drop="k", v=specs["v"]._replace(v_of=None))
    odd = Attention()
    odd.k = nn.Linear(INPUTS + 1, OUTPUTS["k"])
    refuses("inputs or its bias", dense=odd)
    odd.k = nn.Linear(INPUTS, OUTPUTS["k"], bias=False)
    refuses("inputs or its bias", dense=odd)
    flat = {name: spec._replace(side=None, pivots=None, rank=17) for name, spec in specs.items()}
    refuses("too large", **flat)
    assert all(isinstance(layer, SharedLinear) for layer in factorised_layers(model).values())
