"""Models behind the interface that transformers' Trainer expects: loss and logits by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lrsurgery.errors import RecipeError, SourceError
from lrsurgery.modules import for_model

# problems that a head solves, by transformers' names: one class of several, any number of classes, numbers
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
NEVER = -1e30  # logit of what is no class; finite, so that its products with 0 are 0


class Wrapped(nn.Module):
    """A model, `body`, behind another interface."""

    main_input_name = "pixel_values"

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def gradient_checkpointing_enable(self, **options: object) -> None:
        if hasattr(self.body, "gradient_checkpointing_enable"):  # of transformers
            self.body.gradient_checkpointing_enable(**options)  # type: ignore[operator]
            return
        if not hasattr(self.body, "set_grad_checkpointing"):
            raise RecipeError(f"gradient_checkpointing: timm's {type(self.body).__name__} cannot do it")
        self.body.set_grad_checkpointing(True)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **options: object) -> None:
        self.gradient_checkpointing_enable(**options)


class ImageClassifier(Wrapped):
    """A timm model behind the interface that transformers' Trainer expects."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.problem = SINGLE

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": self._loss(logits.float(), labels), "logits": logits}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem == REGRESSION:
            return mse_loss(logits.reshape(-1), labels.float().reshape(-1))
        if self.problem == MULTI:
            return binary_cross_entropy_with_logits(logits, labels.float())
        return cross_entropy(logits, labels)


class SpanPointer(Wrapped):
    """A transformers model for question answering behind the interface of the others.

    Its scores of starts and ends are logits (batch, 2, tokens): two predictions, whose classes are the tokens. Padding
    is no class.
    """

    main_input_name = "input_ids"

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.body(**for_model(self.body, inputs))
        if "start_logits" not in outputs:
            raise SourceError(f"{type(self.body).__name__}: returns no start_logits, by which a span is found")
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float()
        mask = inputs.get("attention_mask")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None] == 0, NEVER)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}
