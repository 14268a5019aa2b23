"""Self-guided training: each factorised layer begins as its dense weight W, and passes over to U V.

    y = a (W x) + (1 - a) (U V x),   a = (1 + cos(pi step / steps)) / 2

Wei et al. 2024 (arXiv 2406.16450): W is trained beside the factors, by the same optimizer, and is dropped after
`steps`. Theirs begins as U V, in training from scratch; here W is the dense model's own weight, with its bias, and so a
run begins at the dense model's output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from lrsurgery.errors import RecipeError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedConv, FactorisedLayer, FactorisedLinear

GUIDE = "guide"  # the dense layer's name in the factorised one


def dense_share(step: int, steps: int) -> float:
    """The share of the dense weights in a step, counted from 0: 1 at first, and 0 from `steps` on."""
    return (1 + math.cos(math.pi * step / steps)) / 2 if step < steps else 0.0


class Blend:
    """Dense layers beside the factorised ones of a model, which share each layer's output while it trains.

    In evaluation a model is its factors alone, as it is published.
    """

    def __init__(self, body: nn.Module, dense: Mapping[str, nn.Module], who: str) -> None:
        """Copy the dense layers of these names into the factorised ones. Raises RecipeError where they do not fit.

        `who` names the dense model.
        """
        self.share = 1.0
        self._layers = factorised_layers(body)
        self._called: set[str] = set()
        for name, layer in self._layers.items():
            _check(name, layer, dense.get(name), who)
        self._handles = []
        for name, layer in self._layers.items():
            setattr(layer, GUIDE, copy.deepcopy(dense[name]).requires_grad_(True).train(layer.training))
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def blend(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not layer.training:
                return None
            self._called.add(name)
            dense: Tensor = getattr(layer, GUIDE)(*args, **kwargs)
            return torch.lerp(output, dense, self.share)  # exactly `dense` at 1, exactly `output` at 0

        return blend

    @property
    def idle(self) -> list[str]:
        """The layers that no step has called: the model reads their weights itself, or routed nothing to them."""
        return [name for name in self._layers if name not in self._called]

    def remove_(self) -> None:
        """Drop the dense layers; the model is its factors again."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            delattr(layer, GUIDE)


def _check(name: str, layer: FactorisedLayer, dense: nn.Module | None, who: str) -> None:
    kind = layer.layout
    simple = isinstance(layer, FactorisedLinear | FactorisedConv) and not (kind.parameter or kind.lookup)
    if not simple or layer.tied or layer.folded is not None:
        raise RecipeError(
            f"blend: {name} is of a kind without self-guided training ({kind.name}{', tied' if layer.tied else ''});"
            " factorise without it (--exclude), or leave --blend out"
        )
    wanted, found = layer.weight, getattr(dense, "weight", None)
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        said = f"{tuple(found.shape)}" if isinstance(found, Tensor) else "no such layer"
        raise RecipeError(
            f"blend: {name} of {who}: {said}, must be {tuple(wanted.shape)}; name the dense model that the factors are"
            " of with --against"
        )


class BlendCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the share of the dense weights before each step, and tells of layers that the first step did not call."""

    def __init__(self, blend: Blend, steps: int, note: Callable[[str], None]) -> None:
        self.blend, self.steps, self.note = blend, steps, note

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.blend.share = dense_share(state.global_step, self.steps)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == 1 and (idle := self.blend.idle):
            self.note(
                f"blend: {len(idle)} layers ({', '.join(idle[:5])}) were not called in the first step, so that dense"
                " weights had no part in it: the model reads their weights itself, or routed nothing to them"
            )
