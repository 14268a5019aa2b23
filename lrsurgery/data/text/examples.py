"""All of the way from rows of text to examples: sequences to train on, windows to measure on, sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrsurgery.data.batches import Collator, Examples, ExampleSet, Rows
from lrsurgery.data.datasets import TEXT_COLUMNS, column_names, pick_column
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import Targets
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.padding import finds_last_token, pad_token_of, pad_tokens, position_limit
from lrsurgery.data.text.sequences import (
    Cut,
    Masking,
    Sentences,
    Sequences,
    StreamedSequences,
    TokenRows,
    TokenStream,
    Windows,
)
from lrsurgery.data.text.tokens import (
    TOKENS,
    Frame,
    check_known,
    check_texts,
    check_tokens,
    check_written,
    encode,
    load_tokenizer,
)
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

WINDOW = 2048  # tokens of a sequence, unless the model takes fewer or --block-size asks for others
LONGEST = 1 << 20  # tokens of a sentence, whatever the config says


def sequences_of(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    *,
    stride: int | None,
    seed: int,
    streaming: bool,
    trust_remote_code: bool,
) -> Examples:
    """Make sequences of running text to train on. Raises DataError, RecipeError."""
    task = TASKS[subject.task]
    tokenizer, cut = _text(subject, options, trust_remote_code)
    pad = pad_tokens(tokenizer.pad_token_id or 0)
    # a stream has no room for masks: rows of tokens are joined without what their masks hide
    join = options.join or (streaming and options.text_column is None and "input_ids" in column_names(rows.rows))
    encoded = encode(rows.rows, tokenizer, options.text_column, rows.reference, frame=cut.frame, join=join)
    if streaming:
        streamed = StreamedSequences(encoded, cut, seed, _vocabulary(subject))
        about = f"{rows.name}: read as training needs it, {cut.about}, sequences of {cut.size}"
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


def windows_of(
    subject: Subject, rows: Rows, options: DataOptions, *, stride: int | None, trust_remote_code: bool
) -> Examples:
    """Make windows of running text to measure on. Raises DataError, RecipeError."""
    task = TASKS[subject.task]
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


def _read(rows: Rows, encoded: Table, stream: TokenStream) -> str:
    """What was read of text."""
    count = len(encoded)
    return f"{rows.name}: {count:,} document{'' if count == 1 else 's'}, {len(stream):,} tokens"


def _is_whole(encoded: Table) -> bool:
    """Whether rows of tokens came with masks or labels, so that each is a sequence of its own."""
    return bool(set(column_names(encoded)) & set(TOKENS))


def _token_rows(subject: Subject, rows: Rows, encoded: Table, cut: Cut, pad: Collator, seed: int) -> Examples:
    made = TokenRows(encoded, rows.reference, _limits(subject), masking=cut.masking, seed=seed)
    held = ", ".join(name for name in column_names(encoded) if name != "input_ids")
    about = f"{rows.name}: {len(made):,} rows of tokens as they are, {made.total:,} tokens, with their {held}"
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
    cut = Cut(size=sequence_size(subject, options.block_size), frame=frame, masking=masking)
    if cut.inner < 1:
        raise RecipeError(f"block_size {cut.size}: leaves no room beside the {cut.size - cut.inner} tokens around each")
    return tokenizer, cut


def sequence_size(subject: Subject, asked: int | None) -> int:
    """Tokens of a sequence. Raises RecipeError for more than the model takes."""
    limit, relative = position_limit(subject.body)
    if asked is None:
        return min(limit or WINDOW, WINDOW)
    if limit is not None and asked > limit and not relative:
        raise RecipeError(f"block_size {asked}: longer than the {limit} positions that the model has")
    return asked


def text_limit(subject: Subject, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text that is taken whole: those that model and tokenizer take, unless --block-size asks for fewer.

    Raises RecipeError for more than the model takes.
    """
    if options.block_size:
        return sequence_size(subject, options.block_size)
    return min(_limits(subject)[1], int(tokenizer.model_max_length))


def check_tokenizer(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    reference: str,
    names: Sequence[str] = ("input_ids",),
) -> None:
    """Raise DataError for a token that the model does not know; the data decides where the tokenizer has such ones."""
    known = _vocabulary(subject)
    if max(tokenizer.get_vocab().values()) >= known:
        for name in names:
            check_known([examples[i][name] for i in range(len(examples))], known, reference)


def sentences_of(
    subject: Subject, rows: Rows, options: DataOptions, targets: Targets, trust_remote_code: bool, padded: bool
) -> Examples:
    """Sentences, pairs of them, or rows of tokens, with what their labels say."""
    task = TASKS[subject.task]
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    pad, notes = _sentence_padding(subject, tokenizer, padded)
    names = column_names(rows.rows)
    if options.text_column is None and "input_ids" in names and not set(TEXT_COLUMNS) & set(names):
        kept = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in names]
        encoded = check_tokens(rows.rows.select_columns(kept), Frame(), rows.reference, False)
        tokens = TokenRows(encoded, rows.reference, _limits(subject), labels=targets.labels)
        about = f"{rows.name}: {len(tokens):,} rows of tokens as they are"
        return Examples(tokens, pad, task.unit, 1, (about, *targets.notes, *notes))
    asked = options.text_column.split(",") if options.text_column else [None]
    columns = [pick_column(rows.rows, c, TEXT_COLUMNS, "text", rows.reference) for c in asked]
    for column in columns:
        check_texts(rows.rows, column, rows.reference)
    size = text_limit(subject, options, tokenizer)
    if not tokenizer("")["input_ids"]:
        check_written(rows.rows, columns, rows.reference)
    sentences = Sentences(rows.rows, columns, targets.labels, tokenizer, size, rows.reference)
    check_tokenizer(subject, tokenizer, sentences, rows.reference)
    what = f"{len(sentences):,} {'pairs of sentences' if len(columns) > 1 else 'sentences'}"
    about = f"{rows.name}: {what}, {'whole' if size >= LONGEST else f'cut to {size:,} tokens'}"
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
        if (old := pad_token_of(config)) not in (None, token):
            notes = [f"{reference}: pad_token_id {old} of the config is not the tokenizer's {token}, which is taken"]
        config.pad_token_id = token
    return DataCollatorWithPadding(tokenizer), tuple(notes)


def _stack() -> Collator:
    from transformers import default_data_collator

    return default_data_collator  # type: ignore[no-any-return]
