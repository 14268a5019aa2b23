"""Low-rank approximation in a metric, which weights the errors of a layer by its inputs and output gradients.

Let C be the second moment of a layer's inputs x, and G that of the gradients of the loss at its outputs. Replacing W by
M raises the loss by about 1/2 ||G^(1/2) (W - M) C^(1/2)||_F^2, its second-order term with Kronecker-factored curvature
(Martens & Grosse 2015, K-FAC). G = I gives the error of the outputs, C = G = I the error of the weight.

The best M of rank r (Eckart & Young in this metric) is L^-T P P^T L^T W, where G = L L^T and P holds the r leading
eigenvectors of L^T W C W^T L. C is neither inverted nor factorised, so it may be singular, as few samples make it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrsurgery.errors import WeightError
from lrsurgery.linalg.factors import Factors, balance, stacked_values, working_dtype
from lrsurgery.linalg.svd import RankChoice

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch's stubs leave it out


class Metric(NamedTuple):
    """Second moments that weight the errors of a weight (rows, columns); None is the identity."""

    inputs: Tensor | None  # C (columns, columns), symmetric, positive semidefinite
    gradients: Tensor | None = None  # G (rows, rows), symmetric, positive definite; or its diagonal (rows,), positive

    def of(self, number: int) -> Metric:
        """The metric of one of several matrices, whose moments have these as a first axis."""
        return Metric(*(None if moment is None else moment[number] for moment in self))


@dataclass(frozen=True)
class StackedMetric:
    """The metrics of several matrices, of which one at a time is damped and widened."""

    of: Callable[[int], Metric]


class WeightedFactors(NamedTuple):
    """The best factors in a metric, with the singular values in it."""

    factors: Factors  # in the working dtype, balanced: u^T u = v v^T, diagonal
    values: Tensor  # (full rank,) singular values of G^(1/2) W C^(1/2) in fp64, descending


class _Core(NamedTuple):
    """L^T W C W^T L as turn (rows, short) gram (short, short) turn^T."""

    gram: Tensor
    turn: Tensor | None  # orthonormal columns; None unless rows > columns
    weighted: Tensor  # L^T W
    root: Tensor | None  # L, lower triangular; of a diagonal its diagonal


def damp(moment: Tensor, share: float) -> Tensor:
    """Tikhonov damping: the moment (..., n, n) in fp64, with this share of its mean diagonal added to the diagonal.

    Of a diagonal (n,) likewise.
    """
    wide = moment.to(torch.float64, copy=True)
    diagonal = wide if wide.ndim == 1 else wide.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(share * diagonal.mean(-1, keepdim=True))
    return wide


def combine(metrics: Sequence[Metric]) -> Metric:
    """One metric for a weight that is used in several ways, as a table of tokens and the head tied to it is.

    Each use is a Kronecker product of its moments C and G, G a diagonal (rows,), and so is the result: rows count with
    the sum of G trace(C), columns with the sum of C trace(G), which keeps the traces over rows and over columns of the
    sum of all uses. (The product nearest in the Frobenius norm would go by the few most frequent tokens.) A moment that
    one use has not is not in the result's.
    """
    inputs = [metric.inputs.double() for metric in metrics if metric.inputs is not None]
    gradients = [metric.gradients.double() for metric in metrics if metric.gradients is not None]
    if len(metrics) == 1 or len(inputs) < len(metrics) or len(gradients) < len(metrics):
        return Metric(inputs[0] if inputs else None, gradients[0] if gradients else None)
    pairs = [(c, g, c.trace(), g.sum()) for c, g in zip(inputs, gradients, strict=True)]
    rows = torch.stack([g * trace for _, g, trace, _ in pairs]).sum(0)
    columns = torch.stack([c * total for c, _, _, total in pairs]).sum(0)
    return Metric(columns / rows.sum().clamp(min=torch.finfo(rows.dtype).tiny), rows)


def weighted_values(weight: Tensor, metric: Metric | StackedMetric) -> Tensor:
    """Singular values (full rank,) of G^(1/2) W C^(1/2) in fp64, descending; a direction's squared value is its error.

    Those of several matrices (matrices, rows, columns), which may be read one at a time, are stacked.

    Raises WeightError if the weight is not finite, if the metric does not fit it, or if G is not positive definite.
    """
    if weight.ndim > 2:
        return stacked_values([weighted_values(each, metric.of(number)) for number, each in enumerate(weight)])
    assert isinstance(metric, Metric)
    try:
        return _roots(torch.linalg.eigvalsh(_core(weight, metric).gram))
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(weight.shape)} matrix in its metric") from e


def weighted_factors(weight: Tensor, rank: RankChoice, metric: Metric) -> WeightedFactors:
    """Factors of the M = u v of this rank that minimises ||G^(1/2) (W - M) C^(1/2)||_F; weight W (rows, columns).

    Computes in fp64: a few directions of a model's inputs are so large that an fp32 Gram matrix loses the others.

    Raises WeightError as `weighted_values` does.
    """
    core = _core(weight, metric)
    try:
        eigenvalues, vectors = torch.linalg.eigh(core.gram)
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on this {tuple(weight.shape)} matrix in its metric") from e
    values = _roots(eigenvalues)
    kept = rank(values) if callable(rank) else rank
    leading = vectors[:, -kept:].flip(1)
    basis = leading if core.turn is None else core.turn @ leading
    v = basis.T @ core.weighted
    if core.root is None:
        u = basis
    elif core.root.ndim == 1:
        u = basis / core.root[:, None]
    else:
        u = torch.linalg.solve_triangular(core.root.T, basis, upper=True)
    dtype = working_dtype(weight.dtype)
    return WeightedFactors(Factors(*(factor.to(dtype) for factor in balance(Factors(u, v)))), values)


def joint_values(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
    """As `weighted_values`, of weights (rows, columns) that share their inputs and one v.

    (full rank,) singular values in fp64 of the stacked weight, whose G is block diagonal: half the sum of the squares
    beyond a rank is the loss of all weights together at it, and compares with that of `weighted_values`.
    """
    gram, _ = _joint_gram(weights, metrics)
    try:
        return _roots(torch.linalg.eigvalsh(gram))[: _joint_rank(weights)]
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on these {len(weights)} matrices in their metric") from e


def joint_factors(weights: Sequence[Tensor], rank: int, metrics: Sequence[Metric]) -> WeightedFactors:
    """Factors u (all rows, rank), v (rank, columns) of weights (rows, columns) that share their inputs, stacked.

    They minimise the sum over the weights of ||G^(1/2) (W - U V) C^(1/2)||_F^2: with C = L L^T and the leading
    eigenvectors Q of L^T (sum of W^T G W) L, V = Q^T L^-1 and U = W L Q. C is that of the first metric, positive
    definite.

    Raises WeightError as `weighted_values` does.
    """
    gram, root = _joint_gram(weights, metrics)
    try:
        eigenvalues, vectors = torch.linalg.eigh(gram)
    except LinAlgError as e:
        raise WeightError(f"no LAPACK driver converges on these {len(weights)} matrices in their metric") from e
    leading = vectors[:, -rank:].flip(1)
    v = torch.linalg.solve_triangular(root.T, leading, upper=True).T
    turned = root @ leading
    u = torch.cat([weight.detach().double() @ turned for weight in weights])
    dtype = working_dtype(weights[0].dtype)
    factors = Factors(*(factor.to(dtype) for factor in balance(Factors(u, v))))
    return WeightedFactors(factors, _roots(eigenvalues)[: _joint_rank(weights)])


def _joint_rank(weights: Sequence[Tensor]) -> int:
    return min(sum(len(weight) for weight in weights), weights[0].shape[1])


def _joint_gram(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> tuple[Tensor, Tensor]:
    """(L^T (sum of W^T G W) L, L) in fp64, both (columns, columns), with C = L L^T."""
    inputs = metrics[0].inputs
    assert inputs is not None, "the moment of the inputs is what weights have in common"
    total = torch.zeros(inputs.shape, dtype=torch.float64, device=weights[0].device)
    for weight, metric in zip(weights, metrics, strict=True):
        wide = _check(weight, Metric(inputs, metric.gradients))
        total += wide.T @ (wide if metric.gradients is None else _times(metric.gradients.to(wide), wide))
    try:
        root = torch.linalg.cholesky(inputs.to(total))
    except LinAlgError as e:
        raise WeightError("the second moment of its inputs is not positive definite; damp it") from e
    gram = root.T @ total @ root
    return (gram + gram.T) / 2, root


def second_order(values: Tensor, rank: int) -> float:
    """Predicted increase of the loss at this rank, from all singular values (full rank,) of G^(1/2) W C^(1/2).

    In the unit of the loss whose gradients G holds: nats for a log likelihood.
    """
    return 0.5 * float(values[rank:].double().square().sum())


def weighted_norm(weight: Tensor, metric: Metric) -> float:
    """||G^(1/2) W C^(1/2)||_F of a weight W (rows, columns)."""
    wide = weight.double()
    product = wide if metric.inputs is None else wide @ metric.inputs.double()
    product = product if metric.gradients is None else _times(metric.gradients.double(), product)
    return float((wide * product).sum().clamp(min=0).sqrt())


def _check(weight: Tensor, metric: Metric) -> Tensor:
    """The weight in fp64. Raises WeightError if it or the metric is not finite, or if they do not fit each other."""
    rows, columns = weight.shape
    for name, moment, size in (("inputs", metric.inputs, columns), ("gradients", metric.gradients, rows)):
        allowed = ((size, size), (size,)) if name == "gradients" else ((size, size),)
        if moment is not None and tuple(moment.shape) not in allowed:
            raise WeightError(f"the second moment of its {name} has shape {tuple(moment.shape)}, not {(size, size)}")
        if moment is not None and not bool(torch.isfinite(moment).all()):
            raise WeightError(f"the second moment of its {name} holds NaN or Inf; repeat the calibration")
    wide = weight.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise WeightError("the weight holds NaN or Inf; repair the checkpoint first")
    return wide


def _times(moment: Tensor, matrix: Tensor) -> Tensor:
    return moment[:, None] * matrix if moment.ndim == 1 else moment @ matrix


def _core(weight: Tensor, metric: Metric) -> _Core:
    wide, root = _check(weight, metric), None
    if metric.gradients is not None:
        root = _root(metric.gradients.to(wide))
    weighted = wide if root is None else _times(root.T if root.ndim == 2 else root, wide)
    turn, short = None, weighted
    if wide.shape[0] > wide.shape[1]:  # the R of a QR has the same Gram matrix, and gives a small eigenproblem
        turn, short = torch.linalg.qr(weighted)
    gram = short @ (short.T if metric.inputs is None else metric.inputs.to(wide) @ short.T)
    return _Core((gram + gram.T) / 2, turn, weighted, root)


def _root(gradients: Tensor) -> Tensor:
    if gradients.ndim == 1:
        if not bool((gradients > 0).all()):
            raise WeightError("the second moment of its gradients is not positive; damp it")
        return gradients.sqrt()
    try:
        return torch.linalg.cholesky(gradients)  # type: ignore[no-any-return]
    except LinAlgError as e:
        raise WeightError("the second moment of its gradients is not positive definite; damp it") from e


def _roots(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.flip(0).clamp(min=0).sqrt()
