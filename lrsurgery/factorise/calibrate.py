"""What `factorise --calibration` does before it decomposes: the data, the model, and what is known of its layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.collect import collect, collect_sequentially, moment_bytes, split
from lrsurgery.calibration.loss import IMPORTANCES, Batch, SampledLoss
from lrsurgery.calibration.offload import load_offloaded
from lrsurgery.calibration.statistics import FILE_NAME, Statistics, StatisticsWriter
from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_model
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import TRAIN_SPLITS
from lrsurgery.data.examples import calibration_examples, open_rows, prepare_subject
from lrsurgery.data.tasks import LANGUAGE, Subject, is_for, task_of
from lrsurgery.errors import CalibrationError, OutputError
from lrsurgery.factorise.options import Calibration
from lrsurgery.files import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.runtime import free_memory
from lrsurgery.surgery.plan import Plan, Replacement

TOKENS = 2048  # of a batch; its logits and their gradients are what is large
IMAGES = 16
NOTABLE = 1 << 30  # bytes of statistics that are told beforehand
SURE = 1e-3  # below this doubt a model's loss is flat where it is and not around it


@dataclass(frozen=True)
class _Ready:
    """A model and the batches that it is to see."""

    subject: Subject
    batches: list[Batch]
    facts: Json
    offloaded: bool


def calibrate(
    source: Source,
    calibration: Calibration,
    rows: Sequence[Replacement],
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    trust_remote_code: bool = False,
    listener: Listener = SILENT,
) -> Statistics:
    """Statistics of these layers of a checkpoint: read where they were taken before, else taken and kept in `folder`.

    Statistics that are in `folder` already, as a resumed job finds them, are read from there.

    Raises SurgeryError: what is wrong with the data, the model or the statistics.
    """
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if calibration.statistics is not None:
        found = calibration.earlier()
        found.check_for(rows, str(calibration.statistics))
        if calibration.importance == "fisher" and not found.has_gradients:
            listener.note(f"{calibration.statistics}: taken with the importance activations, which is used")
        return found
    fisher = IMPORTANCES[calibration.importance]
    available = free_memory(device)
    limit = max(1, available // 3)
    ready = _ready(
        source,
        calibration,
        seed,
        device,
        trust_remote_code,
        folder / "offload",
        by_block=not fisher,
        room=available // 2,
    )
    if fisher:
        need = sum(moment_bytes(row, gradients=True) for row in rows)
        passes = len(split(rows, limit))
        if need > NOTABLE or passes > 1 or ready.offloaded:
            where = "weights stay on disk and each block is run twice" if ready.offloaded else "beside the model"
            listener.note(
                f"calibration: {need / 1e9:.1f} GB of statistics, {where}; {available / 1e9:.1f} GB are free:"
                f" {'one pass' if passes == 1 else f'{passes} passes'} over the data"
            )
    named, loss = _names(ready.subject, rows), SampledLoss(seed)
    found = collect(
        ready.subject.model,
        ready.batches,
        [replace(row, name=named[row.name]) for row in rows],
        importance=calibration.importance,
        loss=loss,
        store=StatisticsWriter(folder, named),
        facts=ready.facts,
        limit=limit,
        listener=listener,
    )
    if fisher and loss.uncertainty < SURE:
        listener.note(
            f"the model is sure of all that it sees (chance of another answer: {loss.uncertainty:.1g}): take the predicted"
            " loss for an order of layers alone; data that it has not learnt by heart say more"
        )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    missing = found.unused_layers()
    if missing:
        listener.note(
            f"{len(missing)} layers received no calibration input ({missing[0]}, ...); plain SVD is used for them"
        )
    if calibration.save is not None:
        _save(folder, calibration.save)
    return found


def _save(folder: Path, target: Path) -> None:
    half = target.with_name(f".{target.name}.half")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(folder, half)
        half.rename(target)
    except OSError as e:
        shutil.rmtree(half, ignore_errors=True)
        raise OutputError(f"{target}: cannot be written ({e.strerror or e})") from e


def recalibrate(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    known: Statistics,
    folder: Path,
    *,
    seed: int,
    init: str,
    device: torch.device,
    trust_remote_code: bool = False,
    listener: Listener = SILENT,
) -> Statistics:
    """--sequential: the inputs of each block anew, once the blocks before it are replaced as planned.

    Gradients stay those of the dense model. Statistics that are in `folder` already are read from there.
    """
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    ready = _ready(source, calibration, seed, device, trust_remote_code, folder / "offload", by_block=True)
    named = _names(ready.subject, plan.replacements)
    original = {new: old for old, new in named.items()}
    renamed = replace(plan, rows=tuple(replace(row, name=named[row.name]) for row in plan.replacements))

    def gradients_of(name: str) -> Tensor | None:
        return known.moments(original[name]).gradients

    found = collect_sequentially(
        ready.subject.model,
        ready.batches,
        renamed,
        gradients_of,
        init=init,
        seed=seed,
        store=StatisticsWriter(folder, named),
        facts={**known.facts, **ready.facts},
        listener=listener,
    )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    return found


def _ready(
    source: Source,
    calibration: Calibration,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    offload: Path,
    *,
    by_block: bool,
    room: int = 0,
) -> _Ready:
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
        from lrsurgery.checkpoints.upstream.transformers import checkpoint_blocks_

        checkpoint_blocks_(subject.model)
    examples, chosen = calibration_examples(
        subject, rows, how, calibration.samples, seed, trust_remote_code=trust_remote_code
    )
    size = max(1, TOKENS // examples.size) if task in LANGUAGE else IMAGES
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    facts = {
        "data": calibration.data,
        "samples": len(chosen),
        "scored_in": examples.unit.removesuffix("s"),
        "tokens": examples.size if task in LANGUAGE else None,
        "seed": seed,
        "sequential": calibration.sequential,
        "model": source.reference,
    }
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


def _names(subject: Subject, rows: Sequence[Replacement]) -> dict[str, str]:
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
