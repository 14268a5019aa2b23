"""The gradients of `SampledLoss`, against the Fisher information and a plain computation in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lrsurgery.calibration import loss as module
from lrsurgery.calibration.loss import SampledLoss

SURE = torch.tensor([[0.0, 40.0, 3.0, -5.0, 2.0], [0.0, 12.0, -30.0, 1.0, 1.0]])
ROWS = {
    "even": torch.zeros(1, 6),
    "two alike": torch.tensor([[5.0, 5.0, -40.0, -40.0]]),
    "sure": SURE,
    "excluded classes": torch.tensor([[0.3, -torch.inf, 1.0, -torch.inf]]),
    "several runs": 3 * torch.randn(2, 3 * module.RUN + 7, generator=torch.Generator().manual_seed(0)),
    "last run alone": torch.full((1, 2 * module.RUN + 3), -30.0).index_fill_(
        1, torch.tensor([2 * module.RUN + 1]), 1.0
    ),
    "narrow": torch.tensor([[0.5, 2.0, -1.0]]).bfloat16(),
}


def gradients(loss: SampledLoss, logits: Tensor, place: float, sign: float = 1.0) -> Tensor:
    column = torch.full((len(logits), 1), place, dtype=torch.float64)
    return loss._gradients(logits, (column, torch.full_like(column, sign)))


def plainly(logits: Tensor, place: float, temperature: float) -> Tensor:
    """The docstring's definition, class by class, in fp64."""
    found = []
    for row in logits.double() / temperature:
        p = row.softmax(-1)
        lengths = ((1 - p).square() + p.square().sum() - p.square()).sqrt()
        for c in (p > 0.25).nonzero().flatten().tolist():  # for these the line before loses digits
            lengths[c] = _length(p, c)
        shares = p * lengths
        q = shares / shares.sum()
        chosen = int((q.cumsum(0) <= place).sum())
        g = p.clone()
        g[chosen] = -_others(p, chosen)
        found.append(g * (p[chosen] / q[chosen]).sqrt())
    return torch.stack(found).float()


def _others(p: Tensor, c: int) -> float:
    return math.fsum(float(each) for i, each in enumerate(p) if i != c)


def _length(p: Tensor, c: int) -> float:
    return math.hypot(_others(p, c), *(float(each) for i, each in enumerate(p) if i != c))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_those_of_a_plain_computation(name: str, temperature: float) -> None:
    for place in (0.0031, 0.2311, 0.4513, 0.7727, 0.9997):
        found = gradients(SampledLoss(0, temperature), ROWS[name], place)
        torch.testing.assert_close(found, plainly(ROWS[name], place, temperature), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("name", ["even", "two alike", "sure", "excluded classes", "narrow"])
def test_the_mean_of_their_squares_is_the_fisher_information(name: str) -> None:
    """Over evenly spaced places, which stand for the random ones."""
    logits, count = ROWS[name][:1], 20_000
    rows = logits.expand(count, -1)
    places = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    g = SampledLoss(0)._gradients(rows, (places, torch.ones_like(places))).double()
    p = logits[0].double().softmax(-1)
    wanted = p.diag() - torch.outer(p, p)
    for c in range(len(p)):
        wanted[c, c] = p[c] * _others(p, c)
    torch.testing.assert_close(g.T @ g / count, wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


def test_parts_and_their_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, places = torch.randn(9, 700), torch.rand(9, 1, dtype=torch.float64)
    signs = torch.ones_like(places)
    whole = SampledLoss(0)._gradients(logits, (places, signs))
    monkeypatch.setattr(module, "CACHED", 1400)
    assert torch.equal(SampledLoss(0)._gradients(logits, (places, signs)), whole)


def test_a_model_without_doubt_has_no_gradient() -> None:
    logits = torch.tensor([[500.0, 0.0, -500.0]])
    loss = SampledLoss(0)
    assert torch.equal(gradients(loss, logits, 0.3), torch.zeros(1, 3))
    assert loss.uncertainty == 0
