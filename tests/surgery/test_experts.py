"""Fused experts: banks of factors in the place of parameters of three axes, for every family and implementation."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support import moe
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lrsurgery
from lrsurgery.errors import PlanError
from lrsurgery.linalg.svd import singular_values
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.surgery.experts.banks import FactorisedBank
from lrsurgery.surgery.experts.operand import Operand
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept, Replacement

EXPERTS = ["*.experts.*_proj"]


def run_as(model: Any, implementation: str) -> Tensor:
    model.config._experts_implementation = implementation
    return moe.logits(model)


def implementations(family: str) -> list[str]:
    return ["eager"] if family == "llama4" else ["eager", "grouped_mm", "batched_mm"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def factorised(model: nn.Module, rank: Any, **options: Any) -> nn.Module:
    new = copy.deepcopy(model)
    lrsurgery.factorise_(new, rank=rank, include=EXPERTS, allow_larger=True, **options)
    return new


def multiplied_out_(dense: nn.Module, layers: dict[str, Any]) -> None:
    """Gives the dense model's parameters the products, by einsum and the words of the format."""
    for name, layer in layers.items():
        holder, _, key = name.rpartition(".")
        product = torch.einsum("eor,eri->eoi", layer.u.weight, layer.v.weight)
        parameter = dense.get_submodule(holder)._parameters[key]
        assert parameter is not None
        parameter.data = (product if product.shape == parameter.shape else product.mT).detach().contiguous()


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_every_family_computes_what_its_products_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = moe.build(family)
    full, half = factorised(dense, 1.0), factorised(dense, 0.5)
    layers = factorised_layers(half)
    assert len(layers) == sum(".experts." in name and p.ndim == 3 for name, p in dense.named_parameters())
    assert all(isinstance(layer, FactorisedBank) for layer in layers.values())
    product = copy.deepcopy(dense)
    multiplied_out_(product, layers)
    monkeypatch.setattr(Operand, "tensor", lambda self: pytest.fail("a product was formed"))
    for implementation in implementations(family):
        wanted = run_as(dense, implementation)
        assert relative(run_as(full, implementation), wanted) < 1e-5, implementation
        found = run_as(half, implementation)
        assert relative(found, run_as(product, implementation)) < 1e-5, implementation
        assert relative(found, wanted) > 0.1, "half of the rank changes nothing, so the test would show nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"], ids=["plain", "transposed"])
def test_full_rank_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    dense = moe.build(family).to(dtype)
    for name, layer in factorised_layers(factorised(dense, 1.0)).items():
        weight = dense.get_parameter(name).detach()
        assert layer.u.weight.dtype == layer.v.weight.dtype == dtype
        assert layer.weight.shape == weight.shape
        lost = (layer.weight.detach().double() - weight.double()).norm()
        assert lost <= 10 * torch.finfo(dtype).eps * weight.double().norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"], ids=["plain", "transposed", "own forward"])
def test_gradients_are_those_of_the_products(family: str) -> None:
    model: Any = factorised(moe.build(family), 0.5)
    layers = factorised_layers(model)
    product: Any = moe.build(family)
    multiplied_out_(product, layers)
    for each in (model, product):
        each(input_ids=moe.IDS, use_cache=False).logits.square().sum().backward()
    for name, layer in layers.items():
        grad = product.get_parameter(name).grad
        grad = grad.mT if layer.layout.name == "experts-transposed" else grad
        u, v = layer.u.weight.detach(), layer.v.weight.detach()
        assert layer.u.weight.grad is not None
        assert layer.v.weight.grad is not None
        assert relative(layer.u.weight.grad, grad @ v.mT) < 1e-4, name
        assert relative(layer.v.weight.grad, u.mT @ grad) < 1e-4, name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_rank_that_grouped_kernels_refuse_is_computed_by_expert(implementation: str) -> None:
    dense: Any = moe.build("mixtral").to(torch.bfloat16)
    swap_(dense, {"model.layers.0.mlp.experts.down_proj": Spec("experts", 12)})
    bank = factorised_layers(dense)["model.layers.0.mlp.experts.down_proj"]
    for part in (bank.u, bank.v):
        part.weight = nn.Parameter(torch.randn(part.weight.shape).to(torch.bfloat16) * 0.2)
    product: Any = moe.build("mixtral").to(torch.bfloat16)
    multiplied_out_(product, {"model.layers.0.mlp.experts.down_proj": bank})
    found, wanted = run_as(dense, implementation).float(), run_as(product, implementation).float()
    assert relative(found, wanted) < 0.05


def test_kernels_that_read_dense_weights_give_way_to_grouped_products() -> None:
    model: Any = factorised(moe.build("qwen3_moe"), 0.5)
    wanted = run_as(model, "grouped_mm")
    for name in ("deepgemm", "sonicmoe"):
        assert torch.equal(run_as(model, name), wanted)
    called: list[str] = []
    former = ALL_EXPERTS_FUNCTIONS["deepgemm"]._former
    ALL_EXPERTS_FUNCTIONS["deepgemm"]._former = lambda experts, x, *_: (called.append("former"), x)[1]
    try:
        run_as(moe.build("qwen3_moe"), "deepgemm")
    finally:
        ALL_EXPERTS_FUNCTIONS["deepgemm"]._former = former
    assert called == ["former"] * 2, "dense experts are left to transformers' own function"


def test_ranks_and_costs_of_a_plan() -> None:
    model = moe.build("qwen3_moe")
    spec = parse_rank(["params:0.6", "*.0.mlp.experts.down_proj=13"])
    rows = {row.name: row for row in make_plan(model, SurgeryOptions(target=spec, include=EXPERTS)).rows}
    first = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(first, Replacement)
    # 4 experts of (64, 48): 16 is the largest multiple of 8 with 4 * 16 * (64 + 48) <= 0.6 * 4 * 64 * 48
    assert (first.kind, first.rank, first.parameters, first.factorised_parameters) == ("experts", 16, 12288, 7168)
    assert (first.flops, first.factorised_flops) == (2 * 2 * 64 * 48, 2 * 2 * 16 * (64 + 48))
    assert rows["model.layers.0.mlp.experts.down_proj"].rank == 16  # type: ignore[union-attr]
    thirds = make_plan(model, SurgeryOptions(target=parse_rank(0.4, 3), include=EXPERTS, allow_larger=True))
    assert {row.rank for row in thirds.replacements} == {24}, "of 8 and 3"


def test_the_reason_of_experts_that_stay_dense() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))

    model = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(32, 32)})
    rows = make_plan(model, SurgeryOptions(target=parse_rank(0.25))).rows
    (reason,) = (row.reason for row in rows if isinstance(row, Kept) and "gate_up" in row.name)
    assert reason == "fused experts of an unknown class"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("rank", [0.5, "energy:0.6"])
def test_the_report_tells_the_errors_of_all_experts_together(family: str, rank: Any) -> None:
    dense = moe.build(family)
    model = factorised(dense, rank)
    rows = {row.name: row for row in lrsurgery.rank_report(model, against=dense).rows}
    for name, layer in factorised_layers(model).items():
        values = torch.linalg.svdvals(dense.get_parameter(name).detach().double())
        whole, lost = float(values.square().sum()), float(values[:, layer.rank :].square().sum())
        row = rows[name]
        assert row.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
        assert row.energy_kept == pytest.approx(1 - lost / whole, rel=1e-4)
        if rank != 0.5:
            kept = values.square().sum(0).cumsum(0) / whole
            needed = int((kept < 0.6).sum()) + 1
            assert layer.rank == min(math.ceil(needed / 8) * 8, *layer.matrix_shape)


def test_values_of_a_bank_are_sums_of_squares_over_its_experts() -> None:
    weight = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(weight.double()).square().sum(0).sqrt()
    torch.testing.assert_close(singular_values(weight), wanted, rtol=1e-5, atol=0)


def test_dense_again_and_in_copies() -> None:
    dense = moe.build("gpt_oss")
    model = factorised(dense, 0.5)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(moe.logits(again), moe.logits(model))
    lrsurgery.densify_(again)
    assert not factorised_layers(again)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert relative(moe.logits(again), moe.logits(model)) < 1e-5


def test_a_bank_of_another_kind_is_refused() -> None:
    model = moe.build("gpt_oss")
    for kind in ("experts", "linear"):
        with pytest.raises(PlanError, match="cannot become"):
            swap_(model, {"model.layers.0.mlp.experts.down_proj": Spec(kind, 8)})
    with pytest.raises(PlanError, match="cannot become"):
        swap_(model, {"model.layers.0.self_attn.q_proj": Spec("experts", 8)})
    assert not specs_of(model)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_compiled_model_is_one_graph(implementation: str) -> None:
    model: Any = factorised(moe.build("qwen3_moe"), 0.5)
    wanted = run_as(model, implementation)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(moe.logits(compiled), wanted) < 1e-6


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_decay_is_that_of_each_expert(decoupled: bool) -> None:
    model: Any = factorised(moe.build("gpt_oss"), 0.5)
    lr, strength = 0.1, 0.3
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    FrobeniusDecay(model, strength, decoupled=decoupled).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wanted = {}
    for name, layer in factorised_layers(model).items():
        u, v = (part.weight.detach().clone().requires_grad_() for part in (layer.u, layer.v))
        total = sum(0.5 * (a @ b).square().sum() for a, b in zip(u, v, strict=True))
        of_u, of_v = torch.autograd.grad(total, (u, v))  # type: ignore[arg-type]
        wanted[name] = u.detach() - lr * strength * of_u, v.detach() - lr * strength * of_v
    optimizer.step()
    for name, layer in factorised_layers(model).items():
        assert relative(layer.u.weight, wanted[name][0]) < 1e-6
        assert relative(layer.v.weight, wanted[name][1]) < 1e-6
