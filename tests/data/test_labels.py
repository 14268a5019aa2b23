"""Labels of a dataset, and the classes of a head that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lrsurgery.data.labels import Labels, match_labels, match_names, read_column, read_label_map, read_labels, rename
from lrsurgery.errors import DataError

STARS = [f"{i} star{'s' * (i > 1)}" for i in range(1, 6)]


def rows_of(values: list[Any], feature: Any = None) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"label": values})
    return rows if feature is None else rows.cast_column("label", feature)


def read(values: list[Any], feature: Any = None) -> Labels:
    return read_column(rows_of(values, feature), "label", "rows")


def matched(names: list[str], head: list[str], *, numbered: bool = False) -> tuple[list[int], str]:
    """The head's class for each name, and all notes in one text."""
    places, notes = match_names(names, range(len(names)), head, "rows", numbered=numbered)
    return [places[i] for i in range(len(names))], "; ".join(notes)


# reading


def test_texts_numbers_and_class_labels() -> None:
    assert read_labels(rows_of(["dog", "cat", "dog"]), "label", "rows") == (["cat", "dog"], [1, 0, 1])
    assert read_labels(rows_of([3, 1]), "label", "rows") == (["0", "1", "2", "3"], [3, 1])
    assert read_labels(rows_of([True, False]), "label", "rows") == (["False", "True"], [1, 0])
    declared = datasets.ClassLabel(names=["zebra", "ant"])
    assert read_labels(rows_of([1, 0, 1], declared), "label", "rows") == (["zebra", "ant"], [1, 0, 1])


def test_numbers_written_as_text_are_numbers() -> None:
    names, labels = read_labels(rows_of([str(i) for i in range(11)]), "label", "rows")
    assert labels == list(range(11))
    assert match_labels(names, labels, [f"LABEL_{i}" for i in range(11)], "rows") == list(range(11))


@pytest.mark.parametrize(
    ("values", "feature"),
    [([1, -1, None], None), ([1, -1, None], datasets.ClassLabel(names=["a", "b"])), (["1", "-1", None], None)],
    ids=["numbers", "class labels", "texts"],
)
def test_hidden_and_missing_labels_are_none(values: list[Any], feature: Any) -> None:
    assert read_labels(rows_of(values, feature), "label", "rows")[1] == [1, None, None]


def test_lists_are_sets_of_classes() -> None:
    assert read([["b", "a"], ["a"], []]).of_rows == ((1, 0), (0,), ())
    assert read([[2, 5], [0]]).of_rows == ((2, 5), (0,))
    hot = read([[0, 1, 1], [0, 0, 0]])
    assert (hot.kind, hot.of_rows, hot.names) == ("classes", ((1, 2), ()), ("0", "1", "2"))
    assert "has a 0 or 1 for each of 3 classes" in hot.notes[0]
    assert read([[0.5, 1.0], [0.0, 2.0]]).kind == "value"


def test_numbers_to_predict() -> None:
    found = read([0.5, float("nan"), 3.0])
    assert (found.kind, found.of_rows) == ("value", (0.5, None, 3.0))
    with pytest.raises(DataError, match="neither class numbers nor class names throughout"):
        read_labels(rows_of([1.5]), "label", "rows")


# matching


def test_names_go_by_name() -> None:
    assert matched(["cat", "dog"], ["dog", "bird", "cat"]) == ([2, 0], "")


def test_another_spelling_is_the_same_name_with_a_note() -> None:
    places, note = matched(["positive", "very bad"], ["Very_Bad", "POSITIVE"])
    assert places == [1, 0]
    assert "'positive' is 'POSITIVE', 'very bad' is 'Very_Bad'" in note
    assert matched(["very-bad"], ["Very_Bad", "very-bad"]) == ([1], "")  # the exact one wins
    with pytest.raises(DataError, match="'Very bad' is none of the model's"):
        matched(["Very bad"], ["Very_Bad", "very-bad"])  # which of the two?


def test_an_unknown_name_is_refused_with_both_lists() -> None:
    with pytest.raises(DataError) as refused:
        matched(["AWFUL", "POSITIVE"], ["POSITIVE", "NEGATIVE"])
    said = str(refused.value)
    assert "'AWFUL' is none of the model's; the data has 'AWFUL', 'POSITIVE'; the model has 'POSITIVE', 'NEGAT" in said
    assert "--label-map" in said


def test_alphabet_is_no_order() -> None:
    """Texts on a head without names: nothing says which is which."""
    with pytest.raises(DataError, match="--label-map FILE says which is which"):
        matched(["cat", "dog"], ["LABEL_0", "LABEL_1"])
    places, note = matched(["cat", "dog"], ["LABEL_0", "LABEL_1"], numbered=True)  # a ClassLabel has numbers
    assert places == [0, 1]
    assert "0 is 'cat', 1 is 'dog'" in note
    with pytest.raises(DataError, match="has 2 classes, the model's head 3"):
        matched(["cat", "dog"], ["0", "1", "2"], numbered=True)


def test_class_numbers_go_by_number() -> None:
    assert matched(["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]) == ([0, 1, 2], "")
    assert matched(["0", "1"], ["NEGATIVE", "POSITIVE"]) == ([0, 1], "")
    assert matched(["LABEL_1", "LABEL_0"], ["NEGATIVE", "POSITIVE"]) == ([1, 0], "")
    places, note = matched(["1", "2"], ["a", "b", "c"])
    assert places == [1, 2]
    assert "no row is of class 0" in note
    with pytest.raises(DataError, match="has 3 classes, the model's head 2; --new-head"):
        matched(["0", "1", "2"], ["a", "b"])


def test_numbers_within_the_heads_names() -> None:
    places, note = matched(["1", "4"], STARS)
    assert places == [0, 3]
    assert "1 is '1 star', 4 is '4 stars'; as class numbers from 0 they would be '2 stars', '5 stars'" in note
    assert matched(["5"], STARS)[0] == [4]
    assert matched(["0", "1", "4"], STARS) == ([0, 1, 4], "")  # 0 is no number of theirs


def test_folders_named_by_numbers() -> None:
    folders = ["0", "1", "10", "2"]  # in the order in which a listing has them
    assert matched(folders, [f"LABEL_{i}" for i in range(11)], numbered=True)[0] == [0, 1, 10, 2]
    places, note = matched(["1", "2", "3"], ["LABEL_0", "LABEL_1", "LABEL_2"], numbered=True)
    assert places == [0, 1, 2]
    assert "classes '1' to '3' taken as classes 0 to 2" in note


def test_synsets_are_classes_of_imagenet() -> None:
    from timm.data import ImageNetInfo

    truth = ImageNetInfo("imagenet-1k").label_names()
    folders = sorted(truth[i] for i in (7, 999, 500))
    nameless = [str(i) for i in range(1000)]
    places, note = matched(folders, nameless, numbered=True)
    assert [truth[p] for p in places] == folders
    assert "imagenet-1k" in note
    descriptions = ImageNetInfo("imagenet-1k").label_descriptions()
    assert matched(folders, descriptions)[0] == places
    with pytest.raises(DataError, match="none of the model's"):
        matched(folders, descriptions[::-1])  # ImageNet's names in another order than timm's
    with pytest.raises(DataError, match="has 3 classes, the model's head 10"):
        matched(folders, nameless[:10], numbered=True)


# --label-map


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_label_map_renames_classes(tmp_path: Path, form: str) -> None:
    pairs = {"awful": "NEGATIVE", "great": "POSITIVE", "unsure": None}
    file = tmp_path / f"map.{form}"
    file.write_text(json.dumps(pairs) if form == "json" else "awful,NEGATIVE\ngreat,POSITIVE\nunsure,\n")
    assert read_label_map(str(file)) == pairs
    labels = rename(read(["great", "unsure", "awful"]), read_label_map(str(file)), str(file))
    assert labels.of_rows == (1, None, 0)
    assert matched(list(labels.names), ["POSITIVE", "NEGATIVE"])[0] == [1, 0]


def test_a_label_map_of_numbers() -> None:
    labels = rename(read([1, 4, -1]), {str(i): STARS[i - 1] for i in range(1, 5)}, "map.json")
    found = match_labels(labels.names, [None if v == -1 else v for v in labels.of_rows], STARS, "rows")
    assert found == [0, 3, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such label map"),
        ("[1", "not a label map; write a JSON object or lines of DATASET-NAME,MODEL-NAME"),
        ('{"bad": "NEGATIVE"}', "'bad' is no class of the data, which has 'awful', 'great'"),
    ],
    ids=["missing", "damaged", "of other data"],
)
def test_a_label_map_that_is_none(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "map.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        rename(read(["great", "awful"]), read_label_map(str(file)), str(file))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 10**9], "column 'label' has class number 1000000000; at most 10,000,000 classes are read"),
        ([[0, 10**9]], "column 'label' has class number 1000000000; at most 10,000,000 classes are read"),
        ([0.5, float("inf")], "row 1 of column 'label' holds inf, not a number"),
        ([{"a": 1}, {"a": 2}], "holds neither class numbers nor class names throughout (row 0 holds a dict)"),
    ],
)
def test_labels_that_no_head_has_are_refused(values: list[Any], words: str) -> None:
    with pytest.raises(DataError) as found:
        read(values)
    assert words in str(found.value)
    assert str(found.value).startswith("rows: ")


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": {"b": 1}}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}"])
def test_a_label_map_of_anything_else_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"map\.json: not a label map"):
        read_label_map(str(file))
