"""Budgets against exhaustive search, a knapsack's table and the Lagrangian bound, each computed here."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrsurgery.errors import BudgetError
from lrsurgery.surgery import budget as budget_module
from lrsurgery.surgery.budget import Budget, Choice, Curve, Layer, cheapest, parse_budget


def predicted_loss(layers: Sequence[Layer], choices: Mapping[str, Choice | int | None]) -> float:
    """The sum of the tails at these choices; a layer at None stays dense and loses nothing."""
    chosen = [(layer, as_choice(choices[layer.name])) for layer in layers]
    return math.fsum(max(0.0, float(layer.curves[at.curve].tails[at.rank])) for layer, at in chosen if at is not None)


def as_choice(value: Choice | int | None) -> Choice | None:
    """A rank stands for one of the first curve."""
    return Choice(0, value) if isinstance(value, int) else value


def allocate(layers: Sequence[Layer], budget: float) -> dict[str, int | None]:
    """The ranks of layers with one curve."""
    found = budget_module.allocate(layers, budget)
    assert all(choice is None or choice.curve == 0 for choice in found.values())
    return {name: None if choice is None else choice.rank for name, choice in found.items()}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget("params", 0.5)),
        (" 1.0 ", Budget("params", 1.0)),
        (" flops:0.25", Budget("flops", 0.25)),
        ("time:0.7", Budget("time", 0.7)),
        ("bytes:500MB", Budget("bytes", 500e6, "model")),
        ("bytes:1.5GB", Budget("bytes", 1.5e9, "model")),
        ("bytes:500MB:int8", Budget("bytes", 500e6, "model", stored="int8")),
        ("bytes:500MB:nf4", Budget("bytes", 500e6, "model", stored="nf4")),
        ("bytes:300kb", Budget("bytes", 300e3, "model")),
        ("bytes:2.01 GB", Budget("bytes", 2_010_000_000, "model")),
        ("bytes:2MiB", Budget("bytes", 2 * 2**20, "model")),
        ("bytes:12B", Budget("bytes", 12, "model")),
        ("bytes:123456789", Budget("bytes", 123456789, "model")),
    ],
)
def test_text_is_read_and_given_back(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "of", "shown"),
    [
        ("0.50", "layers", "0.5"),
        ("0.5", "model", "0.5 of the model"),
        ("flops:0.5", "model", "flops:0.5 of the model"),
        ("bytes:1500MB", "model", "bytes:1.5GB"),
        ("bytes:1500MB:int8", "model", "bytes:1.5GB:int8"),
        ("bytes:500MB", "layers", "bytes:500MB"),
    ],
)
def test_a_share_says_what_it_is_of(text: str, of: str, shown: str) -> None:
    assert str(parse_budget(text, of)) == shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((text, "not readable") for text in ("", "abc", "nan", "inf", "50%", "500MB", "ranks:0.5", "flops:")),
        *((text, "not readable") for text in ("bytes:", "bytes:MB", "bytes:5XB", "bytes:nanMB", "bytes:1e308TB")),
        *((text, r"share of parameters lies in \(0, 1\]; write bytes:500MB") for text in ("0", "-0.5", "1.5", "64")),
        *((text, r"share of FLOPs lies in \(0, 1\]") for text in ("flops:0", "flops:2")),
        *((text, r"share of time lies in \(0, 1\]") for text in ("time:0", "time:1.01")),
        *((text, "at least 1 byte") for text in ("bytes:0", "bytes:-5MB", "bytes:0.1B")),
    ],
)
def test_bad_text_is_one_line(text: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says) as error:
        parse_budget(text)
    assert "\n" not in str(error.value)


def test_a_budget_is_of_the_layers_or_the_model() -> None:
    with pytest.raises(BudgetError, match="unknown budget scope 'block'; known: layers, model"):
        parse_budget("0.5", "block")


def make_layer(name: str, drops: Sequence[float], dense_cost: int, rank_cost: int, ranks: Sequence[int]) -> Layer:
    """A layer whose r-th rank takes `drops[r - 1]` off the loss."""
    tails = [0.0]
    for drop in reversed(drops):
        tails.append(tails[-1] + drop)
    costs = [rank * rank_cost for rank in ranks]
    return Layer(name, dense_cost, (Curve(ranks, costs, torch.tensor(tails[::-1], dtype=torch.float64)),))


def cost_of(layer: Layer, choice: Choice | None) -> int:
    if choice is None:
        return layer.dense_cost
    curve = layer.curves[choice.curve]
    return dict(zip(curve.ranks, curve.costs, strict=True))[choice.rank]


def options(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Costs and losses, dense first."""
    choices = [Choice(index, rank) for index, curve in enumerate(layer.curves) for rank in curve.ranks]
    losses = [float(layer.curves[index].tails[rank]) for index, rank in choices]
    return np.array([cost_of(layer, choice) for choice in (None, *choices)]), np.array([0.0, *losses])


def spent(layers: Sequence[Layer], choices: Mapping[str, Choice | int | None]) -> int:
    assert list(choices) == [layer.name for layer in layers]
    return sum(cost_of(layer, as_choice(choices[layer.name])) for layer in layers)


def lagrangian(layers: Sequence[Layer], budget: float) -> tuple[float, float]:
    """The largest of the bounds min(loss + price * cost) - price * budget, and its price.

    They are concave in the price, so a ternary search over its logarithm finds it.
    """
    menus = [options(layer) for layer in layers]

    def bound(log: float) -> float:
        price = float(np.exp(log))
        return sum(float((losses + price * costs).min()) for costs, losses in menus) - price * budget

    low, high = -60.0, 60.0
    for _ in range(200):
        third = (high - low) / 3
        low, high = (low, high - third) if bound(low + third) > bound(high - third) else (low + third, high)
    return bound((low + high) / 2), float(np.exp((low + high) / 2))


def random_layers(seed: int, count: int, full: int, convex: bool = True) -> list[Layer]:
    """Layers of a few shapes, spectra and scales; tails are convex where the singular values come in order."""
    random = np.random.default_rng(seed)
    layers = []
    for i in range(count):
        rows, columns = full * int(random.integers(1, 5)) + int(random.integers(0, 9)), full
        drops = np.arange(1, full + 1) ** -random.uniform(0.5, 2) * random.uniform(0.5, 1.5, full)
        drops = np.sort(drops)[::-1] if convex else drops
        ranks = [rank for rank in range(1, full + 1) if rank * (rows + columns) < rows * columns]
        drops = drops * 10 ** random.uniform(-1, 1)
        layers.append(make_layer(f"h.{i}", drops.tolist(), rows * columns, rows + columns, ranks))
    return layers


def lumpy_layers(seed: int) -> list[Layer]:
    """Layers with few ranks, whose losses are nearly in proportion to what the ranks save."""
    random = np.random.default_rng(seed)
    layers = []
    for i in range(20):
        ranks = sorted(random.choice(np.arange(1, 31), 4, replace=False).tolist())
        rank_cost = int(random.integers(7, 40))
        drops = rank_cost * random.uniform(0.8, 1.2, 30)
        layers.append(make_layer(f"h.{i}", drops.tolist(), 33 * rank_cost, rank_cost, ranks))
    return layers


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Layer], float]:
    drop = st.one_of(
        st.just(0.0),
        st.integers(0, 5).map(float),
        st.builds(lambda x, e: x * 10.0**e, st.floats(1, 10), st.integers(-9, 8)),
    )
    layers = []
    for i in range(draw(st.integers(2, 4))):
        curves: tuple[Curve, ...] = ()
        for _ in range(draw(st.integers(1, 3))):  # convolution schemes
            drops = draw(st.lists(drop, min_size=1, max_size=6))
            ranks = sorted(draw(st.sets(st.integers(1, len(drops)), max_size=5)))
            (curve,) = make_layer("", drops, 1, 1, ranks).curves
            costs = draw(st.lists(st.integers(1, 120), min_size=len(ranks), max_size=len(ranks)))  # measured, perhaps
            curves += (replace(curve, costs=costs),)
        layers.append(Layer(f"h.{i}", draw(st.integers(1, 90)), curves))
    least, dense = cheapest(layers), sum(layer.dense_cost for layer in layers)
    return layers, least + draw(st.floats(0, 1)) * (dense - least)


@given(cases())
def test_nothing_within_the_budget_loses_less(case: tuple[list[Layer], float]) -> None:
    layers, budget = case
    menus = [options(layer) for layer in layers]
    costs = functools.reduce(np.add.outer, (menu[0] for menu in menus)).ravel()
    losses = functools.reduce(np.add.outer, (menu[1] for menu in menus)).ravel()
    assert cheapest(layers) == costs.min()
    choices = budget_module.allocate(layers, budget)
    assert spent(layers, choices) <= budget
    assert predicted_loss(layers, choices) == pytest.approx(losses[costs <= budget].min(), rel=1e-12, abs=0)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_loses_less_among_more_choices_than_can_be_tried(seed: int) -> None:
    """Against the knapsack's table over every whole budget. Gains are much alike, so greedy choices do not do."""
    layers = lumpy_layers(seed)
    least, dense = cheapest(layers), sum(layer.dense_cost for layer in layers)
    budget = int(least + (0.1 + 0.05 * seed) * (dense - least))
    table = np.zeros(budget + 1)  # least loss within each budget
    for layer in layers:
        before, table = table, np.full(budget + 1, np.inf)
        for cost, loss in zip(*options(layer), strict=True):
            if cost <= budget:
                table[cost:] = np.minimum(table[cost:], before[: budget + 1 - cost] + loss)
    ranks = allocate(layers, budget)
    assert spent(layers, ranks) <= budget
    assert predicted_loss(layers, ranks) == pytest.approx(table[budget], rel=1e-12, abs=0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(2))
def test_many_ranks_spend_the_budget(seed: int, share: float) -> None:
    layers = random_layers(seed, count=20, full=200)
    budget = share * sum(layer.dense_cost for layer in layers)
    assert 0.995 * budget <= spent(layers, allocate(layers, budget)) <= budget


@pytest.mark.parametrize("convex", [True, False], ids=["spectra in order", "spectra out of order"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_losses_come_near_the_lagrangian_bound(share: float, convex: bool) -> None:
    layers = random_layers(7, count=60, full=300, convex=convex)
    budget = share * sum(layer.dense_cost for layer in layers)
    bound, _ = lagrangian(layers, budget)
    ranks = allocate(layers, budget)
    assert spent(layers, ranks) <= budget
    assert bound * (1 - 1e-9) <= predicted_loss(layers, ranks) <= bound * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_a_search_that_stops_at_once_stays_near_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = random_layers(seed, count=10, full=40, convex=False)
    budget = 0.5 * sum(layer.dense_cost for layer in layers)
    least = predicted_loss(layers, allocate(layers, budget))
    monkeypatch.setattr(budget_module, "STATE_LIMIT", 0)
    ranks = allocate(layers, budget)
    bound, price = lagrangian(layers, budget)
    assert spent(layers, ranks) <= budget
    # at most one edge of a hull, whose cost is below a dense layer's
    assert least <= predicted_loss(layers, ranks) <= bound + price * max(layer.dense_cost for layer in layers)


def test_without_a_search_the_edge_that_does_not_fit_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best gains leave no room for the large layer, and give less than it."""
    monkeypatch.setattr(budget_module, "STATE_LIMIT", 0)
    large, small = make_layer("large", [0.0, 10.0], 10, 1, [1]), make_layer("small", [0.0, 5.0], 5, 1, [1])
    assert allocate([small, large], 12) == {"small": 1, "large": None}


def test_without_a_search_what_is_left_goes_to_the_best_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "STATE_LIMIT", 0)
    large = make_layer("large", [0.0, 1000.0], 101, 1, [1])
    first, second = make_layer("first", [0.0, 10.0], 11, 1, [1]), make_layer("second", [0.0, 20.0], 11, 1, [1])
    assert allocate([large, first, second], 13) == {"large": 1, "first": 1, "second": None}
    twin = make_layer("twin", [0.0, 20.0], 11, 1, [1])
    assert allocate([large, second, twin], 13) == {"large": 1, "second": None, "twin": 1}


@pytest.mark.parametrize("states", [0, 400, 4_000])
@pytest.mark.parametrize("seed", [0, 1, 227])  # at 400 states of the last, the best found leaves room
def test_wherever_the_search_stops_no_better_option_fits(
    seed: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "STATE_LIMIT", states)
    layers = random_layers(seed, count=8, full=40)
    budget = (0.3 + 1.2 / 7) * sum(layer.dense_cost for layer in layers)
    ranks = allocate(layers, budget)
    left = budget - spent(layers, ranks)
    for layer in layers:
        rank = ranks[layer.name]
        cost = cost_of(layer, as_choice(rank))
        costs, losses = options(layer)
        assert losses[costs <= cost + left].min() == (0 if rank is None else layer.curves[0].tails[rank])


def test_scales_far_apart_are_each_decided() -> None:
    """A layer a billion billion times quieter than another still gets the best rank that is left for it."""
    loud = make_layer("loud", [1e9, 1e8], 100, 10, [1, 2])
    quiet = make_layer("quiet", [4e-9, 3e-9, 2e-9, 1e-9], 100, 10, [1, 2, 3, 4])
    assert allocate([loud, quiet], 55) == {"loud": 2, "quiet": 3}


def test_a_layer_without_ranks_stays_dense_and_is_paid_for() -> None:
    layers = [make_layer("fixed", [5.0, 5.0], 40, 30, []), make_layer("free", [3.0, 2.0, 1.0], 60, 10, [1, 2, 3])]
    assert allocate(layers, 69) == {"fixed": None, "free": 2}
    assert allocate(layers, 59.9) == {"fixed": None, "free": 1}


def test_a_budget_for_everything_keeps_everything() -> None:
    layers = random_layers(0, count=5, full=20)
    for budget in (sum(layer.dense_cost for layer in layers), float("inf")):
        ranks = allocate(layers, budget)
        assert set(ranks.values()) == {None}
        assert predicted_loss(layers, ranks) == 0


def test_zero_tails_get_the_smallest_rank() -> None:
    layers = [make_layer("dead", [0.0] * 8, 100, 10, [2, 4, 6]), make_layer("live", [2.0, 1.0], 100, 10, [1, 2])]
    for budget in (30, 45, 500):
        assert allocate(layers, budget)["dead"] == 2


def test_a_tail_below_zero_is_rounding() -> None:
    curve = Curve([1, 2, 3], [10, 20, 30], torch.tensor([3.0, 1.0, 0.0, -1e-17], dtype=torch.float64))
    layer = Layer("a", 100, (curve,))
    assert allocate([layer], 100) == {"a": 2}
    assert predicted_loss([layer], {"a": 3}) == 0


def test_equal_layers_share_in_their_order() -> None:
    layers = [make_layer(name, [3.0, 2.0, 1.0], 90, 10, [1, 2, 3]) for name in ("a", "b", "c")]
    assert allocate(layers, 50) == {"a": 2, "b": 2, "c": 1}
    layers = [make_layer(name, [1.0] * 400, 9000, 10, range(1, 401)) for name in ("a", "b", "c")]
    assert allocate(layers, 6000) == {"a": 400, "b": 199, "c": 1}


def test_the_scheme_that_loses_less_is_taken_at_each_budget() -> None:
    """One scheme is better at few ranks, the other at many; of equal ones the first is taken."""
    (early,), (late,) = (
        make_layer("", drops, 1, 10, [1, 2, 3]).curves for drops in ([9.0, 1.0, 1.0, 1.0], [5.0, 5.5, 0.5, 1.0])
    )
    layer = Layer("a", 40, (early, late))
    found = [budget_module.allocate([layer], budget)["a"] for budget in (10, 20, 30, 40)]
    assert found == [Choice(0, 1), Choice(1, 2), Choice(0, 3), None]


def test_no_layers_cost_nothing() -> None:
    assert allocate([], 0.0) == {}
    assert cheapest([]) == 0


def test_a_budget_below_every_choice_names_the_smallest() -> None:
    layers = [make_layer("a", [1.0, 1.0], 5000, 800, [2]), make_layer("b", [1.0], 700, 800, [1])]
    assert cheapest(layers) == 2300
    assert allocate(layers, 2300) == {"a": 2, "b": None}
    with pytest.raises(BudgetError, match=r"budget 2,299\.5: .* costs 2,300; write at least that"):
        allocate(layers, 2299.5)
