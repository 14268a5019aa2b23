"""Leading eigenvectors of a Gram matrix by block Lanczos, which spends nearly all its time in matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT, FAST = 1e-5, 1e-2  # allowed excess of the squared error over the Eckart-Young error, relative to the latter


def krylov(gram: Tensor, rank: int, *, energy: float, best: float | None = None) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvectors (n, rank) of a Gram matrix (n, n) with trace `energy`, and Ritz values (rank,) ascending.

    Block Lanczos from a fixed random start with full orthogonalisation (Golub & Underwood 1977; Musco & Musco 2015
    show that blocks smaller than the rank suffice). The subspace is accepted by the energy it captures. With `best`,
    the most that this rank can capture, the loss must be within `EXACT` of the energy left out. Without `best` it must
    be within `FAST`, extrapolated from the growth of the captured energy. Returns None if about six times the rank is
    not enough.
    """
    size = len(gram)
    block = min(32, max(rank, size // 8))
    limit = min(size, 6 * rank + 4 * block)  # noise takes four and a half times the rank; more is seldom cheap
    span = gram.new_empty(limit, size)  # rows are the Krylov basis
    projected = gram.new_zeros(limit, limit)
    start = torch.randn(size, block, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    fresh = torch.linalg.qr(start.to(gram)).Q.T
    captured: list[float] = []
    count = 0
    # each test costs an eigendecomposition of `projected`: test rarely, and mostly near the expected end (measured)
    next_test, apart = (rank + 3 * rank // 4, rank // 4) if best is not None else (rank + rank // 4, rank // 8)
    while count + block <= limit:
        span[count : count + block] = fresh
        image = fresh @ gram
        count += block
        rows = image @ span[:count].T
        projected[count - block : count, :count] = rows
        projected[:count, count - block : count] = rows.T
        if count >= next_test:
            next_test = count + max(block, apart)
            ritz = torch.linalg.eigvalsh(projected[:count, :count])[-rank:]
            captured.append(float(ritz.double().sum()))
            if _good_enough(captured, energy, best):
                _, inner = torch.linalg.eigh(projected[:count, :count])
                basis = inner[:, -rank:].flip(1).T @ span[:count]
                defect = basis @ basis.T
                defect.diagonal().sub_(1)
                # a basis that is not orthonormal would count energy twice
                return (basis.T, ritz) if float(defect.abs().max()) < 1e-4 else None
        fresh = image
        for _ in range(2):  # twice, since the remainder may be so small that its rounding lies in the span
            fresh = _orthonormal_rows(fresh - (fresh @ span[:count].T) @ span[:count])
    return None


def _good_enough(captured: list[float], energy: float, best: float | None) -> bool:
    if best is not None:
        return best - captured[-1] <= EXACT * max(energy - best, 0.0)
    if len(captured) < 3:
        return False
    grown, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    # geometric extrapolation; a rate of at least 1/2 is assumed, so that one small step does not end the iteration
    rate = min(max(grown / before, 0.5), 0.99) if before > 0 else 0.5
    return grown * rate / (1 - rate) <= FAST * (energy - captured[-1])


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis of the row space by two rounds of Cholesky QR, or by Householder QR if Cholesky fails."""
    basis: Tensor = rows
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(basis @ basis.T)
        if bool(failed):
            columns: Tensor = torch.linalg.qr(rows.T).Q
            return columns.T.contiguous()
        basis = torch.linalg.solve_triangular(factor, basis, upper=False)
    return basis
