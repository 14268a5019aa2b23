"""A model without a task and its teacher, loaded for each other and for the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.quantised.dense import usual_dtype
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import Examples, Rows
from lrsurgery.data.datasets import TRAIN_SPLITS, open_data
from lrsurgery.data.images import Preprocessing, other_pixels
from lrsurgery.data.interfaces.wrapped import Wrapped
from lrsurgery.data.options import NO_TASK, DataOptions
from lrsurgery.data.tasks import Subject, check_finite_weights, task_of
from lrsurgery.data.text.examples import WINDOW
from lrsurgery.data.text.padding import finds_last_token, pad_token_of, position_limit
from lrsurgery.data.unlabelled.agreement import Agreement, find_agreement
from lrsurgery.data.unlabelled.columns import Feed, find_feed
from lrsurgery.data.unlabelled.inputs import unlabelled_examples
from lrsurgery.errors import RecipeError, SourceError
from lrsurgery.modules import arguments_of, model_faults

PROBED = 2  # examples that tell what the models return


class Features(Wrapped):
    """A timm model of any kind: its logits, its features, or its maps."""

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        outputs = self.body(pixel_values)
        if not isinstance(outputs, Tensor):
            return {"feature_maps": outputs}
        return {"logits" if getattr(self.body, "num_classes", 0) else "features": outputs}


class Tower(Wrapped):
    """One tower of CLIP's kin: its projected embedding."""

    def __init__(self, body: nn.Module, tower: str) -> None:
        super().__init__(body)
        self.tower = tower
        self.main_input_name = "input_ids" if tower == "text" else "pixel_values"

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        found: Any = getattr(self.body, f"get_{self.tower}_features")(**inputs)
        return {f"{self.tower}_embeds": found if isinstance(found, Tensor) else found.pooler_output}


@dataclass(frozen=True)
class Pair:
    """A model, its teacher, and what of their outputs is compared."""

    subject: Subject
    teacher: Subject
    feed: Feed
    agreement: Agreement
    notes: tuple[str, ...] = ()


def task_or_none(source: Source) -> str:
    """Name the task that the checkpoint is for; NO_TASK where there is none, as of a timm model without classes."""
    if source.library == "timm" and source.config.get("num_classes") == 0:
        return NO_TASK
    try:
        return task_of(source)
    except RecipeError:
        return NO_TASK


def open_unlabelled(
    reference: str, options: DataOptions, *, split: str | None = None, prefer: tuple[str, ...] = TRAIN_SPLITS
) -> Rows:
    """Open a dataset whose labels nobody reads; of a file of text, each line is a row. Raises DataError."""
    return Rows(open_data(reference, subset=options.subset, split=split, prefer=prefer, lines=True), reference)


def load_bare(source: Source, rows: Rows, options: DataOptions, *, trust_remote_code: bool = False) -> Subject:
    """Load a model without a task, in fp32 and eval mode, behind what the data feeds it. Raises SurgeryError."""
    return _load(source, rows, options, trust_remote_code)[0]


def _load(source: Source, rows: Rows, options: DataOptions, trust_remote_code: bool) -> tuple[Subject, Feed]:
    stored = usual_dtype(source)  # reads the headers: a damaged file is named here
    body = load_source(source, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    check_finite_weights(source, body)
    feed = find_feed(body, rows, options)
    model = Tower(body, feed.tower) if feed.tower else Features(body) if source.library == "timm" else body
    return Subject(source, NO_TASK, model.eval(), stored), feed


def load_pair(
    source: Source, teacher: Source, rows: Rows, options: DataOptions, *, trust_remote_code: bool = False
) -> Pair:
    """Load a model and its teacher, and find out what can be compared.

    Raises SurgeryError, also for a teacher that is fed otherwise, or has no output in common.
    """
    subject, feed = _load(source, rows, options, trust_remote_code)
    other, _ = _load(teacher, rows, options, trust_remote_code)
    who = f"teacher {teacher.reference}"
    lacks = [name for name in _fed(feed) if name not in arguments_of(other.body)]
    if lacks:
        raise SourceError(f"{who}: does not take {', '.join(lacks)}, which the model is fed")
    if feed.text:
        _check_positions(subject, other, options.block_size, who)
    examples = unlabelled_examples(subject, rows, feed, options, trust_remote_code=trust_remote_code)
    if hasattr(other.body, "config") and finds_last_token(other.body):
        other.config.get_text_config().pad_token_id = pad_token_of(subject.config)
    batch = examples.collate([examples.dataset[i] for i in range(min(PROBED, len(examples.dataset)))])
    with model_faults(source.reference):
        agreement = find_agreement(subject.model, other.model, batch, who)
    notes = [agreement.note]
    if feed.image is not None:
        ours, theirs = (
            Preprocessing.of(each.source, each.body, None, trust_remote_code=trust_remote_code)
            for each in (subject, other)
        )
        notes += [note for note in (other_pixels(ours, theirs, who),) if note]
    return Pair(subject, other, feed, agreement, tuple(notes))


def _check_positions(subject: Subject, teacher: Subject, size: int | None, who: str) -> None:
    longest = size or position_limit(subject.body)[0] or WINDOW
    limit, relative = position_limit(teacher.body)
    if limit is not None and not relative and longest > limit:
        raise SourceError(f"{who}: takes {limit:,} tokens, the model is fed up to {longest:,}; lower --block-size")


def _fed(feed: Feed) -> list[str]:
    text = ["input_ids"] if feed.text else []
    return [*feed.tensors, *text, *(["pixel_values"] if feed.image else [])]


def examples_of(
    pair: Pair, rows: Rows, options: DataOptions, *, augment_seed: int | None = None, trust_remote_code: bool = False
) -> Examples:
    """Make the examples of another dataset, or of the same, for a pair. Raises DataError."""
    feed = find_feed(pair.subject.body, rows, options)
    if feed.tower != pair.feed.tower:
        raise RecipeError(
            f"{rows.reference}: feeds {feed.tower or 'both towers'}, the training data {pair.feed.tower or 'both'};"
            " give data of the same kind"
        )
    return unlabelled_examples(
        pair.subject, rows, feed, options, augment_seed=augment_seed, trust_remote_code=trust_remote_code
    )
