"""Opening data: every format gives the same tokens, and a change of the files is noticed."""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from support import tiny

from lrsurgery.data.datasets import (
    EVAL_SPLITS,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    TRAIN_SPLITS,
    column_names,
    digest_of,
    open_data,
    pick_column,
)
from lrsurgery.data.text.tokens import encode
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


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        place = folder / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        (place.with_suffix(".txt")).write_text(text)
    return folder


def texts_of(reference: Path | str, **options: Any) -> list[str]:
    found: list[str] = open_data(str(reference), **options)["text"][:]
    return found


def test_a_folder_of_text_is_its_files_whole_whatever_their_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", a="one\ntwo\n", b="three\n\n", sub__c="four", my_test="five", README="six")
    (folder / "README.md").write_text("about the texts")
    (folder / ".hidden.txt").write_text("hidden")
    wanted = ["six", "one\ntwo\n", "three\n\n", "five", "four"]
    assert texts_of(folder) == wanted
    assert texts_of(folder, prefer=EVAL_SPLITS) == wanted
    assert texts_of(folder, split="my_test") == ["five"]
    with pytest.raises(DataError, match=r"has no folder 'dev' and no file of that name, which --split asks for"):
        open_data(str(folder), split="dev")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"holds files of several kinds \(json, text\); name those to read"):
        open_data(str(folder))
    assert texts_of(f"{folder}/*.jsonl") == ["a"]


def test_text_is_read_compressed_in_capitals_and_after_a_byte_order_mark(tmp_path: Path) -> None:
    text = "früh\nund spät\n"
    (tmp_path / "a.TXT").write_text(text, encoding="utf-8-sig")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.bz2").write_bytes(bz2.compress(text.encode()))
    assert texts_of(tmp_path) == [text] * 3
    assert texts_of(tmp_path / "b.txt.gz") == [text]
    streamed = list(open_data(str(tmp_path), streaming=True))
    assert streamed == [{"text": text, "ends": True}] * 3
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text('{"text": "ä"}\n', encoding="utf-8-sig")
    (rows / "b.JSONL.gz").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    assert texts_of(rows) == ["ä", "b"]
    (tmp_path / "rows.csv").write_text("text,label\nä,1\n", encoding="utf-8-sig")
    assert texts_of(tmp_path / "rows.csv") == ["ä"]


def test_streamed_text_is_whole_and_says_where_a_document_ends(tmp_path: Path) -> None:
    documents = ["".join(f"line {i} of {name}\n" for i in range(9_000)) for name in "ab"]
    write(tmp_path, a=documents[0], b=documents[1])
    rows = list(open_data(str(tmp_path), streaming=True))
    assert len(rows) > 4
    found, held = [], ""
    for row in rows:
        held += row["text"]
        assert held.endswith("\n")
        if row["ends"]:
            found.append(held)
            held = ""
    assert found == documents


def test_splits_are_the_top_folders_where_all_have_names_of_splits(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", train__a="train", valid__a="valid", test__train="test")
    assert texts_of(folder) == ["train"]
    assert texts_of(folder, prefer=EVAL_SPLITS) == texts_of(folder, split="validation") == ["valid"]
    assert texts_of(folder, split="test") == ["test"]
    assert sorted(texts_of(folder, split="all")) == ["test", "train", "valid"]
    with pytest.raises(DataError, match="no split 'best' among test, train, valid; name one with --split"):
        open_data(str(folder), split="best")
    other = write(tmp_path / "g", train__a="train", test__a="test", notes__a="notes")
    with pytest.raises(DataError, match="test, train look like splits and other folders beside them do not"):
        open_data(str(other))
    assert texts_of(other, split="train") == ["train"]


def test_files_with_names_of_several_splits_have_to_be_chosen_from(tmp_path: Path) -> None:
    write(tmp_path, train="train", valid="valid")
    with pytest.raises(DataError, match=r"train\.txt, valid\.txt look like splits; name one with --split"):
        open_data(str(tmp_path))
    assert texts_of(tmp_path, split="validation") == ["valid"]
    assert texts_of(tmp_path, split="all") == ["train", "valid"]
    with pytest.raises(DataError, match="a file has no splits, and --split asks for test"):
        open_data(str(tmp_path / "valid.txt"), split="test")


@pytest.mark.parametrize("name", ["train", "bird"])
def test_a_class_of_images_may_be_called_train(tmp_path: Path, name: str) -> None:
    tiny.write_images(tmp_path / "images", count=2, classes=2)
    (tmp_path / "images" / "class0").rename(tmp_path / "images" / name)
    rows = open_data(str(tmp_path / "images"))
    assert rows.features["label"].names == sorted([name, "class1"])
    assert len(rows) == 4
    for split in ("train", "validation"):
        shutil.copytree(tmp_path / "images", tmp_path / "splits" / split)
    assert len(open_data(str(tmp_path / "splits"))) == 4
    assert open_data(str(tmp_path / "splits"), split="validation").features["label"].names == sorted([name, "class1"])


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images", count=2, classes=2)
    (tmp_path / "images" / "class0").rename(tmp_path / "images" / "train")
    (tmp_path / "images" / "class1").rename(tmp_path / "images" / "test")
    for prefer in (TRAIN_SPLITS, EVAL_SPLITS):
        rows = open_data(str(tmp_path / "images"), prefer=prefer)
        assert column_names(rows) == ["image"]
        assert len(rows) == 2


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_what_is_in_a_file_decides_and_not_its_date(tmp_path: Path, ending: str, inside: bool) -> None:
    file = tmp_path / "f" / f"a.{ending}"
    file.parent.mkdir()
    for text in ("one", "two"):
        if ending == "parquet":
            datasets.Dataset.from_dict({"text": [text]}).to_parquet(file)
        elif ending == "jsonl":
            file.write_text(f'{{"text": "{text}"}}\n')
        else:
            file.write_bytes(gzip.compress(text.encode(), mtime=0) if "gz" in ending else text.encode())
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert texts_of(file.parent if inside else file) == [text]


def test_a_fingerprint_reads_the_middle_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    content = bytearray(b"a" * (5 << 20))
    file.write_bytes(content)
    before = digest_of(str(file), None, None)
    content[len(content) // 2] = ord("b")
    file.write_bytes(content)
    assert digest_of(str(file), None, None) != before


@pytest.mark.parametrize("name", ["a [v1]", "dou::ble", "per%20cent"])
def test_odd_paths_are_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, a="text")
    assert texts_of(tmp_path / name / "a.txt") == texts_of(tmp_path / name) == ["text"]
    tiny.write_images(tmp_path / name / "images", count=1, classes=2)
    assert open_data(str(tmp_path / name / "images"))[0]["image"].size == (16, 16)


def test_lines_are_the_rows_of_text_for_sentences(tmp_path: Path) -> None:
    write(tmp_path, a="one sentence\n\n  \nanother\n")
    assert texts_of(tmp_path / "a.txt", lines=True) == ["one sentence", "another"]
