"""Weights as training leaves them: a power law of singular values over a bulk of noise, made without any SVD."""

from __future__ import annotations

import torch
from torch import Tensor

STD = 0.02  # of the noise: what transformers initialise with, most of which training leaves in place
TOP, EXPONENT, DIRECTIONS = 10.0, 0.6, 512


def trained_weight(rows: int, columns: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix (rows, columns), always the same for a seed.

    The i-th of the first directions has a singular value of about TOP i^-EXPONENT times the largest of the noise, so
    the law sinks into the bulk well before it ends.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns, DIRECTIONS)
    edge = STD * (rows**0.5 + columns**0.5)  # the largest singular value of a Gaussian matrix
    law = TOP * edge * torch.arange(1, count + 1, dtype=torch.float32) ** -EXPONENT
    left, right = (torch.linalg.qr(torch.randn(size, count, generator=generator)).Q for size in (rows, columns))
    noise = torch.randn(rows, columns, generator=generator).mul_(STD)
    return noise.addmm_(left * law, right.T).to(dtype)


def shuffled(weight: Tensor, seed: int) -> Tensor:
    """Another matrix of the same singular values: rows in another order, signs of columns turned."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    signs = torch.randint(0, 2, (columns,), generator=generator).mul_(2).sub_(1).to(weight.dtype)
    return weight[torch.randperm(rows, generator=generator)].mul_(signs)
