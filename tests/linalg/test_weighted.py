"""The best factors in a metric, against gradient descent, plain SVD and the norm worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrsurgery.errors import WeightError
from lrsurgery.linalg.factors import balance_of
from lrsurgery.linalg.inits import INITS, WITHOUT_DIRECTIONS, InitProblem
from lrsurgery.linalg.subspaces import directions
from lrsurgery.linalg.svd import truncated_svd
from lrsurgery.linalg.weighted import Metric, damp, weighted_factors, weighted_norm, weighted_values

SHAPES = {"tall": (23, 11), "wide": (9, 20), "square": (12, 12)}


def moment(size: int, samples: int, seed: int) -> Tensor:
    x = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / samples


def problem(rows: int, columns: int, seed: int = 0, samples: int = 50) -> tuple[Tensor, Metric]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    return weight, Metric(moment(columns, samples, seed + 1), moment(rows, 50, seed + 2))


def by_descent(weight: Tensor, rank: int, metric: Metric, seed: int) -> float:
    """The least weighted error that L-BFGS finds from random factors."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(weight.shape[0], rank, generator=generator).double().requires_grad_()
    v = torch.randn(rank, weight.shape[1], generator=generator).double().requires_grad_()
    optimizer = torch.optim.LBFGS([u, v], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    assert metric.inputs is not None
    assert metric.gradients is not None
    inputs, gradients = metric.inputs, metric.gradients

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = weight - u @ v
        value = torch.trace(error.T @ gradients @ error @ inputs)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(loss().detach())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_descent_finds_better_factors(shape: tuple[int, int]) -> None:
    weight, metric = problem(*shape)
    factors, values = weighted_factors(weight, 4, metric)
    ours = weighted_norm(weight - factors.u @ factors.v, metric) ** 2
    assert ours == pytest.approx(min(by_descent(weight, 4, metric, seed) for seed in range(3)), rel=1e-6)
    assert ours == pytest.approx(float(values[4:].square().sum()), rel=1e-9)
    plain = truncated_svd(weight, 4)
    assert ours < 0.95 * weighted_norm(weight - plain.u @ plain.v, metric) ** 2


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=60, deadline=None)
def test_the_error_is_the_tail_and_factors_are_balanced(
    rows: int, columns: int, samples: int, rank: int, seed: int, dtype: str
) -> None:
    """Also where fewer samples than columns make C singular."""
    rank = min(rank, rows, columns)
    wide, metric = problem(rows, columns, seed, samples)
    weight = wide.to(getattr(torch, dtype))
    factors, values = weighted_factors(weight, rank, metric)
    assert factors.u.dtype == weight.dtype
    whole = weighted_norm(weight, metric)
    digits = 1e-5 if dtype == "float32" else 1e-7  # roots of what fp64 rounds away
    lost = weighted_norm(weight.double() - factors.u.double() @ factors.v.double(), metric)
    assert lost == pytest.approx(float(values[rank:].norm()), abs=digits * max(whole, 1e-12))
    assert balance_of(factors) < 1e-4
    torch.testing.assert_close(values, weighted_values(weight, metric), rtol=1e-6, atol=1e-6 * float(values[0]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_identity_is_plain_svd(shape: tuple[int, int]) -> None:
    weight, _ = problem(*shape)
    plain = truncated_svd(weight, 5)
    for metric in (Metric(None), Metric(torch.eye(shape[1]), torch.eye(shape[0]))):
        factors, values = weighted_factors(weight, 5, metric)
        torch.testing.assert_close(factors.u @ factors.v, plain.u @ plain.v, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(values, torch.linalg.svdvals(weight), rtol=1e-7, atol=1e-9)


def test_a_scale_that_fp32_would_drown_is_kept() -> None:
    """One direction of the inputs 1e8 times as strong as the rest, as a transformer's activations have it."""
    weight, _ = problem(30, 20)
    scales = torch.ones(20).double()
    scales[3] = 1e8
    metric = Metric(torch.diag(scales))
    factors, values = weighted_factors(weight, 10, metric)
    wanted = torch.linalg.svdvals(weight * scales.sqrt())
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=0)
    assert weighted_norm(weight - factors.u @ factors.v, metric) == pytest.approx(float(wanted[10:].norm()), rel=1e-5)


def test_damping_adds_a_share_of_the_mean_diagonal_and_leaves_its_argument() -> None:
    given = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    torch.testing.assert_close(damp(given, 0.1), torch.tensor([[2.3, 1.0], [1.0, 4.3]]).double())
    assert given.tolist() == [[2.0, 1.0], [1.0, 4.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, m: (w * torch.nan, m), "the weight holds NaN"),
        (lambda w, m: (w, m._replace(inputs=m.inputs * torch.inf)), "the second moment of its inputs holds NaN or Inf"),
        (lambda w, m: (w, m._replace(inputs=m.inputs[:3, :3])), r"shape \(3, 3\), not \(20, 20\)"),
        (lambda w, m: (w, m._replace(gradients=torch.zeros(9, 9))), "not positive definite; damp it"),
    ],
    ids=["weight", "inputs", "shape", "gradients"],
)
def test_errors_of_weights_and_metrics_name_the_fault(change: Any, message: str) -> None:
    weight, metric = change(*problem(9, 20))
    with pytest.raises(WeightError, match=message):
        weighted_factors(weight, 3, metric)


@pytest.mark.parametrize("init", [name for name in INITS if name not in WITHOUT_DIRECTIONS])
def test_inits_take_their_directions_from_the_metric(init: str) -> None:
    weight, metric = problem(9, 20)
    best = directions(weighted_factors(weight, 4, metric).factors)
    generator = torch.Generator().manual_seed(0)
    found = INITS[init](InitProblem(weight, 4, 20, generator, metric))
    ours = directions(found.factors)
    assert found.weighted is not None
    torch.testing.assert_close(ours.u @ ours.u.T, best.u @ best.u.T)
    torch.testing.assert_close(ours.v @ ours.v.T, best.v @ best.v.T)
    if init == "spectral-ones":
        torch.testing.assert_close(ours.values, torch.ones(4).double())
    if init == "spectral":
        torch.testing.assert_close(ours.values, best.values)
    torch.testing.assert_close(found.values.double(), torch.linalg.svdvals(weight), rtol=1e-5, atol=1e-5)
