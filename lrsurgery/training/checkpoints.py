"""Checkpoints of a run: the mark that each gets last, and what is looked at before one is used again.

Nothing in a checkpoint is unpickled but by `torch.load(weights_only=True)`, here as in transformers' Trainer, which
allows numpy's arrays beside tensors; its training_args.bin, a pickle of objects, is not read at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from typing_extensions import NotRequired, TypedDict

from lrsurgery.checkpoints.tensors import DTYPES
from lrsurgery.errors import RecipeError, SurgeryError
from lrsurgery.files.digests import MEGABYTE
from lrsurgery.files.json import json_text, read_as
from lrsurgery.files.writing import replace_file
from lrsurgery.report.runs import METRICS

COMPLETE = "complete"  # the mark, a file that is written into a checkpoint last
WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
UNREAD = "training_args.bin"  # the Trainer's own pickle
PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


@dataclass(frozen=True)
class Mark:
    """What a checkpoint consisted of when it was whole. Older versions left the mark empty."""

    files: dict[str, str]  # path in the checkpoint -> SHA-256
    records: int  # lines of metrics.jsonl by then


class EarlyStopping(TypedDict):
    """How transformers' EarlyStoppingCallback keeps its count."""

    attributes: dict[str, int]


class _Callbacks(TypedDict):
    EarlyStoppingCallback: NotRequired[EarlyStopping]


@dataclass(frozen=True)
class State:
    """What is used of trainer_state.json, and what the Trainer would stumble over."""

    global_step: int
    max_steps: int
    epoch: float
    stateful_callbacks: _Callbacks
    logging_steps: float
    eval_steps: float
    save_steps: float
    log_history: list[dict[str, float | None]]
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0

    @staticmethod
    def read(checkpoint: Path) -> State:
        """Raises RecipeError for a damaged file, or one of another step."""
        found = read_as(State, checkpoint / STATE, "a Trainer's state", RecipeError)
        if found.global_step != step_of(checkpoint):
            raise RecipeError(f"{checkpoint / STATE}: is of step {found.global_step}")
        return found

    def best(self, checkpoint: Path) -> Path | None:
        """The stage's best checkpoint, wherever the run's folder lies by now."""
        return checkpoint.with_name(Path(self.best_model_checkpoint).name) if self.best_model_checkpoint else None

    @property
    def evaluations_without_gain(self) -> int:
        """In a row, up to this step."""
        kept = self.stateful_callbacks.get("EarlyStoppingCallback")
        return kept["attributes"].get("early_stopping_patience_counter", 0) if kept is not None else 0


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint that is on the disk in full; one without the mark is never resumed from."""
    files = {}
    for file in _files_of(checkpoint):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[file.relative_to(checkpoint).as_posix()] = _digest(file)
    mark = Mark(files, count_lines(checkpoint.parents[1] / METRICS))
    replace_file(checkpoint / COMPLETE, json_text(asdict(mark)))


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark of a checkpoint; None for the empty one of an older version. Raises RecipeError for a damaged one."""
    file = checkpoint / COMPLETE
    return read_as(Mark, file, "a checkpoint's mark", RecipeError) if file.stat().st_size else None


def marked_checkpoints(stage: Path) -> list[Path]:
    """The checkpoints of a stage that have a mark, the newest first."""
    found = [c for c in stage.glob("checkpoint-*") if c.name[11:].isdecimal() and (c / COMPLETE).is_file()]
    return sorted(found, key=step_of, reverse=True)


def damage_of(checkpoint: Path) -> str | None:
    """The file that keeps a checkpoint from being used, with its fault; None where nothing does.

    Digests are compared where the mark holds them, and each file is opened as training will.
    """
    try:
        mark = read_mark(checkpoint)
        if mark is not None:
            _compare(checkpoint, mark)
        best = State.read(checkpoint).best(checkpoint)
        _open_state(checkpoint)
        if best is not None and best != checkpoint:
            return f"{best}: missing" if not (best / COMPLETE).is_file() else damage_of(best)
    except SurgeryError as e:
        return str(e)
    return None


def _compare(checkpoint: Path, mark: Mark) -> None:
    for name, digest in mark.files.items():
        file = checkpoint / name
        if name == UNREAD:
            continue
        if not file.is_file():
            raise RecipeError(f"{file}: missing")
        if _digest(file) != digest:
            raise RecipeError(f"{file}: damaged, its content is not what was written")


def _open_state(checkpoint: Path) -> None:
    with _named(checkpoint / STATE):
        TrainerState.load_from_json(str(checkpoint / STATE))
    weights = checkpoint / WEIGHTS
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    for name in () if sharded else (WEIGHTS, "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise RecipeError(f"{checkpoint / name}: missing")
    if weights.is_file():
        with _named(weights), safe_open(weights, framework="pt"):
            pass
    for pattern in PICKLES:
        for file in sorted(checkpoint.glob(pattern)):
            with _named(file):
                read_state(file)


def read_state(file: Path) -> object:
    """A pickle of tensors and numbers. Raises whatever torch does for a damaged file, or one with anything else."""
    with safe_globals():
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise TypeError(f"it holds a {type(found).__name__}")
    return found


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    if not file.stat().st_size:
        raise RecipeError(f"{file}: damaged, it is empty")
    try:
        yield
    except Exception as e:  # what torch raises for odd bytes is of a dozen types
        said = " ".join(str(e).split())[:120] or type(e).__name__
        raise RecipeError(f"{file}: damaged ({said})") from e


def check_owner(checkpoint: Path, model: nn.Module) -> None:
    """Raise RecipeError if the weights of a checkpoint are another model's, by a tensor's name, shape or dtype."""
    file = checkpoint / WEIGHTS
    if not file.is_file():  # of FSDP's shards
        return
    wanted = model.state_dict(keep_vars=True)
    with _named(file), safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        found = {name: (opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype()) for name in names}
    remedy = "remove that checkpoint to go on from the one before it, or start over with --overwrite"
    stored = {id(wanted[name]) for name in names if name in wanted}
    for name in sorted(names - set(wanted)):
        raise RecipeError(f"{file}: is of another model, which has {name}; {remedy}")
    for name, tensor in wanted.items():
        if name not in found:
            if id(tensor) not in stored:  # else tied to one that is stored
                raise RecipeError(f"{file}: is of another model, which has no {name}; {remedy}")
            continue
        shape, dtype = found[name]
        if tuple(shape) != tuple(tensor.shape) or DTYPES.get(dtype) != tensor.dtype:
            raise RecipeError(
                f"{file}: is of another model: {name} is {dtype} {tuple(shape)} there and"
                f" {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} here; {remedy}"
            )


def count_lines(file: Path) -> int:
    """The whole lines of a file; 0 without one."""
    if not file.is_file():
        return 0
    with file.open("rb") as handle:
        return sum(part.count(b"\n") for part in iter(lambda: handle.read(MEGABYTE), b""))


def _files_of(checkpoint: Path) -> list[Path]:
    return sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.name != COMPLETE)


def _digest(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as handle:
        for part in iter(lambda: handle.read(MEGABYTE), b""):
            hasher.update(part)
    return hasher.hexdigest()
