"""Moments of fused experts against those of each expert's own tokens, gathered by hand and by autograd."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe
from support.zoo import IDS
from torch import Tensor, nn
from torch.nn import functional as F

import lrsurgery
from lrsurgery.calibration.collect import collect, moment_bytes, split
from lrsurgery.calibration.statistics import LayerUse, Moments, Statistics, StatisticsWriter, merge
from lrsurgery.linalg.weighted import StackedMetric
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import SurgeryOptions, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec
from lrsurgery.surgery.rows import Replacement

EXPERTS = ["*.experts.*_proj"]
UP, DOWN = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


def squares(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    """A loss whose gradients are the logits themselves, on the tokens that the mask lets count."""
    mask = batch.get("attention_mask", torch.ones(batch["input_ids"].shape))
    return (outputs.logits.square() * mask[..., None]).sum() / 2, int(mask.sum())


def statistics_of(model: nn.Module, batches: list[dict[str, Tensor]], importance: str = "fisher") -> Statistics:
    return lrsurgery.collect_statistics(model, batches, importance=importance, include=EXPERTS, loss=squares)


class ByHand(nn.Module):
    """The experts of Qwen3-MoE written out, with an output of every expert for every token that autograd can ask."""

    def __init__(self, experts: Any, mask: Tensor | None) -> None:
        super().__init__()
        self.experts, self.mask = experts, mask
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"gate_up_proj": [], "down_proj": []}

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        counts = torch.ones(len(x), dtype=torch.bool) if self.mask is None else self.mask.flatten().bool()
        for expert in range(len(self.experts.gate_up_proj)):
            share = (weights * (index == expert)).sum(-1)
            chosen = (index == expert).any(-1) & counts
            gate_up = x[chosen] @ self.experts.gate_up_proj[expert].T
            gate_up.retain_grad()
            gate, up = gate_up.chunk(2, -1)
            inner = F.silu(gate) * up
            outer = inner @ self.experts.down_proj[expert].T
            outer.retain_grad()
            total = total.index_add(0, chosen.nonzero()[:, 0], outer * share[chosen, None])
            self.seen["gate_up_proj"].append((x[chosen], gate_up))
            self.seen["down_proj"].append((inner, outer))
        return total


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_moments_are_those_of_the_tokens_of_each_expert(masked: bool) -> None:
    model: Any = moe.build("qwen3_moe")
    batch = {"input_ids": IDS, **({"attention_mask": MASK} if masked else {})}
    found = statistics_of(copy.deepcopy(model), [batch])
    by_hand = ByHand(model.model.layers[0].mlp.experts, MASK if masked else None)
    model.model.layers[0].mlp.experts = by_hand
    loss, scored = squares(model(**batch, use_cache=False), batch)
    loss.backward()
    for name in (UP, DOWN):
        seen = by_hand.seen[name.rpartition(".")[2]]
        moments, use = found.moments(name), found.uses[name]
        assert moments.gradients is not None
        assert moments.counts is not None
        assert use.positions == 2 * scored
        assert use.unseen == sum(not len(x) for x, _ in seen)
        for expert, (x, y) in enumerate(seen):
            assert moments.counts[expert] == len(x)
            torch.testing.assert_close(moments.inputs[expert], x.T @ x / max(1, len(x)), rtol=1e-4, atol=1e-5)
            assert y.grad is not None
            torch.testing.assert_close(moments.gradients[expert], y.grad.T @ y.grad / scored, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_every_family_is_seen_and_computes_the_same_meanwhile(family: str) -> None:
    model: Any = moe.build(family)
    before, wanted = model.config._experts_implementation, moe.logits(model)
    kept = dict(model.named_parameters())
    logits: list[Tensor] = []

    def loss(outputs: Any, batch: Any) -> tuple[Tensor, int]:
        logits.append(outputs.logits.detach())
        return squares(outputs, batch)

    found = lrsurgery.collect_statistics(model, [{"input_ids": IDS}], include=EXPERTS, loss=loss)
    torch.testing.assert_close(logits[0], wanted, rtol=1e-4, atol=1e-4)
    assert found.uses
    active = getattr(model.config, "num_experts_per_tok", None) or model.config.moe_k
    for name, use in found.uses.items():
        assert use.positions == active * IDS.numel(), name
        moments = found.moments(name)
        assert moments.gradients is not None
        assert bool((moments.gradients.flatten(1).any(1) == (moments.counts != 0)).all())  # type: ignore[union-attr]
    assert model.config._experts_implementation == before
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in kept.items()}
    assert torch.equal(moe.logits(model), wanted)


def test_activations_block_by_block_are_those_of_the_whole_pass() -> None:
    model = moe.build("gpt_oss")
    batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)[:, :5]}]
    alone = statistics_of(model, batches, "activations")
    whole = statistics_of(model, batches)
    assert alone.uses == whole.uses
    for name in whole.uses:
        assert alone.moments(name).gradients is None
        torch.testing.assert_close(alone.moments(name).inputs, whole.moments(name).inputs, rtol=1e-4, atol=1e-5)


def metric_of(moments: Moments, positions: int) -> StackedMetric:
    metric = moments.metric(LayerUse("experts", 3, 4, positions, positions))
    assert isinstance(metric, StackedMetric)
    return metric


def test_few_tokens_damp_more_and_none_takes_the_mean() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 500, 4), torch.randn(2, 500, 3)
    inputs = torch.stack([x[0].T @ x[0] / 500, x[1, :2].T @ x[1, :2] / 2, torch.zeros(4, 4)])
    gradients = torch.stack([g[0].T @ g[0], g[1, :2].T @ g[1, :2], torch.zeros(3, 3)])
    moments = Moments(inputs, gradients, torch.tensor([500.0, 2.0, 0.0]))
    metric = metric_of(moments, 502)
    for expert, share in ((0, 1e-3), (1, 1.0)):  # (0.5 * 4 / 2)^2 = 1
        wanted = inputs[expert].double() + share * inputs[expert].diagonal().mean().double() * torch.eye(4)
        torch.testing.assert_close(metric.of(expert).inputs, wanted, rtol=1e-6, atol=1e-9)
    mean = (inputs[0] * 500 + inputs[1] * 2) / 502
    found = metric.of(2)
    assert found.inputs is not None
    assert found.gradients is not None
    torch.testing.assert_close(found.inputs, mean.double() + 1e-3 * mean.diagonal().mean() * torch.eye(4))
    of_gradients = gradients.mean(0).double()
    torch.testing.assert_close(found.gradients, of_gradients + 1e-2 * of_gradients.diagonal().mean() * torch.eye(3))
    alone = metric_of(Moments(inputs, None, moments.counts), 502)
    assert alone.of(1).gradients is None
    torch.testing.assert_close(alone.of(1).inputs, metric.of(1).inputs * (2 * 3 / 502))  # type: ignore[operator]


def test_statistics_of_experts_are_stored_and_merged(tmp_path: Path) -> None:
    model = moe.build("qwen3_moe")
    rows = [
        row
        for row in plan_rows(model, SurgeryOptions(target=RankSpec(FractionRank(1.0)), allow_larger=True))
        if isinstance(row, Replacement) and row.name in (UP, DOWN)
    ]
    assert moment_bytes(rows[0], gradients=True) == 4 * 4 * (64**2 + 48**2)
    assert len(split(rows, 4 * 4 * (64**2 + 48**2))) == 2
    one, other = {"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}

    def run(batches: list[dict[str, Tensor]], folder: str, limit: int | None = None) -> Statistics:
        store = StatisticsWriter(tmp_path / folder)
        return collect(model, batches, rows, importance="fisher", loss=squares, store=store, limit=limit)

    both = run([one, other], "both", limit=1)
    merged = merge(*((found.uses[UP], found.moments(UP)) for found in (run([one], "one"), run([other], "other"))))
    use, moments = merged
    read = Statistics.read(tmp_path / "both")
    assert use == read.uses[UP] == both.uses[UP]
    torch.testing.assert_close(moments.inputs, read.moments(UP).inputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(moments.counts, read.moments(UP).counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["fisher", "activations"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_ranks_and_factors_are_the_best_in_the_metric(family: str, importance: str) -> None:
    dense: Any = moe.build(family)
    batches = [{"input_ids": IDS}]
    statistics = statistics_of(dense, batches, importance)
    model = copy.deepcopy(dense)
    lrsurgery.factorise_(model, rank=0.5, allow_larger=True, include=EXPERTS, statistics=statistics)
    for name, layer in factorised_layers(model).items():
        metric = statistics.metric(name, layer.kind)
        assert isinstance(metric, StackedMetric)
        weight = layer.layout.to_matrix(dense.get_parameter(name).detach()).double()
        u, v = (factor.detach() for factor in layer.factors)
        for expert in range(len(weight)):
            c, g = metric.of(expert)
            assert c is not None
            root = torch.linalg.cholesky(c)
            left = torch.eye(len(weight[expert]), dtype=torch.float64) if g is None else torch.linalg.cholesky(g).mT
            lost = left @ (weight[expert] - (u[expert] @ v[expert]).double()) @ root
            values = torch.linalg.svdvals(left @ weight[expert] @ root)
            assert float(lost.norm()) == pytest.approx(float(values[layer.rank :].norm()), rel=1e-3)


def test_a_budget_weighs_all_experts_of_a_bank_together() -> None:
    """Of two banks of equal shape the one that the loss depends on keeps the higher rank, at the cost of a budget."""
    dense: Any = moe.build("qwen3_moe")
    with torch.no_grad():
        dense.model.layers[1].mlp.experts.down_proj.mul_(0.01)
    statistics = statistics_of(dense, [{"input_ids": IDS}])
    model = copy.deepcopy(dense)
    lrsurgery.factorise_(model, budget=0.5, include=EXPERTS, statistics=statistics)
    layers = factorised_layers(model)
    kept = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    whole = sum(p.numel() for name, p in dense.named_parameters() if ".experts." in name)
    assert kept <= 0.5 * whole
    assert all(layer.rank % 8 == 0 for layer in layers.values())
    ranks = [layers[name].rank if name in layers else 99 for name in (UP, UP.replace("layers.0", "layers.1"))]
    assert ranks[0] > ranks[1]
