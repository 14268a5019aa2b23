"""Mathematics of low-rank factors, tensors in and tensors out: decompositions, initialisations, spectra."""

from lrsurgery.linalg.factors import Factors, balance, balance_of, product_values, relative_error
from lrsurgery.linalg.svd import (
    ENGINES,
    Decomposition,
    Spectrum,
    direction_factors,
    singular_values,
    spectral_factors,
    truncated_svd,
)

__all__ = [
    "ENGINES",
    "Decomposition",
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
