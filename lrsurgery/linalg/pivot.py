"""The pivoted form of a product: some of its own rows, or columns, and the others in terms of them.

A product of rank r has r (m + n - r) degrees of freedom; two factors hold r (m + n) numbers. Keeping r rows of the
product as they are leaves r (m - r) mixing numbers for the others, so nothing is stored twice (PIFA, arXiv 2501.19090).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lrsurgery.linalg.factors import Factors, balance

Side: TypeAlias = Literal["rows", "columns"]

LARGEST_MIXING = 1.2  # no entry of the mixing matrix is larger: a swap that helps less is not worth its time


class Pivoted(NamedTuple):
    """A matrix (m, n) of rank r: r of its rows or columns, and how the others are made of them.

    rows: W[order] = cat(kept, mixing @ kept), kept (r, n), mixing (m - r, r).
    columns: W[:, order] = cat(kept, kept @ mixing), kept (m, r), mixing (r, n - r).
    """

    side: Side
    order: Tensor  # int64 permutation of the rows (m,) or the columns (n,): the pivots, then the others ascending
    kept: Tensor
    mixing: Tensor


def is_permutation(order: Tensor) -> bool:
    """Whether an order (n,) of integers, such as one from a file, holds each place once."""
    return torch.equal(order.long().sort().values, torch.arange(len(order), device=order.device))


def inverse_of(order: Tensor) -> Tensor:
    """The inverse (n,) int64 of a permutation (n,)."""
    # not kept between calls of a layer: it costs microseconds, and a stale one would be silently wrong
    places = torch.arange(order.shape[0], device=order.device)
    return places.scatter(0, order.long(), places)  # exporters lack or mistake the dtype of an empty tensor


def take(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """The entries `places` (int64) of x along an axis, -1 or that of the channels of images, in its memory format."""
    if torch.compiler.is_compiling():  # no indices of x's own shape in the graphs of other runtimes
        return x.index_select(axis, places)
    if axis == -1:
        # gather takes 1/5 of index_select's time on batches, forward and backward on a CPU, and uses several threads
        return x.gather(-1, places.expand_as(x))
    if x.stride(axis) == 1:  # channels last
        moved = x.movedim(axis, -1)
        return moved.gather(-1, places.expand_as(moved)).movedim(-1, axis)  # no recursion, for torch.jit.script
    return x.index_select(axis, places)  # copies whole images


def put(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """The reverse of `take`: entry i of x along the axis goes to place order[i], order int32 or int64."""
    # scattering needs no inverse, which costs as much as the rest on one position; a compiler turns the inverse and
    # the gather into the reads of one kernel, and would begin a scatter with a copy of its target
    if axis != -1 or torch.compiler.is_compiling():
        return take(x, inverse_of(order), axis)
    return torch.empty_like(x).scatter_(-1, order.long().expand_as(x), x)


def side_of(rows: int, columns: int) -> Side:
    """The side of a matrix whose reordering is cheaper: that with fewer entries.

    Of a square one the columns: reading the inputs in another order is cheaper than writing the outputs so.
    """
    return "rows" if rows < columns else "columns"


def pivot(factors: Factors, side: Side | None = None) -> Pivoted:
    """The pivoted form of u @ v, u (m, r), v (r, n), in the dtype of the factors; `side` as `side_of` has it.

    The pivots are well-conditioned: no entry of `mixing` is larger than 1.2, whatever the scale of the factors and
    also where they are rank-deficient. Works in fp64; r may be as large as the chosen side, which leaves no others.
    """
    u, v = (factor.detach().double() for factor in factors)
    side = side or side_of(u.shape[0], v.shape[1])
    # the pivots depend on the span of the rows (columns) alone, and an orthonormal basis has it at any scale; where
    # the factor is rank-deficient, QR fills the basis up
    tall = u if side == "rows" else v.T
    sizes = tall.abs().amax(0)
    basis = torch.linalg.qr(tall / torch.where(sizes > 0, sizes, 1)).Q
    pivots, mixing = _choose(basis)
    others = torch.ones(len(tall), dtype=torch.bool, device=tall.device)
    others[pivots] = False
    order = torch.cat([pivots, others.nonzero()[:, 0]])
    dtype = factors.u.dtype
    if side == "rows":
        return Pivoted(side, order, (u[pivots] @ v).to(dtype), mixing[others].to(dtype))
    return Pivoted(side, order, (u @ v[:, pivots]).to(dtype), mixing[others].T.contiguous().to(dtype))


class Slice(NamedTuple):
    """One of several matrices (m, n) that share the pivots' rows K (r, n), stacked: W[order] = cat(K[own], mixing @ K).

    own = slice(start, start + number): the pivots among its rows.
    """

    order: Tensor  # int64 permutation of the rows (m,): its own pivots, then the others ascending
    start: int
    number: int
    mixing: Tensor  # (m - number, r)


def pivot_together(factors: Factors, sizes: Sequence[int]) -> tuple[Tensor, list[Slice]]:
    """The rows (r, n) that are the pivots of stacked matrices u @ v, and what each of them is made of; see `pivot`.

    u (sum of sizes, r); the pivots of one matrix stand together, in the order of the matrices.
    """
    _, order, kept, mixing = pivot(factors, "rows")
    rank = len(kept)
    pivots, sorting = order[:rank].sort()
    kept, mixing, others = kept[sorting], mixing[:, sorting], order[rank:]
    slices, first = [], 0
    for size in sizes:
        own, rest = ((each >= first) & (each < first + size) for each in (pivots, others))
        start, number = int((pivots < first).sum()), int(own.sum())
        slices.append(Slice(torch.cat([pivots[own], others[rest]]) - first, start, number, mixing[rest]))
        first += size
    return kept, slices


def unpivot(pivoted: Pivoted) -> Factors:
    """Factors of the same product, not balanced: the kept part, and the mixing with an identity in its place."""
    side, order, kept, mixing = pivoted
    one = torch.eye(kept.shape[0] if side == "rows" else kept.shape[1]).to(kept)
    inverse = order.argsort()
    if side == "rows":
        return Factors(torch.cat([one, mixing])[inverse], kept)
    return Factors(kept, torch.cat([one, mixing], 1)[:, inverse])


def product(pivoted: Pivoted) -> Tensor:
    """The matrix (m, n) itself."""
    side, order, kept, mixing = pivoted
    inverse = order.argsort()
    if side == "rows":
        return torch.cat([kept, mixing @ kept])[inverse]
    return torch.cat([kept, kept @ mixing], 1)[:, inverse]


def balanced(pivoted: Pivoted) -> Factors:
    """Balanced factors of the same product, in its dtype; computed in fp64."""
    wide = pivoted._replace(kept=pivoted.kept.detach().double(), mixing=pivoted.mixing.detach().double())
    u, v = balance(unpivot(wide))
    return Factors(u.to(pivoted.kept.dtype), v.to(pivoted.kept.dtype))


def _choose(basis: Tensor) -> tuple[Tensor, Tensor]:
    """(r well-conditioned rows of a basis (m, r), the basis in terms of them (m, r)).

    LU with partial pivoting gives the first rows. Then, as long as a row needs one of them more than LARGEST_MIXING
    times, it takes that one's place: each swap multiplies the volume of the rows by that factor, so few are needed
    (maxvol; Goreinov et al. 2010).
    """
    rows, rank = basis.shape
    swapped = torch.linalg.lu_factor(basis).pivots[:rank].cpu().tolist()
    order = list(range(rows))
    for i, j in enumerate(swapped):  # LAPACK counts from 1
        order[i], order[j - 1] = order[j - 1], order[i]
    pivots = torch.tensor(order[:rank], device=basis.device)
    while True:
        mixing = torch.linalg.solve(basis[pivots], basis, left=False)
        if not _swap_(pivots, mixing):
            return pivots, mixing


def _swap_(pivots: Tensor, mixing: Tensor) -> int:
    """Swap rows until no entry is too large; the number of swaps. `mixing` (m, r) follows by rank-one updates."""
    swaps = 0
    while True:
        at = int(mixing.abs().argmax())
        row, column = divmod(at, mixing.shape[1])
        value = mixing[row, column].clone()
        if not abs(float(value)) > LARGEST_MIXING:
            return swaps
        change = mixing[row].clone()
        change[column] -= 1
        mixing.addr_(mixing[:, column].clone(), change / value, alpha=-1)
        pivots[column] = row
        swaps += 1
