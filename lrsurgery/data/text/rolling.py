"""The rolling windows of lm_eval (EleutherAI's Language Model Evaluation Harness), and what it does to text before.

The rules are those of its task `wikitext` and of `loglikelihood_rolling` in its `hf` models, version 0.4.13.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from lrsurgery.data.batches import IGNORED, Batch, Examples, Rows
from lrsurgery.data.datasets import TEXT_COLUMNS, pick_column
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.padding import pad_tokens, position_limit
from lrsurgery.data.text.sequences import TokenStream
from lrsurgery.data.text.tokens import check_texts, join_rows, load_tokenizer
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_LENGTH = 2048  # tokens that a model takes, where neither its config nor its tokenizer says
UNLIMITED = int(1e30)  # a tokenizer's model_max_length where it does not know one
# WikiText's marks and what stands for them, in the order in which they are replaced. The second is a slip of the
# original, which writes its own pattern into the text; figures agree only with it.
DETOKENISED = (
    (r"s '", r"s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", r"-"),
    (r" @,@ ", r","),
    (r" @\.@ ", r"."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"{re.escape(a)}\s*([^{re.escape(b)}]*?)\s*{re.escape(b)}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}")),
    *((rf"{quote}\s*([^{quote}]*?)\s*{quote}", rf"{quote}\1{quote}") for quote in "\"'"),
    *((" ".join("=" * count), "=" * count) for count in (4, 3, 2)),
    (r" ° ", r"°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", r" 1 "),
    (r" 's", r"'s"),
)


def detokenise(text: str) -> str:
    """Take WikiText's spaces and marks between words out, as lm_eval's task does."""
    for pattern, replacement in DETOKENISED:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True)
class Extent:
    """How much text was scored, by which a summed loss becomes a figure."""

    words: int  # between white space, of the text as it was given
    bytes: int  # of it in UTF-8


class RollingWindows(Dataset[Batch]):
    """Windows over documents, each token of each scored once; `labels` stand where they are predicted.

    A document's first window is the prefix token and its first size - 1 tokens, and predicts `size` of them. The next
    ones predict `size` further tokens each, given at first the one before; the last window predicts what is left, given
    as many tokens before as fit. `lengths` are of the documents, which follow each other in `stream`.
    """

    def __init__(self, stream: TokenStream, lengths: Sequence[int], size: int, prefix: int) -> None:
        self._stream, self._size, self._prefix = stream, size, prefix
        self._places: list[tuple[int, int, int]] = []  # start of the document, first and last predicted token
        start = 0
        for length in lengths:
            marks = [*range(0, length, size), length]
            self._places += [(start, start + a, start + b) for a, b in itertools.pairwise(marks)]
            start += length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Batch:
        start, first, last = self._places[index]
        begin = max(start, last - self._size)
        answers = self._stream.read(begin, last)
        before = torch.tensor([self._prefix]) if begin == start else self._stream.read(begin - 1, begin)
        labels = answers.clone()
        labels[: first - begin] = IGNORED
        return {"input_ids": torch.cat([before, answers[:-1]]), "labels": labels}


def rolling_windows_of(
    subject: Subject, rows: Rows, options: DataOptions, *, detokenised: bool, trust_remote_code: bool
) -> tuple[Examples, Extent]:
    """Make lm_eval's windows of documents, and count their words and bytes. Raises DataError, RecipeError."""
    if not TASKS[subject.task].generates:
        raise RecipeError(f"protocol lm-eval: is for causal-lm, and this model is for {subject.task}")
    if options.bos != "auto":
        raise RecipeError(f"bos {options.bos}: lm_eval's protocol has a rule of its own; leave it out")
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = eos if bos is None else bos
    if prefix is None:
        raise DataError(f"{subject.source.reference}: its tokenizer has no BOS token and no end of text to begin with")
    size = options.block_size or _length(subject, tokenizer)
    limit, relative = position_limit(subject.body)
    if limit is not None and size > limit and not relative:
        raise RecipeError(f"block_size {size}: longer than the {limit} positions that the model has")
    column = pick_column(rows.rows, options.text_column, TEXT_COLUMNS, "text", rows.reference)
    table = join_rows(rows.rows, column, rows.reference) if options.join else rows.rows
    check_texts(table, column, rows.reference)
    begins = tokenizer.decode(prefix)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        texts = [detokenise(text) for text in batch[column]] if detokenised else batch[column]
        # a document that spells the prefix out does not get it twice from a tokenizer that adds one
        ids = [tokenizer.encode(t, add_special_tokens=not t.startswith(begins), verbose=False) for t in texts]
        words = [len(re.split(r"\s+", text)) for text in batch[column]]
        return {"input_ids": ids, "words": words, "bytes": [len(text.encode()) for text in batch[column]]}

    encoded = table.map(tokenise, batched=True, batch_size=100, remove_columns=table.column_names)
    stream = TokenStream(encoded)
    if not len(stream):
        raise DataError(f"{rows.reference}: has no tokens to predict")
    known = int(subject.config.get_text_config().vocab_size)
    if stream.largest >= known:
        raise DataError(f"{rows.reference}: has token {stream.largest}, the model knows {known}: not its own tokenizer")
    windows = RollingWindows(stream, [len(ids) for ids in encoded["input_ids"]], size, prefix)
    extent = Extent(sum(encoded["words"]), sum(encoded["bytes"]))
    about = (
        f"{rows.name}: lm_eval's rolling windows of {size:,} after {tokenizer.convert_ids_to_tokens(prefix)},"
        f" {len(encoded):,} document{'' if len(encoded) == 1 else 's'}, {len(stream):,} tokens of text"
        f" {'detokenised as WikiText is' if detokenised else 'as it is'}, {extent.words:,} words of the original"
    )
    pad = pad_tokens(tokenizer.pad_token_id or 0)
    return Examples(windows, pad, TASKS[subject.task].unit, size, (about,)), extent


def _length(subject: Subject, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that lm_eval takes to be the most that the model takes."""
    config = subject.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return UNKNOWN_LENGTH if tokenizer.model_max_length >= UNLIMITED else int(tokenizer.model_max_length)
