"""Initialisations of the factors: a dense matrix and a rank in, balanced factors out.

To add one: a function of what is `Given` and an entry in `INITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg import (
    Decomposed,
    Factors,
    RankChoice,
    balance,
    direction_factors,
    singular_values,
    spectral_factors,
    working_dtype,
)
from lrsurgery.metric import Metric, weighted_factors


@dataclass(frozen=True)
class Given:
    """What an init is given."""

    weight: Tensor  # (rows, columns)
    rank: RankChoice  # or a function of the singular values, in the metric where there is one
    fan_in: int  # of the dense layer
    generator: torch.Generator  # on the CPU, so that a seed means the same factors on every device
    metric: Metric | None = None  # what weighs the weight's errors, where data was looked at
    effort: Mapping[str, Any] = field(default_factory=dict)  # what `linalg.spectral_factors` takes: svd, known, keep

    def values(self) -> Tensor:
        """All singular values of the weight (full rank,), descending."""
        known = self.effort.get("known")
        return known.values if known is not None else singular_values(self.weight)

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers, drawn in fp32, where the weight lies and as wide as it is computed with."""
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(self.weight.device, working_dtype(self.weight.dtype))


Init: TypeAlias = Callable[[Given], Decomposed]


def spectral(given: Given) -> Decomposed:
    """The truncated SVD, singular values split evenly (Khodak et al. 2021; Kamalakara et al. 2022).

    With a metric, the best factors in it.
    """
    if given.metric is None:
        return spectral_factors(given.weight, given.rank, **given.effort)
    factors, weighted = weighted_factors(given.weight, given.rank, given.metric)
    return _decomposed(factors, given.values(), weighted)


def _directions(given: Given) -> Decomposed:
    """Orthonormal factors: the leading singular directions of the weight, or of its best approximation in a metric."""
    if given.metric is None:
        return direction_factors(given.weight, given.rank, **given.effort)
    found = spectral(given)
    u, v = found.factors  # balanced, so that u's columns and v's rows are orthogonal already
    tiny = torch.finfo(u.dtype).tiny
    return found._replace(
        factors=Factors(u / u.norm(dim=0).clamp(min=tiny), v / v.norm(dim=1).clamp(min=tiny)[:, None])
    )


def spectral_ones(given: Given) -> Decomposed:
    """The singular directions alone: every kept singular value replaced by 1 (Kamalakara et al. 2022)."""
    return _directions(given)


def spectral_shuffled(given: Given) -> Decomposed:
    """A control: the leading singular directions with their own values in random order, so with the same norm."""
    found = _directions(given)
    u, v = found.factors
    order = torch.randperm(u.shape[1], generator=given.generator).to(u.device)
    root = found.values[: u.shape[1]].to(u.dtype)[order].sqrt()
    return found._replace(factors=Factors(u * root, root[:, None] * v))


def random_directions(given: Given) -> Decomposed:
    """A control: the leading singular values of the weight with random orthonormal directions (Haar)."""
    values = given.values()
    rank = given.rank(values) if callable(given.rank) else given.rank
    bases = []
    for size in given.weight.shape:
        q, r = torch.linalg.qr(given.drawn(size, rank))
        bases.append(q * r.diagonal().sign())  # which makes QR's Q uniform (Mezzadri 2007)
    root = values[:rank].to(bases[0]).sqrt()
    return _decomposed(Factors(bases[0] * root, root[:, None] * bases[1].T), values)


def he(given: Given) -> Decomposed:
    """Normal factors whose product has the variance 2 / fan_in of a dense He-initialised layer (He et al. 2015).

    An entry of the product is a sum of `rank` terms, so var(u) var(v) = 2 / (fan_in rank). Balanced afterwards, which
    leaves the product as it is.
    """
    rows, columns = given.weight.shape
    values = given.values()
    rank = given.rank(values) if callable(given.rank) else given.rank
    std = (2 / (given.fan_in * rank)) ** 0.25
    factors = Factors(given.drawn(rows, rank) * std, given.drawn(rank, columns) * std)
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
