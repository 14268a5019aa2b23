"""A model and its data, made ready for each other: columns found, labels matched, text cut, images sized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.answers.pairs import pairs_of
from lrsurgery.data.answers.spans import windows_of_questions
from lrsurgery.data.answers.tags import TAG_COLUMNS, tagged_words_of
from lrsurgery.data.batches import Examples, Rows
from lrsurgery.data.datasets import IMAGE_COLUMNS, LABEL_COLUMNS, TRAIN_SPLITS, open_data, pick_column
from lrsurgery.data.embeddings.pairs import scored_pairs_of
from lrsurgery.data.images import Images, Preprocessing, stack
from lrsurgery.data.interfaces.wrapped import SINGLE
from lrsurgery.data.labels import read_column, read_label_map, read_tags, rename
from lrsurgery.data.options import NO_TASK, TEXT, DataOptions
from lrsurgery.data.scores import Targets, new_head_for, placeholder, problem_of, targets_of
from lrsurgery.data.segmentation.folders import paired_folder
from lrsurgery.data.segmentation.pictures import classes_of, pictures_of
from lrsurgery.data.speech.transcripts import transcripts_of
from lrsurgery.data.tasks import TASKS, Subject, class_names, head_size, load_subject, task_of, with_problem
from lrsurgery.data.text.examples import sentences_of, sequence_size, sequences_of, windows_of
from lrsurgery.errors import DataError, RecipeError

CALIBRATION_SIZE = 512  # tokens of a sequence, unless the model takes fewer


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
    """Open a dataset and, where the task has labels and `labels` asks for them, read them.

    Raises DataError; RecipeError for no task, which `data.unlabelled` is for.
    """
    if task == NO_TASK:
        raise RecipeError(f"task {NO_TASK}: is for finetune with --teacher and for evaluate with --against")
    about = TASKS[task]
    if about.takes_masks:
        paired = paired_folder(reference, split, prefer)
        if paired is not None:
            return Rows(paired, reference)
    labels = labels and (about.classifies or about.tags)
    lines = not about.is_language  # a file of text is sentences then, and not a document
    rows = open_data(reference, subset=options.subset, split=split, streaming=streaming, prefer=prefer, lines=lines)
    if streaming and not about.is_language:
        raise DataError(f"{reference}: streaming is for text; labels have to be known beforehand")
    if not labels:
        return Rows(rows, reference)
    usual = TAG_COLUMNS if about.tags else LABEL_COLUMNS
    column = pick_column(rows, options.label_column, usual, "label", reference)
    found = (read_tags if about.tags else read_column)(rows, column, reference)
    if options.label_map is not None:
        found = rename(found, read_label_map(options.label_map), options.label_map)
    return Rows(rows, reference, found)


def prepare_subject(
    source: Source,
    options: DataOptions,
    rows: Rows | None,
    *,
    new_head: bool = False,
    from_scratch_seed: int | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Load the model; with `new_head` or from scratch, under a head for the labels of `rows`.

    A head that the checkpoint lacks is made only with `new_head`. Raises SurgeryError.
    """
    name = options.task or task_of(source)
    task = TASKS[name]
    labels = rows.labels if rows is not None else None
    problem, classes = None, None
    if rows is not None and labels is not None:
        # training from scratch keeps a head for regression as it is: its labels do not name what it predicts
        fresh = new_head or (from_scratch_seed is not None and not _predicts_numbers(source))
        problem, classes = new_head_for(labels) if fresh else (None, None)
        if problem == SINGLE and classes is not None and len(classes) < 2:
            raise DataError(f"{rows.reference}: has one class, {classes}; a head for classes needs two at least")
    if task.takes_masks and new_head and rows is not None:
        classes = classes_of(source, rows, options, trust_remote_code)
    subject = load_subject(
        source,
        name,
        from_scratch_seed=from_scratch_seed,
        classes=classes,
        new_head=new_head,
        trust_remote_code=trust_remote_code,
    )
    if task.classifies:
        own = problem or (subject.config.problem_type if source.library == "transformers" else None)
        subject = with_problem(subject, problem_of(own, head_size(subject), labels))
    if options.image_size is not None and task.takes_masks:
        raise RecipeError(f"image_size {options.image_size}: is not for {name}; change preprocessor_config.json")
    if options.image_size is not None and task.takes_images:
        subject = _with_image_size(subject, options.image_size, trust_remote_code)
    return subject


def _predicts_numbers(source: Source) -> bool:
    named = source.config.get("id2label")
    return source.config.get("problem_type") == "regression" or (isinstance(named, dict) and len(named) == 1)


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
    options.check_for(task.reads)
    if task.data:
        return _answered(subject, rows, options, trust_remote_code)
    if task.embeds:
        return scored_pairs_of(subject, rows, options, measured=False, trust_remote_code=trust_remote_code)
    if task.takes_masks:
        flips = seed if augment else None
        return pictures_of(subject, rows, options, masks=True, flip_seed=flips, trust_remote_code=trust_remote_code)
    if not task.is_language:
        options = dataclasses.replace(options, test_size=False)  # that is for measuring
        targets = _targets(subject, rows)
        return _labelled(subject, rows, options, targets, trust_remote_code, augment_seed=seed if augment else None)
    return sequences_of(
        subject,
        rows,
        options,
        stride=stride,
        seed=seed,
        streaming=streaming,
        trust_remote_code=trust_remote_code,
    )


def evaluation_examples(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None = None, trust_remote_code: bool = False
) -> Examples:
    """Make examples to measure on: each token, sentence or image of the set once. Raises DataError."""
    task = TASKS[subject.task]
    options.check_for(task.reads)
    if not task.is_language:
        if stride is not None:
            raise RecipeError(f"stride {stride}: is for {TEXT}, and this model reads {task.reads}; leave it out")
        if task.data:
            return _answered(subject, rows, options, trust_remote_code, measured=True)
        if task.embeds:
            return scored_pairs_of(subject, rows, options, measured=True, trust_remote_code=trust_remote_code)
        if task.takes_masks:
            return pictures_of(subject, rows, options, masks=True, trust_remote_code=trust_remote_code)
        return _labelled(subject, rows, options, _targets(subject, rows), trust_remote_code, padded=False)
    return windows_of(subject, rows, options, stride=stride, trust_remote_code=trust_remote_code)


def calibration_examples(
    subject: Subject, rows: Rows, options: DataOptions, samples: int, seed: int, *, trust_remote_code: bool = False
) -> tuple[Examples, list[int]]:
    """Make examples to calibrate on, and draw by `seed` which ones: `samples` sequences, sentences or images.

    Labels are neither needed nor read. Raises DataError.
    """
    is_language = TASKS[subject.task].is_language
    options.check_for(TASKS[subject.task].reads)
    if is_language and options.block_size is None:
        options = dataclasses.replace(options, block_size=min(CALIBRATION_SIZE, sequence_size(subject, None)))
    if is_language:
        examples = training_examples(subject, rows, options, seed=seed, trust_remote_code=trust_remote_code)
    elif TASKS[subject.task].data:
        examples = _answered(subject, rows, options, trust_remote_code, labels=False)
    elif TASKS[subject.task].embeds:
        examples = scored_pairs_of(subject, rows, options, measured=False, trust_remote_code=trust_remote_code)
    elif TASKS[subject.task].takes_masks:
        examples = pictures_of(subject, rows, options, masks=False, trust_remote_code=trust_remote_code)
    else:
        unread = Targets(None, [placeholder(subject)] * len(rows.rows))
        examples = _labelled(subject, rows, options, unread, trust_remote_code)
    order = torch.randperm(len(examples.dataset), generator=torch.Generator().manual_seed(seed))
    return examples, sorted(order[:samples].tolist())


def _answered(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    trust_remote_code: bool,
    *,
    measured: bool = False,
    labels: bool = True,
) -> Examples:
    """Make examples of a task with data of its own, to train on or to be `measured`; without `labels` to calibrate."""
    if TASKS[subject.task].points:
        return windows_of_questions(subject, rows, options, trust_remote_code, measured=measured, labels=labels)
    if TASKS[subject.task].listens:
        return transcripts_of(subject, rows, options, trust_remote_code, measured=measured)
    if TASKS[subject.task].decodes:
        return pairs_of(subject, rows, options, trust_remote_code, measured=measured)
    return tagged_words_of(subject, rows, options, trust_remote_code, measured=measured)


def _targets(subject: Subject, rows: Rows) -> Targets:
    assert rows.labels is not None
    return targets_of(rows.labels, subject.problem, class_names(subject), rows.reference)


def _labelled(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    targets: Targets,
    trust_remote_code: bool,
    *,
    augment_seed: int | None = None,
    padded: bool = True,
) -> Examples:
    """Images or sentences with a label each. `padded` says that the model will see the padding of sentences."""
    task = TASKS[subject.task]
    table = rows.rows if targets.rows is None else rows.rows.select(targets.rows)
    if task.takes_images:
        column = pick_column(rows.rows, options.image_column, IMAGE_COLUMNS, "image", rows.reference)
        how = Preprocessing.of(
            subject.source,
            subject.body,
            options.image_size,
            test_size=options.test_size,
            trust_remote_code=trust_remote_code,
        )
        images = Images(table, column, targets.labels, how, rows.reference, augment_seed)
        return Examples(images, stack, task.unit, 1, (how.note, *images.notes, *targets.notes))
    return sentences_of(subject, dataclasses.replace(rows, rows=table), options, targets, trust_remote_code, padded)
