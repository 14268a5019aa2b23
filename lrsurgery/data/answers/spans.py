"""Questions, and the spans of a context that answer them, in windows that overlap; exact match and F1 as SQuAD's."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrsurgery.data.batches import PLACES, Batch, Example, Examples, Rows
from lrsurgery.data.datasets import pick_column
from lrsurgery.data.interfaces.wrapped import NEVER
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.examples import check_tokenizer, text_limit
from lrsurgery.data.text.tokens import check_texts, load_tokenizer
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# as transformers' example of question answering has them
WINDOW, OVERLAP = 384, 128  # tokens of a window, and of the context that two windows have in common
LONGEST_ANSWER = 30  # tokens
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """One question, its context, and the answers that people gave: none of them if the context has none."""

    text: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()  # with the place of their first character


def windows_of_questions(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    trust_remote_code: bool,
    *,
    measured: bool = False,
    labels: bool = True,
) -> Examples:
    """Make examples of questions with windows of their contexts; without `labels`, answers are not read.

    A window without the first answer is answered by its first token ([CLS]). Raises DataError, RecipeError.
    """
    from transformers import DataCollatorWithPadding

    reference = rows.reference
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    if not tokenizer.is_fast:
        raise DataError(
            f"{subject.source.reference}: its tokenizer does not tell the place of a token in the text; spans need a"
            " tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{subject.source.reference}: its tokenizer has no token to pad with; set pad_token in"
            " tokenizer_config.json"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    questions = _read(rows, options, labels)
    limit = text_limit(subject, options, tokenizer)
    size = limit if options.block_size else min(limit, WINDOW)
    windows = QuestionWindows(questions, tokenizer, size, reference, placed=measured)
    check_tokenizer(subject, tokenizer, windows, reference)
    bare = sum(not question.answers for question in questions) if labels else 0
    if measured and bare == len(questions):
        raise DataError(f"{reference}: no question has an answer, so that nothing can be scored")
    notes = []
    if bare:
        notes = [
            f"{reference}: {bare:,} questions have no answer: [CLS] is their label in the loss, and exact match and F1"
            " leave them out"
        ]
    about = f"{rows.name}: {len(questions):,} questions, {len(windows):,} windows of up to {size:,} tokens"
    judge = SpanJudge(windows) if measured else None
    return Examples(windows, DataCollatorWithPadding(tokenizer), TASKS[subject.task].unit, 1, (about, *notes), judge)


def _read(rows: Rows, options: DataOptions, labels: bool) -> list[Question]:
    reference, table = rows.reference, rows.rows
    asked = options.text_column.split(",") if options.text_column else [None, None]
    if len(asked) != 2:
        raise RecipeError(f"text_column {options.text_column}: name the columns of question and context, with a comma")
    usual = (("question", "query"), ("context", "passage"))
    names = [pick_column(table, one, known, "text", reference) for one, known in zip(asked, usual, strict=True)]
    for name in names:
        check_texts(table, name, reference)
    texts, contexts = (table[name][:] for name in names)
    if not labels:
        return [Question(*pair) for pair in zip(texts, contexts, strict=True)]
    column = pick_column(table, options.label_column, ("answers", "answer"), "label", reference)
    entries = zip(texts, contexts, table[column][:], strict=True)
    return [
        Question(text, context, _answers(answers, context, f"{reference}: row {row}"))
        for row, (text, context, answers) in enumerate(entries)
    ]


def _answers(entry: Any, context: str, where: str) -> tuple[tuple[str, int], ...]:
    texts, starts = (entry.get(name) if isinstance(entry, Mapping) else None for name in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{where}: its answers are {str(entry)[:60]}; write text and answer_start, a list each")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(start, int) or not text or context[start : start + len(text)] != text:
            raise DataError(f"{where}: the context does not hold the answer '{str(text)[:40]}' at character {start}")
    return tuple(zip(texts, starts, strict=True))


class QuestionWindows(Dataset[Example]):
    """Windows of the contexts behind their questions, tokenised when they are read."""

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        reference: str,
        *,
        placed: bool = False,
    ) -> None:
        self.questions = questions
        self._tokenizer, self._size, self._reference, self._placed = tokenizer, size, reference, placed
        self._last: tuple[int, BatchEncoding] | None = None
        counts = [len(self._encode(row)["input_ids"]) for row in range(len(questions))]
        self._windows = [(row, window) for row, count in enumerate(counts) for window in range(count)]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Example:
        row, window = self._windows[index]
        encoded, answers = self._encode(row), self.questions[row].answers
        names = [name for name in self._tokenizer.model_input_names if name in encoded]
        labels = self._label(encoded, window, *answers[0]) if answers else [self._nowhere(encoded, window)] * 2
        return {
            **{name: encoded[name][window] for name in names},
            "labels": labels,
            **({PLACES: index} if self._placed else {}),
        }

    def _encode(self, row: int) -> BatchEncoding:
        """All windows of a question."""
        if self._last is None or self._last[0] != row:
            question = self.questions[row]
            text = question.text.lstrip()
            room = self._size - len(self._tokenizer(text, "")["input_ids"])
            if room < 2:
                raise DataError(
                    f"{self._reference}: row {row} has a question of {self._size - room} tokens, a window has"
                    f" {self._size}; raise --block-size or leave the row out"
                )
            encoded = self._tokenizer(
                text,
                question.context,
                truncation="only_second",
                max_length=self._size,
                stride=min(OVERLAP, room // 2),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            self._last = row, encoded
        return self._last[1]

    def place(self, index: int) -> tuple[int, list[tuple[int, int] | None]]:
        """The question of a window, and the characters of the context that each of its tokens has; None for others."""
        row, window = self._windows[index]
        encoded = self._encode(row)
        own = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
        return row, [(start, end) if which == 1 else None for (start, end), which in own]

    def _label(self, encoded: BatchEncoding, window: int, text: str, start: int) -> list[int]:
        """The first and the last token of an answer that the window holds whole."""
        end, which = start + len(text), encoded.sequence_ids(window)
        inside = [(i, *offsets) for i, offsets in enumerate(encoded["offset_mapping"][window]) if which[i] == 1]
        if not inside or inside[0][1] > start or inside[-1][2] < end:
            return [self._nowhere(encoded, window)] * 2
        first = max(i for i, begin, _ in inside if begin <= start)
        last = min(i for i, _, stop in inside if stop >= end)
        return [first, last]

    def _nowhere(self, encoded: BatchEncoding, window: int) -> int:
        """The token that stands for no answer in the window: [CLS], else the first."""
        ids, cls = encoded["input_ids"][window], self._tokenizer.cls_token_id
        return ids.index(cls) if cls in ids else 0


class SpanJudge:
    """Takes the best span of all windows of a question, and compares it with the answers that people gave."""

    columns: ClassVar[int] = 4

    def __init__(self, windows: QuestionWindows) -> None:
        self._windows = windows

    def measure(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Each window's question, the score of its best span, that span's exact match and F1: (batch, 4)."""
        pairs = zip(outputs["logits"].cpu(), batch[PLACES].tolist(), strict=True)
        return torch.tensor([self._best(logits, place) for logits, place in pairs], dtype=torch.float64)

    def _best(self, logits: Tensor, place: int) -> tuple[float, float, float, float]:
        row, offsets = self._windows.place(place)
        question = self._windows.questions[row]
        inside = torch.tensor([each is not None for each in offsets])
        starts, ends = logits[:, : len(offsets)].double().masked_fill(~inside, NEVER)
        scores = starts[:, None] + ends[None, :]
        allowed = torch.ones_like(scores).triu().tril(LONGEST_ANSWER - 1).bool() & inside[:, None] & inside
        if not bool(allowed.any()) or not question.answers:
            return row, NEVER, 0.0 if question.answers else -1.0, 0.0
        best = int(scores.masked_fill(~allowed, -torch.inf).argmax())
        first, last = offsets[best // len(offsets)], offsets[best % len(offsets)]
        assert first is not None
        assert last is not None
        said = question.context[first[0] : last[1]]
        exact = max(float(normalise(said) == normalise(text)) for text, _ in question.answers)
        return row, float(scores.flatten()[best]), exact, max(overlap(said, text) for text, _ in question.answers)

    def summarise(self, rows: Tensor) -> dict[str, float]:
        """Means over the questions that have an answer."""
        best: dict[int, Sequence[float]] = {}
        for row, *found in rows.tolist():
            if found[1] >= 0 and (row not in best or found[0] > best[row][0]):
                best[row] = found
        count = max(1, len(best))
        exact, f1 = (sum(found[i] for found in best.values()) / count for i in (1, 2))
        return {"f1": f1, "exact_match": exact}


def normalise(text: str) -> str:
    """An answer in lower case without punctuation, articles and further spaces.

    Source: the official script of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def overlap(said: str, true: str) -> float:
    """F1 of the words that two answers have in common, as SQuAD's official script."""
    ours, theirs = normalise(said).split(), normalise(true).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
