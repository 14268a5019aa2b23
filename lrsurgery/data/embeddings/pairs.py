"""Pairs of sentences as examples: tokenised each by itself, with a score of how alike they are where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from lrsurgery.data.batches import Batch, Collator, Example, Examples, Rows
from lrsurgery.data.datasets import pick_column
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.padding import position_limit
from lrsurgery.data.text.tokens import load_tokenizer
from lrsurgery.errors import DataError
from lrsurgery.files.json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = (("sentence1", "sentence2"), ("anchor", "positive"), ("query", "answer"), ("question", "answer"))
SCORES = ("score", "similarity_score", "similarity", "label", "labels")
HIGHEST = 5.0  # of the scores of STS, which begin at 0; cosines are compared with the share of it


class Pairs(Dataset[Example]):
    """Pairs of sentences, tokenised when they are read."""

    def __init__(
        self,
        rows: Any,
        columns: Sequence[str],
        scores: Sequence[float] | None,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        reference: str,
    ) -> None:
        self._rows, self._columns, self._scores = rows.select_columns(list(columns)), columns, scores
        self._tokenizer, self._size, self._reference = tokenizer, size, reference

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)]
        encoded = []
        for column in self._columns:
            if not isinstance(row[column], str):
                raise DataError(f"{self._reference}: row {index} has no text in column '{column}'; leave it out")
            encoded.append(self._tokenizer(row[column], truncation=True, max_length=self._size))
            if not encoded[-1]["input_ids"]:
                raise DataError(f"{self._reference}: row {index} has no token in column '{column}'; leave it out")
        scored = {} if self._scores is None else {"labels": self._scores[index]}
        return {"pair": encoded, **scored}


def _pad(tokenizer: PreTrainedTokenizerBase) -> Collator:
    def collate(examples: Sequence[Example]) -> Batch:
        sentences = [sentence for example in examples for sentence in example["pair"]]
        padded = tokenizer.pad([dict(sentence) for sentence in sentences], return_tensors="pt")
        batch: Batch = {name: value.unflatten(0, (-1, 2)) for name, value in padded.items()}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=torch.float32)
        return batch

    return collate


def scored_pairs_of(
    subject: Subject, rows: Rows, options: DataOptions, *, measured: bool, trust_remote_code: bool = False
) -> Examples:
    """Pairs to train on, or to be `measured`, which needs scores. Raises DataError for columns that are not there."""
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{subject.source.reference}: its tokenizer has no token to pad with; set pad_token in"
            " tokenizer_config.json"
        )
    tokenizer.padding_side = "right"
    columns = _columns(rows, options)
    scores, about = _scores(rows, options)
    if scores is None and measured:
        # a held-out part of pairs that are alike; correlation has no meaning then
        scores, about = [1.0] * len(rows.rows), "no scores: measured by (1 - cosine)^2, which knows no negatives"
    size = _size(subject, options, tokenizer)
    made = Pairs(rows.rows, columns, scores, tokenizer, size, rows.reference)
    notes = (f"{rows.name}: {len(made):,} pairs of sentences ({', '.join(columns)}), cut to {size:,} tokens", about)
    return Examples(made, _pad(tokenizer), TASKS[subject.task].unit, 1, notes)


def _columns(rows: Rows, options: DataOptions) -> tuple[str, str]:
    names = list(rows.rows.column_names or ())
    if options.text_column is not None:
        asked = options.text_column.split(",")
        if len(asked) != 2:
            raise DataError(f"text_column {options.text_column}: sentence-embeddings takes two, with a comma between")
        one, two = (pick_column(rows.rows, name, (), "text", rows.reference) for name in asked)
        return one, two
    found = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if found is None:
        raise DataError(f"{rows.reference}: no pair of sentences among {', '.join(names)}; name two with --text-column")
    return found


def _scores(rows: Rows, options: DataOptions) -> tuple[list[float] | None, str]:
    """The scores as shares of the highest, and how they are read; None where no column has any."""
    names = list(rows.rows.column_names or ())
    asked = options.label_column
    column = asked or next((name for name in SCORES if name in names), None)
    if column is None:
        return None, "no scores: trained to find each second sentence among those of the batch"
    column = pick_column(rows.rows, column, (), "label", rows.reference)
    values = rows.rows[column]  # type: ignore[index]
    found = []
    for index, value in enumerate(values):
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not -1 <= number <= HIGHEST:
            raise DataError(
                f"{rows.reference}: row {index} has {str(value)[:40]} in column '{column}'; scores are numbers from"
                f" -1 to 1, or from 0 to {HIGHEST:g}"
            )
        found.append(number)
    if max(found) <= 1:
        return found, f"scores ('{column}') compared with cosines"
    if min(found) < 0:
        raise DataError(f"{rows.reference}: scores ('{column}') go from {min(found):g} to {max(found):g}; scale them")
    return [value / HIGHEST for value in found], f"scores ('{column}') from 0 to {HIGHEST:g}, divided by it"


def _size(subject: Subject, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a sentence: the option's, else sentence-transformers' own limit, else the model's."""
    limit, _ = position_limit(subject.body)
    sizes = [min(limit or 1 << 20, int(tokenizer.model_max_length))]
    folder = subject.source.folder
    file = None if folder is None else folder / "sentence_bert_config.json"
    if file is not None and file.is_file() and isinstance(own := read_json(file).get("max_seq_length"), int):
        sizes.append(own)
    return min([*sizes, *([options.block_size] if options.block_size else [])])
