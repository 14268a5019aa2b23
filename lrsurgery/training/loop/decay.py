"""Frobenius decay in a transformers `Trainer` of one's own."""

from __future__ import annotations

import warnings

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.decay import FrobeniusDecay


class FrobeniusDecayCallback(TrainerCallback):  # type: ignore[misc]
    """Attach `FrobeniusDecay` to the optimizer that a Trainer makes, for as long as it trains.

        Trainer(model, args, train_dataset=data, callbacks=[lrsurgery.FrobeniusDecayCallback(0.01)])

    Leave `weight_decay` of the TrainingArguments at 0: a factor that the optimizer decays besides decays twice, and a
    warning says so. Raises SurgeryError as `FrobeniusDecay` does, when training begins.
    """

    def __init__(self, strength: float, *, decoupled: bool = True) -> None:
        self.strength, self.decoupled = strength, decoupled
        self._decay: FrobeniusDecay | None = None

    def on_train_begin(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: object,
    ) -> None:
        self._decay = FrobeniusDecay(model, self.strength, decoupled=self.decoupled).attach(optimizer)
        factors = {id(part.weight) for layer in factorised_layers(model).values() for part in (layer.u, layer.v)}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in factors for p in group["params"]):
                warnings.warn(
                    f"factors decay twice: by Frobenius decay and by the optimizer's weight_decay of"
                    f" {group['weight_decay']:g}; set weight_decay=0 in the TrainingArguments",
                    stacklevel=2,
                )
                break

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._decay is not None:
            self._decay.detach()
