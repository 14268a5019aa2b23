"""Tokens: sequences and windows are the stream's own, each token is scored once, masking follows BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from tokenizers import processors

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.text.sequences import Cut, Masking, Sequences, StreamedSequences, TokenStream, Windows
from lrsurgery.data.text.tokens import Frame, check_tokens, encode, load_tokenizer
from lrsurgery.errors import DataError


def stream_of(*rows: list[int], end: tuple[int, ...] = ()) -> TokenStream:
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
    windows = Windows(stream_of(list(range(length))), Cut(size=size), stride)
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
    sequences = Sequences(stream_of(list(range(length))), Cut(size=size), stride)
    found = [sequences[i]["input_ids"].tolist() for i in range(len(sequences))]
    assert found == [list(range(s, s + size)) for s in range(0, length - size + 1, stride)]


def test_streamed_sequences_hold_all_tokens_and_are_shuffled_by_epoch() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * 3 for i in range(40)]}).to_iterable_dataset()
    sequences = StreamedSequences(rows, Cut(size=6), 0)
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


def beginning(tokenizer: Any, suffix: str = "") -> Any:
    """The tokenizer with [CLS] as the BOS token that it adds to a text, and a suffix."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"[CLS] $A {suffix}".strip(), special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.bos_token = "[CLS]"
    return tokenizer


@pytest.mark.process
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 2), st.data())
def test_windows_begin_with_the_prefix_and_score_each_token_once(
    length: int, size: int, count: int, data: st.DataObject
) -> None:
    prefix = tuple(range(90, 90 + min(count, size - 1)))
    cut = Cut(size=size, frame=Frame(prefix=prefix))
    windows = Windows(stream_of(list(range(length))), cut, data.draw(st.integers(1, size)))
    scored: list[int] = []
    for i in range(len(windows)):
        ids, labels = windows[i]["input_ids"].tolist(), windows[i]["labels"].tolist()
        assert len(ids) == len(labels) <= size
        assert tuple(ids[: len(prefix)]) == prefix
        assert ids[len(prefix) :] == list(range(windows.stride * i, windows.stride * i + len(ids) - len(prefix)))
        scored += [label for label in labels[1:] if label != IGNORED]
    assert scored == list(range(length))


def test_the_frame_is_what_the_tokenizer_itself_adds() -> None:
    plain, both = tiny.tokenizer(), tiny.tokenizer(around=True)
    assert Frame.of(plain) == Frame(end=(0,))
    assert Frame.of(both) == Frame(prefix=(2,), suffix=(3,), end=(3,))
    assert Frame.of(beginning(plain)) == Frame(prefix=(2,), end=(0,))
    assert Frame.of(beginning(plain), "never") == Frame(end=(0,))
    assert Frame.of(beginning(tiny.tokenizer(), "[SEP]")) == Frame(prefix=(2,), suffix=(3,), end=(3,))
    assert Frame.of(tiny.tokenizer(), "always") == Frame(prefix=(0,), end=(0,))
    none = tiny.tokenizer()
    none.eos_token = None
    with pytest.raises(DataError, match="model: its tokenizer has no BOS token, which --bos always needs"):
        Frame.of(none, "always", "model")


def encoded(tokenizer: Any, columns: dict[str, list[Any]], **options: Any) -> list[list[int]]:
    found: list[list[int]] = encode(datasets.Dataset.from_dict(columns), tokenizer, None, "rows", **options)[
        "input_ids"
    ][:]
    return found


def test_a_text_that_spells_its_bos_out_has_it_once() -> None:
    tokenizer = beginning(tiny.tokenizer())
    spelled, plain = encoded(tokenizer, {"text": ["[CLS]one text", "one text"]})
    assert spelled == plain == [*tokenizer("one text")["input_ids"][1:], 0]
    assert encoded(tokenizer, {"input_ids": [[2, 9, 8], [9, 8]]}) == [[9, 8], [9, 8]]


def test_joined_rows_are_the_text_that_they_were_cut_from() -> None:
    text = " = Title = \n\n first line \nlast"
    tokenizer = tiny.tokenizer()
    wanted = [tokenizer(text)["input_ids"]]
    assert encoded(tokenizer, {"text": text.splitlines(keepends=True)}, join=True) == wanted
    assert encoded(tokenizer, {"text": text.splitlines()}, join=True) == wanted
    assert len(encoded(tokenizer, {"text": text.splitlines()})) == 4


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = beginning(tiny.tokenizer())
    chats = [
        [{"role": "user", "content": "raise it"}, {"role": "assistant", "content": "done"}],
        [{"role": "user", "content": "return"}],
    ]
    with pytest.raises(DataError, match=r"column 'messages' holds conversations, .* has no chat template"):
        encoded(tokenizer, {"messages": chats})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    )
    wanted = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    assert wanted[0][0] == 2
    assert wanted[0][-1] == 0
    # windows begin with BOS, so that the template's own is not a second one
    assert encoded(tokenizer, {"messages": chats}) == [ids[1:] for ids in wanted]
    tokenizer.chat_template = "{{ raise_exception('no system prompt') }}"
    with pytest.raises(DataError, match=r"row 0 of column 'messages': the chat template refuses it .*no system prompt"):
        encoded(tokenizer, {"messages": chats})


@pytest.mark.parametrize("row", [None, 5, ["a"], [[1, 2]], [-5, 1], [1, None], [1.5, 2.0], [True, False]], ids=str)
@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_rows_that_are_not_tokens_are_named(row: object, streaming: bool) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [row] * 2})
    table = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(DataError, match=r"rows: row 0 of column 'input_ids' holds .*; a row is a list of"):
        list(encode(table, tiny.tokenizer(), None, "rows"))


def test_rows_without_text_are_named() -> None:
    with pytest.raises(DataError, match="rows: row 1 of column 'text' holds nothing, not text"):
        encoded(tiny.tokenizer(), {"text": ["a", None]})
    with pytest.raises(DataError, match="rows: row 0 has 2 input_ids and not as many attention_mask"):
        encoded(tiny.tokenizer(), {"input_ids": [[5, 6]], "attention_mask": [[1]]})
    with pytest.raises(DataError, match="rows with labels of their own are not joined"):
        encoded(tiny.tokenizer(), {"input_ids": [[5, 6]], "labels": [[5, 6]]}, join=True)
    masked = {"input_ids": [[1, 5, 6]], "attention_mask": [[0, 1, 1]]}
    assert encoded(tiny.tokenizer(), masked, join=True) == [[5, 6]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": None}, "row 0 of column 'input_ids' holds None"),
        ({"input_ids": [1.5, 2.5]}, "row 0 of column 'input_ids' holds [1.5, 2.5]"),
        ({"input_ids": [-5, 1]}, "row 0 of column 'input_ids' holds [-5, 1]"),
        ({"input_ids": [1, None]}, "row 0 of column 'input_ids' holds [1, None]"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 0 has 2 input_ids and not as many labels"),
        ({"input_ids": [1, 2], "labels": [-100, None]}, "row 0 of column 'labels' holds [-100, None]"),
        ({"input_ids": [1, 2], "labels": [-101, 3]}, "row 0 of column 'labels' holds [-101, 3]"),
        ({"input_ids": [1, 2], "attention_mask": [1, -1]}, "row 0 of column 'attention_mask' holds [1, -1]"),
        ({"input_ids": [], "labels": []}, "row 0 of column 'input_ids' is empty"),
    ],
)
def test_an_odd_row_of_tokens_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as found:
        check_tokens(datasets.Dataset.from_list([row, row]), Frame(), "a.jsonl", False)
    assert str(found.value).startswith(f"a.jsonl: {words}")


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model_max_length", {}, "model_max_length {}: write a number above 0"),
        ("model_max_length", -1, "model_max_length -1: write a number above 0"),
        ("model_max_length", True, "model_max_length True: write a number above 0"),
        ("padding_side", "x", "no tokenizer that loads .ValueError: Padding side .*; a text task needs"),
        ("tokenizer_class", [1], "no tokenizer that loads .AttributeError: .*; a text task needs"),
    ],
)
def test_a_tokenizer_of_odd_settings_is_refused(tmp_path: Path, setting: str, value: object, words: str) -> None:
    model = tiny.save_gpt2(tmp_path / "model", blocks=1)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(DataError, match=words):
        load_tokenizer(resolve(str(model)))
