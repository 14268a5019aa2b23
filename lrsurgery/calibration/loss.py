"""Importances, which decide how the errors of a layer are weighted, and the loss of the Fisher importance.

To add an importance, add a row to `IMPORTANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import CalibrationError
from lrsurgery.heads import Split

# importance -> whether it needs gradients of a loss
IMPORTANCES = {
    "fisher": True,  # second moments of inputs and of output gradients
    "activations": False,  # second moments of the inputs alone
}
TEMPERATURE = 2.0  # better than 1 (examples/guides/calibration.md)
WIDE = 1 << 24  # logits at a time: 64 MB in fp32
NARROW = 1 << 22  # in fp64, several times: 32 MB
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
        flat = _scored(logits_of(outputs), batch)
        gradients = self._gradients(flat, self._draw(len(flat), flat.device))
        return (flat.float() * gradients).sum(), len(flat)

    def backward(self, split: Split, batch: Batch, context: Callable[[], AbstractContextManager[None]]) -> int:
        """Take the gradients of the loss, the head's logits some positions at a time; return the items scored.

        Backward passes run in a `context`.
        """
        states = _scored(split.hidden, batch)
        leaf = states.detach().requires_grad_()
        draws = self._draw(len(leaf), leaf.device)
        for part in split.slices(len(leaf), WIDE):
            logits = split.logits(leaf[part])
            gradients = self._gradients(logits, tuple(drawn[part] for drawn in draws))
            if logits.requires_grad:
                with context():
                    torch.autograd.backward(logits, gradients.to(logits.dtype))
        if states.requires_grad and leaf.grad is not None:
            with context():
                torch.autograd.backward(states, leaf.grad)
        return len(leaf)

    @property
    def uncertainty(self) -> float:
        """The mean Gini impurity 1 - ||p||^2 so far: probability that two classes sampled from a prediction differ."""
        return self._uncertainty / max(1, self._scored)

    def _draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A number of [0, 1) and a sign for each of `count` predictions, in fp64 (n, 1)."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        places = torch.rand(count, 1, dtype=torch.float64, generator=self._generator, device=device)
        signs = 1 - 2 * torch.randint(2, (count, 1), generator=self._generator, device=device)
        return places, signs.double()

    def _gradients(self, logits: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        """Weighted gradients (n, classes) at logits (n, classes), in fp32."""
        flat = logits.detach().float()
        if not bool(torch.isfinite(flat.logsumexp(-1)).all()):  # -inf only excludes a class
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        self._scored += len(flat)
        size, gradients = max(1, NARROW // flat.shape[-1]), torch.empty_like(flat)
        for out, *part in zip(*(torch.split(each, size) for each in (gradients, flat, *draws)), strict=True):
            out.copy_(self._logit_gradients(*part))
        return gradients

    def _logit_gradients(self, logits: Tensor, places: Tensor, signs: Tensor) -> Tensor:
        """In fp64, since 1 - p matters for p near 1."""
        p = (logits.double() / self._temperature).softmax(-1)
        squares = torch.linalg.vecdot(p, p)[:, None]
        lengths = (1 - p).square_().add_((squares - p.square()).clamp_(min=0)).sqrt_()
        self._uncertainty += float((1 - squares).sum())
        steps = (p * lengths).cumsum_(-1)  # sampling by the inverse of the distribution function
        total = steps[:, -1:].clone()
        classes = torch.searchsorted(steps, places * total, right=True).clamp(max=p.shape[-1] - 1)
        weights = (total / lengths.gather(-1, classes).clamp(min=TINY)).sqrt()  # sqrt(p / q)
        gradients = p.scatter_(-1, classes, p.gather(-1, classes) - 1)
        return gradients.mul_(weights * signs)


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


def _scored(values: Tensor, batch: Batch) -> Tensor:
    """Those (n, width) of the values (batch, ..., width) that count."""
    counted = _counted(batch, values.shape[:-1])
    return values[counted] if counted is not None else values.flatten(0, -2)


def _counted(batch: Batch, shape: torch.Size) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and bool((labels < 0).any()):
        return labels >= 0
    if isinstance(mask, Tensor) and mask.shape == shape and not bool(mask.all()):
        return mask.bool()
    return None
