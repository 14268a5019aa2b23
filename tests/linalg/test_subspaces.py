"""Directions against numpy's SVD, and principal angles that are known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.subspaces import directions, overlap


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    return made


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(6, 20), st.integers(6, 20))
def test_directions_are_the_svd_of_the_product(seed: int, rank: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    v = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    found = directions(Factors(u, v))
    values = np.linalg.svd((u @ v).numpy(), compute_uv=False)[:rank]
    assert found.values.numpy() == pytest.approx(values, rel=1e-9)
    again = found.u * found.values @ found.v.T
    assert float((again - u @ v).norm()) < 1e-10 * float((u @ v).norm())
    for side in (found.u, found.v):
        assert float((side.T @ side - torch.eye(rank, dtype=torch.float64)).norm()) < 1e-10


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.floats(1e-4, math.pi / 2), min_size=1, max_size=5), st.sampled_from(("u", "v"))
)
def test_angles_that_were_put_there_are_found(seed: int, put: list[float], side: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = len(put)
    frame = orthonormal(16, 2 * rank, generator)
    other = orthonormal(12, rank, generator)
    one, rest = frame[:, :rank], frame[:, rank:]
    angles = torch.tensor(put, dtype=torch.float64)
    turned = one * angles.cos() + rest * angles.sin()
    scale = torch.linspace(2, 1, rank, dtype=torch.float64)

    def factors(basis: torch.Tensor) -> Factors:
        return Factors(basis * scale, other.T) if side == "u" else Factors(other * scale, basis.T)

    found = overlap(directions(factors(one)), directions(factors(turned)))
    moved, still = (found.output, found.input) if side == "u" else (found.input, found.output)
    assert moved.largest == pytest.approx(math.degrees(max(put)), rel=1e-6, abs=1e-6)
    assert moved.median == pytest.approx(math.degrees(sorted(put)[(rank - 1) // 2]), rel=1e-6, abs=1e-6)
    assert still.largest < 1e-5
    shared = found.leading[-1]
    assert shared.k == rank
    assert getattr(shared, "output" if side == "u" else "input") == pytest.approx(float(angles.cos().square().mean()))


def test_leading_directions_are_compared_in_their_order() -> None:
    """The same subspace with its first two directions swapped shares nothing at k = 1 and all at k = 2."""
    generator = torch.Generator().manual_seed(0)
    u, v = orthonormal(9, 3, generator), orthonormal(8, 3, generator)
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    found = overlap(directions(Factors(u * values, v.T)), directions(Factors(u * values[[1, 0, 2]], v.T)))
    shares = {share.k: (share.output, share.input) for share in found.leading}
    assert shares[1] == pytest.approx((0.0, 0.0), abs=1e-12)
    assert shares[2] == pytest.approx((1.0, 1.0))
    assert found.output.largest < 1e-5
