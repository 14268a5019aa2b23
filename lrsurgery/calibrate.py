"""What `factorise --calibration` does before it decomposes: the data, the model, and what is known of its layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.calibration import (
    METRICS,
    SampledLoss,
    iter_collect,
    iter_collect_sequentially,
    moment_bytes,
    split,
)
from lrsurgery.data import TRAIN_SPLITS
from lrsurgery.errors import CalibrationError, RecipeError
from lrsurgery.loading import load_model
from lrsurgery.lockstep import find_blocks, load_offloaded
from lrsurgery.moments import Statistics, StatisticsWriter
from lrsurgery.plan import Plan, Replaced
from lrsurgery.preparation import calibration_examples, open_rows, prepare_subject
from lrsurgery.recipes import DataOptions
from lrsurgery.skeletons import build_model
from lrsurgery.sources import Source
from lrsurgery.steps import Note, Progress
from lrsurgery.tasks import LANGUAGE, Subject, is_for, task_of

TOKENS = 2048  # of a batch; its logits and their gradients are what is large
IMAGES = 16
NOTABLE = 1 << 30  # bytes of statistics that are told beforehand
SURE = 1e-3  # below this doubt a model's loss is flat where it is and not around it


@dataclass(frozen=True)
class Calibration:
    """What the layers' errors are weighed by; the CLI's options of the same names say more."""

    data: str | None = None
    metric: str = "fisher"  # or "activations", or "none": as if there were no calibration
    samples: int = 128
    sequential: bool = False
    statistics: Path | None = None  # taken before, in place of data
    save: Path | None = None
    split: str | None = None
    how: DataOptions = field(default_factory=DataOptions)

    @property
    def wanted(self) -> bool:
        return (self.data is not None or self.statistics is not None) and self.metric != "none"

    def check(self) -> None:
        """Raises CalibrationError for a value that no data could make right."""
        if self.metric not in (*METRICS, "none"):
            raise CalibrationError(f"unknown metric '{self.metric}'; known: {', '.join((*METRICS, 'none'))}")
        if self.samples < 1:
            raise CalibrationError(f"samples {self.samples}: write at least 1")
        if self.sequential and self.data is None:
            raise CalibrationError("--sequential looks at data; give --calibration too")
        if self.statistics is not None and self.data is not None:
            raise CalibrationError("--calibration and --statistics are both given; leave one out")
        if self.save is not None and self.data is None:
            raise CalibrationError("--save-statistics keeps what --calibration finds; give that too")
        if self.save is not None and self.save.exists():
            raise CalibrationError(f"{self.save}: is there already; reuse it with --statistics, or name another folder")
        if self.save is not None and not next(p for p in self.save.absolute().parents if p.exists()).is_dir():
            raise CalibrationError(f"{self.save}: cannot be written, as what it should lie in is a file")
        if self.statistics is not None:
            self.kept()  # or says what is wrong with them
        try:
            self.how.check()
        except RecipeError as e:
            raise CalibrationError(str(e)) from e

    def kept(self) -> Statistics:
        """The statistics that were taken before, as the metric asks for them. Raises CalibrationError."""
        assert self.statistics is not None
        found = Statistics.read(self.statistics)
        return found if self.metric == "fisher" else found.without_gradients()

    def recorded(self) -> dict[str, Any] | None:
        """What decides the result, as JSON."""
        if not self.wanted:
            return None
        how = {key: value for key, value in vars(self.how).items() if value is not None}
        return {
            "data": self.data, "statistics": str(self.statistics) if self.statistics else None, "metric": self.metric,
            "samples": self.samples, "sequential": self.sequential, "split": self.split, **how,
        }  # fmt: skip


@dataclass(frozen=True)
class _Ready:
    """A model and the batches that it is to see."""

    subject: Subject
    batches: list[dict[str, Any]]
    facts: dict[str, Any]
    offloaded: bool


def iter_calibrate(
    source: Source, calibration: Calibration, rows: Sequence[Replaced], folder: Path, *, seed: int,
    device: torch.device, trust_remote_code: bool = False,
) -> Generator[Progress | Note, None, Statistics]:  # fmt: skip
    """Statistics of these layers of a checkpoint: read where they were taken before, else taken and kept in `folder`.

    Raises SurgeryError: what is wrong with the data, the model or the statistics.
    """
    if calibration.statistics is not None:
        found = calibration.kept()
        found.check_for(rows, str(calibration.statistics))
        if calibration.metric == "fisher" and not found.has_gradients:
            yield Note(f"{calibration.statistics}: taken with the metric activations, which is used")
        return found
    fisher = calibration.metric == "fisher"
    available = _available(device)
    limit = max(1, available // 3)
    ready = _ready(
        source, calibration, seed, device, trust_remote_code, folder / "offload", by_block=not fisher,
        room=available // 2,
    )  # fmt: skip
    if fisher:
        need = sum(moment_bytes(row, gradients=True) for row in rows)
        passes = len(split(rows, limit))
        if need > NOTABLE or passes > 1 or ready.offloaded:
            where = "weights stay on disk and each block is run twice" if ready.offloaded else "beside the model"
            yield Note(
                f"calibration: {need / 1e9:.1f} GB of statistics, {where}; {available / 1e9:.1f} GB are free:"
                f" {'one pass' if passes == 1 else f'{passes} passes'} over the data"
            )
    named, loss = _names(ready.subject, rows), SampledLoss(seed)
    found = yield from iter_collect(
        ready.subject.model, ready.batches, [replace(row, name=named[row.name]) for row in rows],
        metric=calibration.metric, loss=loss, store=StatisticsWriter(folder, named), facts=ready.facts,
        limit=limit,
    )  # fmt: skip
    if fisher and loss.doubt < SURE:
        yield Note(
            f"the model is sure of all that it sees (chance of another answer: {loss.doubt:.1g}): take the predicted"
            " loss for an order of layers alone; data that it has not learnt by heart say more"
        )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    missing = found.unseen()
    if missing:
        yield Note(f"{len(missing)} layers saw no calibration data ({missing[0]}, ...): they go by their weights alone")
    return found


def iter_resample(
    source: Source, calibration: Calibration, plan: Plan, known: Statistics, folder: Path, *, seed: int, init: str,
    device: torch.device, trust_remote_code: bool = False,
) -> Generator[Progress | Note, None, Statistics]:  # fmt: skip
    """--sequential: the inputs of each block anew, once the blocks before it are replaced as planned.

    Gradients stay those of the dense model.
    """
    ready = _ready(source, calibration, seed, device, trust_remote_code, folder / "offload", by_block=True)
    named = _names(ready.subject, plan.replaced)
    original = {new: old for old, new in named.items()}
    renamed = replace(plan, rows=tuple(replace(row, name=named[row.name]) for row in plan.replaced))

    def gradients_of(name: str) -> Tensor | None:
        return known.moments(original[name]).gradients

    found = yield from iter_collect_sequentially(
        ready.subject.model, ready.batches, renamed, gradients_of, init=init, seed=seed,
        store=StatisticsWriter(folder, named), facts={**known.facts, **ready.facts},
    )  # fmt: skip
    shutil.rmtree(folder / "offload", ignore_errors=True)
    return found


def _ready(
    source: Source, calibration: Calibration, seed: int, device: torch.device, trust_remote_code: bool, offload: Path,
    *, by_block: bool, room: int = 0,
) -> _Ready:  # fmt: skip
    """With the weights of its blocks on disk where the model goes block by block, or is larger than `room` bytes."""
    assert calibration.data is not None
    how = calibration.how
    task = how.task or task_of(source)
    rows = open_rows(calibration.data, task, how, labels=False, split=calibration.split, prefer=TRAIN_SPLITS)
    subject = _offloaded(source, task, device, trust_remote_code, offload, None if by_block else room)
    offloaded = subject is not None
    if subject is None:
        subject = prepare_subject(source, how, None, trust_remote_code=trust_remote_code)
        subject.model.to(device)
    elif not by_block:
        run_again_(subject.model)
    examples, chosen = calibration_examples(
        subject, rows, how, calibration.samples, seed, trust_remote_code=trust_remote_code
    )
    size = max(1, TOKENS // examples.size) if task in LANGUAGE else IMAGES
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    facts = {
        "data": calibration.data, "samples": len(chosen), "scored_in": examples.unit.removesuffix("s"),
        "tokens": examples.size if task in LANGUAGE else None, "seed": seed, "sequential": calibration.sequential,
        "model": source.reference,
    }  # fmt: skip
    return _Ready(subject, batches, facts, offloaded)


def _offloaded(
    source: Source, task: str, device: torch.device, trust_remote_code: bool, folder: Path, room: int | None
) -> Subject | None:
    """The model with the weights of its blocks on disk; None where it is to be in memory.

    That is where it has no blocks, takes up less than `room` bytes, or needs a head that it does not come with.
    """
    if source.library != "transformers" or source.folder is None or not is_for(source, task):
        return None
    skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    blocks = find_blocks(skeleton)
    if not blocks or (room is not None and 4 * sum(p.numel() for p in skeleton.parameters()) < room):
        return None
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # "some parameters are on the meta device": as they should

    def load(**places: Any) -> nn.Module:
        return load_model(str(source.folder), dtype=torch.float32, trust_remote_code=trust_remote_code, **places)

    model = load_offloaded(load, skeleton, blocks, folder, str(device))
    return Subject(source, task, model, torch.float32)


def run_again_(model: Any) -> None:
    """Gradient checkpointing, which transformers has for training alone, in a model that stays in evaluation mode.

    A backward pass then runs each block again, and so brings back the weights that were dropped after it had run.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # the newer of two names, where this transformers has it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of the layer itself, not of the dropout in it


def _names(subject: Subject, rows: Sequence[Replaced]) -> dict[str, str]:
    """The plan's names of layers -> theirs in the model that runs, which may have a head around it, or lack one."""
    there = {name for name, _ in subject.model.named_modules()}
    prefix = getattr(subject.body, "base_model_prefix", "")
    outer = "" if subject.model is subject.body else "body."
    found = {}
    for row in rows:
        candidates = (row.name, f"{prefix}.{row.name}", row.name.removeprefix(f"{prefix}."))
        name = next((outer + c for c in candidates if outer + c in there), None)
        if name is None:
            raise CalibrationError(f"{row.name}: the model for {subject.task} has no such layer; --exclude it")
        found[row.name] = name
    return found


def _available(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
