"""Calibration of `factorise --calibration`: opens the data and the model, and collects or reads statistics."""

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
from lrsurgery.data.tasks import TASKS, Subject, is_for, task_of
from lrsurgery.errors import CalibrationError, OutputError
from lrsurgery.factorise.options import Calibration
from lrsurgery.files import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.runtime import free_memory
from lrsurgery.surgery.plan import Plan, Replacement

TOKENS = 2048  # per batch; its logits and their gradients dominate the memory
IMAGES = 16  # per batch
NOTABLE = 1 << 30  # statistics above this size, in bytes, are announced
LEAST_UNCERTAINTY = 1e-3  # below this the curvature at the weights says little about the loss at a distance


@dataclass(frozen=True)
class _Setup:
    """A model and its calibration batches."""

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
    """Read the statistics of these layers from `calibration.statistics`, or collect them into `folder`.

    Statistics that a resumed job finds in `folder` are read from there.

    Raises SurgeryError for data, a model or statistics that cannot be used.
    """
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if calibration.statistics is not None:
        statistics = calibration.read_statistics()
        statistics.check_for(rows, str(calibration.statistics))
        if calibration.importance == "fisher" and not statistics.has_gradients:
            listener.note(f"{calibration.statistics}: collected with importance activations, which is used")
        return statistics
    fisher = IMPORTANCES[calibration.importance]
    available = free_memory(device)
    limit = max(1, available // 3)
    setup = _prepare(
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
        if need > NOTABLE or passes > 1 or setup.offloaded:
            where = "weights stay on disk and each block runs twice" if setup.offloaded else "beside the model"
            listener.note(
                f"calibration: {need / 1e9:.1f} GB of statistics, {where}; {available / 1e9:.1f} GB are free, so"
                f" {'one pass' if passes == 1 else f'{passes} passes'} over the data"
            )
    named, loss = _match_names(setup.subject, rows), SampledLoss(seed)
    statistics = collect(
        setup.subject.model,
        setup.batches,
        [replace(row, name=named[row.name]) for row in rows],
        importance=calibration.importance,
        loss=loss,
        store=StatisticsWriter(folder, named),
        facts=setup.facts,
        limit=limit,
        listener=listener,
    )
    if fisher and loss.uncertainty < LEAST_UNCERTAINTY:
        listener.note(
            f"the model is certain of its predictions on this data (mean chance of another class:"
            f" {loss.uncertainty:.1g}), so the predicted loss only ranks layers; use data it has not memorised"
        )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    missing = statistics.unused_layers()
    if missing:
        listener.note(
            f"{len(missing)} layers received no calibration input ({missing[0]}, ...); plain SVD is used for them"
        )
    if calibration.save is not None:
        _save(folder, calibration.save)
    return statistics


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
    """Collect the inputs of each block again, after the blocks before it are factorised as planned (--sequential).

    Gradients stay those of the dense model. Statistics that a resumed job finds in `folder` are read from there.
    """
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    setup = _prepare(source, calibration, seed, device, trust_remote_code, folder / "offload", by_block=True)
    named = _match_names(setup.subject, plan.replacements)
    original = {new: old for old, new in named.items()}
    renamed = replace(plan, rows=tuple(replace(row, name=named[row.name]) for row in plan.replacements))

    def gradients_of(name: str) -> Tensor | None:
        return known.moments(original[name]).gradients

    statistics = collect_sequentially(
        setup.subject.model,
        setup.batches,
        renamed,
        gradients_of,
        init=init,
        seed=seed,
        store=StatisticsWriter(folder, named),
        facts={**known.facts, **setup.facts},
        listener=listener,
    )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    return statistics


def _prepare(
    source: Source,
    calibration: Calibration,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    offload: Path,
    *,
    by_block: bool,
    room: int = 0,
) -> _Setup:
    """Open data and model; blocks stay on disk if the pass is by block, or if the model exceeds `room` bytes."""
    assert calibration.data is not None
    how = calibration.how
    task = how.task or task_of(source)
    rows = open_rows(calibration.data, task, how, labels=False, split=calibration.split, prefer=TRAIN_SPLITS)
    subject = _load_offloaded(source, task, device, trust_remote_code, offload, None if by_block else room)
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
    subject = replace(subject, notes=(*subject.notes, *examples.notes))
    size = max(1, TOKENS // examples.size) if TASKS[task].is_language else IMAGES
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    facts = {
        "data": calibration.data,
        "samples": len(chosen),
        "scored_in": examples.unit.removesuffix("s"),
        "tokens": examples.size if TASKS[task].is_language else None,
        "seed": seed,
        "sequential": calibration.sequential,
        "model": source.reference,
    }
    return _Setup(subject, batches, facts, offloaded)


def _load_offloaded(
    source: Source, task: str, device: torch.device, trust_remote_code: bool, folder: Path, room: int | None
) -> Subject | None:
    """Load the model with its blocks on disk; None if it should be in memory.

    That is a model without blocks, one below `room` bytes, or one that lacks the head of the task.
    """
    if source.library != "transformers" or source.folder is None or not is_for(source, task):
        return None
    skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    blocks = find_blocks(skeleton)
    if not blocks or (room is not None and 4 * sum(p.numel() for p in skeleton.parameters()) < room):
        return None
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of parameters on the meta device, as intended

    def load(**places: Any) -> nn.Module:
        return load_model(str(source.folder), dtype=torch.float32, trust_remote_code=trust_remote_code, **places)

    model = load_offloaded(load, skeleton, blocks, folder, str(device))
    return Subject(source, task, model, torch.float32)


def _match_names(subject: Subject, rows: Sequence[Replacement]) -> dict[str, str]:
    """Map the plan's layer names to those in the model that runs, which may have another head than the checkpoint."""
    modules = {name for name, _ in subject.model.named_modules()}
    prefix = getattr(subject.body, "base_model_prefix", "")
    outer = "" if subject.model is subject.body else "body."
    names = {}
    for row in rows:
        candidates = (row.name, f"{prefix}.{row.name}", row.name.removeprefix(f"{prefix}."))
        name = next((outer + c for c in candidates if outer + c in modules), None)
        if name is None:
            raise CalibrationError(
                f"{row.name}: the model for {subject.task} has no such layer; add --exclude '{row.name}'"
            )
        names[row.name] = name
    return names
