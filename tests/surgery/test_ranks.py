"""Rank policies against brute force over all ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrsurgery.errors import RankError
from lrsurgery.linalg.pivot import Side
from lrsurgery.linalg.spectrum import entropy_rank, nuclear_rank, stable_rank
from lrsurgery.surgery.kinds.linear import LINEAR
from lrsurgery.surgery.ranks import (
    AbsoluteRank,
    EnergyRank,
    FractionRank,
    ParameterShare,
    RankPolicy,
    StableRank,
    break_even_rank,
    parse_policy,
    parse_rank,
)

SIZES = st.integers(1, 300)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("0.5", FractionRank(0.5)),
        ("1.0", FractionRank(1.0)),
        ("1", AbsoluteRank(1)),
        ("64", AbsoluteRank(64)),
        ("energy:0.9", EnergyRank(0.9)),
        ("params:0.5", ParameterShare(0.5)),
        ("stable", StableRank()),
    ],
)
def test_text_is_read_without_ambiguity(text: str, policy: RankPolicy) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "1.5",
        "0.0",
        "abc",
        "",
        "nan",
        "inf",
        "energy:",
        "energy:2",
        "params:0",
        "energy:nan",
        "median:3",
        "stable:3",
    ],
)
def test_unreadable_text_is_one_line(text: str) -> None:
    with pytest.raises(RankError) as error:
        parse_policy(text)
    assert "\n" not in str(error.value)


@given(SIZES, SIZES)
def test_break_even_is_the_last_rank_that_saves(rows: int, columns: int) -> None:
    """Counted on real modules: a factorised layer of this rank is smaller than the dense one, one above it is not."""

    def parameters(rank: int) -> int:
        return sum(p.numel() for p in LINEAR.build(dense, rank).parameters())

    with torch.device("meta"):
        dense = torch.nn.Linear(columns, rows)
    whole = sum(p.numel() for p in dense.parameters())
    rank = break_even_rank(rows, columns)
    assert rank == 0 or parameters(rank) < whole
    assert parameters(rank + 1) >= whole


@given(SIZES, SIZES, st.sampled_from(["rows", "columns"]))
def test_a_pivoted_layer_is_smaller_at_every_rank_below_full(rows: int, columns: int, side: Side) -> None:
    full = min(rows, columns)
    assert break_even_rank(rows, columns, pivoted=True) == full - 1
    with torch.device("meta"):
        dense = torch.nn.Linear(columns, rows)
    whole = sum(p.numel() for p in dense.parameters())
    for rank in {1, full // 2, full - 1} - {0, full}:
        assert sum(p.numel() for p in LINEAR.make(dense, rank, side).parameters()) < whole


@given(SIZES, SIZES, st.floats(0.01, 1))
def test_a_pivoted_parameter_share_is_the_largest_rank_within_it(rows: int, columns: int, share: float) -> None:
    def cost(rank: int) -> int:
        return rank * (rows + columns - rank)

    rank = ParameterShare(share).rank_of(rows, columns, pivoted=True)
    assert rank == 1 or cost(rank) <= share * rows * columns
    assert rank == min(rows, columns) or cost(rank + 1) > share * rows * columns
    assert rank >= ParameterShare(share).rank_of(rows, columns)


@given(SIZES, SIZES, st.floats(0.01, 1))
def test_parameter_share_is_the_largest_rank_within_it(rows: int, columns: int, share: float) -> None:
    rank = ParameterShare(share).rank_of(rows, columns)
    assert 1 <= rank <= min(rows, columns)
    assert rank == 1 or rank * (rows + columns) <= share * rows * columns
    assert rank == min(rows, columns) or (rank + 1) * (rows + columns) > share * rows * columns


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=30), st.floats(0.01, 1))
def test_energy_rank_is_the_smallest_that_keeps_it(values: list[float], energy: float) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = EnergyRank(energy).rank_of(len(values), len(values), spectrum)
    squares = spectrum.square()
    assert squares[:rank].sum() >= (energy - 1e-9) * squares.sum()
    assert rank == 1 or squares[: rank - 1].sum() < (energy + 1e-9) * squares.sum()


@given(SIZES, SIZES, st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 32))
def test_multiples_never_exceed_full_rank(rows: int, columns: int, fraction: float, multiple: int) -> None:
    rank = parse_rank(fraction, multiple).rank_of("layer", rows, columns)
    assert 1 <= rank <= min(rows, columns)
    assert rank % multiple == 0 or rank == min(rows, columns)


@given(st.integers(384, 700), st.integers(384, 700), st.floats(0.1, 0.9), st.booleans())
def test_large_layers_have_multiples_of_8_within_the_bounds(
    rows: int, columns: int, share: float, pivoted: bool
) -> None:
    rank = parse_rank(f"params:{share}").rank_of("", rows, columns, pivoted=pivoted)
    exact = ParameterShare(share).rank_of(rows, columns, pivoted=pivoted)
    assert rank % 8 == 0
    assert exact - 8 < rank <= exact
    values = torch.linspace(1, 0.1, min(rows, columns))
    rank = parse_rank(f"energy:{share}").rank_of("", rows, columns, values)
    assert values[:rank].square().sum() >= share * values.square().sum() * (1 - 1e-6)
    assert rank % 8 == 0 or rank == len(values)


def test_a_rank_in_numbers_and_small_layers_keep_theirs() -> None:
    assert parse_rank("101").rank_of("", 512, 512) == 101
    assert parse_rank("101", 8).rank_of("", 512, 512) == 104
    assert parse_rank("params:0.3", 1).rank_of("", 512, 512) == 76
    assert parse_rank("params:0.3").rank_of("", 512, 512) == 72
    assert parse_rank("params:0.3").rank_of("", 383, 512) == ParameterShare(0.3).rank_of(383, 512)


def test_last_match_wins() -> None:
    spec = parse_rank(["0.5", "h.*=8", "h.1.*=params:0.25"])
    assert spec.policy_for("h.0.fc") == AbsoluteRank(8)
    assert spec.policy_for("h.1.fc") == ParameterShare(0.25)
    assert spec.policy_for("other") == FractionRank(0.5)


def test_globs_alone_leave_the_rest() -> None:
    assert parse_rank("h.*=8").policy_for("other") is None


def test_two_defaults_are_refused() -> None:
    with pytest.raises(RankError, match="already given"):
        parse_rank(["0.5", "64"])


def test_named_layer_beyond_its_full_rank_says_the_bound() -> None:
    with pytest.raises(RankError, match=r"h\.0\.fc: rank 900 exceeds 768, the full rank of \(2304, 768\)"):
        parse_rank("h.0.fc=900").rank_of("h.0.fc", 2304, 768)


def test_effective_ranks_by_hand() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])
    assert nuclear_rank(values) == pytest.approx(2.0)
    assert stable_rank(values) == pytest.approx(1.5)
    assert entropy_rank(values) == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 2))
    assert entropy_rank(torch.ones(7)) == pytest.approx(7)
    assert nuclear_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == entropy_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("rank", [True, 0, 1.5, -0.5])
def test_bad_numbers_are_refused(rank: float) -> None:
    with pytest.raises(RankError):
        parse_rank(rank)
