"""Learning rate range test (Smith 2017, arXiv 1506.01186): a few steps at rising rates, which leave no trace.

The loss after each step is that of the first batch, which only the step at the lowest rate trains on, with the same
dropout each time. So the curve holds no differences between batches, and a few steps are enough.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_utils import IntervalStrategy

from lrsurgery.data.batches import Examples
from lrsurgery.data.tasks import Subject
from lrsurgery.data.unlabelled.agreement import Agreement
from lrsurgery.training.loop.arguments import training_arguments
from lrsurgery.training.loop.trainer import Batch, LowRankTrainer, release_
from lrsurgery.training.recipe import Recipe

RANGES = {
    "adamw": (3e-5, 1e-1),
    "sgd": (1e-3, 1e1),
    "spectron": (3e-5, 1e-1),
}  # optimizer -> rates of the first and the last step
LEAST, MOST = 12, 40  # steps of a test: below, the rates lie too far apart; above, nothing is gained
SHARE = 12  # of a run's steps; those of the test cost a third more, with their measurements
WRECKED = 2.0  # a loss of so many times the first one ends the test


@dataclass(frozen=True)
class Curve:
    """The loss (nats) after the step at each rate. The last one may be NaN or infinite."""

    before: float  # the loss before the first step
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def lowest(self) -> int:
        """The place of the lowest loss."""
        return min(range(len(self.losses)), key=lambda i: self.losses[i] if math.isfinite(self.losses[i]) else math.inf)

    @property
    def found(self) -> float:
        """The learning rate to train at, to two digits: the rate at the lowest loss.

        Smith's advice for a constant rate is a fraction of it. Behind a warm-up and under a cosine, half of it healed
        three models less, by 0.002 to 0.07. The rate is read off the parabola through the lowest point and its
        neighbours. Where no step lowered the loss, it is the lowest rate of the test.
        """
        at = self.lowest
        if not self.losses[at] < self.before:
            return self.rates[0]
        place = 0.0  # of the parabola's lowest point, in steps from `at`
        if 0 < at < len(self.losses) - 1 and math.isfinite(self.losses[at + 1]):
            left, here, right = self.losses[at - 1 : at + 2]
            place = (left - right) / (2 * (left - 2 * here + right)) if left + right > 2 * here else 0.0
        growth = self.rates[-1] / self.rates[-2] if len(self.rates) > 1 else 1.0
        return float(f"{self.rates[at] * growth**place:.2g}")

    def describe(self) -> str:
        """A note on what was found, and how."""
        return (
            f"the learning rate is {self.found:g}, by a range test of {len(self.rates)} steps: the loss of a batch was"
            f" {self.before:.3f} before, and lowest after the step at {self.rates[self.lowest]:.2g}"
            f" ({self.losses[self.lowest]:.3f})"
        )


def test_length(total: int) -> int:
    """The number of steps of the test of a run of `total` steps; 0 for a run that is too short for one."""
    steps = min(total // SHARE, MOST)
    return steps if steps >= LEAST else 0


def range_test(
    subject: Subject,
    recipe: Recipe,
    train: Examples,
    teacher: nn.Module | None,
    steps: int,
    agreement: Agreement | None = None,
) -> Curve:
    """Train for `steps` steps at rates that rise geometrically, measure, and put everything back bit for bit.

    Weights, buffers, gradients and random states are as before; the optimizer is the test's own. Every process of a
    run calls this and gets the same curve.
    """
    low, high = RANGES[recipe.optimizer]
    rates = tuple(low * (high / low) ** (i / (steps - 1)) for i in range(steps))
    with tempfile.TemporaryDirectory() as folder, unchanged(subject.model):
        args = training_arguments(recipe, Path(folder), evaluates=False, total=steps)
        args.save_strategy = args.logging_strategy = IntervalStrategy.NO
        args.report_to = []
        trainer = _TestTrainer(subject, recipe, args, train, teacher, rates, agreement)
        trainer.train()
        release_(trainer)
    before, *losses = trainer.losses
    return Curve(before, rates[: len(losses)], tuple(losses))


class _TestTrainer(LowRankTrainer):
    """A Trainer that steps at these rates, and measures the loss of its first batch before and after each."""

    def __init__(
        self,
        subject: Subject,
        recipe: Recipe,
        args: Arguments,
        train: Examples,
        teacher: nn.Module | None,
        rates: tuple[float, ...],
        agreement: Agreement | None,
    ) -> None:
        super().__init__(subject, recipe, args, train, None, teacher, agreement=agreement)
        self.rates = rates
        self.losses: list[float] = []
        self.first: Batch | None = None
        self.add_callback(_Steps(self))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self.first is None:
            self.first = self._prepare_inputs(dict(inputs))
            self.measure()
        # as the Trainer's own: a loss that is not finite is a result here
        loss: Tensor = Trainer.training_step(self, model, inputs, num_items_in_batch)
        return loss

    @torch.no_grad()
    def measure(self) -> float:
        """Append the loss of the first batch, the mean over the processes, and return it."""
        assert self.first is not None
        self.model_wrapped.train()
        with random_states_kept():
            torch.manual_seed(self.recipe.seed)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model_wrapped, dict(self.first))
        assert isinstance(loss, Tensor)
        mean = float(self.accelerator.gather(loss.detach().float().reshape(1)).mean())
        self.losses.append(mean)
        return mean


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Sets the rate before each step and measures after it; ends the test at a wreck."""

    def __init__(self, trainer: _TestTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: object
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.trainer.rates[state.global_step]

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        loss = self.trainer.measure()
        if not loss < WRECKED * self.trainer.losses[0]:  # NaN, too
            control.should_training_stop = True


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put a model's weights, buffers, gradients and mode back at the end of the block, and the random states."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    training = [module.training for module in model.modules()]
    try:
        with random_states_kept():
            yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch (CPU and GPUs) back at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
