"""Text and images into examples, through `datasets`: where the data lies, which columns, how it is cut."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from lrsurgery.errors import DataError
from lrsurgery.tasks import IGNORED

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
TEXT_COLUMNS = ("text", "content", "sentence", "document")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
MASKED_SHARE = 0.15  # of tokens, as BERT
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("validation", "valid", "dev", "test")


def open_data(
    reference: str, *, subset: str | None = None, split: str | None = None, streaming: bool = False,
    prefer: Sequence[str] = TRAIN_SPLITS,
) -> Any:  # fmt: skip
    """The rows of a file, a glob, a folder (of files, of images, or saved by `datasets`) or a hub dataset.

    Without `split`, the first of `prefer` that there is, or the only one. Raises DataError.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        found = _open(reference, subset, streaming)
    except DataError:
        raise
    except Exception as e:  # the readers of `datasets` raise anything; whatever it is, it is about this data
        cause = e.__cause__ or e
        raise DataError(f"{reference}: cannot be read as a dataset ({' '.join(str(cause).split())[:300]})") from e
    if isinstance(found, datasets.DatasetDict | datasets.IterableDatasetDict):
        names = list(found)
        if split is None:
            split = next((name for name in prefer if name in names), names[0] if len(names) == 1 else None)
        if split not in names:
            wanted = f"no split '{split}'" if split else "several splits"
            raise DataError(f"{reference}: {wanted} among {', '.join(map(str, names))}; name one with --split")
        found = found[split]
    if not streaming and len(found) == 0:
        raise DataError(f"{reference}: is empty")
    return found


def _open(reference: str, subset: str | None, streaming: bool) -> Any:
    import datasets

    path = Path(reference).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded.to_iterable_dataset() if streaming and isinstance(loaded, datasets.Dataset) else loaded
        if not any(path.iterdir()):
            raise DataError(f"{reference}: is empty")
        return datasets.load_dataset(str(path), subset, streaming=streaming)
    files = [path] if path.is_file() else _matching(reference)
    if not files:
        if reference.startswith((".", "/", "~")) or path.suffix in FORMATS or reference.count("/") > 1:
            raise DataError(f"{reference}: no such file or folder")
        return datasets.load_dataset(reference, subset, streaming=streaming)
    kind = FORMATS.get(files[0].suffix)
    if kind is None:
        raise DataError(f"{reference}: not a data file; known endings: {', '.join(FORMATS)}")
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{reference}: is empty")
    options: dict[str, Any] = {}
    if kind == "text":
        # a whole file is one document, so that its tokens are those of its text; too large to hold, it goes by lines
        options = {"keep_linebreaks": True, "sample_by": "line" if streaming else "document"}
    elif files[0].suffix == ".tsv":
        options = {"delimiter": "\t"}
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)


def _matching(pattern: str) -> list[Path]:
    names = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return sorted(Path(name) for name in names if Path(name).is_file())


def digest_of(reference: str | None, split: str | None, subset: str | None) -> str:
    """A fingerprint of the data, to tell on resuming whether it is still the same; None for data that is not given."""
    if reference is None:
        return fingerprint([], f"none {split} {subset}")
    path = Path(reference).expanduser()
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    files = files or _matching(reference)
    return fingerprint(files, f"{'' if files else reference} {split} {subset}")


def fingerprint(files: Sequence[Path], text: str = "") -> str:
    """Of files: their names, sizes, first and last megabytes."""
    hasher = hashlib.blake2b(text.encode(), digest_size=16)
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            hasher.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            hasher.update(handle.read())
    return hasher.hexdigest()


def pick_column(rows: Any, asked: str | None, usual: Sequence[str], what: str, reference: str) -> str:
    """The column to read. Raises DataError that lists the columns there are."""
    names = list(rows.column_names or next(iter(rows)).keys())
    if asked is not None:
        if asked not in names:
            raise DataError(f"{reference}: no column '{asked}'; it has {', '.join(names)}")
        return asked
    for name in usual:
        if name in names:
            return name
    raise DataError(f"{reference}: which column holds the {what}? It has {', '.join(names)}; say --{what}-column")


def load_tokenizer(source: Any, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, with a padding token. Raises DataError where it has none."""
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


def encode(rows: Any, tokenizer: Any, column: str | None, reference: str) -> Any:
    """Rows with `input_ids` alone: tokens of each document, an end-of-text token after it where there is one.

    Tokens spelled out in the text are recognised, none are added within a document. Rows that carry `input_ids` and no
    text column were tokenised before and stay as they are.
    """
    names = list(rows.column_names or next(iter(rows)).keys())
    if column is None and "input_ids" in names:
        return rows.select_columns(["input_ids"])
    text = pick_column(rows, column, TEXT_COLUMNS, "text", reference)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = batch[text]
        for entry in texts:
            if not isinstance(entry, str):
                raise DataError(f"{reference}: column '{text}' holds {type(entry).__name__}, not text")
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [row + end for row in ids]}

    return rows.map(tokenise, batched=True, remove_columns=names)


class TokenStream:
    """All tokens of encoded rows as one stream, read from the memory-mapped table; (start, stop) -> tokens."""

    def __init__(self, rows: Any, end: int | None) -> None:
        column = rows.flatten_indices().data.column("input_ids")
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        total = int(self._starts[-1])
        # the token that ends the last document has no document after it
        self.largest = max((int(chunk.max()) for chunk in self._chunks if len(chunk)), default=0)
        self.length = total - (1 if total and end is not None and self._chunks[-1][-1] == end else 0)

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> torch.Tensor:
        pieces = []
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            offset = start - int(self._starts[index])
            piece = self._chunks[index][offset : offset + stop - start]
            pieces.append(piece)
            start, index = start + len(piece), index + 1
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


@dataclass(frozen=True)
class Masking:
    """BERT's noise for masked language models: which token masks, how large the vocabulary, what is never masked."""

    mask: int
    vocabulary: int
    special: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Any, reference: str) -> Masking:
        if tokenizer.mask_token_id is None:
            raise DataError(f"{reference}: its tokenizer has no mask token, which masked-lm needs")
        around = tokenizer("")["input_ids"]
        half = (len(around) + 1) // 2
        special = tuple(tokenizer.all_special_ids)
        return Masking(tokenizer.mask_token_id, len(tokenizer), special, tuple(around[:half]), tuple(around[half:]))

    @property
    def added(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def __call__(self, ids: torch.Tensor, seed: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """15% of the tokens to be told, of them 80% masked and 10% replaced (Devlin et al. 2019, section 3.1)."""
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
    """One seed of several numbers: the same on every machine, whatever was drawn before."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of `size` tokens of a stream, one every `stride` tokens, the remainder left out: for training."""

    def __init__(self, stream: TokenStream, size: int, stride: int, seed: int, masking: Masking | None) -> None:
        self._stream, self._stride, self._masking, self._seed, self._epoch = stream, stride, masking, seed, 0
        self._size = size - (masking.added if masking else 0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return max(0, (len(self._stream) - self._size) // self._stride + 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._stream.read(index * self._stride, index * self._stride + self._size)
        if self._masking is not None:
            # by place and epoch, so that a resumed run masks as the uninterrupted one does
            return self._masking(ids, (self._seed, self._epoch, index))
        return {"input_ids": ids, "labels": ids.clone()}


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows that slide by `stride` over a stream, each token scored once, the last window shorter: for evaluation.

    With stride = size they do not overlap; smaller strides give each token at least size - stride tokens before it.
    """

    def __init__(self, stream: TokenStream, size: int, stride: int, masking: Masking | None) -> None:
        self._stream, self._masking = stream, masking
        self._size = size - (masking.added if masking else 0)
        self._stride = min(stride, self._size)

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self._stream) - self._size) // self._stride))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._stride
        ids = self._stream.read(start, min(start + self._size, len(self._stream)))
        if self._masking is not None:
            return self._masking(ids, (0, 0, index))
        labels = ids.clone()
        if index:
            labels[: self._size - self._stride] = IGNORED
        return {"input_ids": ids, "labels": labels}


class StreamedBlocks(IterableDataset[dict[str, torch.Tensor]]):
    """Blocks packed from rows as they come, shuffled in a buffer of rows: for text too large to hold."""

    def __init__(self, rows: Any, size: int, seed: int, masking: Masking | None) -> None:
        self._rows = rows.shuffle(seed=seed, buffer_size=10_000)
        self._masking, self._seed, self._epoch = masking, seed, 0
        self._size = size - (masking.added if masking else 0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
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


def read_labels(rows: Any, column: str, reference: str) -> tuple[list[str], list[int]]:
    """Class names, and each row's class: from a ClassLabel column, from numbers, or from texts in alphabetical order.

    Raises DataError.
    """
    import datasets

    feature = rows.features[column]
    values = rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), [int(v) for v in values]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        if min(values) < 0:
            raise DataError(f"{reference}: column '{column}' holds {min(values)}; classes are numbered from 0")
        return [str(i) for i in range(max(values) + 1)], list(values)
    if all(isinstance(v, str) for v in values):
        names = sorted(set(values))
        place = {name: i for i, name in enumerate(names)}
        return names, [place[v] for v in values]
    raise DataError(f"{reference}: column '{column}' holds neither class numbers nor class names throughout")


def match_labels(
    names: list[str], labels: list[int], head: list[str], reference: str, *, hint: str = "--new-head"
) -> list[int]:
    """Each row's class in the head's numbering: by name where the head knows the names, else by number.

    Raises DataError where they do not fit.
    """
    place = {name: i for i, name in enumerate(head)}
    if set(names) <= set(head):
        return [place[names[label]] for label in labels]
    if max(labels) >= len(head):
        raise DataError(
            f"{reference}: has {len(names)} classes, the model's head {len(head)}; {hint} makes a head for these"
        )
    return labels


class Classified(Dataset[dict[str, Any]]):
    """Sentences or sentence pairs with their classes, tokenised when they are read; padded by the collator."""

    def __init__(self, rows: Any, columns: Sequence[str], labels: Sequence[int], tokenizer: Any, size: int) -> None:
        self._rows, self._columns, self._labels = rows.select_columns(list(columns)), columns, labels
        self._tokenizer, self._size = tokenizer, size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[int(index)]
        encoded = self._tokenizer(*(row[c] for c in self._columns), truncation=True, max_length=self._size)
        return {**encoded, "labels": self._labels[index]}
