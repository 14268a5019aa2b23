"""`evaluate`: how good a model is on a whole dataset, exactly, with its size beside it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.data.datasets import EVAL_SPLITS
from lrsurgery.data.examples import Examples, evaluation_examples, open_rows, prepare_subject
from lrsurgery.data.tasks import Subject, task_of
from lrsurgery.training.callbacks import EvaluationCallback, Watch
from lrsurgery.training.recipe import DataOptions, Recipe
from lrsurgery.training.trainer import LowRankTrainer, release_, training_arguments


@dataclass(frozen=True)
class Measured:
    """One model on one dataset."""

    model: str
    task: str
    parameters: int  # tied tensors once
    bytes: int | None  # of the weights in the files; None for a model without any
    values: dict[str, float]  # loss (nats), scored (positions), perplexity, top1, top5, whichever the task has

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: str, data: str, options: DataOptions, *, split: str | None = None, stride: int | None = None,
    batch_size: int = 8, device: str = "auto", precision: str = "fp32", revision: str | None = None,
    trust_remote_code: bool = False, watch: Watch = lambda event: None,
) -> Measured:  # fmt: skip
    """Measures a model on every token, sentence or image of `data` once, whatever the batches and the padding.

    Language models are scored in windows of the block size that slide by `stride` (the block size by default): with a
    smaller stride each token has at least block - stride tokens before it.

    Raises SurgeryError: what is wrong with the model or the data.
    """
    options.check()
    recipe = Recipe(batch_size=batch_size, device=device, precision=precision)
    source = resolve(model, revision=revision)
    task = options.task or task_of(source)
    rows = open_rows(data, task, options, split=split, prefer=EVAL_SPLITS)
    subject = prepare_subject(source, options, rows, trust_remote_code=trust_remote_code)
    examples = evaluation_examples(subject, rows, options, stride=stride, trust_remote_code=trust_remote_code)
    values = quality(subject, recipe, examples, watch)
    parameters = sum(parameter.numel() for parameter in subject.body.parameters())
    return Measured(model, task, parameters, size_of(source), values)


def quality(subject: Subject, recipe: Recipe, examples: Examples, watch: Watch) -> dict[str, float]:
    """The figures of a model on examples, without training it."""
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(recipe, Path(folder), evaluates=True, total=1)
        trainer = LowRankTrainer(subject, recipe, args, None, examples, callback=EvaluationCallback(watch))
        found = trainer.evaluate()
        release_(trainer)
    names = ("loss", "perplexity", "top1", "top5", "scored")
    return {name: found[f"eval_{name}"] for name in names if f"eval_{name}" in found}


def size_of(source: Source) -> int | None:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in source.files) if source.files else None
