"""Opening data: every format gives the same tokens, and a change of the files is noticed."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from support import tiny

from lrsurgery.data.datasets import digest_of, open_data
from lrsurgery.data.text import encode

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
