"""Calibration of `factorise --calibration`: collects the statistics, or reads them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lrsurgery.calibration import texts
from lrsurgery.calibration.collect import collect, look_ahead, moment_bytes, split
from lrsurgery.calibration.loss import IMPORTANCES, SampledLoss
from lrsurgery.calibration.statistics import FILE_NAME, Statistics, StatisticsWriter
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.tasks import (
    TASKS,
)
from lrsurgery.errors import CalibrationError, SourceError
from lrsurgery.factorise.opening import Setup, match_names, prepare
from lrsurgery.factorise.options import Calibration
from lrsurgery.files.json import read_json
from lrsurgery.files.writing import staged
from lrsurgery.modules import model_faults
from lrsurgery.progress import SILENT, Listener
from lrsurgery.runtime import free_memory
from lrsurgery.surgery.rows import Replacement
from lrsurgery.units import duration_text

NOTABLE = 1 << 30  # statistics above this size, in bytes, are announced
LEAST_GRAPH = 1 << 28  # bytes; below it a graph is held whole
AGAIN = 1.15  # the time of a pass whose blocks run twice
LEAST_UNCERTAINTY = 1e-3  # below this the curvature at the weights says little about the loss at a distance


def calibrate(
    source: Source,
    calibration: Calibration,
    rows: Sequence[Replacement],
    folder: Path,
    *,
    owner: str,
    seed: int,
    device: torch.device,
    trust_remote_code: bool = False,
    listener: Listener = SILENT,
) -> Statistics:
    """Read the statistics of these layers from `calibration.statistics`, or collect them into `folder`.

    Statistics that a resumed job finds in `folder` are read from there if they are whole and of this `owner`.

    Raises SurgeryError for data, a model or statistics that cannot be used.
    """
    if calibration.own_statistics is not None:
        statistics = Statistics.read(calibration.own_statistics)
        statistics.check_for(rows, str(calibration.own_statistics))
        return statistics
    kept = _read_own(folder, owner, rows)
    target = calibration.save
    if target is not None and target.exists() and not (kept is not None and _is_own(target, owner)):
        raise CalibrationError(f"{target}: already exists; reuse it with --statistics, or name another folder")
    if kept is not None:
        if target is not None and not target.exists():
            _save(folder, target)
        return kept
    shutil.rmtree(folder, ignore_errors=True)
    if calibration.statistics is not None:
        statistics = calibration.read_statistics()
        statistics.check_for(rows, str(calibration.statistics))
        if calibration.importance == "fisher" and not statistics.has_gradients:
            listener.note(f"{calibration.statistics}: collected with importance activations, which is used")
        fewer = sum(len(statistics.of_schemes(row).options) < len(row.options) for row in rows)
        if fewer:
            listener.note(
                f"{calibration.statistics}: hold one convolution scheme of {fewer} layers, which is taken; statistics"
                " collected with --conv auto let the loss decide"
            )
        return statistics
    fisher = IMPORTANCES[calibration.importance]
    available = free_memory(device)
    limit = max(1, available // 3)
    setup = prepare(
        source,
        calibration,
        seed,
        device,
        trust_remote_code,
        folder / "offload",
        by_block=not fisher,
        room=available // 2,
    )
    named = match_names(setup.subject, rows)
    planned = [replace(each, name=named[each.name]) for row in rows for each in row.watched]
    passes = len(split(planned, limit)) if fisher else 1
    _announce(setup, calibration, planned, passes, listener)
    if fisher:
        need = sum(moment_bytes(row, gradients=True) for row in planned)
        if need > NOTABLE or passes > 1 or setup.offloaded:
            where = "weights stay on disk and each block runs twice" if setup.offloaded else "beside the model"
            listener.note(
                f"calibration: {need / 1e9:.1f} GB of statistics, {where}; {available / 1e9:.1f} GB are free, so"
                f" {'one pass' if passes == 1 else f'{passes} passes'} over the data"
            )
    if setup.offloaded:
        listener = _TimesFirstBlock(listener)
    loss = setup.loss(seed, calibration.temperature)
    with model_faults(source.reference):
        statistics = collect(
            setup.subject.model,
            setup.batches,
            planned,
            importance=calibration.importance,
            loss=loss,
            store=StatisticsWriter(folder, named, owner),
            facts={**setup.facts, **({"temperature": calibration.temperature} if fisher and not setup.bare else {})},
            limit=limit,
            listener=listener,
        )
    if fisher and isinstance(loss, SampledLoss) and loss.uncertainty < LEAST_UNCERTAINTY:
        listener.note(
            f"the model is certain of its predictions on this data (mean chance of another class:"
            f" {loss.uncertainty:.1g}), so the predicted loss only ranks layers; use data it has not memorised"
        )
    shutil.rmtree(folder / "offload", ignore_errors=True)
    missing = statistics.unused_layers()
    if missing:
        what = f"{len(missing)} layers received no calibration input ({missing[0]}, ...)"
        listener.note(f"{what}; plain SVD is used for them")
    unseen = [use.unseen for use in statistics.uses.values() if use.unseen and use.positions]
    if unseen:
        what = f"{sum(unseen)} experts of {len(unseen)} banks received no token"
        listener.note(f"{what}; they take the mean metric of their bank")
    if target is not None:
        _save(folder, target)
    return statistics


def _read_own(folder: Path, owner: str, rows: Sequence[Replacement]) -> Statistics | None:
    """The statistics that a job left in its folder; None if they are damaged, or another job's."""
    if not _is_own(folder, owner):
        return None
    try:
        statistics = Statistics.read(folder)
        statistics.check_for(rows)
        for key, use in statistics.uses.items():
            statistics.moments(key, use.kind)
    except CalibrationError:
        return None
    return statistics


def _is_own(folder: Path, owner: str) -> bool:
    try:
        return bool(read_json(folder / FILE_NAME).get("owner") == owner)
    except SourceError:
        return False


class _TimesFirstBlock(Listener):
    """Tells how long blocks that are read from disk will take, going by the first one."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._begun, self._told = listener, time.perf_counter(), False

    def note(self, text: str) -> None:
        self._listener.note(text)

    def progress(self, name: str, done: int, total: int) -> None:
        self._listener.progress(name, done, total)
        if not done:
            self._begun = time.perf_counter()
        elif not self._told:
            self._told = True
            seconds = (time.perf_counter() - self._begun) / done * total
            self.note(f"calibration: block by block from disk, about {duration_text(seconds)} by the first one")


def _announce(
    setup: Setup, calibration: Calibration, rows: Sequence[Replacement], passes: int, listener: Listener
) -> None:
    """Say what the model is about to see, and about how long it takes."""
    fisher = IMPORTANCES[calibration.importance]
    count, size, unit = setup.facts["samples"], setup.facts["tokens"], TASKS[setup.subject.task].unit
    what = f"{count:,} {unit}" if size is None else f"{count:,} sequences of {size} tokens ({count * size:,} tokens)"
    parts = [f"{what} of {texts.TITLE if calibration.data == texts.NAME else calibration.data}"]
    if count < calibration.samples:
        parts.append(f"all that it has, {calibration.samples:,} were asked for")
    if setup.bare:
        head = "random projections of the pooled output stand in for it" if fisher else "none is needed"
        parts.append(f"the model has no head, {head}")
    parts += setup.subject.notes  # heads that had to be made up, how the data is read
    if not setup.offloaded:
        with model_faults(setup.subject.source.reference):
            look = look_ahead(setup.subject.model, setup.batches, rows, gradients=fisher)
        seconds = passes * look.seconds
        if fisher and _recompute_blocks_(setup.subject.model, look.graph):
            parts.append("blocks run twice, to hold less")
            seconds *= AGAIN
        parts.append(f"about {duration_text(seconds)}")
    listener.note(f"calibration: {'; '.join(parts)}")


def _recompute_blocks_(model: nn.Module, graph: int) -> bool:
    """Let backward passes recompute blocks where a batch's graph is large beside the weights; tell whether."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if graph < max(LEAST_GRAPH, weights // 2) or not getattr(model, "supports_gradient_checkpointing", False):
        return False
    from lrsurgery.checkpoints.upstream.transformers import checkpoint_blocks_

    checkpoint_blocks_(model)
    return True


def _save(folder: Path, target: Path) -> None:
    with staged(target, what="statistics") as stage:
        shutil.copytree(folder, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns("offload"))
