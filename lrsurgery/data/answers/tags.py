"""Words and a tag for each of them, as the checkpoint's tokenizer splits them; and the F1 of entities, by seqeval."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrsurgery.data.batches import IGNORED, Batch, Example, Examples, Rows
from lrsurgery.data.datasets import pick_column
from lrsurgery.data.labels import HIDDEN, Labels, match_names, occurring
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject, class_names
from lrsurgery.data.text.examples import LONGEST, check_tokenizer, text_limit
from lrsurgery.data.text.tokens import load_tokenizer
from lrsurgery.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_COLUMNS = ("tokens", "words", "text")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "label", "pos_tags", "chunk_tags")
ENTITY = re.compile(r"O|[BIESLU]-.+")  # tags of entities: outside, or a place in one and its kind


def tagged_words_of(
    subject: Subject, rows: Rows, options: DataOptions, trust_remote_code: bool, *, measured: bool = False
) -> Examples:
    """Make examples of sentences, whose words have a tag each; without labels in `rows` each word has the tag 0.

    Examples to be `measured` come with a judge that gives the F1 of entities. Raises DataError.
    """
    from transformers import DataCollatorForTokenClassification

    tokenizer = _tokenizer(subject, trust_remote_code)
    column = pick_column(rows.rows, options.text_column, WORD_COLUMNS, "text", rows.reference)
    words = rows.rows[column][:]
    head = class_names(subject)
    tags, notes = _tags_of(words, rows.labels, head, column, rows.reference)
    size = text_limit(subject, options, tokenizer)
    examples = TaggedWords(words, tags, tokenizer, size)
    check_tokenizer(subject, tokenizer, examples, rows.reference)
    if all(tag == IGNORED for row in tags for tag in row):
        raise DataError(f"{rows.reference}: no word has a tag; all are hidden (-100)")
    judge, more = _judge(head) if measured else (None, ())
    if measured and (beyond := examples.count_beyond()):
        notes.append(f"{rows.reference}: {beyond:,} words are beyond the cut and not scored")
    what = "whole" if size >= LONGEST else f"cut to {size:,} tokens"
    about = f"{rows.name}: {len(examples):,} sentences of {sum(map(len, words)):,} words, {what}"
    collate = DataCollatorForTokenClassification(tokenizer)
    return Examples(examples, collate, TASKS[subject.task].unit, 1, (about, *notes, *more), judge)


def _tokenizer(subject: Subject, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, which has to know the word of each token. Raises DataError for one that does not."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    reference = subject.source.reference
    if not tokenizer.is_fast:
        raise DataError(f"{reference}: its tokenizer does not tell the word of a token; tags need a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise DataError(f"{reference}: its tokenizer has no token to pad with; set pad_token in tokenizer_config.json")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(split, ByteLevel):  # words come without the spaces between them, which it takes for part of a word
        split.add_prefix_space = True
        tokenizer.add_prefix_space = True
    return tokenizer


def _tags_of(
    words: Sequence[object], labels: Labels | None, head: Sequence[str], column: str, reference: str
) -> tuple[list[list[int]], list[str]]:
    """The head's class of each word; IGNORED for none."""
    for row, entry in enumerate(words):
        if not isinstance(entry, list) or not entry or not all(isinstance(word, str) for word in entry):
            shown = "no word" if entry == [] else str(entry)[:40]
            raise DataError(f"{reference}: row {row} of column '{column}' holds {shown}; a row is a list of words")
    if labels is None:
        return [[0] * len(entry) for entry in words], []  # type: ignore[arg-type]
    for row, (entry, tags) in enumerate(zip(words, labels.of_rows, strict=True)):
        if len(entry) != len(tags):  # type: ignore[arg-type]
            raise DataError(
                f"{reference}: row {row} has {len(entry)} words and {len(tags)} tags"  # type: ignore[arg-type]
                "; write one tag for each word"
            )
    places, notes = match_names(labels.names, occurring(labels), head, reference, numbered=labels.numbered)
    return [[IGNORED if tag in HIDDEN else places[tag] for tag in tags] for tags in labels.of_rows], notes


class TaggedWords(Dataset[Example]):
    """Sentences of words, tokenised when they are read; the first token of a word has its tag, the others none."""

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        tags: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        size: int,
    ) -> None:
        self._words, self._tags, self._tokenizer, self._size = words, tags, tokenizer, size

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> Example:
        encoded = self._tokenizer(self._words[index], is_split_into_words=True, truncation=True, max_length=self._size)
        labels, last = [], None
        for word in encoded.word_ids():
            labels.append(IGNORED if word is None or word == last else self._tags[index][word])
            last = word
        return {**encoded, "labels": labels}

    def count_beyond(self) -> int:
        """Count the words that no token of their sentence is of, since it is cut."""
        kept = self._tokenizer(list(self._words), is_split_into_words=True, truncation=True, max_length=self._size)
        seen = (set(kept.word_ids(i)) - {None} for i in range(len(self._words)))
        return sum(len(words) - len(own) for words, own in zip(self._words, seen, strict=True))


def _judge(head: Sequence[str]) -> tuple[EntityJudge | None, tuple[str, ...]]:
    """The judge of entities, or a note that says why there is none."""
    odd = next((name for name in head if not ENTITY.fullmatch(name)), None)
    if odd is not None:
        return None, (f"no F1 of entities: the head's class '{odd}' is not written as B-, I- or O",)
    try:
        import seqeval  # noqa: F401
    except ImportError:
        return None, ("no F1 of entities, which needs seqeval; run: pip install 'lrsurgery[metrics]'",)
    return EntityJudge(head), ()


class EntityJudge:
    """Counts entities as seqeval does: those that are right in place and kind, those predicted, those there are."""

    columns: ClassVar[int] = 3

    def __init__(self, head: Sequence[str]) -> None:
        self._head = head

    def measure(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Count the entities of each sentence, (batch, 3)."""
        predicted = outputs["logits"].argmax(-1).tolist()
        return torch.tensor(
            [self._count(*pair) for pair in zip(predicted, batch["labels"].tolist(), strict=True)], dtype=torch.float64
        )

    def _count(self, predicted: Sequence[int], labels: Sequence[int]) -> tuple[int, int, int]:
        from seqeval.metrics.sequence_labeling import get_entities

        pairs = [(p, t) for p, t in zip(predicted, labels, strict=True) if t != IGNORED]
        said, true = (set(get_entities([self._head[pair[i]] for pair in pairs])) for i in (0, 1))
        return len(said & true), len(said), len(true)

    def summarise(self, rows: Tensor) -> dict[str, float]:
        """F1 over the entities of all kinds together (micro), as seqeval's `f1_score`."""
        right, said, true = rows.sum(0).tolist()
        return {"f1": 2 * right / (said + true) if said + true else 0.0}
