"""Importances, which decide how the errors of a layer are weighted, and the loss of the Fisher importance.

To add an importance, add a row to `IMPORTANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import CalibrationError

# importance -> whether it needs gradients of a loss
IMPORTANCES = {
    "fisher": True,  # second moments of inputs and of output gradients
    "activations": False,  # second moments of the inputs alone
}
TEMPERATURE = 2.0  # better than 1 (examples/guides/calibration.md)
WIDE = 1 << 24  # logits at a time in fp64: 128 MB
TINY = 1e-300

Outputs: TypeAlias = Any  # a model's outputs: a mapping, an object with logits, a tensor
Batch: TypeAlias = Any  # a dict of keyword arguments, a tensor or a tuple
# model outputs, batch -> loss summed over scored items, number of scored items
Loss: TypeAlias = Callable[[Outputs, Batch], tuple[Tensor, int]]


def check_importance(name: str, *others: str) -> None:
    """Raise CalibrationError that lists the known importances and `others`, unless `name` is one."""
    if name not in (*IMPORTANCES, *others):
        raise CalibrationError(f"unknown importance '{name}'; known: {', '.join((*IMPORTANCES, *others))}")


def check_temperature(value: float) -> None:
    """Raise CalibrationError unless it is a positive number."""
    if not (math.isfinite(value) and value > 0):
        raise CalibrationError(f"Fisher temperature {value}: write a number above 0; 1 leaves the logits as they are")


class SampledLoss:
    """A loss whose gradients g estimate the Fisher information: the mean of g g^T over classes sampled from the model.

    For each prediction p one class c is sampled with probability q_c proportional to p_c ||p - e_c||. Its gradient at
    the logits, p - e_c, is weighted by sqrt(p_c / q_c), so the mean of g g^T is that of classes sampled from p. Random
    signs make the cross terms of several tokens vanish in the mean. This importance sampling has the least variance of
    any single sample: a confident model has almost no gradient at its likely class, and the other classes would hardly
    ever be sampled from p. Only the gradients are meaningful, not the value.

    Scores the last axis of the logits (batch, ..., classes) at every position without padding; labels are not needed.
    If the batch has labels that ignore some positions (< 0), as in masked language modelling, only the others count.

    A network that is sure of its answers has next to no Fisher information where it stands, though a step away it has.
    `temperature` T softens that: p is the softmax of logits / T. The gradients are those at the logits / T, so that the
    metric is that of T^2 KL at temperature T (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """

    def __init__(self, seed: int, temperature: float = 1.0) -> None:
        self._seed, self._temperature = seed, temperature
        self._generator: torch.Generator | None = None
        self._uncertainty, self._scored = 0.0, 0

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        logits = logits_of(outputs)
        counted = _counted(batch, logits.shape[:-1])
        flat = (logits[counted] if counted is not None else logits.flatten(0, -2)).float()
        if not bool(torch.isfinite(flat.detach().logsumexp(-1)).all()):  # -inf only excludes a class
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        if self._generator is None or self._generator.device != flat.device:
            self._generator = torch.Generator(flat.device).manual_seed(self._seed)
        at_a_time = max(1, WIDE // flat.shape[-1])
        gradients = torch.cat(
            [self._logit_gradients(part, self._generator) for part in torch.split(flat.detach(), at_a_time)]
        )
        self._scored += len(flat)
        return (flat * gradients).sum(), len(flat)

    @property
    def uncertainty(self) -> float:
        """The mean Gini impurity 1 - ||p||^2 so far: probability that two classes sampled from a prediction differ."""
        return self._uncertainty / max(1, self._scored)

    def _logit_gradients(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Weighted gradients (n, classes) at logits (n, classes). In fp64, since 1 - p matters for p near 1."""
        log_p = (logits.double() / self._temperature).log_softmax(-1)
        p, rest = log_p.exp(), -log_p.expm1()
        squares = p.square().sum(-1, keepdim=True)
        lengths = (rest.square() + (squares - p.square()).clamp(min=0)).sqrt()
        q = p * lengths
        total = q.sum(-1, keepdim=True)
        self._uncertainty += float((p * rest).sum())
        classes = torch.multinomial(q.clamp(min=TINY), 1, generator=generator)
        gradients = p.scatter(-1, classes, -rest.gather(-1, classes))
        weights = (total / lengths.gather(-1, classes).clamp(min=TINY)).sqrt()  # sqrt(p / q)
        signs = 1 - 2 * torch.randint(2, classes.shape, generator=generator, device=classes.device)
        return (gradients * weights * signs).to(logits.dtype)


class PixelLoss(SampledLoss):
    """As `SampledLoss`, for logits (batch, classes, height, width): each position of these is a prediction."""

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        return super().__call__({"logits": logits_of(outputs).movedim(1, -1)}, None)


class IndependentLoss:
    """As `SampledLoss`, for heads whose outputs are independent: any number of classes (`binary`), or numbers.

    The mean of g g^T over random signs is the Hessian of the loss, a mean over the outputs: diag(p (1 - p)) / outputs
    for binary cross entropy, with p the sigmoid of logits / `temperature`; 2 / outputs for the squared error.
    """

    def __init__(self, seed: int, temperature: float = 1.0, *, binary: bool) -> None:
        self._seed, self._temperature, self._binary = seed, temperature, binary
        self._generator: torch.Generator | None = None

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        logits = logits_of(outputs).float()
        if not bool(torch.isfinite(logits.detach()).all()):
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        if self._generator is None or self._generator.device != logits.device:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        signs = 1 - 2 * torch.randint(2, logits.shape, generator=self._generator, device=logits.device)
        p = (logits.detach() / self._temperature).sigmoid()
        curvature = p * (1 - p) if self._binary else torch.full_like(logits, 2.0)
        gradients = signs * (curvature / logits.shape[-1]).sqrt()
        return (logits * gradients).sum(), len(logits)


class ProjectionLoss:
    """A loss for encoders without a head: the pooled output, of unit length, along a random direction for each sample.

    The mean of g g^T over directions is the Gauss-Newton matrix of ||d||^2, d the change of the pooled output. Pooled
    is the mean of the last hidden states over positions without padding, or over the positions of an image.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        pooled = torch.nn.functional.normalize(_pooled(outputs, batch).float(), dim=-1)
        if not bool(torch.isfinite(pooled.detach()).all()):
            raise CalibrationError("the model's outputs hold NaN or Inf; check the data or the model")
        if self._generator is None or self._generator.device != pooled.device:
            self._generator = torch.Generator(pooled.device).manual_seed(self._seed)
        directions = torch.randn(pooled.shape, generator=self._generator, device=pooled.device)
        return (pooled * directions).sum(), len(pooled)


def _pooled(outputs: Outputs, batch: Batch) -> Tensor:
    """The mean output (n, channels) of an encoder's samples. Raises CalibrationError if there are no hidden states."""
    if isinstance(outputs, Mapping) and isinstance(found := outputs.get("embeddings"), Tensor):
        return found  # pooled as the checkpoint says
    hidden = getattr(outputs, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim < 3:
        raise CalibrationError(
            f"the model returns {type(outputs).__name__} without hidden states; use importance activations"
        )
    if hidden.ndim == 4:  # (n, channels, height, width)
        return hidden.flatten(2).mean(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask.to(hidden)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def logits_of(outputs: Outputs) -> Tensor:
    """The logits (batch, ..., classes) of a model's outputs. Raises CalibrationError if there are none."""
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise CalibrationError(
            f"the model returns {type(outputs).__name__} without logits; pass a loss, or use importance activations"
        )
    return logits


def _counted(batch: Batch, shape: torch.Size) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and bool((labels < 0).any()):
        return labels >= 0
    if isinstance(mask, Tensor) and mask.shape == shape and not bool(mask.all()):
        return mask.bool()
    return None
