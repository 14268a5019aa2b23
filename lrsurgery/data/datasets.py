"""Datasets as the user names them: files, globs, folders and hub datasets, through `datasets`; and their columns."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from lrsurgery.data.text.files import COMPRESSED, plain_path, stream_text, table_options, without_mark
from lrsurgery.errors import DataError
from lrsurgery.files.digests import fingerprint
from lrsurgery.text import expanded

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Table: TypeAlias = Dataset | IterableDataset
    Splits: TypeAlias = DatasetDict | IterableDatasetDict

# ending -> what reads it
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
TEXT_COLUMNS = ("text", "content", "sentence", "document", "page")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SAME_SPLITS = (TRAIN_SPLITS, EVAL_SPLITS[:4], EVAL_SPLITS[4:])  # names of one split
ALL = "all"  # --split of every split together
WHOLE = "whole"  # what `datasets` calls the only split of files that have none
# what folders of data hold besides data
ABOUT_DATA = re.compile(r"readme\.md|licen[cs]e(\.\w+)?|dataset_?infos?\.json", re.IGNORECASE)
HASHED = 1024  # megabytes of a file up to which all of it is hashed


def open_data(
    reference: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    prefer: Sequence[str] = TRAIN_SPLITS,
    lines: bool = False,
) -> Table:
    """Open a file, a glob, a folder (of data files, of images, or saved by `datasets`) or a hub dataset.

    The splits of a folder are its top folders, if all of them have names of splits; names of files and of classes
    decide nothing. Without `split`, the first split of `prefer` that exists is taken, or the only one. A file of text
    is one document, or with `lines` one row for each line that is not blank. Raises DataError.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # of an error it logs a line of its own, too
    if not reference.strip():
        raise DataError("the data has no name; write a file, a folder or a hub dataset")
    try:
        found = _open(reference, subset, split, streaming, prefer, lines)
        if isinstance(found, datasets.DatasetDict | datasets.IterableDatasetDict):
            if split == ALL:
                found = datasets.concatenate_datasets(list(found.values()))
            else:
                found = found[choose_split(list(map(str, found)), split, prefer, reference)]
    except DataError:
        raise
    except Exception as e:  # the readers of `datasets` raise anything; whatever it is, it is about this data
        cause = e.__cause__ or e
        raise DataError(f"{reference}: cannot be read as a dataset ({' '.join(str(cause).split())[:300]})") from e
    if not streaming and len(found) == 0:
        raise DataError(f"{reference}: is empty")
    return found


def documents_of(texts: Sequence[str]) -> Dataset:
    """Make a dataset of texts in memory, each a document."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"text": list(texts)})


def _is_written(text: str) -> bool:
    return bool(text.strip())


def choose_split(names: Sequence[str], asked: str | None, prefer: Sequence[str], reference: str) -> str:
    """Choose a split: the one asked for, under any of its names, else the first preferred one or the only one."""
    if asked is not None:
        wanted, only = [asked, *next((known for known in SAME_SPLITS if asked in known), ())], None
    else:
        wanted, only = list(prefer), names[0] if len(names) == 1 else None
    usual = {_usual(name): name for name in reversed(names)}
    chosen = next((name if name in names else usual[name] for name in wanted if name in names or name in usual), only)
    if chosen is None:
        missing = f"no split '{asked}'" if asked else "several splits"
        raise DataError(f"{reference}: {missing} among {', '.join(names)}; name one with --split")
    return chosen


def _open(
    reference: str, subset: str | None, split: str | None, streaming: bool, prefer: Sequence[str], lines: bool
) -> Table | Splits:
    import datasets

    path = expanded(reference)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded.to_iterable_dataset() if streaming and isinstance(loaded, datasets.Dataset) else loaded
        if not any(path.iterdir()):
            raise DataError(f"{reference}: is empty")
        if subset is None and not _declares(path):
            name, root, files = _files_of(path, split, prefer, reference)
            if files:
                return _read(files, name, reference, streaming, lines, root, every=split == ALL)
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / digest_of(reference, None, None))
        return datasets.load_dataset(str(path), subset, streaming=streaming, cache_dir=cache)
    files = [path] if path.is_file() else _match(reference)
    if not files:
        if reference.startswith((".", "/", "~")) or format_of(path) or reference.count("/") > 1:
            raise DataError(f"{reference}: no such file or folder")
        if glob.has_magic(reference):
            raise DataError(f"{reference}: no file has such a name")
        return datasets.load_dataset(reference, subset, streaming=streaming)
    for file in files:
        if format_of(file) is None:
            raise DataError(f"{file}: not a data file; known endings: {', '.join(FORMATS)}")
    if split not in (None, ALL, *TRAIN_SPLITS):
        raise DataError(f"{reference}: a file has no splits, and --split asks for {split}; leave it out")
    return _read(files, WHOLE, reference, streaming, lines, None)


def format_of(file: PurePath) -> str | None:
    """Name what reads a file by its ending, in any case and compressed or not; None for other files."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(PurePath(name).suffix)


def _is_image(file: PurePath) -> bool:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return file.suffix.lower() in ImageFolder.EXTENSIONS


def _declares(folder: Path) -> bool:
    """Whether the folder's README.md says which files are which split, as those of the hub do."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    return len(head) == 3 and not head[0].strip() and re.search(r"^configs:", head[1], re.MULTILINE) is not None


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _files_of(folder: Path, split: str | None, prefer: Sequence[str], reference: str) -> tuple[str, Path, list[Path]]:
    """The split of a folder to read, where it is, and its data files, sorted: none if none is of a known kind."""
    tops = sorted(f.name for f in folder.iterdir() if f.is_dir() and not _hidden(f.name))
    named = [name for name in tops if _split_of(name) is not None]
    whole = split == ALL
    if named and not whole and (len(named) == len(tops) or _has(split, named)):
        name = choose_split(named, split, prefer, reference)
        return name, folder / name, _data_files(folder / name)
    if not whole and split is None and len({_split_of(name) for name in named}) > 1:
        raise DataError(
            f"{reference}: {', '.join(named)} look like splits and other folders beside them do not; name one with"
            " --split, or all with --split all"
        )
    files = _data_files(folder)
    tables = [file for file in files if not _is_image(file)]
    if split is not None and not whole:
        asked = [file for file in tables if _stem(file) == split or _has(split, [_stem(file)])]
        if not asked and split not in TRAIN_SPLITS:
            raise DataError(f"{reference}: has no folder '{split}' and no file of that name, which --split asks for")
        return (split, folder, asked) if asked else (WHOLE, folder, files)
    alike = [file for file in tables if _split_of(_stem(file)) is not None]
    if not whole and len({_split_of(_stem(file)) for file in alike}) > 1:
        names = ", ".join(file.name for file in alike[:4])
        raise DataError(f"{reference}: {names} look like splits; name one with --split, or all with --split all")
    return WHOLE, folder, files


def _has(split: str | None, names: Sequence[str]) -> bool:
    same = None if split is None else _split_of(split)
    return same is not None and any(_split_of(name) == same for name in names)


def _split_of(name: str) -> str | None:
    """The usual name of a split; None for what names no split."""
    return next((known[0] for known in SAME_SPLITS if _usual(name) in known), None)


def _usual(name: str) -> str:
    """A name without case and year: Train, val2017."""
    return re.sub("(?:19|20)[0-9]{2}$", "", name.lower())


def _stem(file: Path) -> str:
    """The name of a file without endings and without the numbers of a shard (train-00000-of-00002)."""
    return re.sub(r"-\d+-of-\d+(-\w+)?$", "", file.name.split(".")[0])


def _data_files(folder: Path) -> list[Path]:
    found = []
    for file in files_in(folder):
        parts = file.relative_to(folder).parts
        known = format_of(file) is not None or _is_image(file)
        if known and not any(map(_hidden, parts)) and not ABOUT_DATA.fullmatch(file.name):
            found.append(file)
    return found


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder, sorted; links to folders are followed, as subsets of image folders are made of them."""
    found: list[Path] = []
    above: dict[str, frozenset[str]] = {str(folder): frozenset()}  # folder -> the real folders that it lies in
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in above[place]:  # a link to a folder that it lies in
            inner.clear()
            continue
        above |= {os.path.join(place, name): above[place] | {real} for name in inner}
        found += [file for name in names if (file := Path(place, name)).is_file()]
    return sorted(found)


def _read(
    files: Sequence[Path],
    name: str,
    reference: str,
    streaming: bool,
    lines: bool,
    root: Path | None,
    *,
    every: bool = False,
) -> Table:
    """Read data files of one kind as the split `name`; those of a folder `root`, of `every` split, may be images."""
    import datasets
    from datasets.data_files import DataFilesList

    options: dict[str, Any] = {}
    classes: list[str] = []
    kinds = {format_of(file) for file in files if not _is_image(file)}
    if root is not None and any(map(_is_image, files)):
        kind, metadata = "imagefolder", [f for f in files if f.stem == "metadata" and not _is_image(f)]
        files = [*filter(_is_image, files), *metadata]
        depths = {len(file.relative_to(root).parts) for file in files}
        # classes are the names of folders, where all images lie in one
        options["drop_labels"] = None if metadata else len(depths) > 1 or depths == {1}
        if options["drop_labels"] is False:
            classes = _classes_above(files, root, every)
            options["drop_labels"] = bool(classes)
        digest = fingerprint(metadata, reference, pieces=HASHED)
    elif len(kinds) > 1:
        held = ", ".join(sorted(str(k) for k in kinds))
        raise DataError(f"{reference}: holds files of several kinds ({held}); name those to read, as in 'f/*.jsonl'")
    else:
        kind = str(next(iter(kinds)))
        if all(file.stat().st_size == 0 for file in files):
            raise DataError(f"{reference}: is empty")
        if kind == "text":
            if streaming and not lines:
                return stream_text(files)
            # a whole file is one document, so that its tokens are those of its text
            options |= {"keep_linebreaks": not lines, "sample_by": "line" if lines else "document"}
        if kind in ("csv", "tsv"):
            options |= table_options(files, "\t" if kind == "tsv" else ",", TEXT_COLUMNS)
            kind = "csv"
        if kind != "parquet":
            options["encoding"] = "utf-8-sig"  # without the mark that some editors put first
            files = [without_mark(file) for file in files]
        digest = "" if streaming else fingerprint(files, pieces=HASHED)
    # what is in the files decides whether a cache holds, and not their dates
    listed = DataFilesList([plain_path(file) for file in files], [(digest,)])
    split = name if re.fullmatch(r"\w+(\.\w+)*", name) and name != ALL else WHOLE
    rows = datasets.load_dataset(kind, data_files={split: listed}, split=split, streaming=streaming, **options)
    if classes:
        label = datasets.ClassLabel(names=sorted(set(classes)))
        return rows.add_column("label", label.str2int(classes), feature=label)
    return rows.filter(_is_written, input_columns="text") if kind == "text" and lines else rows


def _classes_above(files: Sequence[Path], root: Path, every: bool) -> list[str]:
    """Name each image's class by its top folder if the folders of several share a name (CLASS/images); else nothing."""
    parts = [file.relative_to(root).parts[:-1] for file in files]
    parts = [p[1:] if every and len(p) > 1 and _split_of(p[0]) else p for p in parts]
    return [p[0] for p in parts] if len(set(parts)) > len({p[-1] for p in parts}) else []


def _match(pattern: str) -> list[Path]:
    names = glob.glob(str(expanded(pattern)), recursive=True)
    return sorted(Path(name) for name in names if Path(name).is_file())


def digest_of(reference: str | None, split: str | None, subset: str | None) -> str:
    """Fingerprint the data's files and the split, so that a resumed job notices a change; None stands for no data."""
    if reference is None:
        return fingerprint([], f"none {split} {subset}")
    path = expanded(reference)
    files = files_in(path) if path.is_dir() else [path] if path.is_file() else []
    files = files or _match(reference)
    return fingerprint(files, f"{'' if files else reference} {split} {subset}", pieces=HASHED)


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
