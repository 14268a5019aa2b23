"""A teacher's outputs beside the model's own: its classes matched by name, its tokens and positions compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrsurgery.data.labels import is_nameless, match_names
from lrsurgery.data.scores import LEARNT_BY
from lrsurgery.data.tasks import TASKS, Subject, class_names, count_logits
from lrsurgery.data.text.padding import pad_token_of, position_limit
from lrsurgery.data.text.tokens import load_tokenizer
from lrsurgery.errors import DataError, SourceError
from lrsurgery.modules import for_model


class Reordered(nn.Module):
    """A model whose outputs stand in another order."""

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.main_input_name = getattr(model, "main_input_name", "input_ids")
        self.register_buffer("order", torch.tensor(list(order)), persistent=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(**for_model(self.model, inputs))["logits"][..., self.order]}


def match_teacher(subject: Subject, teacher: Subject, size: int = 1, trust_remote_code: bool = False) -> Subject:
    """The teacher with its classes in the model's order, matched by name, and notes about it.

    `size` is the most tokens that an example has. Raises SourceError for another task or problem, other classes, fewer
    positions, or a tokenizer with other tokens or more than the teacher knows.
    """
    who = f"teacher {teacher.source.reference}"
    if teacher.task != subject.task:
        raise SourceError(f"{who}: is for {teacher.task}, the model for {subject.task}")
    if teacher.problem != subject.problem:
        raise SourceError(f"{who}: predicts {LEARNT_BY[teacher.problem]}, the model {LEARNT_BY[subject.problem]}")
    theirs, ours = count_logits(teacher), count_logits(subject)
    if theirs != ours:
        raise SourceError(f"{who}: has {theirs} outputs, the model {ours}; they must be the same")
    notes = []
    if not TASKS[subject.task].takes_images:
        # it sees the padding of the model's own batches
        teacher.config.get_text_config().pad_token_id = pad_token_of(subject.config)
        notes += compare_vocabularies(subject, teacher, who, trust_remote_code)
        longest, _ = position_limit(teacher.body)
        if longest is not None and size > longest:
            raise SourceError(f"{who}: takes {longest:,} tokens, the examples have up to {size:,}; lower --block-size")
    task = TASKS[subject.task]
    if task.is_language or task.decodes or task.points or ours == 1:
        return dataclasses.replace(teacher, notes=tuple(notes))
    order, more = _teacher_order(class_names(subject), class_names(teacher), who)
    notes += more
    if order == list(range(ours)):
        return dataclasses.replace(teacher, notes=tuple(notes))
    if TASKS[subject.task].takes_masks:
        raise SourceError(f"{who}: its classes stand in another order than the model's, which is not matched for masks")
    notes.append(f"{who}: its classes stand in another order than the model's, matched by name")
    return dataclasses.replace(teacher, model=Reordered(teacher.model, order).eval(), notes=tuple(notes))


def _teacher_order(ours: list[str], theirs: list[str], who: str) -> tuple[list[int], list[str]]:
    remedy = "; name the classes in both folders' config.json (id2label or label_names), or take another teacher"
    if is_nameless(ours) != is_nameless(theirs):
        named = "the teacher" if is_nameless(ours) else "the model"
        raise SourceError(f"{who}: only {named} has names for its classes, so that they cannot be matched{remedy}")
    try:
        places, notes = match_names(ours, range(len(ours)), theirs, who, numbered=False, what="model")
    except DataError:
        places, notes = {}, []
    order = list(places.values())
    if sorted(order) != list(range(len(theirs))):
        pairs = f"{', '.join(theirs[:20])}; the model's are {', '.join(ours[:20])}"
        raise SourceError(f"{who}: its classes are {pairs}{remedy}")
    return order, notes


def compare_vocabularies(subject: Subject, teacher: Subject, who: str, trust_remote_code: bool) -> list[str]:
    """A note where a tokenizer is missing. Raises SourceError for other tokens, or more than the teacher knows."""
    try:
        ours, theirs = (
            {number: token for token, number in load_tokenizer(s.source, trust_remote_code).get_vocab().items()}
            for s in (subject, teacher)
        )
    except DataError:
        return [f"{who}: no tokenizer to compare with the model's; its tokens are taken to be the same"]
    known = int(teacher.config.get_text_config().vocab_size)
    if (largest := max(ours)) >= known:
        raise SourceError(
            f"{who}: knows {known:,} tokens, the model's tokenizer has one of number {largest:,}; distil from a model"
            " with the same vocabulary"
        )
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise SourceError(
                f"{who}: token {number} is '{theirs[number]}' to it, '{ours[number]}' to the model; distil from a model"
                " with the same vocabulary"
            )
    return []
