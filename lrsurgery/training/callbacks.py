"""What a run tells while it trains, what it writes down, and how a signal stops it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lrsurgery.data.examples import Examples
from lrsurgery.training.dynamics import layer_dynamics
from lrsurgery.training.run_folder import append_metrics, mark_complete


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    kind: str  # "step", "evaluated", "evaluating", "stage" or "note"
    step: int = 0
    total: int = 0
    stage: str = ""  # "dense" or "factorised"
    values: dict[str, float] = field(default_factory=dict)
    text: str = ""
    unit: str = ""  # what `per_step` counts: tokens, sentences or images
    per_step: int = 0


Watch = Callable[[Event], None]


class EvaluationCallback(TrainerCallback):  # type: ignore[misc]
    """Tells how far an evaluation is."""

    def __init__(self, watch: Watch, stage: str = "") -> None:
        self.watch, self.stage = watch, stage
        self.trainer: Any = None  # its LowRankTrainer
        self._batch = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self._batch += 1
        self.watch(Event("evaluating", self._batch, len(facts["eval_dataloader"]), self.stage))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batch = 0


class RunCallback(EvaluationCallback):
    """What a run tells and keeps: metrics.jsonl, marks of complete checkpoints, the stop on a signal, the switch."""

    def __init__(
        self, folder: Path, stage: str, watch: Watch, interrupted: Callable[[], bool], train: Examples, stop_at: int
    ) -> None:
        super().__init__(watch, stage)
        self.folder, self.interrupted, self.train, self.stop_at = folder, interrupted, train, stop_at
        self.stopped = False
        self.seconds = 0.0  # in training steps
        self._begun = 0.0
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell("stage", args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return  # evaluations are told below, with what the layers are like
        self._latest = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        self._write(state, {"stage": self.stage, **self._latest})
        self._tell("step", args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
        self._tell("step", args, state)
        if state.global_step >= self.stop_at:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"
        if self._anyone_interrupted(args):
            self.stopped = control.should_save = control.should_training_stop = True

    def _anyone_interrupted(self, args: Any) -> bool:
        mine = self.interrupted()
        if args.world_size == 1:
            return mine
        # a signal reaches the processes at different moments; all of them have to stop after the same step
        flag = torch.tensor(float(mine), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        super().on_evaluate(args, state, control)
        found = {k.removeprefix("eval_"): v for k, v in (metrics or {}).items()}
        values: dict[str, float] = {k: found[k] for k in ("loss", "perplexity", "top1", "top5", "scored") if k in found}
        assert self.trainer is not None
        layers = {k.removeprefix("body."): v for k, v in layer_dynamics(self.trainer.model).items()}
        self._write(state, {"stage": self.stage, "eval": values, "layers": layers})
        self.watch(Event("evaluated", state.global_step, state.max_steps, self.stage, values))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _tell(self, kind: str, args: Any, state: Any) -> None:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * self.train.size
        self.watch(
            Event(kind, state.global_step, state.max_steps, self.stage, self._latest, "", self.train.unit, per_step)
        )

    def _write(self, state: Any, record: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            epoch = round(state.epoch, 4) if state.epoch is not None else 0
            append_metrics(self.folder, {"step": state.global_step, "epoch": epoch, **record})


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGINT or SIGTERM only raises a flag; a second one interrupts at once."""
    raised: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
