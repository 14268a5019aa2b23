"""Labels of a dataset, and the classes of a head that they are."""

from __future__ import annotations

import datasets
import pytest

from lrsurgery.data.labels import match_labels, read_labels
from lrsurgery.errors import DataError


def test_labels_go_by_name_where_the_head_knows_them() -> None:
    rows = datasets.Dataset.from_dict({"label": ["dog", "cat", "dog"]})
    names, labels = read_labels(rows, "label", "pets")
    assert (names, labels) == (["cat", "dog"], [1, 0, 1])
    assert match_labels(names, labels, ["dog", "bird", "cat"], "pets") == [0, 2, 0]
    assert match_labels(names, labels, ["0", "1"], "pets") == [1, 0, 1]
    with pytest.raises(DataError, match="has 2 classes, the model's head 1"):
        match_labels(names, labels, ["0"], "pets")


@pytest.mark.parametrize(
    ("content", "message"),
    [({"label": [-1]}, "holds -1; classes are numbered from 0"), ({"label": [1.5]}, "neither class numbers nor")],
)
def test_labels_that_are_none(content: dict[str, list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(datasets.Dataset.from_dict(content), "label", "rows")
