"""`evaluate`: the exact figures of a model on a whole dataset, and its size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lrsurgery.checkpoints.mapping import notes_of
from lrsurgery.checkpoints.quantised.dense import weight_bytes
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.data.datasets import EVAL_SPLITS
from lrsurgery.data.examples import evaluation_examples, open_rows, prepare_subject
from lrsurgery.data.options import DataOptions, check_choice
from lrsurgery.data.tasks import MASKED_LM, task_of
from lrsurgery.data.text.rolling import Extent, rolling_windows_of
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.files.json import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.training.loop.trainer import quality
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
    trust_remote_code: bool = False,
    listener: Listener = SILENT,
) -> Evaluation:
    """Measure a model on each token, sentence or image of `data` once, independent of batches and padding.

    Language models score windows of the block size that slide by `stride` tokens (the block size by default): with a
    smaller stride, each token has at least block - stride tokens before it. Where the tokenizer begins a text with a
    BOS token, each window does (`options.bos`). The listener is told what was read and how.

    The protocols of lm_eval take its rolling windows of each document in place of these, and give its figures beside
    the loss: perplexity a word and a byte, and bits a byte; "lm-eval" as its task `wikitext`, which takes the spaces
    between words and marks out and counts the words and bytes that were there, "lm-eval-plain" without that.

    Raises SurgeryError: what is wrong with the model or the data.
    """
    options = options or DataOptions()
    options.check()
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol != WINDOWS and stride is not None:
        raise RecipeError(f"stride {stride}: lm_eval's windows do not overlap; leave it out")
    recipe = Recipe(batch_size=batch_size, device=device, precision=precision, stride=stride)
    recipe.check_values()
    source = SourceOptions(revision=revision, architecture=architecture).resolve(str(model))
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
    parameters = sum(parameter.numel() for parameter in subject.body.parameters())
    return Evaluation(
        model=str(model), task=task, parameters=parameters, bytes=weight_bytes(source), values=values, notes=notes
    )


def _by_extent(nats: float, extent: Extent) -> dict[str, float]:
    """lm_eval's figures of a summed loss in nats."""
    a_word, a_byte = nats / extent.words, nats / extent.bytes
    return {
        "word_perplexity": math.exp(a_word) if a_word < 700 else math.inf,
        "byte_perplexity": math.exp(a_byte),
        "bits_per_byte": a_byte / math.log(2),
    }
