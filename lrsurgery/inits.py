"""Initialisations of the factors: a dense matrix and a rank in, balanced factors out.

To add one: a function of the same signature and an entry in `INITS`.
"""

from __future__ import annotations

from typing import Any, Protocol

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


class Init(Protocol):
    """weight (rows, columns); rank or a function of the singular values; fan_in of the dense layer; a CPU generator.

    `metric`: what weighs the weight's errors, where data was looked at; a rank is a function of the singular values in
    it then. `effort`: what `linalg.spectral_factors` takes by name (svd, known, keep).
    """

    def __call__(
        self,
        weight: Tensor,
        rank: RankChoice,
        *,
        fan_in: int,
        generator: torch.Generator,
        metric: Metric | None = None,
        **effort: Any,
    ) -> Decomposed: ...


def spectral(
    weight: Tensor,
    rank: RankChoice,
    *,
    fan_in: int,
    generator: torch.Generator,
    metric: Metric | None = None,
    **effort: Any,
) -> Decomposed:
    """The truncated SVD, singular values split evenly (Khodak et al. 2021; Kamalakara et al. 2022), or the best factors
    in the metric."""
    if metric is None:
        return spectral_factors(weight, rank, **effort)
    factors, weighted = weighted_factors(weight, rank, metric)
    known = effort.get("known")
    values = known.values if known is not None else singular_values(weight)
    return Decomposed(factors, values, float(values.double().square().sum()), None, weighted)


def _directions(weight: Tensor, rank: RankChoice, metric: Metric | None, effort: dict[str, Any]) -> Decomposed:
    """Orthonormal factors: the leading singular directions of the weight, or of its best approximation in a metric."""
    if metric is None:
        return direction_factors(weight, rank, **effort)
    generator = torch.Generator()  # drawn from by none
    found = spectral(weight, rank, fan_in=1, generator=generator, metric=metric, **effort)
    u, v = found.factors  # balanced, so that u's columns and v's rows are orthogonal already
    tiny = torch.finfo(u.dtype).tiny
    return found._replace(
        factors=Factors(u / u.norm(dim=0).clamp(min=tiny), v / v.norm(dim=1).clamp(min=tiny)[:, None])
    )


def spectral_ones(
    weight: Tensor,
    rank: RankChoice,
    *,
    fan_in: int,
    generator: torch.Generator,
    metric: Metric | None = None,
    **effort: Any,
) -> Decomposed:
    """The singular directions alone: every kept singular value replaced by 1 (Kamalakara et al. 2022)."""
    return _directions(weight, rank, metric, effort)


def spectral_shuffled(
    weight: Tensor,
    rank: RankChoice,
    *,
    fan_in: int,
    generator: torch.Generator,
    metric: Metric | None = None,
    **effort: Any,
) -> Decomposed:
    """A control: the leading singular directions with their own values in random order, so with the same norm."""
    found = _directions(weight, rank, metric, effort)
    u, v = found.factors
    order = torch.randperm(u.shape[1], generator=generator).to(u.device)
    root = found.values[: u.shape[1]].to(u.dtype)[order].sqrt()
    return found._replace(factors=Factors(u * root, root[:, None] * v))


def random_directions(
    weight: Tensor,
    rank: RankChoice,
    *,
    fan_in: int,
    generator: torch.Generator,
    metric: Metric | None = None,
    **effort: Any,
) -> Decomposed:
    """A control: the leading singular values of the weight with random orthonormal directions (Haar)."""
    rows, columns = weight.shape
    known = effort.get("known")
    values = known.values if known is not None else singular_values(weight)
    rank = rank(values) if callable(rank) else rank
    # drawn on the CPU in fp32, as in `he`; the sign of R's diagonal makes QR's Q uniform (Mezzadri 2007)
    bases = []
    for size in (rows, columns):
        q, r = torch.linalg.qr(torch.randn(size, rank, generator=generator))
        bases.append((q * r.diagonal().sign()).to(weight.device, working_dtype(weight.dtype)))
    root = values[:rank].to(bases[0]).sqrt()
    factors = Factors(bases[0] * root, root[:, None] * bases[1].T)
    return Decomposed(factors, values, float(values.double().square().sum()))


def he(
    weight: Tensor,
    rank: RankChoice,
    *,
    fan_in: int,
    generator: torch.Generator,
    metric: Metric | None = None,
    **effort: Any,
) -> Decomposed:
    """Normal factors whose product has the variance 2 / fan_in of a dense He-initialised layer (He et al. 2015).

    An entry of the product is a sum of `rank` terms, so var(u) var(v) = 2 / (fan_in rank). Balanced afterwards, which
    leaves the product as it is.
    """
    rows, columns = weight.shape
    known = effort.get("known")
    values = known.values if known is not None else singular_values(weight)
    rank = rank(values) if callable(rank) else rank
    std = (2 / (fan_in * rank)) ** 0.25
    # drawn on the CPU in fp32, so that a seed means the same factors on every device
    u = torch.randn(rows, rank, generator=generator) * std
    v = torch.randn(rank, columns, generator=generator) * std
    dtype = working_dtype(weight.dtype)
    factors = balance(Factors(u.to(weight.device, dtype), v.to(weight.device, dtype)))
    return Decomposed(factors, values, float(values.double().square().sum()))


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
