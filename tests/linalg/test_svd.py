"""The decompositions against independent truths: Eckart-Young tails from fp64 `svdvals`, exact products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsurgery.errors import RankError, SurgeryError, WeightError
from lrsurgery.linalg import svd as linalg
from lrsurgery.linalg.factors import Factors, balance, product_values, relative_error
from lrsurgery.linalg.svd import direction_factors, singular_values, spectral_factors, truncated_svd

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
    (u, v), found, *_ = direction_factors(weight.float(), 30)
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


def slow_decay(full: int, power: float = 0.6) -> Tensor:
    """What trained weights look like: a power law on a floor of noise."""
    return torch.arange(1, full + 1, dtype=torch.float64) ** -power + 0.02


HARD = {
    "power law": slow_decay(1100),
    "flat": torch.ones(1100, dtype=torch.float64),
    "steps": torch.arange(1100, 0, -1).div(100, rounding_mode="floor").double() + 1,
    "cliff at the rank": torch.cat([torch.ones(60), torch.full((1040,), 0.3)]).double(),
    "rank-deficient": torch.cat([slow_decay(300), torch.zeros(800)]).double(),
    "over 4 decades": torch.logspace(0, -4, 1100, dtype=torch.float64),
    # what a random matrix has, here with 40 directions above it: the rank ends within the bulk
    "bulk of noise": torch.cat([torch.linspace(8, 2.2, 40), torch.linspace(2, 0, 1061)[1:]]).double(),
}


@pytest.mark.process
@pytest.mark.parametrize("svd", ["auto", "fast", "full"])
@pytest.mark.parametrize("spectrum", HARD)
def test_leading_directions_keep_their_bound(spectrum: str, svd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rank is far below full rank: 1e-5 of the Eckart-Young error, 1% for "fast"."""
    values, rank = HARD[spectrum], 60
    weight = matrix(1100, 1300, values).float()
    monkeypatch.setattr(linalg, "LEADING_PAYS", dict.fromkeys(linalg.LEADING_PAYS, ((1, 1.0),)))
    u, v = truncated_svd(weight, rank, svd=svd)
    tail = values[rank:].norm()
    error = (weight.double() - u.double() @ v.double()).norm()
    slack = 1e-2 if svd == "fast" else 1e-5
    assert error <= tail * (1 + slack) + 4 * torch.finfo(torch.float32).eps * values.norm()
    assert torch.allclose(u.T @ u, v @ v.T, atol=1e-4 * float(values[0]))


@pytest.mark.parametrize("spectrum", ["power law", "bulk of noise"])
def test_leading_directions_are_used_where_they_pay(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(1100, 1100, HARD[spectrum]).float()
    monkeypatch.setattr(torch.linalg, "eigh", counted := _counting(torch.linalg.eigh))
    spectral_factors(weight, 60)
    assert max(counted.sizes) < 1100
    spectral_factors(weight, 600)
    assert counted.sizes[-1] == 1100


class _counting:
    def __init__(self, real: Any) -> None:
        self.real, self.sizes = real, []

    def __call__(self, matrix: Tensor) -> Any:
        self.sizes.append(len(matrix))
        return self.real(matrix)


def test_fast_says_what_it_did_not_look_at() -> None:
    values = slow_decay(600)
    found = spectral_factors(matrix(600, 700, values).float(), 60, svd="fast")
    assert torch.allclose(found.values[:60].double(), values[:60], rtol=2e-2)
    assert bool(found.values[60:].isnan().all())
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_known_spectrum_saves_the_decomposition(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(80, 60, slow_decay(60)).float() * scale
    first = spectral_factors(weight, 40, keep=True)
    assert first.spectrum is not None
    fresh = spectral_factors(weight, 20)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = spectral_factors(weight, 20, known=first.spectrum)
    assert torch.equal(again.factors.u, fresh.factors.u)
    assert torch.equal(again.factors.v, fresh.factors.v)
    assert torch.equal(spectral_factors(weight, lambda _: 20, known=first.spectrum).factors.u, fresh.factors.u)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular_values_match_lapack_without_vectors(dtype: torch.dtype) -> None:
    weight = matrix(300, 200, slow_decay(200)).to(dtype)
    found = singular_values(weight)
    exact = torch.linalg.svdvals(weight.double())
    assert torch.allclose(found.double(), exact, rtol=1e-4 if dtype != torch.float64 else 1e-9)


def test_unknown_engine_lists_the_known() -> None:
    with pytest.raises(SurgeryError, match="known: auto, fast, full"):
        truncated_svd(torch.ones(3, 3), 1, svd="exact")
