"""Labels: the classes of a dataset, and which of a head's classes they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsurgery.data.tasks import TASKS, Subject
from lrsurgery.errors import DataError, SourceError

if TYPE_CHECKING:
    from datasets import Dataset


def read_labels(rows: Dataset, column: str, reference: str) -> tuple[list[str], list[int]]:
    """Read class names and each row's class from a ClassLabel column, from numbers, or from texts, sorted.

    Raises DataError.
    """
    import datasets

    feature = rows.features[column]
    values = rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), [int(v) for v in values]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        if min(values) < 0:
            raise DataError(f"{reference}: column '{column}' holds {min(values)}; classes are numbered from 0")
        return [str(i) for i in range(max(values) + 1)], list(values)
    if all(isinstance(v, str) for v in values):
        names = sorted(set(values))
        place = {name: i for i, name in enumerate(names)}
        return names, [place[v] for v in values]
    raise DataError(f"{reference}: column '{column}' holds neither class numbers nor class names throughout")


def match_labels(
    names: list[str], labels: list[int], head: list[str], reference: str, *, hint: str = "--new-head"
) -> list[int]:
    """Renumber each row's class as the head does: by name if the head knows all names, else by number.

    Raises DataError if the head has too few classes.
    """
    place = {name: i for i, name in enumerate(head)}
    if set(names) <= set(head):
        return [place[names[label]] for label in labels]
    if max(labels) >= len(head):
        raise DataError(
            f"{reference}: has {len(names)} classes, the model's head {len(head)}; {hint} makes a head for these"
        )
    return labels


def class_names(subject: Subject) -> list[str]:
    """Name the classes of the model's head as its config does; by numbers where it has no names."""
    count = head_size(subject)
    if subject.source.library == "transformers":
        names = subject.config.id2label
        return [names.get(i, str(i)) for i in range(count)]
    names = subject.source.pretrained_cfg.get("label_names") or subject.source.config.get("label_names")
    return list(names) if names and len(names) == count else [str(i) for i in range(count)]


def head_size(subject: Subject) -> int:
    """Count the classes of the model's head."""
    if subject.source.library == "timm":
        return int(getattr(subject.body, "num_classes", 0))
    return int(subject.config.num_labels)


def check_teacher(subject: Subject, teacher: Subject) -> None:
    """Check that a teacher has the model's task and as many logits. Raises SourceError."""
    if teacher.task != subject.task:
        raise SourceError(f"teacher {teacher.source.reference}: is for {teacher.task}, the model for {subject.task}")
    theirs, ours = _count_logits(teacher), _count_logits(subject)
    if theirs != ours:
        raise SourceError(
            f"teacher {teacher.source.reference}: has {theirs} outputs, the model {ours}; they must be the same"
        )


def _count_logits(subject: Subject) -> int:
    """Logits of one prediction: classes, or tokens of the vocabulary."""
    if not TASKS[subject.task].is_language:
        return head_size(subject)
    return int(subject.config.get_text_config().vocab_size)
