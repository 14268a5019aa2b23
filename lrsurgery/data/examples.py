"""A model and its data, made ready for each other: columns found, labels matched, text cut, images sized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import IMAGE_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS, open_data, pick_column
from lrsurgery.data.images import Images, Preprocessing
from lrsurgery.data.labels import class_names, head_size, match_labels, read_labels
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import CLASSIFICATION, LANGUAGE, Subject, is_for, load_subject, task_of
from lrsurgery.data.text import (
    IGNORED,
    Blocks,
    Classified,
    Masking,
    StreamedBlocks,
    TokenStream,
    Windows,
    encode,
    load_tokenizer,
)
from lrsurgery.errors import DataError, RecipeError

CALIBRATED = 512  # tokens of a block, unless the model takes fewer
Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """A dataset as it was opened: its rows, what the user called it, and the classes in it."""

    rows: Any
    reference: str
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Examples:
    """What a model trains on or is measured on."""

    dataset: Any
    collate: Collator
    unit: str  # what progress counts: "tokens", "images" or "sentences"
    size: int  # units in one example


def open_rows(reference: str, task: str, options: DataOptions, *, labels: bool = True, **where: Any) -> Rows:
    """Opens a dataset and reads its labels, unless they are not asked for. Raises DataError."""
    rows = open_data(reference, subset=options.subset, **where)
    if task not in CLASSIFICATION or not labels:
        return Rows(rows, reference)
    if where.get("streaming"):
        raise DataError(f"{reference}: streaming is for text; labels have to be known beforehand")
    column = pick_column(rows, options.label_column, LABEL_COLUMNS, "label", reference)
    names, classes = read_labels(rows, column, reference)
    return Rows(rows, reference, tuple(names), tuple(classes))


def prepare_subject(
    source: Source, options: DataOptions, rows: Rows | None, *, new_head: bool = False,
    from_scratch_seed: int | None = None, trust_remote_code: bool = False,
) -> Subject:  # fmt: skip
    """The model, under a head for the classes of `rows` where it is new or asked for. Raises SurgeryError."""
    task = options.task or task_of(source)
    other_head = new_head or from_scratch_seed is not None or (task in CLASSIFICATION and not is_for(source, task))
    classes = rows.classes if rows is not None and rows.classes and other_head else None
    subject = load_subject(
        source, task, from_scratch_seed=from_scratch_seed, classes=classes, trust_remote_code=trust_remote_code
    )
    if options.image_size is not None and task == "image-classification":
        subject = _with_image_size(subject, options.image_size)
    return subject


def _with_image_size(subject: Subject, size: int) -> Subject:
    own = Preprocessing.of(subject.source, subject.body, None)
    if size == own.size:
        return subject
    if subject.source.library != "timm":
        raise RecipeError(f"image_size {size}: this model's preprocessor_config.json says {own.size}; change it there")
    Preprocessing.of(subject.source, subject.body, size)
    config = subject.source.config
    pretrained = {**(config.get("pretrained_cfg") or {}), "input_size": [3, size, size], "crop_pct": 1.0}
    source = dataclasses.replace(subject.source, config={**config, "pretrained_cfg": pretrained})
    return dataclasses.replace(subject, source=source)


def training_examples(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None = None, seed: int = 0,
    augment: bool = True, streaming: bool = False, trust_remote_code: bool = False,
) -> Examples:  # fmt: skip
    """What to train on. Raises DataError."""
    if subject.task not in LANGUAGE:
        return _classified(subject, rows, options, trust_remote_code, seed if augment else None)
    tokenizer, size, masking = _text(subject, options, trust_remote_code)
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference)
    if streaming:
        return Examples(StreamedBlocks(encoded, size, seed, masking), _stack(), "tokens", size)
    stream = _stream(encoded, tokenizer, subject, rows.reference)
    blocks = Blocks(stream, size, stride or size, seed, masking)
    if not len(blocks):
        raise DataError(
            f"{rows.reference}: its {len(stream):,} tokens are fewer than one block of {size}; lower --block-size"
        )
    return Examples(blocks, _stack(), "tokens", size)


def evaluation_examples(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None = None, trust_remote_code: bool = False
) -> Examples:
    """What to measure on: each token, sentence or image of the set once. Raises DataError."""
    if subject.task not in LANGUAGE:
        return _classified(subject, rows, options, trust_remote_code, None)
    tokenizer, size, masking = _text(subject, options, trust_remote_code)
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference)
    stream = _stream(encoded, tokenizer, subject, rows.reference)
    if stride is not None and not 1 <= stride <= size:
        raise RecipeError(f"stride {stride}: write 1 to {size}, the tokens of a block")
    windows = Windows(stream, size, stride or size, masking)
    if len(stream) < 2:
        raise DataError(f"{rows.reference}: {len(stream)} tokens leave nothing to predict")
    return Examples(windows, _pad(tokenizer.pad_token_id or 0), "tokens", size)


def calibration_examples(
    subject: Subject, rows: Rows, options: DataOptions, samples: int, seed: int, *, trust_remote_code: bool = False
) -> tuple[Examples, list[int]]:
    """What a model is calibrated on, and which of it: `samples` blocks, sentences or images, drawn by `seed`.

    Labels are neither needed nor looked at. Raises DataError.
    """
    if subject.task in LANGUAGE and options.block_size is None:
        tokenizer = load_tokenizer(subject.source, trust_remote_code)
        options = dataclasses.replace(options, block_size=min(CALIBRATED, _block_size(subject, tokenizer, None)))
    if subject.task in LANGUAGE:
        examples = training_examples(subject, rows, options, seed=seed, trust_remote_code=trust_remote_code)
    else:
        examples = _classified(subject, rows, options, trust_remote_code, None, labels=[0] * len(rows.rows))
    order = torch.randperm(len(examples.dataset), generator=torch.Generator().manual_seed(seed))
    return examples, sorted(order[:samples].tolist())


def _stream(encoded: Any, tokenizer: Any, subject: Subject, reference: str) -> TokenStream:
    stream = TokenStream(encoded, tokenizer.eos_token_id)
    config: Any = subject.body.config
    known = config.get_text_config().vocab_size
    if stream.largest >= known:
        raise DataError(f"{reference}: has token {stream.largest}, the model knows {known}: not its own tokenizer")
    return stream


def _text(subject: Subject, options: DataOptions, trust_remote_code: bool) -> tuple[Any, int, Masking | None]:
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    masking = Masking.of(tokenizer, subject.source.reference) if subject.task == "masked-lm" else None
    return tokenizer, _block_size(subject, tokenizer, options.block_size), masking


def position_limit(config: Any) -> tuple[int | None, bool]:
    """The most tokens that a text model's config names, and whether its positions are relative, so that more work."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        limit -= 2  # their positions begin after the padding token's
    return limit, limit is None or getattr(config, "rope_parameters", None) is not None


def _block_size(subject: Subject, tokenizer: Any, asked: int | None) -> int:
    config: Any = subject.body.config
    limit, relative = position_limit(config.get_text_config())
    if asked is None:
        if limit is None:
            raise RecipeError("the model's config names no maximum length; say how long a block is with --block-size")
        return min(int(limit), 1 << 20)
    if limit is not None and asked > limit and not relative:
        raise RecipeError(f"block_size {asked}: longer than the {limit} positions that the model has")
    return asked


def _classified(
    subject: Subject, rows: Rows, options: DataOptions, trust_remote_code: bool, augment_seed: int | None,
    *, labels: list[int] | None = None,
) -> Examples:  # fmt: skip
    count = head_size(subject)
    head = class_names(subject.source.config, subject.source.library, count)
    if subject.source.library == "transformers":
        config: Any = subject.body.config
        head = [config.id2label.get(i, str(i)) for i in range(count)]
    if labels is None:
        labels = match_labels(list(rows.classes), list(rows.labels), head, rows.reference)
    if subject.task == "sequence-classification":
        tokenizer = load_tokenizer(subject.source, trust_remote_code)
        config = subject.body.config
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        asked = (options.text_column or "").split(",") if options.text_column else [None]
        columns = [pick_column(rows.rows, c, TEXT_COLUMNS, "text", rows.reference) for c in asked]
        size = _block_size(subject, tokenizer, options.block_size)
        from transformers import DataCollatorWithPadding

        dataset: Dataset[Any] = Classified(rows.rows, columns, labels, tokenizer, size)
        return Examples(dataset, DataCollatorWithPadding(tokenizer), "sentences", 1)
    column = pick_column(rows.rows, options.image_column, IMAGE_COLUMNS, "image", rows.reference)
    how = Preprocessing.of(subject.source, subject.body, options.image_size)
    transform = how.for_evaluation() if augment_seed is None else how.for_training()
    images = Images(rows.rows, column, labels, transform, rows.reference, augment_seed)
    return Examples(images, _stack(), "images", 1)


def _stack() -> Collator:
    from transformers import default_data_collator

    return default_data_collator  # type: ignore[no-any-return]


def _pad(token: int) -> Collator:
    """Blocks of unlike length, filled up on the right: masked from attention, and with labels that nothing counts."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), longest), token)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length], labels[i, :length], mask[i, :length] = example["input_ids"], example["labels"], 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate
