"""A few leading eigenvectors of a Gram matrix without the others: block Lanczos, nearly all of it matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT, FAST = 1e-5, 1e-2  # squared error over Eckart and Young's that may be given away, relative to it


def krylov(gram: Tensor, rank: int, *, energy: float, best: float | None = None) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvectors (n, rank) of a Gram matrix (n, n) with trace `energy`, and Ritz values (rank,) ascending.

    Block Lanczos from a fixed random start with full orthogonalisation (Golub & Underwood 1977; Musco & Musco 2015 on
    why blocks smaller than the rank do). The span is good when the energy that it captures is: within `EXACT` of what
    is left out, given `best`, the largest that rank can capture; without it within `FAST`, as extrapolated from how the
    captured energy still grows. None where it is not so after six times the rank.
    """
    size = len(gram)
    block = min(32, max(rank, size // 8))
    limit = min(size, 6 * rank + 4 * block)  # a bulk of noise takes four and a half ranks, and more is seldom cheap
    span = gram.new_empty(limit, size)  # rows are the basis
    projected = gram.new_zeros(limit, limit)
    start = torch.randn(size, block, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    fresh = torch.linalg.qr(start.to(gram)).Q.T
    captured: list[float] = []
    count = 0
    # a look costs an eigendecomposition of what there is: few of them, most where the end is near (measured)
    next_look, apart = (rank + 3 * rank // 4, rank // 4) if best is not None else (rank + rank // 4, rank // 8)
    while count + block <= limit:
        span[count : count + block] = fresh
        image = fresh @ gram
        count += block
        rows = image @ span[:count].T
        projected[count - block : count, :count] = rows
        projected[:count, count - block : count] = rows.T
        if count >= next_look:
            next_look = count + max(block, apart)
            ritz = torch.linalg.eigvalsh(projected[:count, :count])[-rank:]
            captured.append(float(ritz.double().sum()))
            if _good_enough(captured, energy, best):
                _, inner = torch.linalg.eigh(projected[:count, :count])
                basis = inner[:, -rank:].flip(1).T @ span[:count]
                lean = basis @ basis.T
                lean.diagonal().sub_(1)
                # a basis that is not orthonormal would count energy twice
                return (basis.T, ritz) if float(lean.abs().max()) < 1e-4 else None
        fresh = image
        for _ in range(2):  # what is left may be so small that its rounding points back into the span
            fresh = _orthonormal_rows(fresh - (fresh @ span[:count].T) @ span[:count])
    return None


def _good_enough(captured: list[float], energy: float, best: float | None) -> bool:
    if best is not None:
        return best - captured[-1] <= EXACT * max(energy - best, 0.0)
    if len(captured) < 3:
        return False
    grown, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    # as if it went on growing as it does, never trusting that it stops sooner than by halves
    rate = min(max(grown / before, 0.5), 0.99) if before > 0 else 0.5
    return grown * rate / (1 - rate) <= FAST * (energy - captured[-1])


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis of the row space: Cholesky QR twice, all matrix products; Householder where that fails."""
    made: Tensor = rows
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(made @ made.T)
        if bool(failed):
            upright: Tensor = torch.linalg.qr(rows.T).Q
            return upright.T.contiguous()
        made = torch.linalg.solve_triangular(factor, made, upper=False)
    return made
