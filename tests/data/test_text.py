"""Tokens: sequences and windows are the stream's own, each token is scored once, masking follows BERT."""

from __future__ import annotations

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from lrsurgery.data.text import IGNORED, Masking, Sequences, StreamedSequences, TokenStream, Windows


def stream_of(*rows: list[int], end: int | None = None) -> TokenStream:
    return TokenStream(datasets.Dataset.from_dict({"input_ids": list(rows)}), end)


ROWS = st.lists(st.lists(st.integers(0, 50), max_size=9), min_size=1, max_size=8).filter(lambda r: sum(map(len, r)) > 1)


@pytest.mark.process
@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_a_stream_reads_what_its_rows_hold(rows: list[list[int]], data: st.DataObject) -> None:
    stream = stream_of(*rows)
    flat = [token for row in rows for token in row]
    assert len(stream) == len(flat)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    assert stream.read(start, stop).tolist() == flat[start:stop]


@pytest.mark.process
@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_enough_before_it(length: int, size: int, data: st.DataObject) -> None:
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
    else:  # the first token of every window has nothing before it
        assert scored == [token for token in range(length) if token % size]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.integers(1, 12))
def test_sequences_are_the_streams_own(length: int, size: int, stride: int) -> None:
    sequences = Sequences(stream_of(list(range(length))), size, stride, 0, None)
    found = [sequences[i]["input_ids"].tolist() for i in range(len(sequences))]
    assert found == [list(range(s, s + size)) for s in range(0, length - size + 1, stride)]


def test_streamed_sequences_hold_all_tokens_and_are_shuffled_by_epoch() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * 3 for i in range(40)]}).to_iterable_dataset()
    sequences = StreamedSequences(rows, 6, 0, None)
    first = torch.stack([each["input_ids"] for each in sequences])
    sequences.set_epoch(1)
    second = torch.stack([each["input_ids"] for each in sequences])
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
