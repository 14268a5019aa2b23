"""Labels: the classes of a dataset, and which of a head's classes they are."""

from __future__ import annotations

from typing import Any

from lrsurgery.data.tasks import CLASSIFICATION, Subject
from lrsurgery.errors import DataError, SourceError
from lrsurgery.files import Json


def read_labels(rows: Any, column: str, reference: str) -> tuple[list[str], list[int]]:
    """Class names, and each row's class: from a ClassLabel column, from numbers, or from texts in alphabetical order.

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
    """Each row's class in the head's numbering: by name where the head knows the names, else by number.

    Raises DataError where they do not fit.
    """
    place = {name: i for i, name in enumerate(head)}
    if set(names) <= set(head):
        return [place[names[label]] for label in labels]
    if max(labels) >= len(head):
        raise DataError(
            f"{reference}: has {len(names)} classes, the model's head {len(head)}; {hint} makes a head for these"
        )
    return labels


def class_names(subject_config: Json, library: str, count: int) -> list[str]:
    """The names of a head's classes as its config gives them, or their numbers."""
    if library == "timm":
        names = (subject_config.get("pretrained_cfg") or {}).get("label_names") or subject_config.get("label_names")
    else:
        names = list((subject_config.get("id2label") or {}).values())
    return list(names) if names and len(names) == count else [str(i) for i in range(count)]


def head_size(subject: Subject) -> int:
    """How many classes the head tells apart."""
    if subject.source.library == "timm":
        return int(getattr(subject.body, "num_classes", 0))
    config: Any = subject.body.config
    return int(config.num_labels)


def check_teacher(subject: Subject, teacher: Subject) -> None:
    """Raises SourceError where a teacher's answers cannot be compared with the model's."""
    if teacher.task != subject.task:
        raise SourceError(f"teacher {teacher.source.reference}: is for {teacher.task}, the model for {subject.task}")
    sizes = [_answers(s) for s in (teacher, subject)]
    if sizes[0] != sizes[1]:
        raise SourceError(
            f"teacher {teacher.source.reference}: has {sizes[0]} outputs, the model {sizes[1]}; they must be the same"
        )


def _answers(subject: Subject) -> int:
    if subject.task in CLASSIFICATION:
        return head_size(subject)
    config: Any = subject.body.config
    return int(config.get_text_config().vocab_size)
