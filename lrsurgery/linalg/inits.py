"""Initialisations of the factors: a dense matrix and a rank in, balanced factors out.

To add one: a function of an `InitProblem` and an entry in `INITS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import Factors, balance, working_dtype
from lrsurgery.linalg.svd import (
    Decomposed,
    RankChoice,
    Spectrum,
    direction_factors,
    singular_values,
    spectral_factors,
)
from lrsurgery.linalg.weighted import Metric, weighted_factors


@dataclass(frozen=True)
class InitProblem:
    """The matrix to initialise factors for, and how."""

    weight: Tensor  # (rows, columns)
    rank: RankChoice  # or a function of the singular values, in the metric where there is one
    fan_in: int  # of the dense layer
    generator: torch.Generator  # on the CPU, so that a seed means the same factors on every device
    metric: Metric | None = None  # what weighs the weight's errors, where data was looked at
    svd: str = "auto"  # as `spectral_factors` takes it, and what follows
    known: Spectrum | None = None
    keep: bool = False

    def values(self) -> Tensor:
        """All singular values of the weight (full rank,), descending."""
        return self.known.values if self.known is not None else singular_values(self.weight)

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers, drawn in fp32, where the weight lies and as wide as it is computed with."""
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(self.weight.device, working_dtype(self.weight.dtype))


Init: TypeAlias = Callable[[InitProblem], Decomposed]


def spectral(problem: InitProblem) -> Decomposed:
    """The truncated SVD, singular values split evenly (Khodak et al. 2021; Kamalakara et al. 2022).

    With a metric, the best factors in it.
    """
    if problem.metric is None:
        return spectral_factors(problem.weight, problem.rank, svd=problem.svd, known=problem.known, keep=problem.keep)
    factors, weighted = weighted_factors(problem.weight, problem.rank, problem.metric)
    return _decomposed(factors, problem.values(), weighted)


def _directions(problem: InitProblem) -> Decomposed:
    """Orthonormal factors: the leading singular directions of the weight, or of its best approximation in a metric."""
    if problem.metric is None:
        return direction_factors(problem.weight, problem.rank, svd=problem.svd, known=problem.known, keep=problem.keep)
    found = spectral(problem)
    u, v = found.factors  # balanced, so that u's columns and v's rows are orthogonal already
    tiny = torch.finfo(u.dtype).tiny
    return found._replace(
        factors=Factors(u / u.norm(dim=0).clamp(min=tiny), v / v.norm(dim=1).clamp(min=tiny)[:, None])
    )


def spectral_ones(problem: InitProblem) -> Decomposed:
    """The singular directions alone: every kept singular value replaced by 1 (Kamalakara et al. 2022)."""
    return _directions(problem)


def spectral_shuffled(problem: InitProblem) -> Decomposed:
    """A control: the leading singular directions with their own values in random order, so with the same norm."""
    found = _directions(problem)
    u, v = found.factors
    order = torch.randperm(u.shape[1], generator=problem.generator).to(u.device)
    root = found.values[: u.shape[1]].to(u.dtype)[order].sqrt()
    return found._replace(factors=Factors(u * root, root[:, None] * v))


def random_directions(problem: InitProblem) -> Decomposed:
    """A control: the leading singular values of the weight with random orthonormal directions (Haar)."""
    values = problem.values()
    rank = problem.rank(values) if callable(problem.rank) else problem.rank
    bases = []
    for size in problem.weight.shape:
        q, r = torch.linalg.qr(problem.drawn(size, rank))
        bases.append(q * r.diagonal().sign())  # which makes QR's Q uniform (Mezzadri 2007)
    root = values[:rank].to(bases[0]).sqrt()
    return _decomposed(Factors(bases[0] * root, root[:, None] * bases[1].T), values)


def he(problem: InitProblem) -> Decomposed:
    """Normal factors whose product has the variance 2 / fan_in of a dense He-initialised layer (He et al. 2015).

    An entry of the product is a sum of `rank` terms, so var(u) var(v) = 2 / (fan_in rank). Balanced afterwards, which
    leaves the product as it is.
    """
    rows, columns = problem.weight.shape
    values = problem.values()
    rank = problem.rank(values) if callable(problem.rank) else problem.rank
    std = (2 / (problem.fan_in * rank)) ** 0.25
    factors = Factors(problem.drawn(rows, rank) * std, problem.drawn(rank, columns) * std)
    return _decomposed(balance(factors), values)


def _decomposed(factors: Factors, values: Tensor, weighted: Tensor | None = None) -> Decomposed:
    return Decomposed(factors, values, float(values.double().square().sum()), None, weighted)


INITS: dict[str, Init] = {
    "spectral": spectral,
    "spectral-ones": spectral_ones,
    "spectral-shuffled": spectral_shuffled,
    "random-directions": random_directions,
    "he": he,
}

WITHOUT_DIRECTIONS = ("random-directions", "he")  # whose factors have nothing of the weight's own


def get_init(name: str) -> Init:
    """The init of this name. Raises SurgeryError that lists the known ones."""
    if name not in INITS:
        raise SurgeryError(f"unknown init '{name}'; known: {', '.join(INITS)}")
    return INITS[name]


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one layer, the same whatever the order of the layers."""
    mixed = seed & 0xFFFFFFFF
    for byte in name.encode():  # FNV-1a: stable over processes, unlike hash()
        mixed = ((mixed ^ byte) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)
