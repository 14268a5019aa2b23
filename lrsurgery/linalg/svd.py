"""Truncated singular value decompositions of dense weights: tensors in, tensors out.

The engine is the Gram matrix of the short side, its symmetric eigendecomposition and one product: with Q_r the leading
eigenvectors of W W^T (W the wide orientation), W ~ Q_r (Q_r^T W) is the best approximation of rank r (Eckart & Young
1936). Where r is far below full rank a block Krylov method finds Q_r without the other eigenvectors. Squaring costs
half of the digits, so the decomposition climbs to fp64, and from there to a full SVD, where the kept singular values
come too close to what rounding leaves of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import RankError, SurgeryError, WeightError
from lrsurgery.linalg.factors import Factors, largest, power_of_two, working_dtype
from lrsurgery.linalg.krylov import krylov

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch's stubs leave it out

# Smallest kept singular value, relative to the largest, whose direction a Gram matrix of this precision resolves.
DIRECTION_FLOOR = {torch.float32: 0.1, torch.float64: 1e-4}


# auto: within 1e-5 of the Eckart-Young error; fast: within 1%, for exploration; full: LAPACK's SVD in fp64
ENGINES = ("auto", "fast", "full")


class Spectrum(NamedTuple):
    """What an earlier decomposition found: of W itself, whatever rank it was for."""

    values: Tensor  # (full rank,) descending
    vectors: Tensor | None = None  # (short side, full rank), the singular vectors of the short side
    precision: torch.dtype = torch.float32  # of the Gram matrix that the vectors are from


class Decomposed(NamedTuple):
    """Factors in the working dtype and what is known of the spectrum."""

    factors: Factors
    values: Tensor  # (full rank,) singular values of W, descending; NaN past the rank where "fast" did not look
    energy: float  # sum of all squared singular values
    spectrum: Spectrum | None = None  # to be kept, where that was asked for and there is more than the values
    weighted: Tensor | None = None  # (full rank,) singular values in a metric, where the factors are the best in one


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


class _Found(NamedTuple):
    values: Tensor  # (short,) in the matrix's dtype
    basis: Tensor  # (short, rank) with orthonormal columns
    image: Tensor | None  # (rank, long) right singular vectors, where the engine gave them
    spectrum: Spectrum | None  # all vectors, where the engine had them


def spectral_factors(
    weight: Tensor, rank: RankChoice, *, svd: str = "auto", known: Spectrum | None = None, keep: bool = False
) -> Decomposed:
    """The best approximation of weight (rows, columns): u = U_r S_r^(1/2), v = S_r^(1/2) V_r^T, an even split.

    `svd` is one of `ENGINES`. With `known` from an earlier call (same weight), what it knows is not computed again;
    with `keep` the vectors are handed back for that.

    Raises WeightError where the weight is not finite, or where no LAPACK driver converges.
    """
    problem = _Problem(*_normalised(weight), rank, False, svd, known, keep)
    found = _decompose(problem)
    matrix, basis = problem.matrix, found.basis
    kept = basis.shape[1]
    # (NaN, a tail that "fast" did not look at, compares false)
    if found.values[kept:].norm() <= 100 * torch.finfo(matrix.dtype).eps * found.values.norm():
        # Nothing is left out, so what the eigensolver lacks in orthonormality is the whole error: one Newton step of
        # the polar iteration takes it from about 10 eps to 2, and fp64 fp32's to its rounding alone.
        basis, matrix = basis.double(), matrix.double()
        basis = 1.5 * basis - 0.5 * basis @ (basis.T @ basis)
    image = basis.T @ matrix
    # Row norms of the image, not square roots of eigenvalues: the split is exact whatever those lost to rounding.
    root = image.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    dtype = problem.matrix.dtype
    u = (basis * (root * math.sqrt(problem.scale))).to(dtype)
    v = image.mul_((inverse * math.sqrt(problem.scale))[:, None]).to(dtype)
    return _decomposed(problem, found, Factors(v.T, u.T) if problem.turned else Factors(u, v))


def direction_factors(
    weight: Tensor, rank: RankChoice, *, svd: str = "auto", known: Spectrum | None = None, keep: bool = False
) -> Decomposed:
    """The leading singular directions alone: u = U_r, v = V_r^T with orthonormal columns and rows.

    Takes and raises what `spectral_factors` does; each direction has to be right by itself here, not only the space
    that they span, so "fast" is "auto".
    """
    problem = _Problem(*_normalised(weight), rank, True, svd, known, keep)
    found = _decompose(problem)
    image = found.image if found.image is not None else found.basis.T @ problem.matrix
    image = image / image.norm(dim=1, keepdim=True)
    factors = Factors(image.T, found.basis.T) if problem.turned else Factors(found.basis, image)
    return _decomposed(problem, found, factors)


def singular_values(weight: Tensor) -> Tensor:
    """All singular values (full rank,) of weight (rows, columns), descending, in the working dtype.

    Raises WeightError where the weight is not finite, or where no LAPACK driver converges.
    """
    matrix, scale, _ = _normalised(weight)
    for precision in (torch.float32, torch.float64):
        if torch.finfo(precision).eps <= torch.finfo(matrix.dtype).eps:
            try:
                return _roots(torch.linalg.eigvalsh(_gram(matrix, precision)), matrix.dtype) * scale
            except LinAlgError:
                continue
    try:
        values: Tensor = torch.linalg.svdvals(matrix.double())
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(matrix.shape)} matrix") from e
    return (values * scale).to(matrix.dtype)


def _decomposed(problem: _Problem, found: _Found, factors: Factors) -> Decomposed:
    if bool(found.values.isnan().any()):
        energy = float(torch.linalg.vector_norm(problem.matrix, dtype=torch.float64)) ** 2
    else:
        energy = float(found.values.double().square().sum())
    values = found.values * problem.scale
    kept = found.spectrum._replace(values=values) if found.spectrum is not None else None
    return Decomposed(factors, values, energy * problem.scale**2, kept)


def _normalised(weight: Tensor) -> tuple[Tensor, float, bool]:
    """The weight as a wide matrix in the working dtype with entries near 1, its scale, and whether it was turned."""
    if weight.ndim != 2 or not weight.numel():
        raise WeightError(f"a matrix is needed, this weight has shape {tuple(weight.shape)}")
    wide = weight.detach().to(working_dtype(weight.dtype))
    largest_entry = largest(wide)
    if not largest_entry < math.inf:  # NaN, which both then are, compares false as well
        raise WeightError("the weight holds NaN or Inf; repair the checkpoint first")
    turned = wide.shape[0] > wide.shape[1]
    matrix = wide.T if turned else wide
    scale = power_of_two(largest_entry)
    return (matrix / scale if scale != 1.0 else matrix), scale, turned


def _decompose(problem: _Problem) -> _Found:
    """The ladder: what is known; the leading directions alone where that is cheaper; Gram in fp32, fp64; full SVD."""
    matrix, known = problem.matrix, problem.known
    if known is not None:
        problem = problem._replace(rank=problem.choose(known.values.to(matrix.device) / problem.scale))
        found = _from_known(problem)
        if found is not None:
            return found
    for precision in (torch.float32, torch.float64):
        if torch.finfo(precision).eps > torch.finfo(matrix.dtype).eps or problem.svd == "full":
            continue
        try:
            gram = _gram(matrix, precision)
            found = _leading_directions(problem, gram) if precision == torch.float32 else None
            if found is not None:
                return found
            eigenvalues, vectors = torch.linalg.eigh(gram)
        except LinAlgError:
            continue
        del gram  # memory: this and the vectors are what a large layer costs
        values = _roots(eigenvalues, matrix.dtype)
        kept = problem.choose(values)
        if _accurate(values, kept, problem, precision):
            basis = vectors[:, -kept:].flip(1).to(matrix.dtype)
            spectrum = Spectrum(values, vectors.flip(1).to(matrix.dtype), precision) if problem.keep else None
            return _Found(values, basis, None, spectrum)
        del vectors
    try:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(matrix.shape)} matrix") from e
    values = values.to(matrix.dtype)
    kept = problem.choose(values)
    return _Found(values, left[:, :kept].to(matrix.dtype), right[:kept].to(matrix.dtype), None)


def _from_known(problem: _Problem) -> _Found | None:
    """What an earlier decomposition knows, where its vectors are good enough for this rank."""
    matrix, known, rank = problem.matrix, problem.known, problem.rank
    assert known is not None
    assert isinstance(rank, int)
    values = (known.values.to(matrix.device) / problem.scale).to(matrix.dtype)
    if known.vectors is None or not _accurate(values, rank, problem, known.precision):
        return None
    return _Found(values, known.vectors[:, :rank].to(matrix), None, None)


def _gram(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """matrix @ matrix.T (short, short) in this precision; the blocks above the diagonal are copied, not computed."""
    short, long = matrix.shape
    blocks = 4 if short >= 256 else 1  # measured: four cost 2/3 of one, more gain nothing
    gram = matrix.new_zeros(short, short, dtype=precision)
    step = -(-short // blocks)
    # a copy in a wider precision is made of some columns at a time
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
    # what rounding leaves of a zero singular value is not a singular value
    noise = eigenvalues[0] * torch.finfo(eigenvalues.dtype).eps * len(eigenvalues)
    return torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues)).sqrt().to(dtype)


def _accurate(values: Tensor, kept: int, problem: _Problem, precision: torch.dtype) -> bool:
    """Whether eigenvectors of a Gram matrix in this precision separate what is kept from what is left out.

    Rounding of size eps ||W||^2 in the Gram matrix turns the last kept direction by up to eps ||W||^2 / s_r^2 into what
    is left out, and so costs eps^2 ||W||^4 / s_r^2 of squared error. That has to stay below 5e-6 of the Eckart-Young
    error and the rounding of the factors.
    """
    dtype = problem.matrix.dtype
    if values[0] <= 0:
        return precision == torch.float64 and dtype != torch.float64 and not problem.directions
    if problem.directions:
        return bool(values[kept - 1] >= DIRECTION_FLOOR[precision] * values[0])
    if precision == torch.float64 and dtype != torch.float64:
        return True  # storage in fp32 or less rounds away all that an fp64 Gram matrix cannot resolve of the product
    norm, tail, last = (float(v) for v in (values.norm(), values[kept:].norm(), values[kept - 1]))
    if last == 0:
        return False
    lost = torch.finfo(precision).eps * norm**2 / last
    return math.hypot(tail, lost) - tail <= 5e-6 * tail + torch.finfo(dtype).eps * norm


# From which short side on, up to which share of full rank, the leading directions alone are cheaper than all of them.
# Measured (examples/benchmarks/ladder.py) where all singular values are computed besides, where they are known, and
# where they are not asked for.
LEADING_PAYS = {
    "auto": ((4096, 1 / 8), (1024, 1 / 16)),
    "known": ((512, 1 / 8),),
    "fast": ((4096, 1 / 4), (512, 1 / 8)),
}


def _leading_directions(problem: _Problem, gram: Tensor) -> _Found | None:
    """The leading directions by a block Krylov method, or None where that is not cheaper or not good enough."""
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
        found = krylov(gram, rank, energy=energy)
        if found is None:
            return None
        basis, top = found
        values = torch.full((short,), math.nan, dtype=matrix.dtype, device=matrix.device)
        values[:rank] = _roots(top, matrix.dtype)
        return _Found(values, basis, None, None)
    if known is not None:
        values = (known.values.to(matrix.device) / problem.scale).to(matrix.dtype)
    else:
        values = _roots(torch.linalg.eigvalsh(gram), matrix.dtype)
    if not _accurate(values, rank, problem, gram.dtype):
        return None
    best = float(values[:rank].double().square().sum())
    found = krylov(gram, rank, energy=energy, best=best)
    return _Found(values, found[0], None, None) if found is not None else None


def truncated_svd(weight: Tensor, rank: int, *, svd: str = "auto") -> Factors:
    """Factors u (rows, rank), v (rank, columns) of weight (rows, columns), best in Frobenius norm (Eckart & Young).

    The singular values are split evenly (Khodak et al. 2021, spectral initialisation), so that u^T u = v v^T. Works in
    fp32 or wider, returns the weight's dtype. `svd`: "auto" is within 1e-5 of the best error, "fast" within 1%, "full"
    LAPACK's SVD in fp64.

    Raises RankError where rank is not between 1 and full rank; WeightError where the weight is not finite; SurgeryError
    for an unknown `svd`.
    """
    check_engine(svd)
    full = min(weight.shape) if weight.ndim == 2 else 0
    if weight.ndim == 2 and not 1 <= rank <= full:
        raise RankError(f"rank {rank} is not between 1 and {full}, the full rank of {tuple(weight.shape)}")
    u, v = spectral_factors(weight, rank, svd=svd).factors
    return Factors(u.to(weight.dtype), v.to(weight.dtype))


def check_engine(svd: str) -> None:
    """Raises SurgeryError that lists the known engines."""
    if svd not in ENGINES:
        raise SurgeryError(f"unknown svd '{svd}'; known: {', '.join(ENGINES)}")
