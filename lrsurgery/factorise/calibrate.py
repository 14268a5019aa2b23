"""Calibration of `factorise --calibration`: opens the data and the model, and collects or reads statistics.

The file is long because the way from data and model to statistics is one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.calibration import texts
from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.collect import collect, look_ahead, moment_bytes, split
from lrsurgery.calibration.loss import IMPORTANCES, Batch, IndependentLoss, Loss, PixelLoss, ProjectionLoss, SampledLoss
from lrsurgery.calibration.offload import load_offloaded
from lrsurgery.calibration.statistics import FILE_NAME, Statistics, StatisticsWriter
from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import Rows
from lrsurgery.data.datasets import TRAIN_SPLITS, documents_of
from lrsurgery.data.examples import calibration_examples, open_rows, prepare_subject
from lrsurgery.data.interfaces.wrapped import MULTI, SINGLE
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import problem_of
from lrsurgery.data.tasks import (
    TASKS,
    MissingHeadError,
    Subject,
    behind_interface,
    count_logits,
    head_size,
    is_for,
    task_of,
    with_problem,
)
from lrsurgery.errors import CalibrationError, RecipeError, SourceError
from lrsurgery.factorise.options import Calibration
from lrsurgery.files.json import Json, read_json
from lrsurgery.files.writing import staged
from lrsurgery.modules import model_faults
from lrsurgery.progress import SILENT, Listener
from lrsurgery.runtime import free_memory
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.rows import Replacement
from lrsurgery.units import duration_text

TOKENS = 2048  # per batch
LOGITS = 1 << 26  # per batch, 268 MB: they, their gradients and what the loss makes of them dominate the memory
IMAGES = 16  # per batch
NOTABLE = 1 << 30  # statistics above this size, in bytes, are announced
LEAST_GRAPH = 1 << 28  # bytes; below it a graph is held whole
AGAIN = 1.15  # the time of a pass whose blocks run twice
LEAST_UNCERTAINTY = 1e-3  # below this the curvature at the weights says little about the loss at a distance


@dataclass(frozen=True)
class Setup:
    """A model and its calibration batches."""

    subject: Subject
    batches: list[Batch]
    facts: Json
    offloaded: bool
    bare: bool  # an encoder without a head, which the loss of random projections stands in for

    def loss(self, seed: int, temperature: float) -> Loss:
        """The loss whose gradients the Fisher importance takes."""
        if self.bare:
            return ProjectionLoss(seed)
        problem = self.subject.problem
        if TASKS[self.subject.task].takes_masks:
            return PixelLoss(seed, temperature)
        return (
            SampledLoss(seed, temperature)
            if problem == SINGLE
            else IndependentLoss(seed, temperature, binary=problem == MULTI)
        )


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


def prepare(
    source: Source,
    calibration: Calibration,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    offload: Path,
    *,
    by_block: bool,
    room: int = 0,
    least: int = 1,
) -> Setup:
    """Open data and model; blocks stay on disk if the pass is by block, or if the model exceeds `room` bytes.

    The samples stand in at least so many batches as `least`, if there are so many.
    """
    assert calibration.data is not None
    how = calibration.how
    bare = _bare_task(source, trust_remote_code) if how.task is None else None
    task = bare or how.task or task_of(source)
    rows = rows_of(calibration.data, task, how, calibration.split)
    if bare is not None:
        model = load_source(source, dtype=torch.float32, trust_remote_code=trust_remote_code).to(device)
        subject, offloaded = Subject(source, task, model, torch.float32), False
    else:
        room_left = None if by_block else room
        # a head of random weights leaves the inputs of the layers below it as they are
        new_head = not IMPORTANCES[calibration.importance]
        try:
            subject, offloaded = load_subject(
                source, task, how, device, trust_remote_code, offload, room_left, new_head=new_head
            )
        except MissingHeadError as e:
            raise CalibrationError(f"{e}; or take --importance activations, which needs no head") from e
    if offloaded and not by_block:
        from lrsurgery.checkpoints.upstream.transformers import checkpoint_blocks_

        checkpoint_blocks_(subject.model)
    examples, chosen = calibration_examples(
        subject, rows, how, calibration.samples, seed, trust_remote_code=trust_remote_code
    )
    size = max(1, _tokens_at_a_time(subject) // examples.size) if TASKS[task].is_language else IMAGES
    if TASKS[task].decodes:
        longest = max(len(examples.dataset[i]["labels"]) for i in chosen)
        size = max(1, min(size, LOGITS // (longest * count_logits(subject))))
    size = min(size, max(1, len(chosen) // least))
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    projected = bare is not None or TASKS[task].embeds
    facts = {
        "data": calibration.data,
        "samples": len(chosen),
        "scored_in": TASKS[task].scored or examples.unit.removesuffix("s"),
        "tokens": examples.size if TASKS[task].is_language else None,
        "seed": seed,
        "model": source.reference,
        **({"head": "random projections of the pooled output"} if projected else {}),
    }
    notes = (*subject.notes, *examples.notes)
    return Setup(replace(subject, notes=notes), batches, facts, offloaded, projected)


def _tokens_at_a_time(subject: Subject) -> int:
    text = getattr(subject.config, "get_text_config", lambda: subject.config)()
    return min(TOKENS, LOGITS // max(1, getattr(text, "vocab_size", None) or 1))


def rows_of(data: str, task: str, how: DataOptions, part: str | None, *, characters: int | None = None) -> Rows:
    """Open calibration data without labels; of the built-in text, the first `characters` of each document or all."""
    if data != texts.NAME:
        return open_rows(data, task, how, labels=False, split=part, prefer=TRAIN_SPLITS)
    if not TASKS[task].is_language:
        raise CalibrationError(f"--calibration {data}: is for language models, and {task} needs data of its own")
    if part is not None or how.text_column is not None or how.subset is not None:
        raise CalibrationError(f"--calibration {data}: has no splits, subsets or columns; leave their options out")
    documents = texts.read_texts() if characters is None else texts.excerpts(characters)
    return Rows(documents_of(list(documents.values())), texts.TITLE)


def load_subject(
    source: Source,
    task: str,
    how: DataOptions,
    device: torch.device,
    trust_remote_code: bool,
    folder: Path,
    room: int | None,
    *,
    new_head: bool = False,
) -> tuple[Subject, bool]:
    """Load the model, and whether its blocks stay on disk in `folder`: above `room` bytes, or always if that is None.

    A model without blocks, or without the task's head, is loaded into memory.
    """
    subject = load_offloaded_subject(source, task, device, trust_remote_code, folder, room)
    if subject is not None:
        return subject, True
    own = replace(how, task=task)
    subject = prepare_subject(source, own, None, new_head=new_head, trust_remote_code=trust_remote_code)
    subject.model.to(device)
    return subject, False


def _bare_task(source: Source, trust_remote_code: bool) -> str | None:
    """The task whose examples an encoder without a head takes: sentences or images; None for any other model."""
    try:
        task_of(source)
    except RecipeError:
        pass
    else:
        return None
    from lrsurgery.checkpoints.upstream.transformers import is_only_causal

    skeleton: Any = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    if getattr(skeleton.config, "is_encoder_decoder", False):
        return None
    known = {"input_ids": "sequence-classification", "pixel_values": "image-classification"}
    is_decoder = is_only_causal(skeleton.config.model_type)
    has_head = not skeleton.base_model_prefix or skeleton.base_model is not skeleton
    return None if is_decoder or has_head else known.get(skeleton.main_input_name)


def load_offloaded_subject(
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
        return load_source(source, dtype=torch.float32, trust_remote_code=trust_remote_code, **places)

    model = load_offloaded(load, skeleton, blocks, folder, str(device))
    subject = Subject(source, task, behind_interface(model, task), torch.float32)
    if not TASKS[task].classifies:
        return subject
    return with_problem(subject, problem_of(subject.config.problem_type, head_size(subject), None))


def match_names(subject: Subject, rows: Sequence[Replacement]) -> dict[str, str]:
    """Map the plan's layer names to those in the model that runs, which may have another head than the checkpoint."""
    modules = dense_layers(subject.model)
    prefix = getattr(subject.body, "base_model_prefix", "")
    outer = "" if subject.model is subject.body else "body."
    names = {}
    for row in [each for planned in rows for each in planned.watched]:
        candidates = (row.name, f"{prefix}.{row.name}", row.name.removeprefix(f"{prefix}."))
        name = next((outer + c for c in candidates if outer + c in modules), None)
        if name is None:
            raise CalibrationError(
                f"{row.name}: the model for {subject.task} has no such layer; add --exclude '{row.name}'"
            )
        names[row.name] = name
    return names
