"""Importances: what weighs a layer's errors, and the loss whose gradients weigh them.

To add an importance: a row in `IMPORTANCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrsurgery.errors import CalibrationError

# importance -> whether it needs the gradients of a loss
IMPORTANCES = {
    "fisher": True,  # second moments of inputs and of output gradients
    "activations": False,  # second moments of the inputs alone
}
WIDE = 1 << 24  # logits at a time in fp64: 128 MB
TINY = 1e-300

Outputs: TypeAlias = Any  # whatever a model returns: a mapping, an object with logits, a tensor
Batch: TypeAlias = Any  # a dict of keyword arguments, a tensor or a tuple
# The model's outputs and the batch -> a loss summed over what it scores, and how many that are.
Loss: TypeAlias = Callable[[Outputs, Batch], tuple[Tensor, int]]


def check_importance(name: str, *others: str) -> None:
    """Raises CalibrationError that lists the known ones, `others` among them."""
    if name not in (*IMPORTANCES, *others):
        raise CalibrationError(f"unknown importance '{name}'; known: {', '.join((*IMPORTANCES, *others))}")


class SampledLoss:
    """A loss whose gradients make the Fisher information: the mean of g g^T over the classes that a model predicts.

    For each prediction p one class c is drawn, with probability q_c in proportion to p_c ||p - e_c||, and its gradient
    at the logits, p - e_c, is weighed by sqrt(p_c / q_c) and a random sign, so that those of several tokens add up to
    nothing on average. The mean is that of classes drawn from p, and no single draw comes nearer to it (importance
    sampling): a model that is nearly sure has next to no gradient at its likely class, and the others would hardly ever
    be drawn. Only the gradients mean anything, not the value.

    Taken over the last axis of the logits (batch, ..., classes), wherever the batch has no padding; it needs no labels.
    With labels in the batch that mark some positions as not counted, as masked language modelling does, over the rest.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._doubt, self._scored = 0.0, 0

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        logits = logits_of(outputs)
        counted = _counted(batch, logits.shape[:-1])
        flat = (logits[counted] if counted is not None else logits.flatten(0, -2)).float()
        if not bool(torch.isfinite(flat.detach().logsumexp(-1)).all()):  # -inf rules a class out, which is all right
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        if self._generator is None or self._generator.device != flat.device:
            self._generator = torch.Generator(flat.device).manual_seed(self._seed)
        at_a_time = max(1, WIDE // flat.shape[-1])
        slopes = torch.cat([self._slopes(part, self._generator) for part in torch.split(flat.detach(), at_a_time)])
        self._scored += len(flat)
        return (flat * slopes).sum(), len(flat)

    @property
    def doubt(self) -> float:
        """The mean probability, so far, that two classes drawn from one prediction differ: 1 - ||p||^2."""
        return self._doubt / max(1, self._scored)

    def _slopes(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Gradients (n, classes) at these logits, weighed. In fp64: 1 - p is what matters of a p near 1."""
        log_p = logits.double().log_softmax(-1)
        p, rest = log_p.exp(), -log_p.expm1()
        squares = p.square().sum(-1, keepdim=True)
        lengths = (rest.square() + (squares - p.square()).clamp(min=0)).sqrt()
        q = p * lengths
        total = q.sum(-1, keepdim=True)
        self._doubt += float((p * rest).sum())
        drawn = torch.multinomial(q.clamp(min=TINY), 1, generator=generator)
        slopes = p.scatter(-1, drawn, -rest.gather(-1, drawn))
        weights = (total / lengths.gather(-1, drawn).clamp(min=TINY)).sqrt()  # sqrt(p / q)
        signs = 1 - 2 * torch.randint(2, drawn.shape, generator=generator, device=drawn.device)
        return (slopes * weights * signs).to(logits.dtype)


def logits_of(outputs: Outputs) -> Tensor:
    """The logits (batch, ..., classes) of a model's outputs. Raises CalibrationError where there are none."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise CalibrationError(
            f"the model gives {type(outputs).__name__} without logits; pass a loss, or use the importance activations"
        )
    return found


def _counted(batch: Batch, shape: torch.Size) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and bool((labels < 0).any()):
        return labels >= 0
    if isinstance(mask, Tensor) and mask.shape == shape and not bool(mask.all()):
        return mask.bool()
    return None
