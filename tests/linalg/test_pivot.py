"""The pivoted form: the same product, and a bound on its entries, also on the matrices that pivoting is bad at."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsurgery.linalg import truncated_svd
from lrsurgery.linalg.factors import Factors, balance_of
from lrsurgery.linalg.pivot import LARGEST_MIXING, Pivoted, Side, balanced, pivot, side_of, unpivot

BOUND = LARGEST_MIXING * (1 + 1e-9)
SIDES: tuple[Side, ...] = ("rows", "columns")


def product(pivoted: Pivoted) -> Tensor:
    """By the definition, one row (column) after another."""
    kept, mixing = pivoted.kept.double(), pivoted.mixing.double()
    rank = mixing.shape[1] if pivoted.side == "rows" else kept.shape[1]
    if pivoted.side == "rows":
        found = torch.empty(len(pivoted.order), kept.shape[1], dtype=torch.float64)
        for i, place in enumerate(pivoted.order.tolist()):
            found[place] = kept[i] if i < rank else mixing[i - rank] @ kept
        return found
    found = torch.empty(len(kept), len(pivoted.order), dtype=torch.float64)
    for i, place in enumerate(pivoted.order.tolist()):
        found[:, place] = kept[:, i] if i < rank else kept @ mixing[:, i - rank]
    return found


def check(factors: Factors, pivoted: Pivoted, tolerance: float) -> None:
    rank = factors.u.shape[1]
    m, n = len(factors.u), factors.v.shape[1]
    length = m if pivoted.side == "rows" else n
    assert sorted(pivoted.order.tolist()) == list(range(length))
    assert pivoted.order[rank:].tolist() == sorted(pivoted.order[rank:].tolist())
    assert pivoted.kept.numel() + pivoted.mixing.numel() == rank * (m + n - rank)
    assert pivoted.kept.dtype == pivoted.mixing.dtype == factors.u.dtype
    if pivoted.mixing.numel():
        assert float(pivoted.mixing.double().abs().max()) <= BOUND + (tolerance if tolerance > 1e-9 else 0)
    dense = factors.u.double() @ factors.v.double()
    assert float((product(pivoted) - dense).norm()) <= tolerance * max(float(dense.norm()), 1e-300)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_the_same_product_with_fewer_numbers(m: int, n: int, data: st.DataObject) -> None:
    rank, side = data.draw(st.integers(1, min(m, n))), data.draw(st.sampled_from([*SIDES, None]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    factors = Factors(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
    pivoted = pivot(factors, side)
    assert pivoted.side == (side or side_of(m, n))
    check(factors, pivoted, 1e-6)
    again = unpivot(pivoted)
    torch.testing.assert_close(again.u @ again.v, factors.u @ factors.v, rtol=1e-4, atol=1e-4)


def kahan(size: int) -> Tensor:
    """Kahan's matrix, on which QR with column pivoting fails to show the rank; LU of its transpose grows."""
    s = math.sin(1.2)
    c = math.cos(1.2)
    upper = torch.eye(size, dtype=torch.float64) - c * torch.ones(size, size, dtype=torch.float64).triu(1)
    return torch.tensor([s**i for i in range(size)], dtype=torch.float64)[:, None] * upper


def wilkinson(size: int) -> Tensor:
    """The matrix whose LU with partial pivoting grows by 2 a column."""
    one = torch.ones(size, size, dtype=torch.float64)
    found = torch.eye(size, dtype=torch.float64) - one.tril(-1)
    found[:, -1] = 1
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(kahan(60), id="kahan"),
        pytest.param(kahan(60).T, id="kahan transposed"),
        pytest.param(torch.cat([wilkinson(40), wilkinson(40).T]), id="wilkinson"),
        pytest.param(torch.vander(torch.linspace(0, 1, 50, dtype=torch.float64), 20), id="vandermonde"),
        pytest.param(1.0 / (torch.arange(40.0)[:, None] + torch.arange(30.0) + 1).double(), id="hilbert"),
    ],
)
def test_hard_matrices_keep_the_bound(matrix: Tensor, side: Side) -> None:
    for rank in (1, 7, min(matrix.shape) // 2, min(matrix.shape)):
        factors = truncated_svd(matrix, rank, svd="full")
        check(factors, pivot(factors, side), 1e-10)


def test_badly_scaled_and_rank_deficient_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(50, 12, generator=generator).double(), torch.randn(12, 40, generator=generator).double()
    scales = torch.logspace(-150, 150, 12, dtype=torch.float64)
    scaled = Factors(u * scales, v / scales[:, None])
    deficient = Factors(torch.cat([u[:, :6], u[:, :6]], 1), v)
    zero_columns = Factors(u * (torch.arange(12) < 5), v * (torch.arange(12) < 5)[:, None])
    nothing = Factors(torch.zeros(50, 12).double(), torch.zeros(12, 40).double())
    for side in SIDES:
        for factors in (scaled, deficient, zero_columns, nothing):
            check(factors, pivot(factors, side), 1e-10)


def test_in_bf16_the_rounding_of_its_numbers_is_all_that_is_lost() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 120) @ torch.diag(torch.logspace(0, -3, 120)) @ torch.randn(120, 300)
    factors = truncated_svd(weight.bfloat16(), 60)
    pivoted = pivot(factors)
    check(factors, pivoted, 0.03)
    assert pivoted.kept.dtype == torch.bfloat16
    whole = pivot(Factors(factors.u.double(), factors.v.double()))
    assert torch.equal(pivoted.order, whole.order)  # chosen in fp64 whatever the dtype
    assert torch.equal(pivoted.mixing, whole.mixing.bfloat16())


def test_back_to_balanced_factors() -> None:
    torch.manual_seed(0)
    for shape in ((40, 60), (60, 40)):
        factors = truncated_svd(torch.randn(*shape), 20)
        back = balanced(pivot(factors))
        torch.testing.assert_close(back.u @ back.v, factors.u @ factors.v, rtol=1e-5, atol=1e-5)
        assert balance_of(back) < 1e-5


def test_at_full_rank_of_a_side_nothing_is_mixed() -> None:
    weight = torch.randn(5, 9, dtype=torch.float64)
    factors = truncated_svd(weight, 5)
    pivoted = pivot(factors)
    assert pivoted.side == "rows"
    assert pivoted.mixing.shape == (0, 5)
    torch.testing.assert_close(product(pivoted), weight)
    again = unpivot(pivoted)
    torch.testing.assert_close(again.u @ again.v, weight)
