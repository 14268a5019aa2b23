"""Documents of tokens into what models are fed: sequences to train on, windows to measure on, rows as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from lrsurgery.data.batches import IGNORED, Batch, Example, seed_of
from lrsurgery.data.text.tokens import Frame, check_known
from lrsurgery.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

MASKED_SHARE = 0.15  # of tokens, as BERT
SHUFFLE_BUFFER = 10_000  # rows of a stream


class TokenStream:
    """All tokens of encoded rows as one stream, read from the memory-mapped table."""

    def __init__(self, rows: datasets.Dataset, end: Sequence[int] = ()) -> None:
        column = rows.flatten_indices().data.column("input_ids")
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self.length = int(self._starts[-1])
        self.largest = max((int(chunk.max()) for chunk in self._chunks if len(chunk)), default=0)
        last = max(0, self.length - len(end))
        if end and self.length and self.read(last, self.length).tolist() == list(end):
            self.length = last  # what ends the last document has no document after it

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read the tokens from `start` up to `stop`, (stop - start,)."""
        pieces = []
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            offset = start - int(self._starts[index])
            piece = self._chunks[index][offset : offset + stop - start]
            pieces.append(piece)
            start, index = start + len(piece), index + 1
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """BERT's noise for masked language models."""

    mask: int  # the token that stands for a hidden one
    vocabulary: int  # replacements are drawn from it
    special: tuple[int, ...]  # tokens that are never hidden
    frame: Frame  # what stands around a sequence, such as [CLS] and [SEP]

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase, reference: str, *, frame: Frame | None = None, known: int | None = None
    ) -> Masking:
        """Read the tokens from a tokenizer; `known` is the size of the model's vocabulary.

        Raises DataError if it has no mask token, or one that the model does not know.
        """
        mask = tokenizer.mask_token_id
        if mask is None:
            raise DataError(f"{reference}: its tokenizer has no mask token, which masked-lm needs")
        if known is not None and mask >= known:
            raise DataError(f"{reference}: its tokenizer's mask token is {mask}, the model knows {known}")
        return Masking(
            mask=mask,
            vocabulary=len(tokenizer) if known is None else min(len(tokenizer), known),
            special=tuple(tokenizer.all_special_ids),
            frame=frame or Frame.of(tokenizer),
        )

    def __call__(self, ids: torch.Tensor, seed: tuple[int, ...], *, framed: bool = False) -> Batch:
        """Choose 15% of the tokens `ids` (length,) as labels: 80% of them masked, 10% replaced, 10% shown.

        `input_ids` and `labels` have the tokenizer's prefix and suffix around, unless `ids` are `framed` already.

        Source: Devlin et al. 2019, section 3.1.
        """
        if not framed:
            around = (self.frame.prefix, self.frame.suffix)
            prefix, suffix = (torch.tensor(tokens, dtype=ids.dtype) for tokens in around)
            ids = torch.cat([prefix, ids, suffix])
        generator = torch.Generator().manual_seed(seed_of(*seed))
        share, how = torch.rand(2, len(ids), generator=generator)
        noise = torch.randint(self.vocabulary, (len(ids),), generator=generator)
        chosen = (share < MASKED_SHARE) & ~torch.isin(ids, torch.tensor(self.special, dtype=ids.dtype))
        labels = torch.where(chosen, ids, torch.full_like(ids, IGNORED))
        shown = torch.where(chosen & (how < 0.8), torch.full_like(ids, self.mask), ids)
        shown = torch.where(chosen & (how >= 0.9), noise, shown)
        return {"input_ids": shown, "labels": labels}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a stream is cut: tokens of a piece, what stands around each, and noise for masked language models."""

    size: int  # with what stands around
    frame: Frame = field(default_factory=Frame)
    masking: Masking | None = None

    @property
    def inner(self) -> int:
        """Tokens of the stream in a piece of full length."""
        return self.size - len(self.frame.prefix) - (len(self.frame.suffix) if self.masking else 0)

    @property
    def about(self) -> str:
        """What stands around each piece, for the user."""
        if self.masking is not None:
            return "the tokenizer's own tokens around each" if self.inner < self.size else "no tokens around each"
        return "BOS added" if self.frame.prefix else "no BOS added"

    def example(self, ids: torch.Tensor, seed: tuple[int, ...], known: int = 0) -> Batch:
        """Inputs and labels of a piece `ids`; neither its prefix nor its first `known` tokens are labels."""
        if self.masking is not None:
            return self.masking(ids, seed)
        ids = torch.cat([torch.tensor(self.frame.prefix, dtype=ids.dtype), ids])
        labels = ids.clone()
        labels[: len(self.frame.prefix) + known] = IGNORED
        return {"input_ids": ids, "labels": labels}


class Sequences(Dataset[Batch]):
    """Pieces of a stream, one every `stride` tokens, without the remainder: for training."""

    def __init__(self, stream: TokenStream, cut: Cut, stride: int | None = None, seed: int = 0) -> None:
        self._stream, self._cut, self._seed, self._epoch = stream, cut, seed, 0
        self.stride = stride or cut.inner

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return max(0, (len(self._stream) - self._cut.inner) // self.stride + 1)

    def __getitem__(self, index: int) -> Batch:
        start = index * self.stride
        # noise goes by place and epoch, so that a resumed run masks as the uninterrupted one does
        return self._cut.example(self._stream.read(start, start + self._cut.inner), (self._seed, self._epoch, index))


class Windows(Dataset[Batch]):
    """Windows that slide by `stride` over a stream, each token scored once, the last window shorter: for evaluation.

    With a stride of a window's tokens they do not overlap; with a smaller stride each token has at least the
    difference before it, and the prefix.
    """

    def __init__(self, stream: TokenStream, cut: Cut, stride: int | None = None) -> None:
        self._stream, self._cut = stream, cut
        self.stride = min(stride or cut.inner, cut.inner)

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self._stream) - self._cut.inner) // self.stride))

    def __getitem__(self, index: int) -> Batch:
        start = index * self.stride
        ids = self._stream.read(start, min(start + self._cut.inner, len(self._stream)))
        return self._cut.example(ids, (0, 0, index), self._cut.inner - self.stride if index else 0)


class StreamedSequences(IterableDataset[Batch]):
    """Pieces packed from rows as they arrive, shuffled in a buffer of rows: for text too large to hold."""

    def __init__(self, rows: datasets.IterableDataset, cut: Cut, seed: int, known: int | None = None) -> None:
        self._rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._cut, self._seed, self._epoch, self._known = cut, seed, 0, known

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and mask otherwise from the next pass on."""
        self._epoch = epoch
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        held: list[int] = []
        index, size = 0, self._cut.inner
        for row in self._rows:
            held += row["input_ids"]
            while len(held) >= size:
                ids = torch.tensor(held[:size])
                del held[:size]
                if self._known is not None and int(ids.max()) >= self._known:
                    raise DataError(f"the data has token {int(ids.max())}, the model knows {self._known}")
                yield self._cut.example(ids, (self._seed, self._epoch, index))
                index += 1


class TokenRows(Dataset[Example]):
    """Rows of tokens as they are, each a sequence with its own mask and labels, or with the labels that are given."""

    def __init__(
        self,
        rows: datasets.Dataset,
        reference: str,
        limits: tuple[int, int],
        *,
        labels: Sequence[Any] | None = None,
        masking: Masking | None = None,
        seed: int = 0,
    ) -> None:
        self._rows, self._labels, self._masking, self._seed, self._epoch = rows, labels, masking, seed, 0
        known, longest = limits  # tokens of the vocabulary, and of a row
        lengths = [len(ids) for ids in rows["input_ids"]]
        self.longest, self.total = max(lengths), sum(lengths)
        if self.longest > longest:
            raise DataError(
                f"{reference}: row {lengths.index(self.longest)} has {self.longest} tokens, the model takes {longest};"
                " cut the rows, or --join them"
            )
        check_known(rows["input_ids"], known, reference)
        if "labels" in rows.column_names:
            check_known(rows["labels"], known, reference)
            if labels is None and all(label == IGNORED for row in rows["labels"] for label in row):
                raise DataError(f"{reference}: every label is {IGNORED}, so that none is left to score or to learn")

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = {name: torch.tensor(values) for name, values in self._rows[int(index)].items()}
        if self._labels is not None:
            return {**row, "labels": self._labels[index]}
        mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
        labels = row["input_ids"]
        if self._masking is not None and "labels" not in row:
            made = self._masking(row["input_ids"], (self._seed, self._epoch, int(index)), framed=True)
            row["input_ids"], labels = made["input_ids"], made["labels"]
        own = torch.where(mask.bool(), labels, torch.full_like(labels, IGNORED))
        return {**row, "attention_mask": mask, "labels": row.get("labels", own)}


class Sentences(Dataset[Example]):
    """Sentences or sentence pairs with their classes, tokenised when they are read; the collator pads them."""

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        labels: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        reference: str,
    ) -> None:
        self._reference = reference
        self._rows, self._columns, self._labels = rows.select_columns(list(columns)), columns, labels
        self._tokenizer, self._size = tokenizer, size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)]
        encoded = self._tokenizer(*(row[c] for c in self._columns), truncation=True, max_length=self._size)
        if not encoded["input_ids"]:
            raise DataError(f"{self._reference}: row {index} has no token; leave it out")
        return {**encoded, "labels": self._labels[index]}
