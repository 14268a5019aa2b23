"""Figures and distillation of language models, the head some positions at a time: logits are never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from lrsurgery.data.batches import IGNORED
from lrsurgery.heads import Split

AT_A_TIME = 1 << 24  # logits: 64 MB in fp32, and several copies
COLUMNS = 4

# what is given for each position (batch, positions, ...), labels -> those that answer each other
Align: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def measure_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood, 1, top-1 and top-5 hit of each label, in fp64 (n, COLUMNS); zeros where it is ignored.

    Takes logits (n, classes) and labels (n,).
    """
    counted = labels.ne(IGNORED)
    nll = cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices.eq(labels.unsqueeze(-1)) & counted.unsqueeze(-1)
    columns = (nll.where(counted, 0), counted, hits[:, 0], hits.any(-1))
    return torch.stack([column.double() for column in columns], dim=-1)


def kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum T^2 KL(teacher || student) at temperature T over positions, of logits (n, classes).

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    ours, theirs = (log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def measure_split(split: Split, labels: Tensor, align: Align) -> Tensor:
    """Sums of `measure_tokens` over each example (batch, COLUMNS)."""
    hidden, labels = align(split.hidden, labels)
    counted = labels.ne(IGNORED)
    states, right = hidden[counted], labels[counted]
    rows = torch.zeros(len(labels), COLUMNS, dtype=torch.float64, device=labels.device)
    examples = counted.nonzero()[:, 0]
    for part in split.slices(len(states), AT_A_TIME):
        rows.index_add_(0, examples[part], measure_tokens(split.logits(states[part]), right[part]))
    return rows


def distil_split(
    student: Split, teacher: Split, labels: Tensor, align: Align, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """Sums of the negative log likelihood and of the `kl_sum` over the scored positions, and how many these are.

    A backward pass computes the logits again.
    """
    ours, answers = align(student.hidden, labels)
    theirs, _ = align(teacher.hidden, labels)
    counted = answers.ne(IGNORED)
    states, targets, right = ours[counted], theirs[counted], answers[counted]

    def piece(state: Tensor, target: Tensor, label: Tensor) -> Tensor:
        logits = student.logits(state)
        with torch.no_grad():
            answer = teacher.logits(target)
        return torch.stack([cross_entropy(logits.float(), label, reduction="sum"), kl_sum(logits, answer, temperature)])

    sums = torch.zeros(2, device=labels.device)
    for part in student.slices(len(states), AT_A_TIME):
        found: Tensor = checkpoint(piece, states[part], targets[part], right[part], use_reentrant=False)
        sums = sums + found
    return sums[0], sums[1], len(states)
