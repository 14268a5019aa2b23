"""Truncated singular value decompositions of dense weights: tensors in, tensors out.

The engine is the Gram matrix of the short side, its symmetric eigendecomposition and one product: with Q_r the leading
eigenvectors of W W^T (W the wide orientation), W ~ Q_r (Q_r^T W) is the best approximation of rank r (Eckart & Young
1936). Squaring costs half of the digits, so the decomposition climbs to fp64, and from there to a full SVD, where the
kept singular values come too close to what rounding leaves of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import RankError, WeightError

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch's stubs leave it out

# Smallest kept singular value, relative to the largest, whose direction a Gram matrix of this precision resolves.
DIRECTION_FLOOR = {torch.float32: 0.1, torch.float64: 1e-4}


class Factors(NamedTuple):
    """W ~ u @ v, u (rows, rank), v (rank, columns)."""

    u: Tensor
    v: Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic runs in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class Decomposed(NamedTuple):
    """Factors in the working dtype, and all singular values (full rank,) of the dense matrix, descending."""

    factors: Factors
    values: Tensor


RankChoice: TypeAlias = "int | Callable[[Tensor], int]"  # a rank, or a function of the singular values (full rank,)


def spectral_factors(weight: Tensor, rank: RankChoice) -> Decomposed:
    """The best approximation of weight (rows, columns): u = U_r S_r^(1/2), v = S_r^(1/2) V_r^T, an even split.

    Raises WeightError where the weight is not finite, or where no LAPACK driver converges.
    """
    matrix, scale, turned = _normalised(weight)
    values, basis, image = _decompose(matrix, rank, scale, directions=False)
    # Row norms of the image, not square roots of eigenvalues: the split is exact whatever those lost to rounding.
    root = image.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    u = (basis * (root * math.sqrt(scale))).to(values.dtype)
    v = (image * (inverse * math.sqrt(scale))[:, None]).to(values.dtype)
    return Decomposed(Factors(v.T, u.T) if turned else Factors(u, v), values * scale)


def direction_factors(weight: Tensor, rank: RankChoice) -> Decomposed:
    """The leading singular directions alone: u = U_r, v = V_r^T with orthonormal columns and rows.

    Raises WeightError as `spectral_factors` does.
    """
    matrix, scale, turned = _normalised(weight)
    values, basis, image = _decompose(matrix, rank, scale, directions=True)
    return Decomposed(Factors(image.T, basis.T) if turned else Factors(basis, image), values * scale)


def _normalised(weight: Tensor) -> tuple[Tensor, float, bool]:
    """The weight as a wide matrix in the working dtype with entries near 1, its scale, and whether it was turned."""
    if weight.ndim != 2 or not weight.numel():
        raise WeightError(f"a matrix is needed, this weight has shape {tuple(weight.shape)}")
    wide = weight.detach().to(working_dtype(weight.dtype))
    largest = float(wide.abs().max())
    if not largest < math.inf:  # NaN compares false as well
        raise WeightError("the weight holds NaN or Inf; repair the checkpoint first")
    # A power of two keeps every digit, and keeps squares of 1e-20 or 1e20 inside fp32's range.
    scale = 2.0 ** round(math.log2(largest)) if largest > 0 else 1.0
    turned = wide.shape[0] > wide.shape[1]
    return (wide.T if turned else wide) / scale, scale, turned


def _decompose(matrix: Tensor, rank: RankChoice, scale: float, *, directions: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (short,), basis (short, r) and image (r, long) of a matrix (short, long).

    `basis` has orthonormal columns. `image` is basis^T matrix or, for directions, the right singular vectors.
    """
    choose = rank if callable(rank) else (lambda values: rank)
    for precision in (torch.float32, torch.float64):
        if torch.finfo(precision).eps > torch.finfo(matrix.dtype).eps:
            continue
        try:
            values, vectors = _gram_eigh(matrix, precision)
        except LinAlgError:
            continue
        kept = choose(values * scale)
        # Storage in fp32 or less rounds away all that an fp64 Gram matrix cannot resolve of the product.
        rounded_away = precision == torch.float64 and matrix.dtype != torch.float64 and not directions
        if rounded_away or (values[0] > 0 and _resolved(values, kept, matrix.dtype, directions=directions)):
            image = None
            break
    else:
        try:
            vectors, values, image = torch.linalg.svd(matrix.double(), full_matrices=False)
        except LinAlgError as e:
            raise WeightError(f"no LAPACK driver converges on this {tuple(matrix.shape)} matrix") from e
        kept = choose(values * scale)
    values, basis = values.to(matrix.dtype), vectors[:, :kept].to(matrix.dtype)
    if directions:
        image = image[:kept].to(matrix.dtype) if image is not None else basis.T @ matrix
        return values, basis, image / image.norm(dim=1, keepdim=True)
    if values[kept:].norm() <= 100 * torch.finfo(matrix.dtype).eps * values.norm():
        # Nothing is left out, so what the eigensolver lacks in orthonormality is the whole error: one Newton step
        # of the polar iteration takes it from about 10 eps to 2, and fp64 fp32's to its rounding alone.
        basis, matrix = basis.double(), matrix.double()
        basis = 1.5 * basis - 0.5 * basis @ (basis.T @ basis)
    return values, basis, basis.T @ matrix


def _resolved(values: Tensor, kept: int, stored: torch.dtype, *, directions: bool) -> bool:
    """Whether a Gram matrix of the precision of `values` separates what is kept from what is left out well enough.

    Rounding of size eps ||W||^2 in the Gram matrix turns the last kept direction by up to eps ||W||^2 / s_r^2 into what
    is left out, and so costs eps^2 ||W||^4 / s_r^2 of squared error. That has to stay below 1e-5 of the Eckart-Young
    error and the rounding of factors stored in `stored`.
    """
    if directions:
        return bool(values[kept - 1] >= DIRECTION_FLOOR[values.dtype] * values[0])
    norm, tail, last = (float(v) for v in (values.norm(), values[kept:].norm(), values[kept - 1]))
    if last == 0:
        return False
    lost = torch.finfo(values.dtype).eps * norm**2 / last
    allowed = 1e-5 * tail + torch.finfo(stored).eps * norm
    return math.hypot(tail, lost) - tail <= allowed


def _gram_eigh(matrix: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Singular values (short,) descending and left singular vectors (short, short) by way of matrix @ matrix.T."""
    work = matrix.to(precision)
    eigenvalues, vectors = torch.linalg.eigh(work @ work.T)
    eigenvalues = eigenvalues.flip(0)
    # what rounding leaves of a zero singular value is not a singular value
    noise = eigenvalues[0] * torch.finfo(precision).eps * matrix.shape[0]
    values = torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues)).sqrt()
    return values, vectors.flip(1)


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """Factors u (rows, rank), v (rank, columns) of weight (rows, columns), best in Frobenius norm (Eckart & Young).

    The singular values are split evenly (Khodak et al. 2021, spectral initialisation), so that u^T u = v v^T. Works in
    fp32 or wider, returns the weight's dtype.

    Raises RankError where rank is not between 1 and full rank; WeightError where the weight is not finite.
    """
    full = min(weight.shape) if weight.ndim == 2 else 0
    if weight.ndim == 2 and not 1 <= rank <= full:
        raise RankError(f"rank {rank} is not between 1 and {full}, the full rank of {tuple(weight.shape)}")
    u, v = spectral_factors(weight, rank).factors
    return Factors(u.to(weight.dtype), v.to(weight.dtype))


def balance(factors: Factors) -> Factors:
    """The same product with u^T u = v v^T, from the QR of each factor and the SVD of the r x r core."""
    q_u, r_u = torch.linalg.qr(factors.u)
    q_v, r_v = torch.linalg.qr(factors.v.T)
    left, values, right = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
    root = values.sqrt()
    return Factors(q_u @ (left * root), (root[:, None] * right) @ q_v.T)


def product_values(factors: Factors) -> Tensor:
    """Singular values (rank,) of u @ v in O((rows + columns) rank^2); the product is never formed."""
    dtype = working_dtype(factors.u.dtype)
    r_u = torch.linalg.qr(factors.u.detach().to(dtype), mode="r").R
    r_v = torch.linalg.qr(factors.v.detach().to(dtype).T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_u @ r_v.T)
    return values


def relative_error(weight: Tensor, factors: Factors) -> float:
    """||W - u v||_F / ||W||_F in the working dtype; 0 for the zero matrix approximated by itself."""
    wide = weight.to(working_dtype(weight.dtype))
    largest = wide.abs().max()
    scale = largest if largest > 0 else torch.ones_like(largest)
    residual = wide / scale - (factors.u.to(wide.dtype) / scale) @ factors.v.to(wide.dtype)
    norm = float((wide / scale).norm())
    return float(residual.norm()) / norm if norm > 0 else float(residual.norm())
