"""The optimizer's state across the dense-to-factorised switch, against what the factors' own gradients give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lrsurgery
from lrsurgery.training.switch import switch_optimizer, switch_schedule

SETTINGS: dict[str, float] = {"weight_decay": 0.0}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 9, (3, 2)), nn.Flatten(), nn.Linear(270, 15), nn.Linear(15, 40)).double()


def names_of(model: nn.Module) -> list[tuple[list[str], dict[str, float]]]:
    return [([name for name, _ in model.named_parameters()], SETTINGS)]


@pytest.mark.parametrize(("conv", "form"), [("channel", "balanced"), ("spatial", "balanced"), ("channel", "pivoted")])
def test_first_moments_are_those_of_the_factors_gradients(conv: str, form: str) -> None:
    """One step from rest: exp_avg is (1 - beta1) times the gradient, of the dense weight and of the factors."""
    x = torch.randn(5, 6, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = build()
    how: Any = {"rank": 1.0, "conv": conv, "allow_larger": True}
    if form == "pivoted":  # below full rank, of a model that has no higher rank
        how = {"rank": ["8", "2=14"], "form": form}
        lrsurgery.factorise_(model, **how)
        lrsurgery.densify_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(x).sin().sum().backward()
    optimizer.step()
    before = names_of(model)
    saved = optimizer.state_dict()
    lrsurgery.factorise_(model, **how)  # the same function, so the same gradients
    sides = {layer.side for layer in lrsurgery.factorised_layers(model).values()}
    assert sides == ({None} if form == "balanced" else {"rows", "columns"})
    after = names_of(model)
    switched, reset = switch_optimizer(saved, model, before, after, 0.5)
    assert reset == []
    model.zero_grad()
    model(x).sin().sum().backward()
    wanted = torch.optim.AdamW(model.parameters(), lr=0.0)
    wanted.step()
    truth = wanted.state_dict()["state"]
    for index, (name, _) in enumerate(model.named_parameters()):
        mine = switched["state"][index]
        assert float(mine["step"]) == 1
        scale = float(truth[index]["exp_avg"].abs().max())
        torch.testing.assert_close(mine["exp_avg"], truth[index]["exp_avg"], atol=1e-5 * scale, rtol=0, msg=name)
        assert bool((mine["exp_avg_sq"] >= 0).all())
        assert mine["exp_avg_sq"].shape == truth[index]["exp_avg_sq"].shape
    fresh = torch.optim.AdamW(model.parameters(), lr=0.1)
    fresh.load_state_dict(switched)  # and it is an optimizer's state dict
    assert fresh.param_groups[0]["lr"] == 0.0


def test_second_moments_are_right_where_entries_are_uncorrelated() -> None:
    """Over many random gradients with independent entries, the mean square of G V^T is that of G times V^2."""
    model: Any = nn.Sequential(nn.Linear(40, 30, bias=False))
    before = names_of(model)
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(20_000, 30, 40, generator=generator) * torch.rand(30, 40, generator=generator)
    state = {"state": {0: {"exp_avg_sq": gradients.square().mean(0)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    lrsurgery.factorise_(model, rank=4)
    switched, _ = switch_optimizer(state, model, before, names_of(model), 0.5)
    u, v = model[0].factors
    found = {name: switched["state"][i]["exp_avg_sq"] for i, (name, _) in enumerate(model.named_parameters())}
    torch.testing.assert_close(found["0.u.weight"], (gradients @ v.detach().T).square().mean(0), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(found["0.v.weight"], (u.detach().T @ gradients).square().mean(0), rtol=0.1, atol=1e-3)
    assert switched["param_groups"][0]["lr"] == 0.5


def test_untouched_parameters_keep_their_state_and_unknown_state_is_reset() -> None:
    model: Any = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))
    before = names_of(model)
    kept = torch.randn(30)
    state = {
        "state": {0: {"exp_avg": torch.ones(30, 40), "row_means": torch.ones(30)}, 2: {"exp_avg": kept}},
        "param_groups": [{"lr": 1.0, "params": [0, 1, 2, 3]}],
    }
    lrsurgery.factorise_(model, rank=4)
    after = names_of(model)
    switched, reset = switch_optimizer(state, model, before, after, 0.5)
    assert reset == ["0"]
    place = after[0][0].index("1.weight")
    assert switched["state"] == {place: {"exp_avg": kept}}


def test_a_schedule_goes_on_scaled_for_more_groups() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    groups = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    other = torch.optim.lr_scheduler.LambdaLR(groups, lambda step: 1 - step / 10)
    other.load_state_dict(switch_schedule(schedule.state_dict(), 2, 0.5))
    groups.step()
    other.step()
    assert [group["lr"] for group in groups.param_groups] == pytest.approx([0.1 * 0.5 * (1 - 5 / 10)] * 2)
