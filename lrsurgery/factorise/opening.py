"""What calibration runs on: the model, in memory or with its blocks on disk, and the batches of its data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.calibration import texts
from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.loss import IMPORTANCES, Batch, IndependentLoss, Loss, PixelLoss, ProjectionLoss, SampledLoss
from lrsurgery.calibration.offload import load_offloaded
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
from lrsurgery.errors import CalibrationError, RecipeError
from lrsurgery.factorise.options import Calibration
from lrsurgery.files.json import Json
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.rows import Replacement

TOKENS = 2048  # per batch
LOGITS = 1 << 26  # per batch, 268 MB: they, their gradients and what the loss makes of them dominate the memory
IMAGES = 16  # per batch


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
