"""How far the directions of two low-rank matrices lie apart: principal angles between their leading subspaces."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrsurgery.linalg.factors import Factors, working_dtype

LEADING = 12  # of the numbers of leading directions that are compared


class Angles(NamedTuple):
    """Of two subspaces of one dimension, in degrees: 0 where they share a direction, 90 where it is new."""

    largest: float
    median: float


class Shared(NamedTuple):
    """How much of the k leading directions of one matrix lies in those of the other, from 0 to 1."""

    k: int
    output: float
    input: float


class Overlap(NamedTuple):
    """The whole subspaces of the columns (output side) and rows (input side), and the leading directions of each."""

    output: Angles
    input: Angles
    leading: tuple[Shared, ...]


class Directions(NamedTuple):
    """The singular value decomposition of a product: u (rows, rank), values (rank,), v (columns, rank)."""

    u: Tensor
    values: Tensor
    v: Tensor


def directions(factors: Factors) -> Directions:
    """Singular vectors of u v in O((rows + columns) rank^2), from the QR of each factor and the SVD of the core."""
    dtype = working_dtype(factors.u.dtype)
    q_u, r_u = torch.linalg.qr(factors.u.detach().to(dtype))
    q_v, r_v = torch.linalg.qr(factors.v.detach().to(dtype).T)
    left, values, right = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
    return Directions(q_u @ left, values, q_v @ right.T)


def overlap(one: Directions, other: Directions) -> Overlap:
    """Compare two matrices of one shape and rank by their directions alone.

    The principal angles are the arc cosines of the singular values of Q1^T Q2 (Bjorck & Golub 1973), small ones taken
    from the sine, which keeps its digits there. The overlap of the k leading directions is ||Q1^T Q2||_F^2 / k, the
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
    # a cosine near 1 says little about its angle, a sine near 0 all
    found = torch.where(cosines > 0.7, sines.asin(), cosines.acos()).rad2deg()
    return Angles(float(found.max()), float(found.median()))


def _leading_shares(crossed: Tensor) -> Tensor:
    """||crossed[:k, :k]||_F^2 / k for every k."""
    squares = crossed.double().square().cumsum(0).cumsum(1).diagonal()
    return (squares / torch.arange(1, len(squares) + 1, device=squares.device)).clamp(max=1)
