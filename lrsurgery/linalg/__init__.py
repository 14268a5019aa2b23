"""Tensors in, tensors out: decompositions, initialisations, what singular values say."""

from lrsurgery.linalg.factors import Factors, balance, balance_of, product_values, relative_error
from lrsurgery.linalg.svd import (
    ENGINES,
    Decomposed,
    Spectrum,
    direction_factors,
    singular_values,
    spectral_factors,
    truncated_svd,
)

__all__ = [
    "ENGINES",
    "Decomposed",
    "Factors",
    "Spectrum",
    "balance",
    "balance_of",
    "direction_factors",
    "product_values",
    "relative_error",
    "singular_values",
    "spectral_factors",
    "truncated_svd",
]
