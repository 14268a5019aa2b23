"""Inputs without labels: text, images and sound as the checkpoint's own files make them, and tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lrsurgery.data.batches import IGNORED, Batch, Collator, Example, Examples, Rows
from lrsurgery.data.images import Images, Preprocessing
from lrsurgery.data.options import DataOptions
from lrsurgery.data.speech.recordings import Recordings
from lrsurgery.data.tasks import Subject
from lrsurgery.data.text.examples import LONGEST, WINDOW
from lrsurgery.data.text.padding import finds_last_token, pad_token_of, position_limit
from lrsurgery.data.text.tokens import check_texts, load_tokenizer
from lrsurgery.data.unlabelled.columns import Feed
from lrsurgery.errors import DataError, RecipeError

# place, inputs that the parts before it made -> some of the inputs of an example
Part: TypeAlias = Callable[[int, Example], Example]


def unlabelled_examples(
    subject: Subject,
    rows: Rows,
    feed: Feed,
    options: DataOptions,
    *,
    augment_seed: int | None = None,
    trust_remote_code: bool = False,
) -> Examples:
    """Make examples of what a model is fed; images augmented by a seed where there is one. Raises DataError."""
    made = _Maker(subject, rows, feed, options, trust_remote_code, augment_seed)
    parts = [each for each in (made.tensors(), made.text(), made.images(), made.sound()) if each is not None]
    if feed.decodes:
        parts.append(made.decoder())
    unit = "images" if feed.image and not feed.text else "sentences" if feed.text and not feed.image else "examples"
    return Examples(Inputs(parts, len(rows.rows)), _collate(made.pads), unit, 1, tuple(made.notes))


class Inputs(Dataset[Example]):
    """Examples whose inputs come from several parts; a part may go by the inputs that the parts before it made."""

    def __init__(self, parts: Sequence[Part], count: int) -> None:
        self._parts, self._count = parts, count

    def set_epoch(self, epoch: int) -> None:
        """Augment otherwise from now on."""
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        found: Example = {}
        for part in self._parts:
            found |= part(int(index), found)
        return found


@dataclass
class _Maker:
    """The parts of the examples of one dataset, and notes on them."""

    subject: Subject
    rows: Rows
    feed: Feed
    options: DataOptions
    trust: bool
    augment_seed: int | None

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.pads: dict[str, int] = {}
        self.tokenizer: Any = None
        body, feed = self.subject.body, self.feed
        if feed.text or "input_ids" in feed.tensors or feed.decodes:
            token = pad_token_of(self.subject.config)
            if feed.text or (feed.target is not None and isinstance(rows_value(self.rows, feed.target), str)):
                self.tokenizer = load_tokenizer(self.subject.source, self.trust)
                token = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else token
            self.pads = {"input_ids": token or 0, "decoder_input_ids": token or 0}
            if finds_last_token(body):  # the head takes the last token that is not config.pad_token_id
                self.subject.config.get_text_config().pad_token_id = self.pads["input_ids"]
        if feed.tower is not None:
            fed = "texts" if feed.tower == "text" else "images"
            self.notes.append(
                f"{self.rows.name}: has {fed} alone, so the {feed.tower} tower alone is compared and trained"
            )

    def tensors(self) -> Part | None:
        """Columns that are named as arguments."""
        if not self.feed.tensors:
            return None
        names = [name for name in self.feed.tensors if not name.startswith("decoder_") or not self.feed.decodes]
        table = self.rows.rows.select_columns(names)
        self.notes.append(f"{self.rows.name}: {', '.join(names)} as they are")
        known = self._vocabulary() if "input_ids" in names else None
        masks = "input_ids" in names and "attention_mask" not in names
        return _Tensors(table, self.rows.reference, known, masks)

    def _vocabulary(self) -> int | None:
        known = getattr(self.subject.config.get_text_config(), "vocab_size", None)
        return int(known) if known is not None else None

    def text(self) -> Part | None:
        """Texts by the checkpoint's tokenizer."""
        if not self.feed.text:
            return None
        for column in self.feed.text:
            check_texts(self.rows.rows, column, self.rows.reference)
        limit, relative = position_limit(self.subject.body)
        longest = min(WINDOW if limit is None else limit, self.tokenizer.model_max_length)
        size = self.options.block_size or longest
        if self.options.block_size and limit is not None and size > limit and not relative:
            raise RecipeError(f"block_size {size}: longer than the {limit} positions that the model has")
        # SigLIP reads padding: it was trained on texts of one length without a mask, as transformers' pipeline gives it
        fixed = "siglip" in str(getattr(self.subject.config, "model_type", "")) and limit is not None
        if fixed:
            size = int(limit or size)
        made = f"padded to {size} tokens" if fixed else f"cut to {size:,} tokens" if size < LONGEST else "whole"
        pairs = "pairs of texts" if len(self.feed.text) > 1 else "texts"
        count = len(self.rows.rows)
        self.notes.append(f"{self.rows.name}: {count:,} {pairs} ({', '.join(self.feed.text)}), {made}")
        table = self.rows.rows.select_columns(list(self.feed.text))
        return _Texts(table, self.feed, self.tokenizer, size, fixed, self._vocabulary(), self.rows.reference)

    def images(self) -> Part | None:
        """Images by the checkpoint's processor or transform."""
        if self.feed.image is None:
            return None
        how = Preprocessing.of(self.subject.source, self.subject.body, None, trust_remote_code=self.trust)
        unread = [0] * len(self.rows.rows)
        images = Images(self.rows.rows, self.feed.image, unread, how, self.rows.reference, self.augment_seed)
        self.notes += [how.note, *images.notes]
        return _Images(images)

    def sound(self) -> Part | None:
        """Sound by the checkpoint's feature extractor."""
        if self.feed.audio is None:
            return None
        recordings = Recordings(self.subject.source, self.rows, self.feed.audio, self.feed.takes, self.trust)
        self.notes.append(f"{self.rows.name}: {recordings.note}")
        return _Sounds(recordings)

    def decoder(self) -> Part:
        """What the decoder reads: the targets if there are any, else the tokens of the input, else its first token."""
        start = self._start()
        if self.feed.target is not None:
            self.notes.append(f"{self.rows.name}: the decoder reads column '{self.feed.target}', shifted by one")
        elif self.feed.text or "input_ids" in self.feed.tensors:
            self.notes.append(f"{self.rows.name}: no targets, so the decoder reads the input's tokens, shifted by one")
        else:
            self.notes.append(f"{self.rows.name}: no targets, so the decoder reads its first token ({start}) alone")
        limit, _ = position_limit(self.subject.body)
        table = None if self.feed.target is None else self.rows.rows.select_columns([self.feed.target])
        most = int(limit or WINDOW)
        return _Decoder(table, self.tokenizer, start, most, "decoder_attention_mask" in self.feed.takes)

    def _start(self) -> int:
        places = (self.subject.config, getattr(self.subject.body, "generation_config", None))
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            for place in places:
                value = getattr(place, name, None)
                if isinstance(value, int):
                    return value
        raise DataError(
            f"{self.subject.source.reference}: its config names no decoder_start_token_id; add it, or give a column"
            " decoder_input_ids"
        )


def rows_value(rows: Rows, column: str) -> Any:
    """The first value of a column."""
    return rows.rows[0][column]


@dataclass(frozen=True)
class _Tensors:
    table: Any
    reference: str
    known: int | None  # tokens of the vocabulary
    masks: bool  # whether a mask has to be made

    def __call__(self, index: int, before: Example) -> Example:
        found = {}
        for name, value in self.table[index].items():
            try:
                array = np.asarray(value)
                tensor = torch.as_tensor(array.astype(np.float32) if array.dtype.kind == "f" else array)
            except (TypeError, ValueError) as e:
                raise DataError(f"{self.reference}: row {index}: {name} is no tensor ({e})") from e
            found[name] = tensor
        ids = found.get("input_ids")
        if ids is not None and (not ids.numel() or int(ids.max()) >= (self.known or 1 << 62) or int(ids.min()) < 0):
            held = f"token {int(ids.max())}, the model knows {self.known:,}" if ids.numel() else "no token"
            raise DataError(f"{self.reference}: row {index} has {held}")
        if ids is not None and self.masks:
            found["attention_mask"] = torch.ones_like(ids)
        return found


@dataclass(frozen=True)
class _Texts:
    table: Any
    feed: Feed
    tokenizer: Any
    size: int
    fixed: bool  # padded to one length, without a mask
    known: int | None
    reference: str

    def __call__(self, index: int, before: Example) -> Example:
        row = self.table[index]
        padding = {"padding": "max_length"} if self.fixed else {}
        encoded = self.tokenizer(
            *(row[column] for column in self.feed.text), truncation=True, max_length=self.size, **padding
        )
        ids = encoded["input_ids"]
        if not ids or (self.known is not None and max(ids) >= self.known):
            held = f"token {max(ids)}, the model knows {self.known}: not its own tokenizer" if ids else "no token"
            raise DataError(f"{self.reference}: row {index} has {held}")
        # the mask also tells which positions count, be the model's forward without it
        names = {*self.feed.takes} - {"attention_mask"} if self.fixed else {*self.feed.takes, "attention_mask"}
        return {name: torch.tensor(value) for name, value in encoded.items() if name in names}


@dataclass(frozen=True)
class _Images:
    images: Images

    def set_epoch(self, epoch: int) -> None:
        self.images.set_epoch(epoch)

    def __call__(self, index: int, before: Example) -> Example:
        return {name: value for name, value in self.images[index].items() if name != "labels"}


@dataclass(frozen=True)
class _Sounds:
    recordings: Recordings

    def __call__(self, index: int, before: Example) -> Example:
        return {name: torch.as_tensor(value) for name, value in self.recordings[index].items()}


@dataclass(frozen=True)
class _Decoder:
    table: Any  # of the targets; None without any
    tokenizer: Any
    start: int
    most: int
    masks: bool

    def __call__(self, index: int, before: Example) -> Example:
        ids: Any = before.get("input_ids", [])
        if self.table is not None:
            (value,) = self.table[index].values()
            ids = self.tokenizer(text_target=value)["input_ids"] if isinstance(value, str) else value
            ids = [token for token in ids if token != IGNORED]
        shifted = torch.tensor([self.start, *map(int, ids)][: max(1, min(len(ids), self.most))])
        return {
            "decoder_input_ids": shifted,
            **({"decoder_attention_mask": torch.ones_like(shifted)} if self.masks else {}),
        }


def _collate(pads: Mapping[str, int]) -> Collator:
    """A collator that stacks tensors of one size, and pads rows of numbers on the right."""

    def collate(examples: Sequence[Example]) -> Batch:
        return {name: _stack(name, [each[name] for each in examples], pads.get(name, 0)) for name in examples[0]}

    return collate


def _stack(name: str, values: Sequence[Tensor], pad: int) -> Tensor:
    if len({each.shape for each in values}) == 1:
        return torch.stack(list(values))
    if any(each.ndim != 1 for each in values):
        shapes = sorted({tuple(each.shape) for each in values})
        raise DataError(
            f"{name} has several sizes ({shapes[0]}, {shapes[-1]}), which no batch holds; give one size, or"
            " --batch-size 1"
        )
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=float(pad))
