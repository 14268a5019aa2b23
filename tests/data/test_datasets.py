"""Opening data: every format gives the same tokens, and a change of the files is noticed."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from support import tiny

from lrsurgery.data.datasets import (
    EVAL_SPLITS,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    column_names,
    digest_of,
    open_data,
    pick_column,
)
from lrsurgery.data.text import encode
from lrsurgery.errors import DataError

TEXTS = ["one row of text,\nwith a comma", "another row", 'a "third" one']


def save(kind: str, folder: Path) -> str:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    if kind == "jsonl":
        rows.to_json(folder / "rows.jsonl")
    elif kind == "csv":
        rows.to_csv(folder / "rows.csv")
    elif kind == "parquet":
        rows.to_parquet(folder / "rows.parquet")
    elif kind == "saved":
        rows.save_to_disk(folder / "rows")
        return str(folder / "rows")
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "rows")
        return str(folder / "rows")
    elif kind == "glob":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
        return str(folder / "*.txt")
    elif kind == "folder":
        rows.to_parquet(folder / "train.parquet")
        return str(folder)
    return str(folder / f"rows.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "saved splits", "glob", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_tokens(tmp_path: Path, kind: str, streaming: bool) -> None:
    if kind == "glob" and streaming:
        pytest.skip("streamed text goes line by line")
    tokenizer = tiny.tokenizer()
    rows = open_data(save(kind, tmp_path), streaming=streaming)
    found = [row["input_ids"] for row in encode(rows, tokenizer, None, "rows")]
    wanted = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    assert found == wanted


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    text = "a\n\n  b\nc\n\n"
    (tmp_path / "t.txt").write_bytes(text.encode())
    rows = open_data(str(tmp_path / "t.txt"))
    assert rows["text"][:] == [text]


def test_a_fingerprint_notices_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.txt"
    file.write_text("abc")
    before = digest_of(str(file), None, None)
    assert digest_of(str(file), None, None) == before
    assert digest_of(str(file), "train", None) != before
    monkeypatch.chdir(tmp_path)
    none = digest_of(None, None, None)
    (tmp_path / "other.txt").write_text("a file beside it")
    assert digest_of(None, None, None) == none  # what lies in the current folder is no data
    file.write_text("abd")
    assert digest_of(str(file), None, None) != before


def test_the_first_preferred_split_is_taken(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("other", "test", "validation", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    del splits["train"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "held out")
    place = str(tmp_path / "all")
    assert open_data(place)["text"][:] == ["train"]
    assert open_data(place, prefer=EVAL_SPLITS)["text"][:] == ["validation"]
    assert open_data(place, split="other")["text"][:] == ["other"]
    with pytest.raises(DataError, match="several splits among other, test, validation; name one with --split"):
        open_data(str(tmp_path / "held out"))
    with pytest.raises(DataError, match="no split 'best' among other, test, validation, train"):
        open_data(place, split="best")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file or folder"),
        ("empty.txt", "", "is empty"),
        ("notes.docx", "words", r"not a data file; known endings: \.txt, "),
        ("torn.jsonl", '{"text": "a"\n{', "cannot be read as a dataset"),
    ],
    ids=["absent", "empty", "unknown ending", "damaged"],
)
def test_a_file_that_holds_no_data_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        open_data(str(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_a_column_is_asked_for_or_usual(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.csv").write_text("words,content,text\na,b,c\n")
    rows = open_data(str(tmp_path / "rows.csv"), streaming=streaming)
    assert column_names(rows) == ["words", "content", "text"]
    assert pick_column(rows, None, TEXT_COLUMNS, "text", "rows") == "text"
    assert pick_column(rows, "words", TEXT_COLUMNS, "text", "rows") == "words"
    with pytest.raises(DataError, match="rows: no column 'lines'; it has words, content, text"):
        pick_column(rows, "lines", TEXT_COLUMNS, "text", "rows")
    with pytest.raises(DataError, match=r"rows: which column holds the label.* say --label-column"):
        pick_column(rows, None, LABEL_COLUMNS, "label", "rows")
