"""Text into tokens, and tokens into sequences and windows.

The file is long: it holds all of the way from rows of text to what a language model is fed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.datasets import TEXT_COLUMNS, column_names, pick_column
from lrsurgery.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

Batch: TypeAlias = dict[str, torch.Tensor]  # a model's inputs by name
Example: TypeAlias = dict[str, Any]  # the same of one example, before collation: tensors, lists of tokens, numbers
Collator: TypeAlias = Callable[[Sequence[Example]], Batch]

IGNORED = -100  # the label that no loss counts, as everywhere in transformers
MASKED_SHARE = 0.15  # of tokens, as BERT
SHUFFLE_BUFFER = 10_000  # rows of a stream
CHAT = "messages"  # the column of conversations
TOKENS = ("attention_mask", "token_type_ids", "labels")  # what rows may hold beside input_ids


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


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Special tokens around a text."""

    prefix: tuple[int, ...] = ()  # at the head of each window, such as BOS or [CLS]
    suffix: tuple[int, ...] = ()  # at its end, such as [SEP], in masked language models
    end: tuple[int, ...] = ()  # after each document

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, bos: str = "auto", reference: str = "tokenizer") -> Frame:
        """Read off what the tokenizer itself adds around a text; a document ends with that or the end-of-text token.

        `bos` is "auto", "always" (a tokenizer that adds nothing in front then gives its BOS token, else its end-of-text
        token) or "never". Raises DataError for "always" if there is no such token.
        """
        body, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        starts = (i for i in range(len(full) - len(body) + 1) if full[i : i + len(body)] == body)
        at = next(starts, None) if body else None
        if at is None:
            full, body = tokenizer("")["input_ids"], []
            at = (len(full) + 1) // 2
        prefix, suffix = tuple(full[:at]), tuple(full[at + len(body) :])
        eos = tokenizer.eos_token_id
        if bos == "always" and not prefix:
            known = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
            prefix = tuple(token for token in known if token is not None)[:1]
            if not prefix:
                raise DataError(f"{reference}: its tokenizer has no BOS token, which --bos always needs")
        return Frame(
            prefix=() if bos == "never" else prefix,
            suffix=suffix,
            end=suffix or (() if eos is None else (eos,)),
        )

    def strip(self, ids: list[int]) -> list[int]:
        """The tokens without a prefix of their own, which windows get anyway."""
        count = len(self.prefix)
        return ids[count:] if count and tuple(ids[:count]) == self.prefix else ids


def encode(
    rows: Table,
    tokenizer: PreTrainedTokenizerBase,
    column: str | None,
    reference: str,
    *,
    frame: Frame | None = None,
    join: bool = False,
) -> Table:
    """Turn each document into its tokens, `input_ids`, with the frame's end after it; `join` makes one of all rows.

    Special tokens spelled out in the text are recognised; a prefix that a document brings along is taken off, since
    each window gets its own. Conversations go through the tokenizer's chat template and end as that ends them. Rows
    with `input_ids` are taken as tokenised already, unless a text column is asked for.

    Raises DataError that names the row.
    """
    import datasets

    frame = frame or Frame.of(tokenizer)
    names = column_names(rows)
    if column is None and "input_ids" in names:
        return check_tokens(rows, frame, reference, join)
    if column is None and CHAT in names and not set(TEXT_COLUMNS) & set(names):
        column = CHAT
    text = pick_column(rows, column, TEXT_COLUMNS, "text", reference)
    pieces = rows.column_names == ["text", "ends"]  # of streamed text
    held = isinstance(rows, datasets.Dataset)
    if join and held:
        rows = _join(rows, text, reference)
    end = [] if join else list(frame.end)

    def tokenise(batch: dict[str, list[object]], at: list[int]) -> dict[str, list[list[int]]]:
        texts = batch[text]
        if any(_is_chat(entry) for entry in texts):
            return {"input_ids": [frame.strip(ids) for ids in _apply_template(texts, at, tokenizer, text, reference)]}
        for row, entry in zip(at, texts, strict=True):
            if not isinstance(entry, str):
                raise DataError(f"{reference}: row {row} of column '{text}' holds {_kind(entry)}, not text")
        if join and not held:
            texts = [entry if str(entry).endswith("\n") else f"{entry}\n" for entry in texts]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ends = [end if last else [] for last in batch["ends"]] if pieces else [end] * len(ids)
        return {"input_ids": [frame.strip(row) + after for row, after in zip(ids, ends, strict=True)]}

    return rows.map(tokenise, batched=True, with_indices=True, remove_columns=column_names(rows))


def _kind(entry: object) -> str:
    return "nothing" if entry is None else type(entry).__name__


def check_texts(rows: datasets.Dataset, column: str, reference: str) -> None:
    """Raise DataError that names the first row whose entry in the column is not text."""
    for row, entry in enumerate(rows[column]):
        if not isinstance(entry, str):
            raise DataError(f"{reference}: row {row} of column '{column}' holds {_kind(entry)}, not text")


def _join(rows: datasets.Dataset, column: str, reference: str) -> datasets.Dataset:
    """One row with the text of all, each on a line of its own."""
    import datasets

    check_texts(rows, column, reference)
    texts = list(rows[column])
    lines = [text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]]
    features = datasets.Features({column: datasets.Value("large_string")})
    return datasets.Dataset.from_dict({column: ["".join([*lines, *texts[-1:]])]}, features=features)


def _is_chat(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and all(isinstance(message, Mapping) for message in entry)


def _apply_template(
    chats: Sequence[object], at: Sequence[int], tokenizer: PreTrainedTokenizerBase, column: str, reference: str
) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{reference}: column '{column}' holds conversations, and the model's tokenizer has no chat template;"
            " write them out as text"
        )
    found = []
    for row, chat in zip(at, chats, strict=True):
        if not isinstance(chat, list) or not _is_chat(chat):
            raise DataError(f"{reference}: row {row} of column '{column}' holds {_kind(chat)}, not a conversation")
        messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
        try:
            found.append(list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)))
        except Exception as e:  # a template raises anything
            cause = " ".join(str(e).split())[:200]
            raise DataError(
                f"{reference}: row {row} of column '{column}': the chat template refuses it ({cause})"
            ) from e
    return found


def check_tokens(rows: Table, frame: Frame, reference: str, join: bool) -> Table:
    """Rows of tokens; with their masks and labels where they have any, unless they are joined."""
    names = column_names(rows)
    kept = ["input_ids", *(name for name in TOKENS if name in names)]
    if join and "labels" in kept:
        raise DataError(f"{reference}: rows with labels of their own are not joined; leave --join or the labels out")
    whole = not join and len(kept) > 1

    def check(batch: dict[str, list[Any]], at: list[int]) -> dict[str, list[Any]]:
        for i, (row, ids) in enumerate(zip(at, batch["input_ids"], strict=True)):
            if not _are_tokens(ids):
                shown = str(ids)[:40]
                raise DataError(
                    f"{reference}: row {row} of column 'input_ids' holds {shown};"
                    " a row is a list of whole numbers from 0"
                )
            for name in kept[1:]:
                if not isinstance(batch[name][i], list) or len(batch[name][i]) != len(ids):
                    raise DataError(f"{reference}: row {row} has {len(ids)} input_ids and not as many {name}")
        if whole:
            return {name: batch[name] for name in kept}
        masks = batch.get("attention_mask") or [None] * len(at)
        pairs = zip(batch["input_ids"], masks, strict=True)
        unmasked = [ids if mask is None else [t for t, m in zip(ids, mask, strict=True) if m] for ids, mask in pairs]
        return {"input_ids": [frame.strip(ids) for ids in unmasked]}

    return rows.map(check, batched=True, with_indices=True, remove_columns=names)


def _are_tokens(ids: object) -> bool:
    if not isinstance(ids, list):
        return False
    return not ids or (all(type(token) is int for token in ids) and min(ids) >= 0)


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


def seed_of(*parts: int) -> int:
    """Hash several numbers to one seed, the same on every machine and independent of earlier draws."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a stream is cut: tokens of a piece, what stands around each, and noise for masked language models."""

    size: int  # with what stands around
    frame: Frame = Frame()
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


def check_known(rows: Sequence[Sequence[int]], known: int, reference: str) -> None:
    """Raise DataError that names the first row with a token that a vocabulary of `known` does not have."""
    for row, ids in enumerate(rows):
        if len(ids) and max(ids) >= known:
            raise DataError(
                f"{reference}: row {row} has token {max(ids)}, the model knows {known}: not its own tokenizer"
            )


class Sentences(Dataset[Example]):
    """Sentences or sentence pairs with their classes, tokenised when they are read; the collator pads them."""

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        labels: Sequence[Any],
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


def pad_tokens(token: int) -> Collator:
    """A collator that pads sequences on the right, outside of the attention mask, with labels that no loss counts."""

    def collate(examples: Sequence[Example]) -> Batch:
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), longest), token)
        labels = torch.full_like(ids, IGNORED)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length], labels[i, :length] = example["input_ids"], example["labels"]
            mask[i, :length] = example.get("attention_mask", 1)
            types[i, :length] = example.get("token_type_ids", 0)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {**batch, "token_type_ids": types} if "token_type_ids" in examples[0] else batch

    return collate


def position_limit(model: nn.Module) -> tuple[int | None, bool]:
    """Read the most tokens that a text model takes, and whether positions are relative, so that more work.

    The config names the rows of the table of positions. If that has a padding entry, as in RoBERTa's kin, MPNet,
    Longformer and ESM, positions begin after it.
    """
    config: PreTrainedConfig = model.config.get_text_config()  # type: ignore[operator, union-attr]
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if (
            limit
            and padding is not None
            and table is not None
            and "position" in name.rpartition(".")[2]
            and len(table) == limit
        ):
            limit -= padding + 1
            break
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "position_embedding_type", None) == "rotary"
    return limit, limit is None or bool(rotary)


def without_padding(inputs: Batch, model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Split a batch that is padded on the right into parts of examples of one length: their places, and their inputs.

    So no figure depends on padding: not on its side, not on its token, not on layers that ignore the mask. Batches
    without padding stay whole, except for a head that finds the last token and has no padding token to go by.
    """
    mask = inputs.get("attention_mask")
    config = getattr(model, "config", None)
    everything = torch.arange(len(next(iter(inputs.values()))))
    if mask is None or mask.ndim != 2 or config is None:
        yield everything, inputs
        return
    alone = config.get_text_config().pad_token_id is None and finds_last_token(model)
    lengths = mask.sum(-1)
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if not bool((mask.bool() == prefix).all()):  # the examples' own masks, and no padding of ours
        yield everything, inputs
        return
    for length in sorted(set(lengths.tolist())):
        places = (lengths == length).nonzero()[:, 0]
        for chosen in places.split(1) if alone else (places,):
            part = {
                name: (v[chosen, :length] if v.ndim > 1 and v.shape[1] == mask.shape[1] else v[chosen])
                for name, v in inputs.items()
            }
            yield chosen.cpu(), part


def finds_last_token(model: torch.nn.Module) -> bool:
    """Tell whether the head answers at the last token, which it finds by the config's padding token."""
    return "pad_token_id" in inspect.getsource(inspect.unwrap(type(model).forward))
