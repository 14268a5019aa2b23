"""Files of text and tables as `datasets` reads them right: heading and rows, byte order marks, odd paths, pieces."""

from __future__ import annotations

import codecs
import csv
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsurgery.errors import DataError
from lrsurgery.files.digests import fingerprint
from lrsurgery.files.marks import half_of
from lrsurgery.runtime import cache_folder

if TYPE_CHECKING:
    from datasets import IterableDataset

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that may follow those of data files
# what pandas takes for an entry that is missing
NOTHING: tuple[str, ...] = (
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
)
NOTHING += ("NA", "NULL", "NaN", "None", "n/a", "nan", "null")
PIECE = 1 << 16  # characters of a piece of streamed text, which ends with a line


def table_options(files: Sequence[Path], delimiter: str, texts: Sequence[str]) -> dict[str, Any]:
    """How to read tables of one form, in which columns of these names hold texts.

    Raises DataError for a file whose first row is longer than its heading.
    """
    columns: list[str] = []
    for file in files:
        columns, row = _heading(file, delimiter)
        if len(row) > len(columns):  # pandas would take the first of its fields for the names of rows
            raise DataError(
                f"{file}: its first row has {len(row)} fields and its heading {len(columns)}; put a text that holds a"
                f" {'comma' if delimiter == ',' else 'tab'} in quotes"
            )
    # words such as "None" and "NA" stand for nothing in a column of texts, and can be classes in another
    missing = {name: list(NOTHING) if name in texts else [""] for name in columns}
    return {"delimiter": delimiter, "keep_default_na": False, "na_values": missing}


def _heading(file: Path, delimiter: str) -> tuple[list[str], list[str]]:
    """The first two rows that are not blank."""
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="") as handle:
        try:
            rows = (row for row in csv.reader(handle, delimiter=delimiter) if row)
            return next(rows, []), next(rows, [])
        except (csv.Error, UnicodeError) as e:
            raise DataError(f"{file}: cannot be read as a table ({e})") from e


def without_mark(file: Path) -> Path:
    """The file, or in place of one that is compressed and begins with a byte order mark a plain copy without it.

    `datasets` takes the mark off of plain files alone.
    """
    import fsspec

    if not file.name.lower().endswith(COMPRESSED):
        return file
    with fsspec.open(str(file), "rb", compression="infer") as handle:
        if handle.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            return file
        copy: Path = cache_folder() / "plain" / fingerprint([file], "") / file.name[: file.name.rindex(".")]
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with (half := half_of(copy)).open("wb") as written:
                shutil.copyfileobj(handle, written)
            half.replace(copy)
    return copy


def plain_path(file: Path) -> str:
    """The absolute path of a file, through a link where `datasets` would read the path as one into an archive."""
    path = file.absolute()
    folder = next((p for p in reversed(path.parents) if "::" in p.name), path if "::" in path.name else None)
    if folder is None:
        return str(path)
    link = cache_folder() / "links" / hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    if folder == path:
        link = link.with_name(link.name + "".join(path.suffixes))
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(folder)
    return str(link / path.relative_to(folder) if folder != path else link)


def stream_text(files: Sequence[Path]) -> IterableDataset:
    """Rows of text that are pieces of documents; `ends` marks the last piece of each."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "ends": datasets.Value("bool")})
    return datasets.IterableDataset.from_generator(_pieces, features=features, gen_kwargs={"files": list(files)})


def _pieces(files: Sequence[Path]) -> Iterator[Mapping[str, object]]:
    import fsspec

    for file in files:
        with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig") as handle:
            held = ""
            while piece := handle.read(PIECE):
                piece += handle.readline()
                if held:
                    yield {"text": held, "ends": False}
                held = piece
            if held:
                yield {"text": held, "ends": True}
