"""Data into examples: every format gives the same tokens, every window scores each token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from lrsurgery.data.datasets import (
    Blocks,
    Masking,
    StreamedBlocks,
    TokenStream,
    Windows,
    digest_of,
    encode,
    match_labels,
    open_data,
    read_labels,
)
from lrsurgery.data.tasks import IGNORED
from lrsurgery.errors import DataError

TEXTS = ["one row of text,\nwith a comma", "another row", 'a "third" one']


def stream_of(*rows: list[int], end: int | None = None) -> TokenStream:
    return TokenStream(datasets.Dataset.from_dict({"input_ids": list(rows)}), end)


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


ROWS = st.lists(st.lists(st.integers(0, 50), max_size=9), min_size=1, max_size=8).filter(lambda r: sum(map(len, r)) > 1)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_a_stream_reads_what_its_rows_hold(rows: list[list[int]], data: Any) -> None:
    stream = stream_of(*rows)
    flat = [token for row in rows for token in row]
    assert len(stream) == len(flat)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    assert stream.read(start, stop).tolist() == flat[start:stop]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_enough_before_it(length: int, size: int, data: Any) -> None:
    stride = data.draw(st.integers(1, size))
    windows = Windows(stream_of(list(range(length))), size, stride, None)
    scored: list[int] = []
    for i in range(len(windows)):
        window = windows[i]
        answers = window["labels"][1:]  # a causal model's loss never asks for a window's first token
        for place, label in enumerate(answers.tolist()):
            if label != IGNORED:
                scored.append(label)
                assert place + 1 >= min(label, size - stride)
    if stride < size:
        assert scored == list(range(1, length))
    else:  # the first token of every block has nothing before it
        assert scored == [token for token in range(length) if token % size]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.integers(1, 12))
def test_blocks_are_the_streams_own(length: int, size: int, stride: int) -> None:
    blocks = Blocks(stream_of(list(range(length))), size, stride, 0, None)
    found = [blocks[i]["input_ids"].tolist() for i in range(len(blocks))]
    assert found == [list(range(s, s + size)) for s in range(0, length - size + 1, stride)]


def test_streamed_blocks_hold_all_tokens_and_are_shuffled_by_epoch() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * 3 for i in range(40)]}).to_iterable_dataset()
    blocks = StreamedBlocks(rows, 6, 0, None)
    first = torch.stack([b["input_ids"] for b in blocks])
    blocks.set_epoch(1)
    second = torch.stack([b["input_ids"] for b in blocks])
    assert sorted(first.flatten().tolist()) == sorted([i for i in range(40) for _ in range(3)])
    assert not torch.equal(first, second)


def test_masking_hides_about_fifteen_percent_and_never_the_special_ones() -> None:
    masking = Masking.of(tiny.tokenizer(around=True), "model")
    ids = torch.randint(6, 300, (20_000,), generator=torch.Generator().manual_seed(0))
    ids[::10] = 2  # [CLS]
    made = masking(ids, (0, 0, 0))
    counted = made["labels"] != IGNORED
    assert float(counted.float().mean()) == pytest.approx(0.15 * 0.9, abs=0.01)
    shown, body = made["input_ids"][counted], made["labels"][counted]
    assert float((shown == masking.mask).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((shown == body).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert 2 not in body.tolist()
    again, other = masking(ids, (0, 0, 0)), masking(ids, (0, 1, 0))
    assert torch.equal(again["input_ids"], made["input_ids"])
    assert not torch.equal(other["input_ids"], made["input_ids"])


def test_labels_go_by_name_where_the_head_knows_them() -> None:
    rows = datasets.Dataset.from_dict({"label": ["dog", "cat", "dog"]})
    names, labels = read_labels(rows, "label", "pets")
    assert (names, labels) == (["cat", "dog"], [1, 0, 1])
    assert match_labels(names, labels, ["dog", "bird", "cat"], "pets") == [0, 2, 0]
    assert match_labels(names, labels, ["0", "1"], "pets") == [1, 0, 1]
    with pytest.raises(DataError, match="has 2 classes, the model's head 1"):
        match_labels(names, labels, ["0"], "pets")


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


@pytest.mark.parametrize(
    ("content", "message"),
    [({"label": [-1]}, "holds -1; classes are numbered from 0"), ({"label": [1.5]}, "neither class numbers nor")],
)
def test_labels_that_are_none(content: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(datasets.Dataset.from_dict(content), "label", "rows")
