"""Figures of a class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrsurgery.data.batches import IGNORED
from lrsurgery.data.tasks import TASKS


def measure_masks(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Measure each image, in fp64 (batch, 3 + 3 classes): sums that `summarise_masks` adds up.

    Summed negative log likelihood, pixels counted, pixels right, then for each class the pixels that are both said and
    true, said, and true. Logits are enlarged to the labels' size, one image at a time.
    """
    rows = []
    for one, right in zip(logits, labels, strict=True):
        scores, answers = (each[0] for each in TASKS[task].align(one[None], right[None]))
        counted = answers != IGNORED
        scores, answers = scores[counted].float(), answers[counted]
        nll = cross_entropy(scores, answers, reduction="none").double().sum()
        said, classes = scores.argmax(-1), logits.shape[1]
        hits = said == answers
        counts = [torch.bincount(each, minlength=classes) for each in (said[hits], said, answers)]
        rows.append(torch.cat([torch.stack([nll, counted.sum().double(), hits.sum().double()]), *counts]))
    return torch.stack(rows)


def summarise_masks(sums: Sequence[float]) -> dict[str, float]:
    """Loss of a pixel, pixel accuracy, and the mean over classes of intersection / union, of those that occur."""
    nll, count, hits, *classes = sums
    if not count:
        return {}
    both, said, true = torch.tensor(classes, dtype=torch.float64).view(3, -1)
    union = said + true - both
    return {
        "loss": nll / count,
        "scored": count,
        "pixel_accuracy": hits / count,
        "mean_iou": float((both[union > 0] / union[union > 0]).mean()),
    }
