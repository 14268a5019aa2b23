"""Initialisations: balanced factors of a dense matrix at some rank.

To add one, write a function of an `InitProblem` and add an entry to `INITS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import Factors, balance, stacked_values, working_dtype
from lrsurgery.linalg.svd import (
    Decomposition,
    RankChoice,
    Spectrum,
    direction_factors,
    singular_values,
    spectral_factors,
)
from lrsurgery.linalg.weighted import Metric, StackedMetric, weighted_factors, weighted_values


@dataclass(frozen=True)
class InitProblem:
    """The matrix whose factors are to be initialised, with the settings."""

    weight: Tensor  # (rows, columns), or (matrices, rows, columns) for `in_stack`
    rank: RankChoice  # a function of the singular values gets those in the metric, if there is one
    fan_in: int  # of the dense layer
    generator: torch.Generator  # on the CPU, so that a seed gives the same factors on every device
    metric: Metric | StackedMetric | None = None  # weights of the errors, from calibration
    svd: str = "auto"  # `svd`, `known` and `keep` go to `spectral_factors`
    known: Spectrum | None = None
    keep: bool = False

    def values(self) -> Tensor:
        """All singular values of the weight (full rank,), descending."""
        return self.known.values if self.known is not None else singular_values(self.weight)

    def draw_normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers in fp32 and convert them to the working dtype on the weight's device."""
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(self.weight.device, working_dtype(self.weight.dtype))


Init: TypeAlias = Callable[[InitProblem], Decomposition]


def spectral(problem: InitProblem) -> Decomposition:
    """Truncated SVD with the singular values split evenly (Khodak et al. 2021; Kamalakara et al. 2022).

    With a metric, the best factors in that metric.
    """
    if problem.metric is None:
        return spectral_factors(problem.weight, problem.rank, svd=problem.svd, known=problem.known, keep=problem.keep)
    assert isinstance(problem.metric, Metric)
    factors, weighted = weighted_factors(problem.weight, problem.rank, problem.metric)
    return _decomposition(factors, problem.values(), weighted)


def _directions(problem: InitProblem) -> Decomposition:
    """Orthonormal factors: leading singular directions of the weight, or of its best approximation in the metric."""
    if problem.metric is None:
        return direction_factors(problem.weight, problem.rank, svd=problem.svd, known=problem.known, keep=problem.keep)
    decomposition = spectral(problem)
    u, v = decomposition.factors  # balanced, so the columns of u and the rows of v are orthogonal already
    tiny = torch.finfo(u.dtype).tiny
    return decomposition._replace(
        factors=Factors(u / u.norm(dim=0).clamp(min=tiny), v / v.norm(dim=1).clamp(min=tiny)[:, None])
    )


def spectral_ones(problem: InitProblem) -> Decomposition:
    """Leading singular directions with every singular value set to 1 (Kamalakara et al. 2022)."""
    return _directions(problem)


def spectral_shuffled(problem: InitProblem) -> Decomposition:
    """Control: leading singular directions with their singular values in random order, so of the same norm."""
    decomposition = _directions(problem)
    u, v = decomposition.factors
    order = torch.randperm(u.shape[1], generator=problem.generator).to(u.device)
    root = decomposition.values[: u.shape[1]].to(u.dtype)[order].sqrt()
    return decomposition._replace(factors=Factors(u * root, root[:, None] * v))


def random_directions(problem: InitProblem) -> Decomposition:
    """Control: leading singular values of the weight with random orthonormal directions (Haar)."""
    values = problem.values()
    rank = problem.rank(values) if callable(problem.rank) else problem.rank
    bases = []
    for size in problem.weight.shape:
        q, r = torch.linalg.qr(problem.draw_normal(size, rank))
        bases.append(q * r.diagonal().sign())  # makes the Q of the QR uniform (Mezzadri 2007)
    root = values[:rank].to(bases[0]).sqrt()
    return _decomposition(Factors(bases[0] * root, root[:, None] * bases[1].T), values)


def he(problem: InitProblem) -> Decomposition:
    """Normal factors whose product has the variance 2 / fan_in of a dense He-initialised layer (He et al. 2015).

    An entry of the product is a sum of `rank` terms, so var(u) var(v) = 2 / (fan_in rank). The factors are then
    balanced, which keeps their product.
    """
    rows, columns = problem.weight.shape
    values = problem.values()
    rank = problem.rank(values) if callable(problem.rank) else problem.rank
    std = (2 / (problem.fan_in * rank)) ** 0.25
    factors = Factors(problem.draw_normal(rows, rank) * std, problem.draw_normal(rank, columns) * std)
    return _decomposition(balance(factors), values)


def _decomposition(factors: Factors, values: Tensor, weighted: Tensor | None = None) -> Decomposition:
    return Decomposition(factors, values, float(values.double().square().sum()), None, weighted)


def in_stack(init: Init, problem: InitProblem) -> Decomposition:
    """Factors u (matrices, rows, rank), v (matrices, rank, columns), computed one matrix after the other at one rank.

    Values are those of `stacked_values`.
    """
    weights, metric = problem.weight, problem.metric
    rank = problem.rank
    if callable(rank):
        rank = rank(problem.values() if metric is None else weighted_values(weights, metric))
    (count, rows, columns), device, dtype = weights.shape, weights.device, working_dtype(weights.dtype)
    u = torch.empty(count, rows, rank, device=device, dtype=dtype)
    v = torch.empty(count, rank, columns, device=device, dtype=dtype)
    values, weighted, energy = [], [], 0.0
    for number, weight in enumerate(weights):
        own = None if metric is None else metric.of(number)
        found = init(replace(problem, weight=weight, rank=rank, metric=own, known=None, keep=False))
        u[number], v[number] = found.factors
        values.append(found.values)
        energy += found.energy
        weighted += [] if found.weighted is None else [found.weighted]
    in_metric = stacked_values(weighted) if weighted else None
    return Decomposition(Factors(u, v), stacked_values(values), energy, None, in_metric)


INITS: dict[str, Init] = {
    "spectral": spectral,
    "spectral-ones": spectral_ones,
    "spectral-shuffled": spectral_shuffled,
    "random-directions": random_directions,
    "he": he,
}

WITHOUT_DIRECTIONS = ("random-directions", "he")  # inits that discard the singular directions of the weight


def get_init(name: str) -> Init:
    """The init of this name. Raises SurgeryError that lists the known names."""
    if name not in INITS:
        raise SurgeryError(f"unknown init '{name}'; known: {', '.join(INITS)}")
    return INITS[name]


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by `seed` and the layer's name, so independent of the order of the layers."""
    mixed = seed & 0xFFFFFFFF
    for byte in name.encode():  # FNV-1a: the same in every process, unlike hash()
        mixed = ((mixed ^ byte) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)
