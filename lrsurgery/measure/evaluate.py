"""`evaluate`: the exact figures of a model on a whole dataset, and its size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrsurgery.checkpoints.mapping import notes_of
from lrsurgery.checkpoints.quantised.dense import weight_bytes
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.data.datasets import EVAL_SPLITS, LABEL_COLUMNS, column_names
from lrsurgery.data.examples import evaluation_examples, open_rows, prepare_subject
from lrsurgery.data.options import NO_TASK, DataOptions, check_choice
from lrsurgery.data.tasks import MASKED_LM, TASKS, task_of
from lrsurgery.data.text.rolling import Extent, rolling_windows_of
from lrsurgery.data.unlabelled.models import examples_of, load_pair, open_unlabelled, task_or_none
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.files.json import Json
from lrsurgery.progress import USUAL, Listener
from lrsurgery.surgery.layers import count_parameters
from lrsurgery.training.loop.trainer import quality
from lrsurgery.training.loop.unlabelled import other_tokens
from lrsurgery.training.recipe import Recipe

# how text is cut and counted: windows of ours; lm_eval's task `wikitext`; its tasks of text that needs no detokenising
PROTOCOLS = ("windows", "lm-eval", "lm-eval-plain")
WINDOWS, LM_EVAL, _ = PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one model on one dataset."""

    model: str
    task: str
    parameters: int  # tied tensors once
    bytes: int | None  # of the weight files; None for a model without any
    values: dict[str, float]  # loss, scored and the figures of the task, as far as it has them
    notes: tuple[str, ...] = ()  # how model and data were read
    against: str | None = None  # the dense model whose outputs these figures compare with

    def to_dict(self) -> Json:
        """The JSON object of `evaluate --json`."""
        return asdict(self)


def evaluate(
    model: str | Path,
    data: str | Path,
    options: DataOptions | None = None,
    *,
    split: str | None = None,
    stride: int | None = None,
    protocol: str = WINDOWS,
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "fp32",
    revision: str | None = None,
    architecture: str | None = None,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    listener: Listener = USUAL,
) -> Evaluation:
    """Measure a model on each token, sentence or image of `data` once, independent of batches and padding.

    Language models score windows of the block size that slide by `stride` tokens (the block size by default): with a
    smaller stride, each token has at least block - stride tokens before it. Where the tokenizer begins a text with a
    BOS token, each window does (`options.bos`). The listener is told what was read and how.

    The protocols of lm_eval take its rolling windows of each document in place of these, and give its figures beside
    the loss: perplexity a word and a byte, and bits a byte; "lm-eval" as its task `wikitext`, which takes the spaces
    between words and marks out and counts the words and bytes that were there, "lm-eval-plain" without that.

    With `against`, a dense model, no labels are read, and the figures tell how far the outputs of both agree: KL and
    top-1 match of logits, cosine and relative MSE of hidden states and embeddings. A model without a task needs it.

    Raises SurgeryError: what is wrong with the model or the data.
    """
    options = options or DataOptions()
    options.check()
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol != WINDOWS and stride is not None:
        raise RecipeError(f"stride {stride}: lm_eval's windows do not overlap; leave it out")
    recipe = Recipe(batch_size=batch_size, device=device, precision=precision, stride=stride, architecture=architecture)
    recipe.check_values()
    source = SourceOptions(revision=revision, architecture=architecture).resolve(str(model))
    if against is not None:
        if protocol != WINDOWS:
            raise RecipeError(f"protocol {protocol}: is for running text with a task; leave it out")
        return _agreement(source, data, options, recipe, str(against), split, trust_remote_code, listener)
    if (options.task or task_or_none(source)) == NO_TASK:
        raise RecipeError(
            f"{model}: has no task to be measured by; name the dense model to compare its outputs with by --against"
        )
    task = options.task or task_of(source)
    rows = open_rows(str(data), task, options, split=split, prefer=EVAL_SPLITS)
    subject = prepare_subject(source, options, rows, trust_remote_code=trust_remote_code)
    extent = None
    if protocol == WINDOWS:
        examples = evaluation_examples(subject, rows, options, stride=stride, trust_remote_code=trust_remote_code)
    else:
        examples, extent = rolling_windows_of(
            subject, rows, options, detokenised=protocol == LM_EVAL, trust_remote_code=trust_remote_code
        )
        # their labels stand where they are predicted, as those of masked language models do
        subject = replace(subject, task=MASKED_LM.name)
    notes = (*notes_of(source, trust_remote_code=trust_remote_code), *subject.notes, *examples.notes)
    for note in notes:
        listener.note(note)
    values = quality(subject, recipe, examples, listener)
    if not values:
        raise DataError(f"{data}: nothing is left to score: every label is hidden, or too few tokens could be masked")
    if values.get("loss") is not None and not math.isfinite(values["loss"]):
        listener.note(note := f"{model}: its outputs are not all finite, so hits are not counted")
        notes = (*notes, note)
    if extent is not None:
        values |= _by_extent(values["loss"] * values["scored"], extent)
    parameters = count_parameters(subject.body)
    return Evaluation(
        model=str(model), task=task, parameters=parameters, bytes=weight_bytes(source), values=values, notes=notes
    )


def evaluate_all(
    model: str,
    data: str,
    options: DataOptions,
    *,
    against: str | None = None,
    revision: str | None = None,
    **how: Any,
) -> list[Evaluation]:
    """Measure a model, and `against` before it; where there is no task, or no labels, the model by their agreement.

    `how` are further arguments of `evaluate`. Raises SurgeryError.
    """
    if against is None:
        return [evaluate(model, data, options, revision=revision, **how)]
    source = SourceOptions(revision=revision, architecture=how.get("architecture")).resolve(model)
    if not _has_labels(source, data, options, how.get("split")):
        return [evaluate(model, data, options, against=against, revision=revision, **how)]
    revisions = {against: None, model: revision}
    return [evaluate(each, data, options, revision=revisions[each], **how) for each in (against, model)]


def _has_labels(source: Source, data: str, options: DataOptions, split: str | None) -> bool:
    """Tell whether there is a task, and what it is scored by is in the data. Raises DataError."""
    task = options.task or task_or_none(source)
    if task == NO_TASK:
        return False
    if TASKS[task].is_language or options.label_column is not None:
        return True
    rows = open_unlabelled(data, options, split=split, prefer=EVAL_SPLITS).rows
    return bool(set(LABEL_COLUMNS) & set(column_names(rows)))


def _agreement(
    source: Source,
    data: str | Path,
    options: DataOptions,
    recipe: Recipe,
    against: str,
    split: str | None,
    trust_remote_code: bool,
    listener: Listener,
) -> Evaluation:
    """Measure how far a model's outputs are those of `against`."""
    if recipe.stride is not None:
        raise RecipeError(f"stride {recipe.stride}: is for running text, and here there is no task; leave it out")
    trust, teacher = trust_remote_code, SourceOptions(architecture=recipe.architecture).resolve(against)
    rows = open_unlabelled(str(data), options, split=split, prefer=EVAL_SPLITS)
    pair = load_pair(source, teacher, rows, options, trust_remote_code=trust)
    examples = examples_of(pair, rows, options, trust_remote_code=trust)
    read = notes_of(source, trust_remote_code=trust)
    notes = (*read, *pair.notes, *other_tokens(pair, trust), *examples.notes)
    for note in notes:
        listener.note(note)
    values = quality(pair.subject, recipe, examples, listener, pair.teacher.model, pair.agreement)
    if not math.isfinite(values["loss"]):
        listener.note(note := f"{source.reference}: its outputs, or those of {against}, are not all finite")
        notes = (*notes, note)
    return Evaluation(
        model=source.reference,
        task=NO_TASK,
        parameters=sum(parameter.numel() for parameter in pair.subject.body.parameters()),
        bytes=weight_bytes(source),
        values=values,
        notes=notes,
        against=against,
    )


def _by_extent(nats: float, extent: Extent) -> dict[str, float]:
    """lm_eval's figures of a summed loss in nats."""
    a_word, a_byte = nats / extent.words, nats / extent.bytes
    return {
        "word_perplexity": math.exp(a_word) if a_word < 700 else math.inf,
        "byte_perplexity": math.exp(a_byte),
        "bits_per_byte": a_byte / math.log(2),
    }
