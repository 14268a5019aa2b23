"""Comparison of two low-rank matrices: principal angles between their leading singular subspaces."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrsurgery.linalg.factors import Factors, working_dtype

LEADING = 12  # largest number of subspace dimensions k that are compared


class Angles(NamedTuple):
    """Principal angles of two subspaces of equal dimension, in degrees: 0 for a shared direction, 90 for a new one."""

    largest: float
    median: float


class Shared(NamedTuple):
    """Share (0 to 1) of the k leading directions of one matrix that lies in those of the other."""

    k: int
    output: float
    input: float


class Overlap(NamedTuple):
    """Angles of the column spaces (output) and row spaces (input), and overlap of their leading directions."""

    output: Angles
    input: Angles
    leading: tuple[Shared, ...]


class Directions(NamedTuple):
    """Singular value decomposition of a product: u (rows, rank), values (rank,), v (columns, rank)."""

    u: Tensor
    values: Tensor
    v: Tensor


def directions(factors: Factors) -> Directions:
    """SVD of u v in O((rows + columns) rank^2), by QR of each factor and SVD of the core."""
    dtype = working_dtype(factors.u.dtype)
    q_u, r_u = torch.linalg.qr(factors.u.detach().to(dtype))
    q_v, r_v = torch.linalg.qr(factors.v.detach().to(dtype).T)
    left, values, right = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
    return Directions(q_u @ left, values, q_v @ right.T)


def overlap(one: Directions, other: Directions) -> Overlap:
    """Compare two matrices of equal shape and rank by their singular directions.

    The principal angles are the arc cosines of the singular values of Q1^T Q2; small angles are computed from the sine,
    which is accurate there (Bjorck & Golub 1973). The overlap of the k leading directions is ||Q1^T Q2||_F^2 / k, the
    mean squared cosine of their angles.
    """
    rank = one.values.numel()
    output, input_ = one.u.T @ other.u, one.v.T @ other.v
    outputs, inputs = _leading_shares(output), _leading_shares(input_)
    ks = sorted({min(rank, round(k)) for k in torch.logspace(0, math.log10(rank), LEADING).tolist()})
    leading = tuple(Shared(k, float(outputs[k - 1]), float(inputs[k - 1])) for k in ks)
    return Overlap(_angles(one.u, other.u, output), _angles(one.v, other.v, input_), leading)


def _angles(one: Tensor, other: Tensor, crossed: Tensor) -> Angles:
    cosines = torch.linalg.svdvals(crossed).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ crossed).clamp(max=1).flip(0)
    # the arc cosine is ill-conditioned near 1, the arc sine is not near 0
    angles = torch.where(cosines > 0.7, sines.asin(), cosines.acos()).rad2deg()
    return Angles(float(angles.max()), float(angles.median()))


def _leading_shares(crossed: Tensor) -> Tensor:
    """||crossed[:k, :k]||_F^2 / k for every k."""
    squares = crossed.double().square().cumsum(0).cumsum(1).diagonal()
    return (squares / torch.arange(1, len(squares) + 1, device=squares.device)).clamp(max=1)
