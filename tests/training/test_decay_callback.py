"""Frobenius decay in a Trainer of one's own, against autograd on the product."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lrsurgery
from lrsurgery.errors import SurgeryError

RATE, STRENGTH = 0.1, 0.3


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 14)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def trained(folder: Path, *, callbacks: list[Any], low_rank: bool = True, weight_decay: float = 0.0) -> Any:
    """The model after one step of SGD."""
    torch.manual_seed(0)
    model = Regression()
    if low_rank:
        lrsurgery.factorise_(model, rank=4)
    rows = [{"x": torch.randn(10), "labels": torch.randn(14)} for _ in range(4)]
    settings = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_steps": 1, "seed": 0}
    places = {"output_dir": str(folder), "save_strategy": "no", "report_to": "none", "use_cpu": True}
    options: dict[str, Any] = {**settings, **places, "weight_decay": weight_decay, "disable_tqdm": True}
    arguments = tf.TrainingArguments(**options, per_device_train_batch_size=4, remove_unused_columns=False)
    trainer = tf.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    return model


@pytest.mark.parametrize("decoupled", [True, False])
def test_one_step_of_a_trainer(tmp_path: Path, decoupled: bool) -> None:
    torch.manual_seed(0)
    before = Regression()
    lrsurgery.factorise_(before, rank=4)
    layer: Any = before.layer
    moved = torch.autograd.grad(STRENGTH / 2 * layer.weight.square().sum(), (layer.u.weight, layer.v.weight))
    callback = lrsurgery.FrobeniusDecayCallback(STRENGTH, decoupled=decoupled)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="factors decay twice")
        decayed = trained(tmp_path, callbacks=[callback]).layer
    plain = trained(tmp_path, callbacks=[]).layer
    for part, gradient in zip(("u", "v"), moved, strict=True):
        difference = getattr(decayed, part).weight - getattr(plain, part).weight
        assert not torch.equal(getattr(plain, part).weight, getattr(layer, part).weight)
        torch.testing.assert_close(difference, -RATE * gradient, rtol=1e-4, atol=1e-6)


def test_a_second_decay_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"decay twice: .* weight_decay of 0.01; set weight_decay=0"):
        trained(tmp_path, callbacks=[lrsurgery.FrobeniusDecayCallback(STRENGTH)], weight_decay=0.01)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="the model has no factorised layers"):
        trained(tmp_path, callbacks=[lrsurgery.FrobeniusDecayCallback(STRENGTH)], low_rank=False)
