"""Text into tokens, and tokens into sequences and windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import TEXT_COLUMNS, column_names, pick_column
from lrsurgery.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

Batch: TypeAlias = dict[str, torch.Tensor]  # a model's inputs by name
Example: TypeAlias = dict[str, Any]  # the same of one example, before collation: tensors, lists of tokens, numbers

IGNORED = -100  # the label that no loss counts, as everywhere in transformers
MASKED_SHARE = 0.15  # of tokens, as BERT
SHUFFLE_BUFFER = 10_000  # rows of a stream


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, with a padding token. Raises DataError if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise DataError(
            f"{source.reference}: no tokenizer that loads; a text task needs tokenizer.json or the like in the folder"
        ) from e
    # without its files some classes make an empty one that turns every text into nothing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{source.reference}: no tokenizer in the folder; a text task needs one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def encode(rows: Table, tokenizer: PreTrainedTokenizerBase, column: str | None, reference: str) -> Table:
    """Turn each document into its tokens, `input_ids`, with the end-of-text token of the tokenizer after it, if any.

    Special tokens spelled out in the text are recognised; none are added within a document. Rows with `input_ids` are
    taken as tokenised already, unless a text column is asked for.
    """
    names = column_names(rows)
    if column is None and "input_ids" in names:
        return rows.select_columns(["input_ids"])
    text = pick_column(rows, column, TEXT_COLUMNS, "text", reference)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def tokenise(batch: dict[str, list[object]]) -> dict[str, list[list[int]]]:
        texts = batch[text]
        for entry in texts:
            if not isinstance(entry, str):
                raise DataError(f"{reference}: column '{text}' holds {type(entry).__name__}, not text")
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [row + end for row in ids]}

    return rows.map(tokenise, batched=True, remove_columns=names)


class TokenStream:
    """All tokens of encoded rows as one stream, read from the memory-mapped table."""

    def __init__(self, rows: datasets.Dataset, end: int | None) -> None:
        column = rows.flatten_indices().data.column("input_ids")
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        total = int(self._starts[-1])
        self.largest = max((int(chunk.max()) for chunk in self._chunks if len(chunk)), default=0)
        # the token that ends the last document has no document after it
        self.length = total - (1 if total and end is not None and self._chunks[-1][-1] == end else 0)

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
    prefix: tuple[int, ...]  # tokens that the tokenizer puts before a sequence, such as [CLS]
    suffix: tuple[int, ...]  # and after it, such as [SEP]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, reference: str) -> Masking:
        """Read the tokens from a tokenizer. Raises DataError if it has no mask token."""
        if tokenizer.mask_token_id is None:
            raise DataError(f"{reference}: its tokenizer has no mask token, which masked-lm needs")
        around = tokenizer("")["input_ids"]
        half = (len(around) + 1) // 2
        return Masking(
            mask=tokenizer.mask_token_id,
            vocabulary=len(tokenizer),
            special=tuple(tokenizer.all_special_ids),
            prefix=tuple(around[:half]),
            suffix=tuple(around[half:]),
        )

    @property
    def added(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def __call__(self, ids: torch.Tensor, seed: tuple[int, ...]) -> Batch:
        """Choose 15% of the tokens `ids` (length,) as labels: 80% of them masked, 10% replaced, 10% shown.

        `input_ids` and `labels` have the tokenizer's prefix and suffix around: (length + added,).

        Source: Devlin et al. 2019, section 3.1.
        """
        ids = torch.cat([torch.tensor(self.prefix, dtype=ids.dtype), ids, torch.tensor(self.suffix, dtype=ids.dtype)])
        generator = torch.Generator().manual_seed(seed_of(*seed))
        share, how = torch.rand(2, len(ids), generator=generator)
        noise = torch.randint(self.vocabulary, (len(ids),), generator=generator)
        chosen = (share < MASKED_SHARE) & ~torch.isin(ids, torch.tensor(self.special, dtype=ids.dtype))
        labels = torch.where(chosen, ids, torch.full_like(ids, IGNORED))
        shown = torch.where(chosen & (how < 0.8), torch.full_like(ids, self.mask), ids)
        shown = torch.where(chosen & (how >= 0.9), noise, shown)
        return {"input_ids": shown, "labels": labels}


def seed_of(*parts: int) -> int:
    """Hash several numbers to one seed, the same on every machine and independent of earlier draws."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Sequences(Dataset[Batch]):
    """Sequences of `size` tokens of a stream, one every `stride` tokens, without the remainder: for training."""

    def __init__(self, stream: TokenStream, size: int, stride: int, seed: int, masking: Masking | None) -> None:
        self._stream, self._stride, self._masking, self._seed, self._epoch = stream, stride, masking, seed, 0
        self._size = size - (masking.added if masking else 0)

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return max(0, (len(self._stream) - self._size) // self._stride + 1)

    def __getitem__(self, index: int) -> Batch:
        ids = self._stream.read(index * self._stride, index * self._stride + self._size)
        if self._masking is not None:
            # by place and epoch, so that a resumed run masks as the uninterrupted one does
            return self._masking(ids, (self._seed, self._epoch, index))
        return {"input_ids": ids, "labels": ids.clone()}


class Windows(Dataset[Batch]):
    """Windows that slide by `stride` over a stream, each token scored once, the last window shorter: for evaluation.

    With stride = size they do not overlap; with a smaller stride each token has at least size - stride tokens before
    it.
    """

    def __init__(self, stream: TokenStream, size: int, stride: int, masking: Masking | None) -> None:
        self._stream, self._masking = stream, masking
        self._size = size - (masking.added if masking else 0)
        self._stride = min(stride, self._size)

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self._stream) - self._size) // self._stride))

    def __getitem__(self, index: int) -> Batch:
        start = index * self._stride
        ids = self._stream.read(start, min(start + self._size, len(self._stream)))
        if self._masking is not None:
            return self._masking(ids, (0, 0, index))
        labels = ids.clone()
        if index:
            labels[: self._size - self._stride] = IGNORED
        return {"input_ids": ids, "labels": labels}


class StreamedSequences(IterableDataset[Batch]):
    """Sequences packed from rows as they arrive, shuffled in a buffer of rows: for text too large to hold."""

    def __init__(self, rows: datasets.IterableDataset, size: int, seed: int, masking: Masking | None) -> None:
        self._rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._masking, self._seed, self._epoch = masking, seed, 0
        self._size = size - (masking.added if masking else 0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and mask otherwise from the next pass on."""
        self._epoch = epoch
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        held: list[int] = []
        index = 0
        for row in self._rows:
            held += row["input_ids"]
            while len(held) >= self._size:
                ids = torch.tensor(held[: self._size])
                del held[: self._size]
                if self._masking is not None:
                    yield self._masking(ids, (self._seed, self._epoch, index))
                else:
                    yield {"input_ids": ids, "labels": ids.clone()}
                index += 1


class Sentences(Dataset[Example]):
    """Sentences or sentence pairs with their classes, tokenised when they are read; the collator pads them."""

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        labels: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        size: int,
    ) -> None:
        self._rows, self._columns, self._labels = rows.select_columns(list(columns)), columns, labels
        self._tokenizer, self._size = tokenizer, size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)]
        encoded = self._tokenizer(*(row[c] for c in self._columns), truncation=True, max_length=self._size)
        return {**encoded, "labels": self._labels[index]}
