"""How often tokens occur, as far as their numbers say: tokenizers give low numbers to frequent tokens."""

from __future__ import annotations

import torch

from lrsurgery.linalg.weighted import Metric

FLAT = 0.1  # share of the vocabulary over which the weight does not fall yet: special tokens and bytes come first


def order_metric(vocabulary: int) -> Metric:
    """The metric of a table (vocabulary, d) without data: token i counts as 1 / (i + vocabulary / 10).

    Zipf's law with Mandelbrot's shift: merges of byte pairs are found in the order of their frequency, and unigram
    vocabularies are sorted by it. The mean weight is 1.
    """
    weights = 1 / (torch.arange(vocabulary, dtype=torch.float64) + FLAT * vocabulary)
    return Metric(None, weights / weights.mean())
