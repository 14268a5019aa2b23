"""What a run reports while it trains, what it writes down, and how a signal stops it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from lrsurgery.data.batches import Examples
from lrsurgery.progress import Listener, TrainingStep
from lrsurgery.report.views.columns import HARNESS, QUALITY
from lrsurgery.training.checkpoints import mark_complete
from lrsurgery.training.loop.dynamics import layer_dynamics
from lrsurgery.training.run_folder import RunFolder

FIGURES = (*QUALITY, *HARNESS, "scored")  # of an evaluation, whichever the task has


def figures_of(evaluation: Mapping[str, float]) -> dict[str, float]:
    """The figures among what the Trainer's evaluation gives; then those of single outputs, as `NAME.cosine`."""
    found = {name: evaluation[f"eval_{name}"] for name in FIGURES if f"eval_{name}" in evaluation}
    single = {name: name.removeprefix("eval_") for name in evaluation if "." in name and name.startswith("eval_")}
    return found | {name: evaluation[key] for key, name in single.items()}


class HasModel(Protocol):
    """A Trainer, as its callbacks see it."""

    model: nn.Module


class EvaluationCallback(TrainerCallback):  # type: ignore[misc]
    """Reports how far an evaluation is."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.trainer: HasModel | None = None  # its LowRankTrainer
        self._batch = 0

    def on_prediction_step(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        eval_dataloader: DataLoader[object],
        **_: object,
    ) -> None:
        self._batch += 1
        self.listener.evaluating(self._batch, len(eval_dataloader))

    def on_evaluate(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        self._batch = 0


class RunCallback(EvaluationCallback):
    """Reports a run and keeps its records: metrics.jsonl, marks of complete checkpoints. Stops it on a signal."""

    def __init__(
        self,
        folder: RunFolder,
        stage: str,
        listener: Listener,
        interrupted: Callable[[], bool],
        train: Examples,
        stop_at: int,
    ) -> None:
        super().__init__(listener)
        self.folder, self.stage, self.interrupted = folder, stage, interrupted
        self.train, self.stop_at = train, stop_at
        self.stopped = False
        self.seconds = 0.0  # in training steps
        self._begun = 0.0
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.listener.stage(self.stage, state.global_step, state.max_steps)

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # evaluations are reported below, with the dynamics of the layers
        self._latest = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        self._write(state, {"stage": self.stage, **self._latest})
        self._report_step(args, state)

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.seconds += time.perf_counter() - self._begun
        self._report_step(args, state)
        if state.global_step >= self.stop_at:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"
        if self._anyone_interrupted(args):
            self.stopped = control.should_save = control.should_training_stop = True
        if control.should_save:  # a resumed run knows no losses from before its checkpoint
            control.should_log = True

    def _anyone_interrupted(self, args: Arguments) -> bool:
        mine = self.interrupted()
        if args.world_size == 1:
            return mine
        # a signal reaches the processes at different moments; all of them have to stop after the same step
        flag = torch.tensor(float(mine), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def on_evaluate(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        super().on_evaluate(args, state, control)
        values = figures_of(metrics or {})
        assert self.trainer is not None
        layers = {k.removeprefix("body."): v for k, v in layer_dynamics(self.trainer.model).items()}
        self._write(state, {"stage": self.stage, "eval": values, "layers": layers})
        self.listener.evaluated(self.stage, state.global_step, state.max_steps, values)

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _report_step(self, args: Arguments, state: TrainerState) -> None:
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.listener.step(
            TrainingStep(
                step=state.global_step,
                total=state.max_steps,
                units_per_step=examples * self.train.size,
                unit=self.train.unit,
                logged=self._latest,
            )
        )

    def _write(self, state: TrainerState, record: Mapping[str, object]) -> None:
        if state.is_world_process_zero:
            epoch = round(state.epoch, 4) if state.epoch is not None else 0
            self.folder.append_metrics({"step": state.global_step, "epoch": epoch, **record})


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGINT or SIGTERM only raises a flag; a second one interrupts at once."""
    raised: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
