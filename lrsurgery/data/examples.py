"""A model and its data, made ready for each other: columns found, labels matched, text cut, images sized.

The file is long, since all that the room's other files make comes together here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    TRAIN_SPLITS,
    WHOLE,
    column_names,
    open_data,
    pick_column,
)
from lrsurgery.data.images import Images, Preprocessing, stack
from lrsurgery.data.labels import Labels, read_column, read_label_map, rename
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import Targets, new_head_for, placeholder, problem_of, targets_of
from lrsurgery.data.tasks import SINGLE, TASKS, Subject, class_names, head_size, load_subject, task_of, with_problem
from lrsurgery.data.text import (
    TOKENS,
    Collator,
    Cut,
    Example,
    Frame,
    Masking,
    Sentences,
    Sequences,
    StreamedSequences,
    TokenRows,
    TokenStream,
    Windows,
    check_known,
    check_texts,
    check_tokens,
    encode,
    finds_last_token,
    load_tokenizer,
    pad_tokens,
    position_limit,
)
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

CALIBRATION_SIZE = 512  # tokens of a sequence, unless the model takes fewer
WINDOW = 2048  # tokens of a sequence, unless the model takes fewer or --block-size asks for others
LONGEST = 1 << 20  # tokens of a sentence, whatever the config says


class ExampleSet(Protocol):
    """A torch dataset with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Rows:
    """A dataset as it was opened: its rows, what the user called it, and the labels in it."""

    rows: Table
    reference: str
    labels: Labels | None = None  # None where the task has none, or nobody reads them


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
    """Open a dataset and, where the task has labels and `labels` asks for them, read them. Raises DataError."""
    lines = not TASKS[task].is_language  # a file of text is sentences then, and not a document
    rows = open_data(reference, subset=options.subset, split=split, streaming=streaming, prefer=prefer, lines=lines)
    if TASKS[task].is_language or not labels:
        return Rows(rows, reference)
    if streaming:
        raise DataError(f"{reference}: streaming is for text; labels have to be known beforehand")
    column = pick_column(rows, options.label_column, LABEL_COLUMNS, "label", reference)
    found = read_column(rows, column, reference)
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
    subject = load_subject(
        source,
        name,
        from_scratch_seed=from_scratch_seed,
        classes=classes,
        new_head=new_head,
        trust_remote_code=trust_remote_code,
    )
    if not task.is_language:
        own = problem or (subject.config.problem_type if source.library == "transformers" else None)
        subject = with_problem(subject, problem_of(own, head_size(subject), labels))
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
    if not task.is_language:
        options = dataclasses.replace(options, test_size=False)  # that is for measuring
        targets = _targets(subject, rows)
        return _labelled(subject, rows, options, targets, trust_remote_code, augment_seed=seed if augment else None)
    tokenizer, cut = _text(subject, options, trust_remote_code)
    pad = pad_tokens(tokenizer.pad_token_id or 0)
    # a stream has no room for masks: rows of tokens are joined without what their masks hide
    join = options.join or (streaming and options.text_column is None and "input_ids" in column_names(rows.rows))
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference, frame=cut.frame, join=join)
    if streaming:
        streamed = StreamedSequences(encoded, cut, seed, _vocabulary(subject))
        about = f"{_name(rows)}: read as training needs it, {cut.about}, sequences of {cut.size}"
        # the one set without a length, which nothing asks for: such a run counts its steps
        return Examples(streamed, _stack(), task.unit, cut.size, (about,))  # type: ignore[arg-type]
    if _is_whole(encoded):
        return _token_rows(subject, rows, encoded, cut, pad, seed)
    stream = _stream(encoded, cut, subject, rows.reference)
    sequences = Sequences(stream, cut, stride, seed)
    if not len(sequences):
        raise DataError(
            f"{rows.reference}: its {len(stream):,} tokens are fewer than one sequence of {cut.size};"
            " lower --block-size"
        )
    about = f"{_read(rows, encoded, stream)}, {cut.about}, {len(sequences):,} sequences of {cut.size}"
    return Examples(sequences, _stack(), task.unit, cut.size, (about,))


def evaluation_examples(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None = None, trust_remote_code: bool = False
) -> Examples:
    """Make examples to measure on: each token, sentence or image of the set once. Raises DataError."""
    task = TASKS[subject.task]
    if not task.is_language:
        return _labelled(subject, rows, options, _targets(subject, rows), trust_remote_code, padded=False)
    tokenizer, cut = _text(subject, options, trust_remote_code)
    pad = pad_tokens(tokenizer.pad_token_id or 0)
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference, frame=cut.frame, join=options.join)
    if stride is not None and not 1 <= stride <= cut.size:
        raise RecipeError(f"stride {stride}: write 1 to {cut.size}, the tokens of a sequence")
    if _is_whole(encoded):
        return _token_rows(subject, rows, encoded, cut, pad, 0)
    stream = _stream(encoded, cut, subject, rows.reference)
    windows = Windows(stream, cut, stride)
    if len(stream) + len(cut.frame.prefix) < 2 or not len(stream):
        raise DataError(f"{rows.reference}: {len(stream)} tokens leave nothing to predict")
    about = f"{_read(rows, encoded, stream)}, {cut.about}, windows of {cut.size} with stride {windows.stride}"
    return Examples(windows, pad, task.unit, cut.size, (about,))


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
        unread = Targets(None, [placeholder(subject)] * len(rows.rows))
        examples = _labelled(subject, rows, options, unread, trust_remote_code)
    order = torch.randperm(len(examples.dataset), generator=torch.Generator().manual_seed(seed))
    return examples, sorted(order[:samples].tolist())


def _name(rows: Rows) -> str:
    """What the user called the data, with the split where it has several."""
    split = str(getattr(rows.rows, "split", None) or WHOLE)
    return rows.reference if split == WHOLE else f"{rows.reference} ({split})"


def _read(rows: Rows, encoded: Table, stream: TokenStream) -> str:
    """What was read of text."""
    count = len(encoded)
    return f"{_name(rows)}: {count:,} document{'' if count == 1 else 's'}, {len(stream):,} tokens"


def _is_whole(encoded: Table) -> bool:
    """Whether rows of tokens came with masks or labels, so that each is a sequence of its own."""
    return bool(set(column_names(encoded)) & set(TOKENS))


def _token_rows(subject: Subject, rows: Rows, encoded: Table, cut: Cut, pad: Collator, seed: int) -> Examples:
    made = TokenRows(encoded, rows.reference, _limits(subject), masking=cut.masking, seed=seed)
    held = ", ".join(name for name in column_names(encoded) if name != "input_ids")
    about = f"{_name(rows)}: {len(made):,} rows of tokens as they are, {made.total:,} tokens, with their {held}"
    return Examples(made, pad, TASKS[subject.task].unit, made.longest, (about,))


def _limits(subject: Subject) -> tuple[int, int]:
    """Tokens of the vocabulary, and of the longest row."""
    limit, relative = position_limit(subject.body)
    return _vocabulary(subject), LONGEST if relative or limit is None else limit


def _vocabulary(subject: Subject) -> int:
    return int(subject.config.get_text_config().vocab_size)


def _stream(encoded: Table, cut: Cut, subject: Subject, reference: str) -> TokenStream:
    stream = TokenStream(encoded, cut.frame.end)
    largest, known = max(stream.largest, *cut.frame.prefix, *cut.frame.suffix, 0), _vocabulary(subject)
    if largest >= known:
        raise DataError(f"{reference}: has token {largest}, the model knows {known}: not its own tokenizer")
    return stream


def _text(subject: Subject, options: DataOptions, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, Cut]:
    """The tokenizer, and how its tokens are cut. Raises RecipeError, DataError."""
    name = subject.source.reference
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    frame = Frame.of(tokenizer, options.bos, name)
    masks = TASKS[subject.task].masks
    masking = Masking.of(tokenizer, name, frame=frame, known=_vocabulary(subject)) if masks else None
    cut = Cut(size=_sequence_size(subject, options.block_size), frame=frame, masking=masking)
    if cut.inner < 1:
        raise RecipeError(f"block_size {cut.size}: leaves no room beside the {cut.size - cut.inner} tokens around each")
    return tokenizer, cut


def _sequence_size(subject: Subject, asked: int | None) -> int:
    """Tokens of a sequence. Raises RecipeError for more than the model takes."""
    limit, relative = position_limit(subject.body)
    if asked is None:
        return min(limit or WINDOW, WINDOW)
    if limit is not None and asked > limit and not relative:
        raise RecipeError(f"block_size {asked}: longer than the {limit} positions that the model has")
    return asked


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
    return _sentences(subject, dataclasses.replace(rows, rows=table), options, targets, trust_remote_code, padded)


def _sentences(
    subject: Subject, rows: Rows, options: DataOptions, targets: Targets, trust_remote_code: bool, padded: bool
) -> Examples:
    """Sentences, pairs of them, or rows of tokens, with what their labels say."""
    if options.bos != "auto":
        raise RecipeError(f"bos {options.bos}: is for running text; sentences have the tokens that the tokenizer adds")
    task = TASKS[subject.task]
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    pad, notes = _sentence_padding(subject, tokenizer, padded)
    names = column_names(rows.rows)
    if options.text_column is None and "input_ids" in names and not set(TEXT_COLUMNS) & set(names):
        kept = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in names]
        encoded = check_tokens(rows.rows.select_columns(kept), Frame(), rows.reference, False)
        tokens = TokenRows(encoded, rows.reference, _limits(subject), labels=targets.labels)
        about = f"{_name(rows)}: {len(tokens):,} rows of tokens as they are"
        return Examples(tokens, pad, task.unit, 1, (about, *targets.notes, *notes))
    asked = options.text_column.split(",") if options.text_column else [None]
    columns = [pick_column(rows.rows, c, TEXT_COLUMNS, "text", rows.reference) for c in asked]
    for column in columns:
        check_texts(rows.rows, column, rows.reference)
    known, longest = _limits(subject)
    size = (
        _sequence_size(subject, options.block_size) if options.block_size else min(longest, tokenizer.model_max_length)
    )
    sentences = Sentences(rows.rows, columns, targets.labels, tokenizer, size)
    if max(tokenizer.get_vocab().values()) >= known:  # then the data decides
        check_known([sentences[i]["input_ids"] for i in range(len(sentences))], known, rows.reference)
    what = f"{len(sentences):,} {'pairs of sentences' if len(columns) > 1 else 'sentences'}"
    about = f"{_name(rows)}: {what}, {'whole' if size >= LONGEST else f'cut to {size:,} tokens'}"
    return Examples(sentences, pad, task.unit, 1, (about, *targets.notes, *notes))


def _sentence_padding(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, padded: bool
) -> tuple[Collator, tuple[str, ...]]:
    """A collator that pads sentences, and notes about the token. Raises DataError without one if the model needs it.

    Padding stands on the right, so that absolute positions are those without it; models with relative ones keep their
    tokenizer's side. A batch that is not `padded` for the model is cut back before it gets there.
    """
    from transformers import DataCollatorWithPadding

    reference, notes = subject.source.reference, []
    _, relative = position_limit(subject.body)
    if not padded or not relative:
        tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None and padded:
        raise DataError(f"{reference}: its tokenizer has no token to pad with; set pad_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    elif padded and finds_last_token(subject.body):
        # the head takes the last token that is not config.pad_token_id
        config, token = subject.config.get_text_config(), tokenizer.pad_token_id
        if config.pad_token_id not in (None, token):
            old = config.pad_token_id
            notes = [f"{reference}: pad_token_id {old} of the config is not the tokenizer's {token}, which is taken"]
        config.pad_token_id = token
    return DataCollatorWithPadding(tokenizer), tuple(notes)


def _stack() -> Collator:
    from transformers import default_data_collator

    return default_data_collator  # type: ignore[no-any-return]
