"""The table of tasks, known to transformers and to the command line, and the heads of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support import tiny

from lrsurgery.checkpoints.source import resolve
from lrsurgery.checkpoints.upstream.transformers import head_classes
from lrsurgery.data import options
from lrsurgery.data.tasks import (
    TASKS,
    MissingHeadError,
    Task,
    class_names,
    head_size,
    is_for,
    load_subject,
    task_of,
)
from lrsurgery.errors import RecipeError


def test_the_command_line_knows_the_tasks_of_the_table() -> None:
    assert tuple(TASKS) == options.TASKS
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.heads], ids=lambda task: task.name)
def test_transformers_has_the_head_of_every_task(task: Task) -> None:
    auto_class = getattr(transformers, task.auto_class)
    assert head_classes(task.heads) == {c.__name__ for c in _classes(auto_class)}


def _classes(auto_class: type) -> set[type]:
    """The model classes that an auto class loads, of all that this transformers can import."""
    found: set[type] = set()
    for value in auto_class._model_mapping.values():  # type: ignore[attr-defined]
        found.update(value if isinstance(value, tuple) else (value,))
    return found


def test_the_architecture_names_the_task(tmp_path: Path) -> None:
    gpt2 = resolve(str(tiny.save_gpt2(tmp_path / "gpt2")))
    assert task_of(gpt2) == "causal-lm"
    assert task_of(resolve(str(tiny.save_bert(tmp_path / "masked", "BertForMaskedLM")))) == "masked-lm"
    assert task_of(resolve(str(tiny.save_timm(tmp_path / "timm")))) == "image-classification"
    body = resolve(str(tiny.save_bert(tmp_path / "body", "BertModel")))
    assert not any(is_for(body, task) for task in TASKS)
    with pytest.raises(RecipeError, match="BertModel is for none of causal-lm, masked-lm, "):
        task_of(body)


def test_timm_models_have_one_task(tmp_path: Path) -> None:
    source = resolve(str(tiny.save_timm(tmp_path / "timm")))
    with pytest.raises(RecipeError, match="task masked-lm: timm models are for image-classification"):
        load_subject(source, "masked-lm")


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


@pytest.mark.parametrize(
    ("task", "part"),
    [("masked-lm", "cls.predictions"), ("sequence-classification", "classifier")],
    ids=["words", "classes"],
)
def test_a_head_that_the_checkpoint_lacks_is_asked_for(tmp_path: Path, task: str, part: str) -> None:
    source = resolve(str(tiny.save_bert(tmp_path / "body", "BertModel")))
    with pytest.raises(MissingHeadError, match=f"has no head for {task}: {part}.* would be random; .*--new-head"):
        load_subject(source, task)
    assert load_subject(source, task, new_head=True).notes[0].startswith("new and untrained: ")


def test_a_timm_body_has_no_head(tmp_path: Path) -> None:
    source = resolve(str(tiny.save_timm(tmp_path / "body", classes=0)))
    with pytest.raises(MissingHeadError, match="has no head for image-classification"):
        load_subject(source, "image-classification")
    assert head_size(load_subject(source, "image-classification", classes=["a", "b"])) == 2
