"""Statistics of singular values: effective ranks, condition number, sampled spectra, predicted damage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POINTS = 64  # largest number of points in a sampled spectrum
RESOLVED = 100.0  # largest condition number that fp32 resolves, where values are roots of a Gram matrix's eigenvalues


@dataclass(frozen=True)
class EffectiveRanks:
    """Three effective ranks ("effective rank" alone is ambiguous) and the condition number."""

    nuclear: float  # ||W||_* / ||W||_2
    entropy: float  # exp(H(s / sum s)), Roy & Vetterli (2007)
    stable: float  # ||W||_F^2 / ||W||_2^2
    condition: float | None = None  # largest / smallest singular value; None if the precision cannot resolve it

    @staticmethod
    def of(values: Tensor, *, limit: float = RESOLVED) -> EffectiveRanks:
        """Compute from singular values (n,), descending; condition numbers above `limit` become None."""
        top, least = float(values[0]), float(values[-1])
        condition = top / least if 0 < top <= limit * least else None
        return EffectiveRanks(nuclear_rank(values), entropy_rank(values), stable_rank(values), condition)


@dataclass(frozen=True)
class Points:
    """A sampled spectrum, complete if it is short: `value[i]` is the `index[i]`-th singular value."""

    index: tuple[int, ...]  # from 1
    value: tuple[float, ...]

    @staticmethod
    def of(values: Tensor, *, points: int = POINTS) -> Points:
        """Sample singular values (n,), descending: dense at the head, even over the rest; six digits."""
        index = sample(values.numel(), points)
        return Points(index, tuple(_round(float(values[i - 1])) for i in index))


def sample(count: int, points: int = POINTS) -> tuple[int, ...]:
    """Choose up to `points` of the positions 1 to `count`, including both ends."""
    if count <= points:
        return tuple(range(1, count + 1))
    half = points // 2
    chosen = [*torch.logspace(0, math.log10(count), half).tolist(), *torch.linspace(1, count, half).tolist()]
    return tuple(sorted({round(position) for position in chosen}))


def _round(number: float) -> float:
    return float(f"{number:.6g}")


def predicted_damage(before: int, after: int, stable: float) -> float:
    """Share of the parameters removed times the stable rank (for a model: the mean over its layers).

    Source: Xu (2026, arXiv:2604.18085), where compression ratio times stable rank correlates with the loss of accuracy
    of language models (Pearson 0.89 for attention, 0.84 for MLP layers). It ranks layers; it measures nothing.
    """
    return (1 - after / before) * stable if before else 0.0


def stable_rank(values: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 from singular values; 0 for the zero matrix."""
    top = values.max().double() if values.numel() else torch.zeros(())
    return float((values.double() / top).square().sum()) if top > 0 else 0.0


def nuclear_rank(values: Tensor) -> float:
    """||W||_* / ||W||_2 from singular values; 0 for the zero matrix."""
    top = values.max().double() if values.numel() else torch.zeros(())
    return float((values.double() / top).sum()) if top > 0 else 0.0


def entropy_rank(values: Tensor) -> float:
    """exp(H(s / sum s)), the effective rank of Roy & Vetterli (2007); 0 for the zero matrix."""
    values = values.double()
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
