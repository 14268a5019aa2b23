"""Truncated singular value decompositions of dense weights: tensors in, tensors out.

The engine eigendecomposes the Gram matrix of the short side: with Q_r the leading eigenvectors of W W^T (W in wide
orientation), W ~ Q_r (Q_r^T W) is the best approximation of rank r (Eckart & Young 1936). If r is far below full rank,
a block Krylov method finds Q_r without the other eigenvectors. Squaring halves the number of correct digits. If the
kept singular values are too close to the rounding error, the engine repeats the work in fp64, then by a full SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import RankError, SurgeryError, WeightError
from lrsurgery.linalg.factors import Factors, largest, power_of_two, stacked_values, times, working_dtype
from lrsurgery.linalg.krylov import krylov

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch's stubs leave it out

# Smallest singular value, relative to the largest, whose direction a Gram matrix of this precision resolves.
DIRECTION_FLOOR = {torch.float32: 0.1, torch.float64: 1e-4}


# auto: within 1e-5 of the Eckart-Young error; fast: within 1%, for exploration; full: LAPACK's SVD in fp64
ENGINES = ("auto", "fast", "full")


class Spectrum(NamedTuple):
    """Singular values and vectors of W from an earlier decomposition at any rank."""

    values: Tensor  # (full rank,) descending
    vectors: Tensor | None = None  # (short side, full rank), the singular vectors of the short side
    precision: torch.dtype = torch.float32  # of the Gram matrix that gave the vectors


class Decomposition(NamedTuple):
    """Factors in the working dtype, with the spectrum."""

    factors: Factors
    values: Tensor  # (full rank,) singular values of W, descending; NaN past the rank if "fast" did not compute them
    energy: float  # sum of all squared singular values
    spectrum: Spectrum | None = None  # with all vectors, for the cache; None unless `keep` was set
    weighted: Tensor | None = None  # (full rank,) singular values in the metric that the factors are the best in


RankChoice: TypeAlias = "int | Callable[[Tensor], int]"  # a rank, or a function of the singular values (full rank,)


class _Problem(NamedTuple):
    """A weight as a wide matrix (short, long) in the working dtype with entries near 1."""

    matrix: Tensor
    scale: float
    turned: bool
    rank: RankChoice
    directions: bool
    svd: str
    known: Spectrum | None
    keep: bool

    def choose(self, values: Tensor) -> int:
        return self.rank(values * self.scale) if callable(self.rank) else self.rank


class _Result(NamedTuple):
    values: Tensor  # (short,) in the matrix's dtype
    basis: Tensor  # (short, rank) with orthonormal columns
    image: Tensor | None  # (rank, long) right singular vectors, from a full SVD only
    spectrum: Spectrum | None  # all vectors, if `keep` is set and the engine computed them


def spectral_factors(
    weight: Tensor, rank: RankChoice, *, svd: str = "auto", known: Spectrum | None = None, keep: bool = False
) -> Decomposition:
    """The best approximation of weight (rows, columns): u = U_r S_r^(1/2), v = S_r^(1/2) V_r^T, an even split.

    `svd` is one of `ENGINES`. `known`, the spectrum of an earlier call for the same weight, saves its computation;
    with `keep` the result holds such a spectrum.

    Raises WeightError if the weight is not finite, or if no LAPACK driver converges.
    """
    problem = _Problem(*_normalise(weight), rank, False, svd, known, keep)
    result = _decompose(problem)
    matrix, basis = problem.matrix, result.basis
    kept = basis.shape[1]
    # (NaN, a tail that "fast" did not compute, compares false)
    if result.values[kept:].norm() <= 100 * torch.finfo(matrix.dtype).eps * result.values.norm():
        # Nothing is left out, so the eigensolver's defect in orthonormality is the whole error. One Newton step of the
        # polar iteration reduces it from about 10 eps to 2; in fp64, an fp32 weight keeps only its rounding error.
        basis, matrix = basis.double(), matrix.double()
        basis = 1.5 * basis - 0.5 * basis @ (basis.T @ basis)
    image = basis.T @ matrix
    # Row norms of the image, not square roots of eigenvalues: the split stays exact if those were rounded.
    root = image.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    dtype = problem.matrix.dtype
    u = (basis * (root * math.sqrt(problem.scale))).to(dtype)
    v = image.mul_((inverse * math.sqrt(problem.scale))[:, None]).to(dtype)
    return _assemble(problem, result, Factors(v.T, u.T) if problem.turned else Factors(u, v))


def direction_factors(
    weight: Tensor, rank: RankChoice, *, svd: str = "auto", known: Spectrum | None = None, keep: bool = False
) -> Decomposition:
    """The leading singular directions alone: u = U_r, v = V_r^T with orthonormal columns and rows.

    Arguments and errors are those of `spectral_factors`. Every single direction must be accurate, not only their
    span, so "fast" acts as "auto".
    """
    problem = _Problem(*_normalise(weight), rank, True, svd, known, keep)
    result = _decompose(problem)
    image = result.image if result.image is not None else result.basis.T @ problem.matrix
    image = image / image.norm(dim=1, keepdim=True)
    factors = Factors(image.T, result.basis.T) if problem.turned else Factors(result.basis, image)
    return _assemble(problem, result, factors)


def singular_values(weight: Tensor) -> Tensor:
    """All singular values (full rank,) of weight (rows, columns), descending, in the working dtype.

    Those of several matrices (matrices, rows, columns) are stacked.

    Raises WeightError if the weight is not finite, or if no LAPACK driver converges.
    """
    if weight.ndim > 2:
        return stacked_values([singular_values(each) for each in weight])
    matrix, scale, _ = _normalise(weight)
    for precision in (torch.float32, torch.float64):
        if torch.finfo(precision).eps <= torch.finfo(matrix.dtype).eps:
            try:
                return times(_roots(torch.linalg.eigvalsh(_gram(matrix, precision)), matrix.dtype), scale)
            except LinAlgError:
                continue
    try:
        values: Tensor = torch.linalg.svdvals(matrix.double())
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(matrix.shape)} matrix") from e
    return times(values.to(matrix.dtype), scale)


def _assemble(problem: _Problem, result: _Result, factors: Factors) -> Decomposition:
    if bool(result.values.isnan().any()):
        energy = float(torch.linalg.vector_norm(problem.matrix, dtype=torch.float64)) ** 2
    else:
        energy = float(result.values.double().square().sum())
    values = times(result.values, problem.scale)
    spectrum = result.spectrum._replace(values=values) if result.spectrum is not None else None
    return Decomposition(factors, values, energy * problem.scale**2, spectrum)


def _normalise(weight: Tensor) -> tuple[Tensor, float, bool]:
    """The weight as a wide matrix in the working dtype with entries near 1, its scale, whether it was transposed."""
    if weight.ndim != 2 or not weight.numel():
        raise WeightError(f"the weight has shape {tuple(weight.shape)}; a matrix with at least one entry is needed")
    wide = weight.detach().to(working_dtype(weight.dtype))
    largest_entry = largest(wide)
    if not largest_entry < math.inf:  # false for NaN too
        raise WeightError("the weight holds NaN or Inf; repair the checkpoint first")
    turned = wide.shape[0] > wide.shape[1]
    matrix = wide.T if turned else wide
    scale = power_of_two(largest_entry)
    return (matrix / scale if scale != 1.0 else matrix), scale, turned


def _decompose(problem: _Problem) -> _Result:
    """Try in turn: known vectors; a Krylov method if it is cheaper; the Gram matrix in fp32, in fp64; a full SVD."""
    matrix, known = problem.matrix, problem.known
    if known is not None:
        problem = problem._replace(rank=problem.choose(known.values.to(matrix.device) / problem.scale))
        result = _from_known(problem)
        if result is not None:
            return result
    for precision in (torch.float32, torch.float64):
        if torch.finfo(precision).eps > torch.finfo(matrix.dtype).eps or problem.svd == "full":
            continue
        try:
            gram = _gram(matrix, precision)
            result = _leading_directions(problem, gram) if precision == torch.float32 else None
            if result is not None:
                return result
            eigenvalues, vectors = torch.linalg.eigh(gram)
        except LinAlgError:
            continue
        del gram  # the Gram matrix and the vectors dominate the memory of a large layer
        values = _roots(eigenvalues, matrix.dtype)
        kept = problem.choose(values)
        if _accurate(values, kept, problem, precision):
            basis = vectors[:, -kept:].flip(1).to(matrix.dtype)
            spectrum = Spectrum(values, vectors.flip(1).to(matrix.dtype), precision) if problem.keep else None
            return _Result(values, basis, None, spectrum)
        del vectors
    try:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(matrix.shape)} matrix") from e
    values = values.to(matrix.dtype)
    kept = problem.choose(values)
    return _Result(values, left[:, :kept].to(matrix.dtype), right[:kept].to(matrix.dtype), None)


def _from_known(problem: _Problem) -> _Result | None:
    """The result from known vectors, or None if they are missing or not accurate enough for this rank."""
    matrix, known, rank = problem.matrix, problem.known, problem.rank
    assert known is not None
    assert isinstance(rank, int)
    values = (known.values.to(matrix.device) / problem.scale).to(matrix.dtype)
    if known.vectors is None or not _accurate(values, rank, problem, known.precision):
        return None
    return _Result(values, known.vectors[:, :rank].to(matrix), None, None)


def _gram(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """matrix @ matrix.T (short, short) in this precision; tiles above the diagonal are copied from those below."""
    short, long = matrix.shape
    tiles = 4 if short >= 256 else 1  # measured: four strips take 2/3 of the time of one; more gain nothing
    gram = matrix.new_zeros(short, short, dtype=precision)
    step = -(-short // tiles)
    # convert some columns at a time, so that no whole copy in the wider precision is held
    width = long if precision == matrix.dtype else max(1, (1 << 23) // short)
    for column in range(0, long, width):
        wide = matrix[:, column : column + width].to(precision)
        for start in range(0, short, step):
            end = min(start + step, short)
            gram[start:end, :end].addmm_(wide[start:end], wide[:end].T)
    for start in range(step, short, step):
        end = min(start + step, short)
        gram[:start, start:end] = gram[start:end, :start].T
    return gram


def _roots(eigenvalues: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values (short,), descending, from ascending eigenvalues of the Gram matrix."""
    eigenvalues = eigenvalues.flip(0)
    # eigenvalues below the rounding error count as zero singular values
    noise = eigenvalues[0] * torch.finfo(eigenvalues.dtype).eps * len(eigenvalues)
    return torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues)).sqrt().to(dtype)


def _accurate(values: Tensor, kept: int, problem: _Problem, precision: torch.dtype) -> bool:
    """Whether eigenvectors of a Gram matrix in this precision separate the kept directions from the others.

    Rounding of size eps ||W||^2 in the Gram matrix rotates the last kept direction by up to eps ||W||^2 / s_r^2 into
    the others, which adds eps^2 ||W||^4 / s_r^2 to the squared error. The error must grow by at most 5e-6 of the
    Eckart-Young error plus the rounding of the factors.
    """
    dtype = problem.matrix.dtype
    if values[0] <= 0:
        return precision == torch.float64 and dtype != torch.float64 and not problem.directions
    if problem.directions:
        return bool(values[kept - 1] >= DIRECTION_FLOOR[precision] * values[0])
    if precision == torch.float64 and dtype != torch.float64:
        return True  # storage in fp32 or less rounds more than an fp64 Gram matrix does
    norm, tail, last = (float(v) for v in (values.norm(), values[kept:].norm(), values[kept - 1]))
    if last == 0:
        return False
    lost = torch.finfo(precision).eps * norm**2 / last
    return math.hypot(tail, lost) - tail <= 5e-6 * tail + torch.finfo(dtype).eps * norm


# (smallest short side, largest share of full rank) at which a Krylov method is cheaper than all eigenvectors.
# Measured by examples/benchmarks/ladder.py: auto also computes all singular values, known has them, fast needs none.
LEADING_PAYS = {
    "auto": ((4096, 1 / 8), (1024, 1 / 16)),
    "known": ((512, 1 / 8),),
    "fast": ((4096, 1 / 4), (512, 1 / 8)),
}


def _leading_directions(problem: _Problem, gram: Tensor) -> _Result | None:
    """The leading directions by a block Krylov method, or None if it is not cheaper or not accurate enough."""
    rank, matrix, known = problem.rank, problem.matrix, problem.known
    if problem.directions or problem.svd not in ("auto", "fast") or callable(rank):
        return None
    short = len(gram)
    case = "fast" if problem.svd == "fast" else "auto" if known is None else "known"
    if not any(short >= side and rank <= share * short for side, share in LEADING_PAYS[case]):
        return None
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if not energy > 0:
        return None
    if case == "fast":
        leading = krylov(gram, rank, energy=energy)
        if leading is None:
            return None
        basis, top = leading
        values = torch.full((short,), math.nan, dtype=matrix.dtype, device=matrix.device)
        values[:rank] = _roots(top, matrix.dtype)
        return _Result(values, basis, None, None)
    if known is not None:
        values = (known.values.to(matrix.device) / problem.scale).to(matrix.dtype)
    else:
        values = _roots(torch.linalg.eigvalsh(gram), matrix.dtype)
    if not _accurate(values, rank, problem, gram.dtype):
        return None
    best = float(values[:rank].double().square().sum())
    leading = krylov(gram, rank, energy=energy, best=best)
    return _Result(values, leading[0], None, None) if leading is not None else None


def truncated_svd(weight: Tensor, rank: int, *, svd: str = "auto") -> Factors:
    """Factors u (rows, rank), v (rank, columns) of weight (rows, columns), best in Frobenius norm (Eckart & Young).

    The singular values are split evenly (Khodak et al. 2021, spectral initialisation), so that u^T u = v v^T. Computes
    in fp32 or wider, returns the weight's dtype. `svd`: "auto" is within 1e-5 of the best error, "fast" within 1%,
    "full" is LAPACK's SVD in fp64.

    Raises RankError if rank is not between 1 and full rank; WeightError if the weight is not finite; SurgeryError for
    an unknown `svd`.
    """
    check_engine(svd)
    full = min(weight.shape) if weight.ndim == 2 else 0
    if weight.ndim == 2 and not 1 <= rank <= full:
        raise RankError(f"rank {rank} is not between 1 and {full}, the full rank of {tuple(weight.shape)}")
    u, v = spectral_factors(weight, rank, svd=svd).factors
    return Factors(u.to(weight.dtype), v.to(weight.dtype))


def check_engine(svd: str) -> None:
    """Raise SurgeryError that lists the known engines, unless `svd` is one."""
    if svd not in ENGINES:
        raise SurgeryError(f"unknown svd '{svd}'; known: {', '.join(ENGINES)}")
