"""Datasets as the user names them: files, globs, folders and hub datasets, through `datasets`; and their columns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lrsurgery.errors import DataError
from lrsurgery.files import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Table: TypeAlias = Dataset | IterableDataset
    Splits: TypeAlias = DatasetDict | IterableDatasetDict

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
TEXT_COLUMNS = ("text", "content", "sentence", "document")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("validation", "valid", "dev", "test")


def open_data(
    reference: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    prefer: Sequence[str] = TRAIN_SPLITS,
) -> Table:
    """Open a file, a glob, a folder (of data files, of images, or saved by `datasets`) or a hub dataset.

    Without `split`, the first split of `prefer` that exists is taken, or the only one. Raises DataError.
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


def _open(reference: str, subset: str | None, streaming: bool) -> Table | Splits:
    import datasets

    path = Path(reference).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded.to_iterable_dataset() if streaming and isinstance(loaded, datasets.Dataset) else loaded
        if not any(path.iterdir()):
            raise DataError(f"{reference}: is empty")
        return datasets.load_dataset(str(path), subset, streaming=streaming)
    files = [path] if path.is_file() else _match(reference)
    if not files:
        if reference.startswith((".", "/", "~")) or path.suffix in FORMATS or reference.count("/") > 1:
            raise DataError(f"{reference}: no such file or folder")
        return datasets.load_dataset(reference, subset, streaming=streaming)
    kind = FORMATS.get(files[0].suffix)
    if kind is None:
        raise DataError(f"{reference}: not a data file; known endings: {', '.join(FORMATS)}")
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{reference}: is empty")
    options: dict[str, str | bool] = {}
    if kind == "text":
        # a whole file is one document, so that its tokens are those of its text; too large to hold, it goes by lines
        options = {"keep_linebreaks": True, "sample_by": "line" if streaming else "document"}
    elif files[0].suffix == ".tsv":
        options = {"delimiter": "\t"}
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)


def _match(pattern: str) -> list[Path]:
    names = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return sorted(Path(name) for name in names if Path(name).is_file())


def digest_of(reference: str | None, split: str | None, subset: str | None) -> str:
    """Fingerprint the data's files and the split, so that a resumed job notices a change; None stands for no data."""
    if reference is None:
        return fingerprint([], f"none {split} {subset}")
    path = Path(reference).expanduser()
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    files = files or _match(reference)
    return fingerprint(files, f"{'' if files else reference} {split} {subset}")


def column_names(rows: Table) -> list[str]:
    """List the columns, of a stream those of its first row."""
    return list(rows.column_names or next(iter(rows)).keys())


def pick_column(rows: Table, asked: str | None, usual: Sequence[str], what: str, reference: str) -> str:
    """Choose the column to read: the one asked for, else the first of the usual names.

    Raises DataError that lists the columns.
    """
    names = column_names(rows)
    if asked is not None:
        if asked not in names:
            raise DataError(f"{reference}: no column '{asked}'; it has {', '.join(names)}")
        return asked
    for name in usual:
        if name in names:
            return name
    raise DataError(f"{reference}: which column holds the {what}? It has {', '.join(names)}; say --{what}-column")
