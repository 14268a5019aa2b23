"""The two factors of a matrix: balancing them, and properties of their product without forming it.

The matrices of a grouped layer or of fused experts stand together along a first axis: one rank for all, and for each
singular value the root of the sum of their squares over the matrices, so that what is left out adds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """W ~ u @ v, u (rows, rank), v (rank, columns)."""

    u: Tensor
    v: Tensor


def blocks_of(factors: Factors) -> list[Factors]:
    """The factors of each of several matrices; of one alone, itself."""
    return [factors] if factors.u.ndim == 2 else [Factors(u, v) for u, v in zip(factors.u, factors.v, strict=True)]


def stacked_values(values: Sequence[Tensor]) -> Tensor:
    """Singular values (n,) of several matrices together, in fp64: their norms over the matrices."""
    norms: Tensor = torch.linalg.vector_norm(torch.stack([each.double() for each in values]), dim=0)
    return norms


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for arithmetic on tensors of `dtype`: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def balance(factors: Factors) -> Factors:
    """Factors of the same product with u^T u = v v^T, by QR of each factor and SVD of the r x r core."""
    q_u, r_u = torch.linalg.qr(factors.u)
    q_v, r_v = torch.linalg.qr(factors.v.T)
    left, values, right = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
    root = values.sqrt()
    return Factors(q_u @ (left * root), (root[:, None] * right) @ q_v.T)


def balance_of(factors: Factors) -> float:
    """||u^T u - v v^T||_F / ||u^T u||_F: 0 for balanced factors, as every init makes them; the largest of several."""
    if factors.u.ndim > 2:
        return max(map(balance_of, blocks_of(factors)))
    wide = working_dtype(factors.u.dtype)
    scale = power_of_two(max(largest(factors.u), largest(factors.v)))
    u, v = factors.u.detach().to(wide) / scale, factors.v.detach().to(wide) / scale
    left = u.T @ u
    norm = float(left.norm())
    return float((left - v @ v.T).norm()) / norm if norm else 0.0


def product_values(factors: Factors) -> Tensor:
    """Singular values (rank,) of u @ v in O((rows + columns) rank^2); the product is never formed.

    Of factors u (matrices, rows, rank), v (matrices, rank, columns) they are stacked.
    """
    if factors.u.ndim > 2:
        return stacked_values(list(map(product_values, blocks_of(factors))))
    dtype = working_dtype(factors.u.dtype)
    scales = power_of_two(largest(factors.u)), power_of_two(largest(factors.v))
    r_u = torch.linalg.qr(factors.u.detach().to(dtype) / scales[0], mode="r").R
    r_v = torch.linalg.qr(factors.v.detach().to(dtype).T / scales[1], mode="r").R
    return times(torch.linalg.svdvals(r_u @ r_v.T), scales[0] * scales[1])


def relative_error(weight: Tensor, factors: Factors) -> float:
    """||W - u v||_F / ||W||_F in the working dtype; ||u v||_F for the zero matrix."""
    lost, norm = _squares(weight, factors, 1.0)
    if not 1e-20 < norm < 1e30 or not lost > 1e-20:  # squares may have left the range of fp32
        lost, norm = _squares(weight, factors, power_of_two(largest(weight)))
    return math.sqrt(lost / norm) if norm > 0 else math.sqrt(lost)


def _squares(weight: Tensor, factors: Factors, scale: float) -> tuple[float, float]:
    """||W - u v||_F^2 and ||W||_F^2, both divided by scale^2; the product is formed slice by slice."""
    wide = working_dtype(weight.dtype)
    u, v = factors.u.to(wide), factors.v.to(wide)
    lost = norm = 0.0
    rows = max(1, (1 << 22) // weight.shape[1])  # rows of a slice: 16 MB in fp32
    for start in range(0, weight.shape[0], rows):
        part, left = weight[start : start + rows].to(wide), u[start : start + rows]
        if scale != 1.0:
            part, left = part / scale, left / scale
        norm += float(torch.linalg.vector_norm(part)) ** 2
        lost += float(torch.linalg.vector_norm(torch.addmm(part, left, v, alpha=-1))) ** 2
    return lost, norm


def times(values: Tensor, scale: float) -> Tensor:
    """values * scale in their dtype, in fp64 where they would overflow there."""
    scaled = values * scale
    return values.double() * scale if bool(scaled.isinf().any()) else scaled


def largest(matrix: Tensor) -> float:
    """The largest magnitude of an entry; NaN if any entry is NaN."""
    least, most = matrix.detach().aminmax()
    return max(-float(least), float(most))


def power_of_two(size: float) -> float:
    """A divisor that keeps squares in the range of fp32; 1 if they already are. Powers of two lose no digit."""
    return 2.0 ** math.floor(math.log2(size)) if size > 0 and not 1e-6 < size < 1e6 else 1.0
