"""What a model is measured by: the problem that its head solves, targets, figures, and distillation's divergence.

A head solves one of three problems, which transformers calls `problem_type`: one class of several, any number of
classes, or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from lrsurgery.data.batches import IGNORED, UNREAD, Batch, Judge
from lrsurgery.data.interfaces.wrapped import MULTI, REGRESSION, SINGLE
from lrsurgery.data.labels import HIDDEN, NUMBER, Labels, as_classes, match_names, occurring
from lrsurgery.data.segmentation.figures import measure_masks, summarise_masks
from lrsurgery.data.tasks import TASKS, Subject, class_names, count_logits
from lrsurgery.data.text.padding import MOST_LOGITS, without_padding
from lrsurgery.data.text.sliced import kl_sum, measure_split, measure_tokens
from lrsurgery.errors import DataError
from lrsurgery.heads import find_head
from lrsurgery.modules import for_model

LEARNT_BY = {SINGLE: "one class of several", MULTI: "any number of classes", REGRESSION: "numbers (regression)"}


def problem_of(own: str | None, outputs: int, labels: Labels | None) -> str:
    """The problem of a head: the one that its config names, else what its outputs and the labels are for.

    One output is for regression, as transformers takes it; lists of classes are for any number of classes.
    """
    if own is not None:
        return own
    if outputs == 1:
        return REGRESSION
    return MULTI if labels is not None and labels.kind == "classes" else SINGLE


def new_head_for(labels: Labels) -> tuple[str, tuple[str, ...]]:
    """The problem that labels pose, and names for the outputs of a head that is made for them."""
    if labels.kind == "value":
        width = max((len(v) for v in labels.of_rows if isinstance(v, tuple)), default=1)
        return REGRESSION, tuple(f"LABEL_{i}" for i in range(width))
    return (MULTI if labels.kind == "classes" else SINGLE), labels.names


@dataclass(frozen=True)
class Targets:
    """What a model should answer: for each row that has a label, in the form of its head."""

    rows: tuple[int, ...] | None  # places of the rows that have a label; None: all of them
    labels: Sequence[Any]  # of these rows: a class, a list of a 0.0 or 1.0 for each class, a number or a list of them
    notes: tuple[str, ...] = ()


def targets_of(labels: Labels, problem: str, head: Sequence[str], reference: str) -> Targets:
    """Match the labels of a dataset with the head of a model. Raises DataError where they do not fit."""
    notes = list(labels.notes)
    values: list[Any]
    if problem == REGRESSION:
        values = _numbers_of(labels, len(head), reference)
        notes.append(f"{reference}: the head predicts numbers: measured by mean squared error and correlation")
    else:
        values, more = _classes_of(labels, problem, head, reference)
        notes += more
    kept = tuple(i for i, value in enumerate(values) if value is not None)
    if not kept:
        raise DataError(f"{reference}: no row has a label; all are missing or hidden (-1)")
    if len(kept) == len(values):
        return Targets(None, values, tuple(notes))
    notes.append(f"{reference}: {len(values) - len(kept):,} of {len(values):,} rows have no label and are left out")
    return Targets(kept, [values[i] for i in kept], tuple(notes))


def _numbers_of(labels: Labels, outputs: int, reference: str) -> list[Any]:
    """Numbers to predict. Where every label is the number that stands for "no label", none has one."""
    if labels.kind == "classes" or (labels.kind == "class" and not all(map(NUMBER.fullmatch, labels.names))):
        raise DataError(
            f"{reference}: its labels are classes, the model's head predicts numbers; --new-head makes a head for"
            " classes, --label-map FILE can give each class a number"
        )
    known = [v for v in labels.of_rows if v is not None]
    if known and all(v in HIDDEN for v in known):
        return [None] * len(labels.of_rows)
    if labels.kind == "value":
        values: list[Any] = [v if v is None else list(v) if isinstance(v, tuple) else v for v in labels.of_rows]
    else:
        number = [float(name.removeprefix("LABEL_")) for name in labels.names]
        values = [None if v is None else float(v) if v in HIDDEN else number[v] for v in labels.of_rows]
    widths = {len(v) if isinstance(v, list) else 1 for v in values if v is not None}
    if widths != {outputs}:
        raise DataError(f"{reference}: rows have {min(widths, default=0)} numbers each, the model's head {outputs}")
    return values


def _classes_of(labels: Labels, problem: str, head: Sequence[str], reference: str) -> tuple[list[Any], list[str]]:
    if labels.kind == "value":
        odd = next((v for v in labels.of_rows if v is not None and not (isinstance(v, float) and v.is_integer())), None)
        if odd is not None:
            raise DataError(
                f"{reference}: labels are numbers to predict ({odd}), the model's head is for {len(head)} classes;"
                " --new-head makes a head for regression"
            )
        labels = as_classes(labels)
    if labels.multi_hot and len(labels.names) != len(head):
        raise DataError(
            f"{reference}: has {len(labels.names)} classes, the model's head {len(head)}; --new-head makes a head for"
            " these"
        )
    places, notes = match_names(labels.names, occurring(labels), head, reference, numbered=labels.numbered)
    found: list[Any] = []
    for label in labels.of_rows:
        if label is None or label in HIDDEN:
            found.append(None)
        else:
            found.append([places[item] for item in (label if isinstance(label, tuple) else (label,))])
    if problem == MULTI:
        if labels.kind == "class":
            notes.append(f"{reference}: one class a row, taken as the only one of the head's that holds")
        notes.append(f"{reference}: the head is for any number of classes: measured by F1 (micro) and exact match")
        hot = [None if row is None else [float(i in row) for i in range(len(head))] for row in found]
        return hot, notes
    if any(row is not None and len(row) != 1 for row in found):
        raise DataError(
            f"{reference}: rows have several classes, the model's head is for one of {len(head)}; --new-head makes a"
            " head for any number of classes"
        )
    return [None if row is None else row[0] for row in found], notes


def placeholder(subject: Subject) -> Any:
    """A label in the form of the model's head, for examples whose labels nobody reads."""
    outputs = len(class_names(subject))
    if subject.problem == SINGLE:
        return 0
    return [0.0] * outputs if subject.problem == MULTI or outputs > 1 else 0.0


# figures


def measure(task: str, logits: Tensor, labels: Tensor, problem: str = SINGLE) -> Tensor:
    """Measure each example, in fp64 (batch, columns), so that `summarise` can add up examples of any batches.

    One class: sums of negative log likelihood, positions scored, top-1 and top-5 hits. Any number of classes: binary
    cross entropy, 1, true and false positives, false negatives, whether all classes are right. Numbers: the outputs
    and the labels themselves.
    """
    if TASKS[task].takes_masks:
        return measure_masks(task, logits, labels)
    if problem == REGRESSION:
        return torch.cat([part.double().reshape(len(logits), -1) for part in (logits, labels)], dim=-1)
    if problem == MULTI:
        nll = binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").double().mean(-1)
        said, true = logits > 0, labels > 0.5
        counts = ((said & true).sum(-1), (said & ~true).sum(-1), (~said & true).sum(-1), (said == true).all(-1))
        return torch.stack([nll, torch.ones_like(nll), *(count.double() for count in counts)], dim=-1)
    logits, labels = TASKS[task].align(logits, labels)
    # in slices of positions, since a loss takes several copies of its logits
    size = max(1, MOST_LOGITS // 4 // max(1, len(logits) * logits.shape[-1]))
    pieces = zip(torch.split(logits, size, dim=1), torch.split(labels, size, dim=1), strict=True)
    return torch.stack([_measure_tokens(*piece) for piece in pieces]).sum(0)


def _measure_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    # classes last in memory: across a stride the sum over 262,144 of them is off by 3e-4 in fp32
    each = measure_tokens(logits.flatten(0, 1).contiguous(), labels.flatten())
    return each.view(*labels.shape, -1).sum(1)


def measure_batch(
    subject: Subject,
    model: Callable[..., Mapping[str, Tensor]],
    inputs: Batch,
    *,
    whole: bool = False,
    judge: Judge | None = None,
) -> Tensor:
    """Run `model`, the subject's, on a batch and measure each example (batch, columns), free of padding.

    With `whole`, in one piece, padding and all; otherwise in parts whose logits fit in memory, and where the head works
    position by position, some positions at a time. The columns of `judge` stand behind those of `measure`.
    """
    task = TASKS[subject.task]
    width = count_logits(subject) if task.is_language or task.tags else 1
    if task.decodes and "attention_mask" in inputs:  # logits of the target, by the tokens of the shortest source
        width = count_logits(subject) * -(-inputs["labels"].shape[1] // int(inputs["attention_mask"].sum(-1).min()))
    unpadded = without_padding(inputs, subject.body, width, labels_of_tokens=task.is_language or task.tags)
    parts = [(torch.arange(len(inputs["labels"])), inputs)] if whole else unpadded
    head = find_head(model) if task.is_language and judge is None and not whole else None
    places, found = [], []
    for place, part in parts:
        places.append(place)
        taken = {name: value for name, value in for_model(subject.body, part).items() if name not in UNREAD}
        split = None if head is None else head.run(lambda: model(**taken))  # noqa: B023  (called within the round)
        if split is not None:
            found.append(measure_split(split, part["labels"], task.align))
            continue
        outputs = model(**taken)
        columns = measure(subject.task, outputs["logits"], part["labels"], subject.problem)
        own = [] if judge is None else [judge.measure(outputs, part).to(columns)]
        found.append(torch.cat([columns, *own], dim=-1))
    return torch.cat(found)[torch.cat(places).argsort()]


def summarise(task: str, rows: Tensor, problem: str = SINGLE, judge: Judge | None = None) -> dict[str, float]:
    """Compute the figures of a whole set from the rows (examples, columns) of `measure`, and of `judge` behind them.

    A correlation is left out where the labels or the answers are all the same.
    """
    if not len(rows):
        return {}
    if judge is not None:
        found = summarise(task, rows[:, : -judge.columns], problem)
        known = math.isfinite(found.get("loss", math.nan))
        return {**found, **judge.summarise(rows[:, -judge.columns :])} if known else found
    if problem == REGRESSION:
        return _regression(*rows.double().chunk(2, dim=-1))
    sums = [float(value) for value in rows.double().sum(0)]
    if TASKS[task].takes_masks:
        return summarise_masks(sums)
    nll, count = sums[:2]
    if not count:
        return {}
    loss = nll / count
    if problem == MULTI:
        positives = 2 * sums[2] + sums[3] + sums[4]
        return {
            "loss": loss,
            "scored": count,
            **({} if math.isnan(loss) else {"f1": 2 * sums[2] / positives if positives else 0.0}),
            **({} if math.isnan(loss) else {"exact_match": sums[5] / count}),
        }
    # top-k finds places among NaN, too
    hits = {} if math.isnan(loss) else {"top1": sums[2] / count, "top5": sums[3] / count}
    values = {
        "loss": loss,
        "scored": count,
        "perplexity": math.inf if loss > 700 else math.exp(loss),  # exp overflows beyond about 709 nats a token
        **hits,
    }
    return {name: values[name] for name in TASKS[task].figures if name in values}


def _regression(answers: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean squared error; Pearson's and Spearman's correlation, the mean of those of the outputs."""
    mse = float((answers - labels).square().mean())
    found = {"loss": mse, "scored": float(len(labels)), "mse": mse}
    for name, of in (("pearson", lambda x: x), ("spearman", _ranks)):
        value = _correlation(of(answers), of(labels))
        if math.isfinite(value):
            found[name] = value
    return found


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(((x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()).mean())


def _ranks(values: Tensor) -> Tensor:
    """Ranks within each column (examples, outputs), ties at the mean of their ranks."""
    columns = []
    for column in values.unbind(-1):
        _, place, counts = torch.unique(column, return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        columns.append((last - (counts - 1) / 2)[place])
    return torch.stack(columns, dim=-1)


def distillation(
    task: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, problem: str = SINGLE
) -> tuple[Tensor, int]:
    """Sum T^2 KL(teacher || student) at temperature T over the scored positions, and count these.

    For any number of classes, the mean over the classes of the divergence of each; for numbers, the squared error.

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    if problem == REGRESSION:
        return (student.float() - teacher.float()).square().flatten(1).mean(-1).sum(), len(student)
    if problem == MULTI:
        s, t = student.float() / temperature, teacher.float() / temperature
        p = t.sigmoid()
        divergence = p * (logsigmoid(t) - logsigmoid(s)) + (1 - p) * (logsigmoid(-t) - logsigmoid(-s))
        return divergence.mean(-1).sum() * temperature**2, len(student)
    align = TASKS[task].align
    student, answers = align(student, labels)
    teacher, _ = align(teacher, labels)
    counted = answers.ne(IGNORED)
    total = kl_sum(student[counted], teacher[counted], temperature)
    return total, int(counted.sum())


# teachers
