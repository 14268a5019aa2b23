"""Labels of a dataset, and the classes of a head that they are."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from support import tiny

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.labels import check_teacher, class_names, head_size, match_labels, read_labels
from lrsurgery.data.tasks import load_subject
from lrsurgery.errors import DataError, SourceError


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


def test_class_labels_keep_the_order_of_the_dataset() -> None:
    feature = datasets.ClassLabel(names=["zebra", "ant"])
    rows = datasets.Dataset.from_dict({"label": [1, 0, 1]}).cast_column("label", feature)
    assert read_labels(rows, "label", "rows") == (["zebra", "ant"], [1, 0, 1])


def test_numbers_name_the_classes_below_the_largest() -> None:
    rows = datasets.Dataset.from_dict({"label": [3, 1]})
    assert read_labels(rows, "label", "rows") == (["0", "1", "2", "3"], [3, 1])


def test_a_head_names_its_classes(tmp_path: Path) -> None:
    vit = load_subject(resolve(str(tiny.save_vit(tmp_path / "vit", classes=4))), "image-classification")
    assert head_size(vit) == vit.model(torch.zeros(1, 3, 16, 16)).logits.shape[-1] == 4
    assert class_names(vit) == [f"LABEL_{i}" for i in range(4)]  # as transformers names them
    timm = resolve(str(tiny.save_timm(tmp_path / "timm")))
    plain = load_subject(timm, "image-classification")
    assert head_size(plain) == plain.body(torch.zeros(1, 3, 32, 32)).shape[-1] == 3
    assert class_names(plain) == ["0", "1", "2"]
    named = load_subject(timm, "image-classification", classes=["cat", "dog"])
    assert class_names(named) == ["cat", "dog"]
    assert named.body(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_a_teacher_has_the_models_task_and_outputs(tmp_path: Path) -> None:
    gpt2 = load_subject(resolve(str(tiny.save_gpt2(tmp_path / "gpt2"))), "causal-lm")
    three, four = (
        load_subject(resolve(str(tiny.save_vit(tmp_path / f"vit{n}", classes=n))), "image-classification")
        for n in (3, 4)
    )
    timm = load_subject(resolve(str(tiny.save_timm(tmp_path / "timm", classes=3))), "image-classification")
    check_teacher(gpt2, gpt2)
    check_teacher(three, timm)  # of another library
    with pytest.raises(SourceError, match="is for image-classification, the model for causal-lm"):
        check_teacher(gpt2, three)
    with pytest.raises(SourceError, match="has 4 outputs, the model 3; they must be the same"):
        check_teacher(three, four)
