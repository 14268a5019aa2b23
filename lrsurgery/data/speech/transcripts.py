"""Recordings and what is said in them, for encoder-decoders such as Whisper: teacher forcing, and the word error rate.

As transformers' own recipe for Whisper: labels are the tokenizer's, without the token that the decoder begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from lrsurgery.data.answers.pairs import GenerationJudge, Shift, shift_of
from lrsurgery.data.batches import IGNORED, PLACES, Batch, Example, Examples, Rows
from lrsurgery.data.datasets import TEXT_COLUMNS, pick_column
from lrsurgery.data.options import DataOptions
from lrsurgery.data.speech.recordings import AUDIO_COLUMNS, SOUNDS, Recordings
from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.data.text.examples import LONGEST, check_tokenizer
from lrsurgery.data.text.padding import position_limit
from lrsurgery.data.text.tokens import check_texts, load_tokenizer
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.modules import arguments_of

TRANSCRIPT_COLUMNS = (*TEXT_COLUMNS, "transcription", "transcript", "sentence", "target")


def transcripts_of(
    subject: Subject, rows: Rows, options: DataOptions, trust_remote_code: bool, *, measured: bool = False
) -> Examples:
    """Make examples of recordings with their transcripts; with `options.generate`, those `measured` have a judge.

    A column that is named as the model's argument (`input_features`) is fed as it is. Raises DataError, RecipeError.
    """
    text = pick_column(rows.rows, options.target_column, TRANSCRIPT_COLUMNS, "target", rows.reference)
    check_texts(rows.rows, text, rows.reference)
    sounds, notes = _sounds_of(subject, rows, options, trust_remote_code)
    tokenizer = load_tokenizer(subject.source, trust_remote_code)
    spoken = _set_language(subject, tokenizer, options.language)
    limit, _ = position_limit(subject.body)
    size = min(limit or LONGEST, int(tokenizer.model_max_length))
    targets = rows.rows[text][:]
    judge = None
    if measured and options.generate is not None:
        judge = GenerationJudge(subject, tokenizer, targets, options.generate, spoken)
    begin = getattr(subject.config, "decoder_start_token_id", None)
    examples = Transcripts(sounds, targets, tokenizer, size, begin, rows.reference, placed=judge is not None)
    check_tokenizer(subject, tokenizer, examples.labels_alone, rows.reference, ("labels",))
    cut = "whole" if size >= LONGEST else f"cut to {size:,} tokens"
    notes.append(f"{rows.name}: {len(examples):,} recordings, '{text}' to write, {cut}")
    if options.language is None and getattr(_generation(subject), "is_multilingual", False):
        notes.append(f"{rows.name}: no --language, so transcripts are scored without a token of their language")
    return Examples(examples, _Collator(sounds, shift_of(subject)), TASKS[subject.task].unit, 1, tuple(notes), judge)


def _sounds_of(
    subject: Subject, rows: Rows, options: DataOptions, trust_remote_code: bool
) -> tuple[Recordings | _Ready, list[str]]:
    takes = arguments_of(subject.body)
    ready = next((name for name in SOUNDS if name in takes and name in rows.rows.column_names), None)
    if ready is not None and options.audio_column is None:
        return _Ready(rows.rows.select_columns([ready]), ready), [f"{rows.name}: {ready} as they are"]
    column = pick_column(rows.rows, options.audio_column, AUDIO_COLUMNS, "audio", rows.reference)
    recordings = Recordings(subject.source, rows, column, takes, trust_remote_code)
    return recordings, [f"{rows.name}: {recordings.note}"]


class _Ready:
    """Features that somebody has made already."""

    extractor: Any = None

    def __init__(self, table: Any, name: str) -> None:
        self._table, self._name = table, name

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self._name: np.asarray(self._table[index][self._name], np.float32)}


def _generation(subject: Subject) -> Any:
    return getattr(subject.body, "generation_config", None)


def _set_language(subject: Subject, tokenizer: Any, language: str | None) -> dict[str, Any]:
    """Have the tokenizer begin transcripts with their language; what the model's `generate` is told of it."""
    if language is None:
        return {}
    if not hasattr(tokenizer, "set_prefix_tokens"):
        raise RecipeError(
            f"language {language}: {type(tokenizer).__name__} of {subject.source.reference} has no tokens of languages;"
            " leave it out"
        )
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    try:
        tokenizer.set_prefix_tokens(language=language, task="transcribe")
        begin = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)  # which looks the language up
    except ValueError as e:
        raise RecipeError(f"language {language}: {' '.join(str(e).split())[:200]}") from e
    # the tokenizer counts the languages on from its first one, whether the vocabulary has them or not
    if f"<|{TO_LANGUAGE_CODE.get(language.lower(), language.lower())}|>" not in begin:
        raise RecipeError(f"language {language}: {subject.source.reference} has no token for it; leave it out")
    multilingual = getattr(_generation(subject), "is_multilingual", False)
    return {"language": language, "task": "transcribe"} if multilingual else {}


class Transcripts(Dataset[Example]):
    """Recordings with their transcripts, made when they are read."""

    def __init__(
        self,
        sounds: Recordings | _Ready,
        targets: Sequence[str],
        tokenizer: Any,
        size: int,
        begin: int | None,
        reference: str,
        *,
        placed: bool = False,
    ) -> None:
        self._sounds, self._targets, self._tokenizer = sounds, targets, tokenizer
        self._size, self._begin, self._reference, self._placed = size, begin, reference, placed

    @property
    def labels_alone(self) -> _Labels:
        """The same examples without their recordings."""
        return _Labels(self)

    def labels(self, index: int) -> list[int]:
        """The tokens of one transcript. Raises DataError without any."""
        ids = list(self._tokenizer(self._targets[index], truncation=True, max_length=self._size)["input_ids"])
        if ids and ids[0] == self._begin:  # which the decoder is fed in any case
            ids = ids[1:]
        if not ids:
            raise DataError(f"{self._reference}: row {index} has a transcript without any token; leave it out")
        return ids

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Example:
        return {**self._sounds[index], "labels": self.labels(index), **({PLACES: index} if self._placed else {})}


class _Labels:
    def __init__(self, transcripts: Transcripts) -> None:
        self._transcripts = transcripts

    def __len__(self) -> int:
        return len(self._transcripts)

    def __getitem__(self, index: int) -> Example:
        return {"labels": self._transcripts.labels(index)}


class _Collator:
    """Pads transcripts, and recordings by the extractor's own `pad` where they are of several lengths."""

    def __init__(self, sounds: Recordings | _Ready, shift: Shift) -> None:
        self._extractor, self._shift = sounds.extractor, shift

    def __call__(self, examples: Sequence[Example]) -> Batch:
        labels = [torch.as_tensor(each["labels"]) for each in examples]
        batch: Batch = {"labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)}
        if PLACES in examples[0]:
            batch[PLACES] = torch.tensor([each[PLACES] for each in examples])
        batch |= self._sounds([{name: v for name, v in each.items() if name not in batch} for each in examples])
        return {**batch, "decoder_input_ids": self._shift(batch["labels"])}

    def _sounds(self, sounds: Sequence[Mapping[str, Any]]) -> Batch:
        if all(len({each[name].shape for each in sounds}) == 1 for name in sounds[0]):
            return {name: torch.as_tensor(np.stack([each[name] for each in sounds])) for name in sounds[0]}
        if self._extractor is None:
            raise DataError("recordings have several lengths, which no batch holds; give one, or --batch-size 1")
        return dict(self._extractor.pad(list(map(dict, sounds)), padding=True, return_tensors="pt"))
