"""The decompositions against independent truths: Eckart-Young tails from fp64 `svdvals`, exact products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsurgery.errors import RankError, WeightError
from lrsurgery.linalg import (
    Factors,
    balance,
    direction_factors,
    product_values,
    relative_error,
    spectral_factors,
    truncated_svd,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"tall": (160, 48), "wide": (48, 160), "square": (96, 96), "row": (1, 50), "column": (50, 1), "single": (1, 1)}


def matrix(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """An fp64 matrix with these singular values (min(rows, columns),)."""
    generator = torch.Generator().manual_seed(seed)
    full = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, full, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, full, dtype=torch.float64, generator=generator))
    return left * values @ right.T


def spectra(full: int) -> dict[str, Tensor]:
    few = max(1, full // 4)
    generator = torch.Generator().manual_seed(1)
    return {
        "random": torch.rand(full, dtype=torch.float64, generator=generator).sort(descending=True).values,
        "flat": torch.ones(full, dtype=torch.float64),
        "rank-deficient": torch.cat([torch.ones(few), torch.zeros(full - few)]).double(),
        "cliff of 3 decades": torch.cat([torch.ones(few), torch.full((full - few,), 1e-3)]).double(),
        "over 4 decades": torch.logspace(0, -4, full, dtype=torch.float64),
        "over 8 decades": torch.logspace(0, -8, full, dtype=torch.float64),
        "all zero": torch.zeros(full, dtype=torch.float64),
    }


def assert_near_optimal(weight: Tensor, rank: int) -> None:
    """Within 1e-5 of the Eckart-Young error, and the rounding of factors stored in the weight's dtype."""
    u, v = truncated_svd(weight, rank)
    assert (u.shape, v.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
    assert u.dtype == v.dtype == weight.dtype
    exact = weight.double()
    tail = torch.linalg.svdvals(exact)[rank:].norm()
    error = (exact - u.double() @ v.double()).norm()
    assert error <= tail * (1 + 1e-5) + 4 * torch.finfo(weight.dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", spectra(8))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_is_eckart_young(shape: tuple[int, int], spectrum: str, dtype: torch.dtype) -> None:
    full = min(shape)
    weight = matrix(*shape, spectra(full)[spectrum]).to(dtype)
    for rank in {1, max(1, full // 4), max(1, full // 2), max(1, full - 1), full}:
        assert_near_optimal(weight, rank)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spectrum", ["random", "over 8 decades", "rank-deficient"])
def test_scale_does_not_matter(spectrum: str, dtype: torch.dtype, scale: float) -> None:
    weight = (matrix(60, 90, spectra(60)[spectrum]) * scale).to(dtype)
    for rank in (1, 20, 60):
        assert_near_optimal(weight, rank)


def test_half_precision_reaches_both_ends_of_its_range() -> None:
    for scale in (1e-4, 3e4):
        assert_near_optimal((matrix(60, 90, spectra(60)["random"]) * scale).half(), 20)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    decades=st.floats(0, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
)
def test_any_spectrum_is_near_optimal(
    rows: int, columns: int, decades: float, share: float, seed: int, dtype: torch.dtype
) -> None:
    full = min(rows, columns)
    weight = matrix(rows, columns, torch.logspace(0, -decades, full, dtype=torch.float64), seed).to(dtype)
    assert_near_optimal(weight, max(1, round(share * full)))


@pytest.mark.parametrize("shape", [(160, 48), (48, 160)], ids=["tall", "wide"])
def test_factors_are_balanced(shape: tuple[int, int]) -> None:
    u, v = truncated_svd(matrix(*shape, spectra(48)["random"]), 20)
    assert torch.allclose(u.T @ u, v @ v.T, atol=1e-10)
    assert torch.allclose(u.T @ u, torch.diag(spectra(48)["random"][:20]), atol=1e-10)


@pytest.mark.parametrize("spectrum", ["random", "over 8 decades", "rank-deficient"])
@pytest.mark.parametrize("shape", [(160, 48), (48, 160)], ids=["tall", "wide"])
def test_directions_are_orthonormal_and_the_singular_vectors(shape: tuple[int, int], spectrum: str) -> None:
    values = spectra(48)[spectrum]
    weight = matrix(*shape, values)
    (u, v), found = direction_factors(weight.float(), 30)
    eye = torch.eye(30)
    assert torch.allclose(u.T @ u, eye, atol=1e-5)
    assert torch.allclose(v @ v.T, eye, atol=1e-5)
    # u_i^T W v_i is the i-th singular value, which fixes the directions up to sign
    assert torch.allclose((u.double().T @ weight @ v.double().T).diagonal(), values[:30], atol=1e-6)
    assert torch.allclose(found.double(), values, atol=1e-6)


def test_values_match_lapack() -> None:
    weight = torch.randn(80, 200, generator=torch.Generator().manual_seed(3))
    values = spectral_factors(weight, 10).values
    assert torch.allclose(values, torch.linalg.svdvals(weight), rtol=1e-4)


def test_product_values_need_no_product() -> None:
    generator = torch.Generator().manual_seed(3)
    factors = Factors(torch.randn(70, 9, generator=generator), torch.randn(9, 40, generator=generator))
    assert torch.allclose(product_values(factors), torch.linalg.svdvals(factors.u @ factors.v)[:9], rtol=1e-4)


def test_balance_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    factors = Factors(
        torch.randn(70, 9, generator=generator).double() * 100, torch.randn(9, 40, generator=generator).double()
    )
    u, v = balance(factors)
    assert torch.allclose(u @ v, factors.u @ factors.v, atol=1e-10)
    assert torch.allclose(u.T @ u, v @ v.T, atol=1e-10)


def test_relative_error_is_that_of_the_stored_factors() -> None:
    weight = matrix(30, 50, spectra(30)["random"])
    factors = truncated_svd(weight, 10)
    wanted = (weight - factors.u @ factors.v).norm() / weight.norm()
    assert relative_error(weight * 1e20, Factors(factors.u * 1e10, factors.v * 1e10)) == pytest.approx(float(wanted))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 6)
    weight[2, 3] = bad
    with pytest.raises(WeightError, match="NaN or Inf"):
        truncated_svd(weight, 2)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match="between 1 and 4"):
        truncated_svd(torch.ones(4, 6), rank)


def test_next_driver_takes_over_where_one_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(30, 50, spectra(30)["random"])

    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert_near_optimal(weight, 10)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(WeightError, match="no LAPACK driver"):
        truncated_svd(weight, 10)
