"""A model and its data, made ready for each other: columns found, labels matched, text cut, images sized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import IMAGE_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS, TRAIN_SPLITS, open_data, pick_column
from lrsurgery.data.images import Images, Preprocessing, stack
from lrsurgery.data.labels import class_names, match_labels, read_labels
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject, is_for, load_subject, task_of
from lrsurgery.data.text import (
    IGNORED,
    Batch,
    Example,
    Masking,
    Sentences,
    Sequences,
    StreamedSequences,
    TokenStream,
    Windows,
    encode,
    load_tokenizer,
)
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

CALIBRATION_SIZE = 512  # tokens of a sequence, unless the model takes fewer
LONGEST = 1 << 20  # tokens of a sequence, whatever the config says
# model types whose positions begin after the padding token's
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
Collator: TypeAlias = Callable[[Sequence[Example]], Batch]


class ExampleSet(Protocol):
    """A torch dataset with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Rows:
    """A dataset as it was opened: its rows, what the user called it, and the classes in it."""

    rows: Table
    reference: str
    classes: tuple[str, ...] = ()  # names
    labels: tuple[int, ...] = ()  # the class of each row


@dataclass(frozen=True)
class Examples:
    """What a model is trained or measured on."""

    dataset: ExampleSet
    collate: Collator
    unit: str  # what progress counts: "tokens", "images" or "sentences"
    size: int  # units in one example
    notes: tuple[str, ...] = ()  # for the user: how the data is read


def open_rows(
    reference: str,
    task: str,
    options: DataOptions,
    *,
    labels: bool = True,
    split: str | None = None,
    streaming: bool = False,
    prefer: Sequence[str] = TRAIN_SPLITS,
) -> Rows:
    """Open a dataset and, where the task has classes and `labels` asks for them, read them. Raises DataError."""
    rows = open_data(reference, subset=options.subset, split=split, streaming=streaming, prefer=prefer)
    if TASKS[task].is_language or not labels:
        return Rows(rows, reference)
    if streaming:
        raise DataError(f"{reference}: streaming is for text; labels have to be known beforehand")
    column = pick_column(rows, options.label_column, LABEL_COLUMNS, "label", reference)
    names, classes = read_labels(rows, column, reference)
    return Rows(rows, reference, tuple(names), tuple(classes))


def prepare_subject(
    source: Source,
    options: DataOptions,
    rows: Rows | None,
    *,
    new_head: bool = False,
    from_scratch_seed: int | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Load the model, under a head for the classes of `rows` if the head is new or asked for. Raises SurgeryError."""
    name = options.task or task_of(source)
    task = TASKS[name]
    other_head = new_head or from_scratch_seed is not None or not (task.is_language or is_for(source, name))
    classes = rows.classes if rows is not None and rows.classes and other_head else None
    subject = load_subject(
        source, name, from_scratch_seed=from_scratch_seed, classes=classes, trust_remote_code=trust_remote_code
    )
    if options.image_size is not None and task.takes_images:
        subject = _with_image_size(subject, options.image_size, trust_remote_code)
    return subject


def _with_image_size(subject: Subject, size: int, trust_remote_code: bool) -> Subject:
    own = Preprocessing.of(subject.source, subject.body, None, trust_remote_code=trust_remote_code)
    other = Preprocessing.of(subject.source, subject.body, size, trust_remote_code=trust_remote_code)
    if subject.source.library != "timm" or own.shape == other.shape:
        return subject
    changed = {"input_size": [*(other.shape or ())], "crop_pct": 1.0, "test_input_size": None, "test_crop_pct": None}
    pretrained = {**subject.source.pretrained_cfg, **changed}
    source = dataclasses.replace(subject.source, config={**subject.source.config, "pretrained_cfg": pretrained})
    return dataclasses.replace(subject, source=source)


def training_examples(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    *,
    stride: int | None = None,
    seed: int = 0,
    augment: bool = True,
    streaming: bool = False,
    trust_remote_code: bool = False,
) -> Examples:
    """Make examples to train on: sequences of tokens, sentences, or images (augmented by `seed`). Raises DataError."""
    task = TASKS[subject.task]
    if not task.is_language:
        options = dataclasses.replace(options, test_size=False)  # that is for measuring
        return _labelled(
            subject, rows, options, _match_labels(subject, rows), seed if augment else None, trust_remote_code
        )
    tokenizer, size, masking = _text(subject, options, trust_remote_code)
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference)
    if streaming:
        streamed = StreamedSequences(encoded, size, seed, masking)
        # the one set without a length, which nothing asks for: such a run counts its steps
        return Examples(streamed, _stack(), task.unit, size)  # type: ignore[arg-type]
    stream = _stream(encoded, tokenizer, subject, rows.reference)
    sequences = Sequences(stream, size, stride or size, seed, masking)
    if not len(sequences):
        raise DataError(
            f"{rows.reference}: its {len(stream):,} tokens are fewer than one sequence of {size}; lower --block-size"
        )
    return Examples(sequences, _stack(), task.unit, size)


def evaluation_examples(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None = None, trust_remote_code: bool = False
) -> Examples:
    """Make examples to measure on: each token, sentence or image of the set once. Raises DataError."""
    task = TASKS[subject.task]
    if not task.is_language:
        return _labelled(subject, rows, options, _match_labels(subject, rows), None, trust_remote_code)
    tokenizer, size, masking = _text(subject, options, trust_remote_code)
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference)
    stream = _stream(encoded, tokenizer, subject, rows.reference)
    if stride is not None and not 1 <= stride <= size:
        raise RecipeError(f"stride {stride}: write 1 to {size}, the tokens of a sequence")
    windows = Windows(stream, size, stride or size, masking)
    if len(stream) < 2:
        raise DataError(f"{rows.reference}: {len(stream)} tokens leave nothing to predict")
    return Examples(windows, _pad(tokenizer.pad_token_id or 0), task.unit, size)


def calibration_examples(
    subject: Subject, rows: Rows, options: DataOptions, samples: int, seed: int, *, trust_remote_code: bool = False
) -> tuple[Examples, list[int]]:
    """Make examples to calibrate on, and draw by `seed` which ones: `samples` sequences, sentences or images.

    Labels are neither needed nor read. Raises DataError.
    """
    is_language = TASKS[subject.task].is_language
    if is_language and options.block_size is None:
        options = dataclasses.replace(options, block_size=min(CALIBRATION_SIZE, _sequence_size(subject, None)))
    if is_language:
        examples = training_examples(subject, rows, options, seed=seed, trust_remote_code=trust_remote_code)
    else:
        examples = _labelled(subject, rows, options, [0] * len(rows.rows), None, trust_remote_code)
    order = torch.randperm(len(examples.dataset), generator=torch.Generator().manual_seed(seed))
    return examples, sorted(order[:samples].tolist())


def _stream(encoded: Table, tokenizer: PreTrainedTokenizerBase, subject: Subject, reference: str) -> TokenStream:
    stream = TokenStream(encoded, tokenizer.eos_token_id)
    known = subject.config.get_text_config().vocab_size
    if stream.largest >= known:
        raise DataError(f"{reference}: has token {stream.largest}, the model knows {known}: not its own tokenizer")
    return stream


def _text(
    subject: Subject, options: DataOptions, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, int, Masking | None]:
    """The tokenizer, the tokens of a sequence, and the masking of a masked language model."""
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    masking = Masking.of(tokenizer, subject.source.reference) if TASKS[subject.task].masks else None
    return tokenizer, _sequence_size(subject, options.block_size), masking


def position_limit(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """Read the most tokens that a text model's config names, and whether positions are relative, so that more work."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and config.model_type in SHIFTED_POSITIONS:
        limit -= 2
    return limit, limit is None or getattr(config, "rope_parameters", None) is not None


def _sequence_size(subject: Subject, asked: int | None) -> int:
    """Tokens of a sequence. Raises RecipeError for more than the model takes, or if nothing names a number."""
    limit, relative = position_limit(subject.config.get_text_config())
    if asked is None:
        if limit is None:
            raise RecipeError(
                "the model's config names no maximum length; pass the tokens of a sequence as --block-size"
            )
        return min(int(limit), LONGEST)
    if limit is not None and asked > limit and not relative:
        raise RecipeError(f"block_size {asked}: longer than the {limit} positions that the model has")
    return asked


def _match_labels(subject: Subject, rows: Rows) -> list[int]:
    return match_labels(list(rows.classes), list(rows.labels), class_names(subject), rows.reference)


def _labelled(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    labels: list[int],
    augment_seed: int | None,
    trust_remote_code: bool,
) -> Examples:
    """Images or sentences with a class each."""
    task = TASKS[subject.task]
    if task.takes_images:
        column = pick_column(rows.rows, options.image_column, IMAGE_COLUMNS, "image", rows.reference)
        how = Preprocessing.of(
            subject.source,
            subject.body,
            options.image_size,
            test_size=options.test_size,
            trust_remote_code=trust_remote_code,
        )
        images = Images(rows.rows, column, labels, how, rows.reference, augment_seed)
        return Examples(images, stack, task.unit, 1, (how.note, *images.notes))
    from transformers import DataCollatorWithPadding

    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    config = subject.config
    if task.needs_padding and config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    asked = options.text_column.split(",") if options.text_column else [None]
    columns = [pick_column(rows.rows, c, TEXT_COLUMNS, "text", rows.reference) for c in asked]
    size = _sequence_size(subject, options.block_size)
    sentences = Sentences(rows.rows, columns, labels, tokenizer, size)
    return Examples(sentences, DataCollatorWithPadding(tokenizer), task.unit, 1)


def _stack() -> Collator:
    from transformers import default_data_collator

    return default_data_collator  # type: ignore[no-any-return]


def _pad(token: int) -> Collator:
    """A collator that pads sequences on the right, outside of the attention mask, with labels that no loss counts."""

    def collate(examples: Sequence[Example]) -> Batch:
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), longest), token)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length], labels[i, :length], mask[i, :length] = example["input_ids"], example["labels"], 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate
