"""The table of tasks: known to transformers and to the command line; figures against plain arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from support import tiny

from lrsurgery.checkpoints.source import resolve
from lrsurgery.checkpoints.upstream.transformers import head_classes
from lrsurgery.data import options
from lrsurgery.data.tasks import TASKS, Task, distillation, is_for, load_subject, measure, summarise, task_of
from lrsurgery.data.text import IGNORED
from lrsurgery.errors import RecipeError


def test_the_command_line_knows_the_tasks_of_the_table() -> None:
    assert tuple(TASKS) == options.TASKS
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
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


def _case(task: str) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Logits, labels, and what they must be scored as: (example, position of the logits, label)."""
    generator = torch.Generator().manual_seed(0)
    if not TASKS[task].is_language:
        labels = torch.tensor([3, 0])
        return torch.randn(2, 7, generator=generator), labels, [(0, 0, 3), (1, 0, 0)]
    labels = torch.tensor([[4, 5, IGNORED], [1, IGNORED, 6]])
    logits = torch.randn(2, 3, 7, generator=generator)
    if task == "causal-lm":  # position t answers label t + 1
        return logits, labels, [(0, 0, 5), (1, 1, 6)]
    return logits, labels, [(0, 0, 4), (0, 1, 5), (1, 0, 1), (1, 2, 6)]


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_plain_arithmetic(task: str) -> None:
    logits, labels, scored = _case(task)
    losses, ranks = [], []
    for example, position, label in scored:
        row = [float(x) for x in (logits[example] if logits.ndim == 2 else logits[example, position])]
        losses.append(math.log(sum(map(math.exp, row))) - row[label])
        ranks.append(sum(x > row[label] for x in row))
    loss = sum(losses) / len(losses)
    wanted = {
        "loss": loss,
        "scored": len(scored),
        "perplexity": math.exp(loss),
        "top1": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5": sum(rank < 5 for rank in ranks) / len(ranks),
    }
    found = summarise(task, measure(task, logits, labels))
    assert tuple(found) == TASKS[task].figures
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_distillation_is_the_divergence_of_the_scored_positions(task: str) -> None:
    student, labels, scored = _case(task)
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    wanted = 0.0
    for example, position, _ in scored:
        rows = [x[example] if x.ndim == 2 else x[example, position] for x in (student, teacher)]
        ours, theirs = ([math.exp(float(x) / 2) for x in row] for row in rows)
        for mine, other in zip(ours, theirs, strict=True):
            p = other / sum(theirs)
            wanted += 4 * p * math.log(p / (mine / sum(ours)))
    found, count = distillation(task, student, teacher, labels, 2.0)
    assert count == len(scored)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
