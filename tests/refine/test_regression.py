"""Anchored regression against reduced-rank regression as its textbooks compute it, from the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lrsurgery
from lrsurgery.refine.activations import Cache, Given
from lrsurgery.refine.regression import regress_
from lrsurgery.refine.walk import ALONE
from lrsurgery.surgery.apply import factorised_layers

COUNT = 4000


class Block(nn.Module):
    """Two layers with the same input and one behind them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 8, bias=bias), nn.Linear(10, 8, bias=bias)
        self.last = nn.Linear(8, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.left(x)) * self.right(x))  # type: ignore[no-any-return]


def caches(*lists: list[torch.Tensor]) -> tuple[Cache, ...]:
    made = tuple(Cache(None, 1 << 40) for _ in lists)
    for cache, given in zip(made, lists, strict=True):
        for x in given:
            cache.append(Given((x,), {}))
    return made


def reduced_rank(x: np.ndarray, y: np.ndarray, rank: int, intercept: bool) -> float:
    """The least mean squared error of y by a map of x of this rank (Izenman 1975): the fitted values, cut by an SVD."""
    if intercept:
        x, y = x - x.mean(0), y - y.mean(0)
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    fitted = x @ solution
    left, values, right = np.linalg.svd(fitted, full_matrices=False)
    cut = (left[:, :rank] * values[:rank]) @ right[:rank]
    return float(((y - cut) ** 2).mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_each_layer_is_the_reduced_rank_regression_on_what_it_is_given(bias: bool, form: str) -> None:
    torch.manual_seed(0)
    dense = Block(bias)
    block = Block(bias)
    block.load_state_dict(dense.state_dict())
    lrsurgery.factorise_(block, rank=3, form=form, allow_larger=True, heads=True)
    x = [torch.randn(COUNT // 4, 10) + 0.5 for _ in range(4)]
    mixing = torch.eye(10) + 0.1 * torch.randn(10, 10)
    moved = [each @ mixing + 0.2 for each in x]  # what compressed blocks before would do
    names = regress_(dense, block, caches(x, moved), range(4), [(None,)] * 4, ALONE)
    assert names == ["left", "right", "last"]
    with torch.no_grad():
        before, after = torch.cat(x), torch.cat(moved)
        inner = torch.tanh(dense.left(before)) * dense.right(before)
        reached = torch.tanh(block.left(after)) * block.right(after)
        for name, given, seen in (("left", before, after), ("right", before, after), ("last", inner, reached)):
            wanted = dense.get_submodule(name)(given)
            found = float((block.get_submodule(name)(seen) - wanted).square().mean())
            best = reduced_rank(seen.double().numpy(), wanted.double().numpy(), 3, bias)
            assert best * 0.999 <= found <= best * 1.02, name  # the ridge costs a little
    assert all(layer.rank == 3 and layer.form == form for layer in factorised_layers(block).values())


def test_gradients_say_which_errors_count() -> None:
    """With their second moment G, the fit is the reduced-rank regression of G^(1/2) y; and not the one without."""
    torch.manual_seed(0)
    dense, weighed, plain = Block(True), Block(True), Block(True)
    for each in (weighed, plain):
        each.load_state_dict(dense.state_dict())
        lrsurgery.factorise_(each, rank=3, form="balanced", heads=True)
    x = [torch.randn(COUNT // 4, 10) + 0.5 for _ in range(4)]
    moved = [each @ (torch.eye(10) + 0.1 * torch.randn(10, 10)) for each in x]
    root = torch.diag(torch.logspace(-1, 1, 8)) @ torch.linalg.qr(torch.randn(8, 8))[0]
    moments = {"left": root.T @ root, "right": torch.logspace(-1, 1, 8)}
    asked: list[tuple[str, str, int]] = []

    def weights(*key: object) -> torch.Tensor | None:
        asked.append(key)  # type: ignore[arg-type]
        return moments.get(str(key[0]))

    for block, more in ((weighed, (weights,)), (plain, ())):
        regress_(dense, block, caches(x, moved), range(4), [(None,)] * 4, ALONE, *more)
    assert asked == [("left", "linear", 8), ("right", "linear", 8), ("last", "linear", 6)]
    before, after = torch.cat(x), torch.cat(moved)
    with torch.no_grad():
        for name, metric in (("left", root), ("right", moments["right"].sqrt().diag())):
            wanted = dense.get_submodule(name)(before) @ metric.T
            found, without = (
                float((each.get_submodule(name)(after) @ metric.T - wanted).square().mean())
                for each in (weighed, plain)
            )
            best = reduced_rank(after.double().numpy(), wanted.double().numpy(), 3, True)
            assert best * 0.999 <= found <= best * 1.02, name
            assert without > 1.1 * best, name


def test_a_layer_that_is_not_compressed_and_not_moved_keeps_its_product() -> None:
    torch.manual_seed(0)
    dense = Block(bias=True)
    block = Block(bias=True)
    block.load_state_dict(dense.state_dict())
    lrsurgery.factorise_(block, rank=1.0, form="balanced", allow_larger=True, heads=True)
    x = [torch.randn(500, 10) for _ in range(2)]
    regress_(dense, block, caches(x, x), range(2), [(None,)] * 2, ALONE)
    for name, wanted in dense.named_parameters():
        layer, _, part = name.rpartition(".")
        torch.testing.assert_close(getattr(block.get_submodule(layer), part) * 1, wanted * 1, atol=1e-5, rtol=0)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    dense, block, other = Block(True), Block(True), Block(True)
    for each in (block, other):
        each.load_state_dict(dense.state_dict())
        lrsurgery.factorise_(each, rank=3, form="balanced", heads=True)
    x = torch.randn(8, 50, 10)
    mask = torch.ones(8, 50)
    mask[:, 30:] = 0
    spoilt = x.clone()
    spoilt[:, 30:] = 1000
    regress_(dense, block, caches([spoilt], [spoilt]), range(1), [(mask,)], ALONE)
    short = x[:, :30].contiguous()
    regress_(dense, other, caches([short], [short]), range(1), [(None,)], ALONE)
    for name in ("left", "right", "last"):
        torch.testing.assert_close(
            block.get_submodule(name).weight * 1, other.get_submodule(name).weight * 1, atol=1e-4, rtol=1e-4
        )


class Again(Block):
    """Runs its last layer a second time for inputs that are large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.left(x)) * self.right(x)
        if bool(x.abs().mean() > 2):
            self.last(hidden)
        return self.last(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("large", [False, True])
def test_a_layer_that_runs_twice_in_any_call_stays(large: bool) -> None:
    torch.manual_seed(0)
    dense, block = Again(False), Again(False)
    block.load_state_dict(dense.state_dict())
    lrsurgery.factorise_(block, rank=3, allow_larger=True, heads=True)
    x = [torch.randn(64, 10), torch.randn(64, 10) * (4 if large else 1)]
    given = caches(x, x)
    fitted = regress_(dense, block, (given[0], given[1]), range(2), [(None,), (None,)], ALONE)
    assert fitted == (["left", "right"] if large else ["left", "right", "last"])
