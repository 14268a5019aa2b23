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
CACHED = 1 << 20  # logits at a time that a CPU's cache holds
RUN = 512  # classes that are summed together before one is drawn
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
        logits = logits.detach()
        gradients = torch.empty_like(logits, dtype=torch.float32)
        size = max(1, (CACHED if logits.device.type == "cpu" else WIDE) // logits.shape[-1])
        for out, *part in zip(*(torch.split(each, size) for each in (gradients, logits, *draws)), strict=True):
            self._fill_(out, *part)
        self._scored += len(logits)
        return gradients

    def _fill_(self, out: Tensor, logits: Tensor, places: Tensor, signs: Tensor) -> None:
        """Write the gradients at `logits` (n, classes) to `out`, in fp32.

        What is near 1 - 1 would be lost in fp32, so the likeliest class is kept apart: `e` are the others' odds against
        it, p / p_top, and figures of a whole row are in fp64.
        """
        largest, top = logits.max(-1, keepdim=True)
        e = torch.sub(logits.float(), largest.float(), out=out).div_(self._temperature).exp_().scatter_(-1, top, 0)
        odds, squares = e.sum(-1, keepdim=True).double(), torch.linalg.vecdot(e, e)[:, None].double()
        if not bool((torch.isfinite(largest) & torch.isfinite(odds)).all()):  # -inf only excludes a class
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        p_top = 1 / (1 + odds)
        rest, squares = odds * p_top, squares * p_top.square()  # of the other classes: sum of p, sum of p^2
        self._uncertainty += float((rest * (1 + p_top) - squares).sum())
        # ||p - e_c||^2 = 1 + ||p||^2 - 2 p_c; of the likeliest class rest^2 + squares
        purity = 1 + squares + p_top.square()
        length_of_top = (rest.square() + squares).sqrt()
        steps = torch.addcmul(purity.float(), e, (-2 * p_top).float()).sqrt_().mul_(e)
        steps.scatter_(-1, top, length_of_top.float())  # p ||p - e_c|| over p_top
        classes, total = _choose(steps, places)
        p = e.gather(-1, classes).double() * p_top
        is_top = classes == top
        length = torch.where(is_top, length_of_top, (purity - 2 * p).sqrt())
        weights = signs * (total * p_top / length.clamp(min=TINY)).sqrt()  # sqrt(p / q)
        out.mul_((p_top * weights).float()).scatter_(-1, top, (p_top * weights).float())
        out.scatter_(-1, classes, (weights * torch.where(is_top, -rest, p - 1)).float())


def _choose(steps: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (n, 1) at these places of [0, 1) where each has a share in proportion to `steps` (n, classes).

    By the inverse of the distribution function, which is summed in fp64 only where the place falls. Returns the sums
    (n, 1) of the steps too.
    """
    count = steps.shape[-1]
    length = min(RUN, count)
    whole = count // length * length
    runs = steps[:, :whole].unflatten(-1, (-1, length)).sum(-1)  # type: ignore[no-untyped-call]
    if whole < count:
        runs = torch.cat([runs, steps[:, whole:].sum(-1, keepdim=True)], -1)
    upto = runs.double().cumsum_(-1)
    aims = places * upto[:, -1:]
    run = torch.searchsorted(upto, aims, right=True).clamp_(max=runs.shape[-1] - 1)
    inside = run * length + torch.arange(length, device=steps.device)
    own = steps.gather(-1, inside.clamp(max=count - 1)).double().masked_fill_(inside >= count, 0).cumsum_(-1)
    # the sum of the run is that of fp32, so an aim at its very end may lie behind the last class
    aims = aims - upto.gather(-1, run) + runs.gather(-1, run)
    last = (own < own[:, -1:]).sum(-1, keepdim=True)  # the last class of the run with a share
    return run * length + torch.searchsorted(own, aims, right=True).minimum(last), upto[:, -1:]


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
