"""A text to read and a text to write, for encoder-decoders: teacher forcing, and the figures of what they generate."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrsurgery.data.batches import IGNORED, PLACES, UNREAD, Batch, Collator, Example, Examples, Rows
from lrsurgery.data.datasets import pick_column
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.examples import LONGEST, check_tokenizer, text_limit
from lrsurgery.data.text.padding import position_limit
from lrsurgery.data.text.tokens import check_texts, load_tokenizer
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.modules import for_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE_COLUMNS = ("source", "text", "document", "article", "input", "dialogue", "sentence")
TARGET_COLUMNS = ("target", "summary", "highlights", "output", "labels", "label")
ROUGE = ("rouge1", "rouge2", "rougeL")
BEFORE = 4  # tokens that a decoder may begin with: Whisper's language, task and timestamps
Shift = Callable[[Tensor], Tensor]  # labels (batch, tokens) -> what the decoder reads, one place later


def pairs_of(
    subject: Subject, rows: Rows, options: DataOptions, trust_remote_code: bool, *, measured: bool = False
) -> Examples:
    """Make examples of texts with their targets; with `options.generate`, examples to be `measured` have a judge.

    Columns of dictionaries are read by path, such as `translation.de`. Raises DataError, RecipeError.
    """
    table = rows.rows.flatten()
    source = pick_column(table, options.text_column, SOURCE_COLUMNS, "text", rows.reference)
    target = pick_column(table, options.target_column, TARGET_COLUMNS, "target", rows.reference)
    for column in (source, target):
        check_texts(table, column, rows.reference)
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{subject.source.reference}: its tokenizer has no token to pad with; set pad_token in"
            " tokenizer_config.json"
        )
    tokenizer.padding_side = "right"
    size = text_limit(subject, options, tokenizer)
    sources, targets = table[source][:], table[target][:]
    judge = None
    if measured and options.generate is not None:
        judge = GenerationJudge(subject, tokenizer, targets, options.generate)
    pairs = Pairs(sources, targets, tokenizer, size, rows.reference, placed=judge is not None)
    check_tokenizer(subject, tokenizer, pairs, rows.reference, ("input_ids", "labels"))
    what = "whole" if size >= LONGEST else f"each text cut to {size:,} tokens"
    about = f"{rows.name}: {len(pairs):,} pairs of texts, '{source}' to '{target}', {what}"
    collate = _collator(tokenizer, shift_of(subject))
    return Examples(pairs, collate, TASKS[subject.task].unit, 1, (about,), judge)


def shift_of(subject: Subject) -> Shift:
    """What makes the decoder's inputs of labels, as the model itself does in training. Raises DataError without it."""
    body: Any = subject.body
    if hasattr(body, "prepare_decoder_input_ids_from_labels"):
        return lambda labels: body.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[no-any-return]
    shift = getattr(sys.modules[type(body).__module__], "shift_tokens_right", None)
    if shift is None or len(inspect.signature(shift).parameters) != 3:
        raise DataError(
            f"{subject.source.reference}: {type(body).__name__} has no prepare_decoder_input_ids_from_labels, by which"
            " its decoder is fed a target"
        )
    config = subject.config
    return lambda labels: shift(labels, config.pad_token_id, config.decoder_start_token_id)  # type: ignore[no-any-return]


class Pairs(Dataset[Example]):
    """Texts with their targets, tokenised when they are read, as the tokenizer makes sources and targets."""

    def __init__(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        reference: str,
        *,
        placed: bool = False,
    ) -> None:
        self._sources, self._targets, self._tokenizer = sources, targets, tokenizer
        self._size, self._reference, self._placed = size, reference, placed

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Example:
        how = {"truncation": True, "max_length": self._size}
        read = self._tokenizer(self._sources[index], **how)
        written = self._tokenizer(text_target=self._targets[index], **how)
        for what, ids in (("text", read["input_ids"]), ("target", written["input_ids"])):
            if not ids:
                raise DataError(f"{self._reference}: row {index} has a {what} without any token; leave it out")
        tokens = {name: read[name] for name in ("input_ids", "attention_mask")}
        return {**tokens, "labels": written["input_ids"], **({PLACES: index} if self._placed else {})}


def _collator(tokenizer: PreTrainedTokenizerBase, shift: Shift) -> Collator:
    from transformers import DataCollatorForSeq2Seq

    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(examples: Sequence[Example]) -> Batch:
        batch: Batch = dict(pad(list(examples)))
        labels, mask = batch["labels"], batch["attention_mask"]
        if labels.shape == mask.shape and not bool(mask.all() and labels.ne(IGNORED).all()):
            # of another length than the sources, so that a layer's shape tells which mask is its own
            batch["labels"] = labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
        batch["decoder_input_ids"] = shift(labels)
        return batch

    return collate


class GenerationJudge:
    """Generates a text for each source, and compares it with the target: ROUGE, and the edits of its words.

    ROUGE stems words (Porter), as the scores of summarisation are usually given. Words are compared as they are
    written. `options` go to the model's `generate`. Raises RecipeError for more tokens than the decoder takes.
    """

    columns: ClassVar[int] = len(ROUGE) + 2

    def __init__(
        self,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        targets: Sequence[str],
        new_tokens: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        limit, relative = position_limit(subject.body)
        if limit is not None and not relative and new_tokens > limit - BEFORE:
            raise RecipeError(f"generate {new_tokens}: the decoder takes {limit}; write at most {limit - BEFORE}")
        try:
            import jiwer  # noqa: F401
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as e:
            raise RecipeError(
                f"generate {new_tokens}: its figures need rouge_score and jiwer ({e}); run: pip install"
                " 'lrsurgery[metrics]'"
            ) from e
        self._body: Any = subject.body
        self._tokenizer, self._targets = tokenizer, targets
        self._options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, **(options or {})}
        self._scorer = RougeScorer(list(ROUGE), use_stemmer=True)

    def measure(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """F-measures of ROUGE, edits and words of the target: (batch, 5)."""
        unread = (*UNREAD, "decoder_input_ids", "decoder_attention_mask")
        inputs = {name: value for name, value in for_model(self._body, batch).items() if name not in unread}
        ids = self._body.generate(**inputs, **self._options)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        targets = [self._targets[place] for place in batch[PLACES].tolist()]
        return torch.tensor([self._compare(*pair) for pair in zip(texts, targets, strict=True)], dtype=torch.float64)

    def _compare(self, text: str, target: str) -> list[float]:
        import jiwer

        scores = self._scorer.score(target, text)
        words = jiwer.process_words(target, text)
        edits = words.substitutions + words.deletions + words.insertions
        return [*(scores[name].fmeasure for name in ROUGE), edits, words.substitutions + words.deletions + words.hits]

    def summarise(self, rows: Tensor) -> dict[str, float]:
        """The mean of each ROUGE; the word error rate, edits by the words of all targets."""
        rouge, (edits, words) = rows[:, : len(ROUGE)].mean(0).tolist(), rows[:, len(ROUGE) :].sum(0).tolist()
        return {**dict(zip(ROUGE, rouge, strict=True)), **({"wer": edits / words} if words else {})}
