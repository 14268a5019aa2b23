"""The loss check: a quick look at what surgery did to the loss, on a few samples of calibration data or built-in text.

It finds wrecks, such as plain SVD of a large language model; `evaluate` gives exact figures.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.calibration import texts
from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.blockwise import visit_blocks
from lrsurgery.calibration.collect import call
from lrsurgery.calibration.loss import Batch, logits_of
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.examples import calibration_examples, evaluation_examples, open_rows
from lrsurgery.data.interfaces.wrapped import SINGLE
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import LEARNT_BY, measure_batch, summarise
from lrsurgery.data.tasks import TASKS, Subject, is_for, task_of
from lrsurgery.data.text.tokens import load_tokenizer
from lrsurgery.errors import DataError, SurgeryError
from lrsurgery.factorise.opening import load_subject, rows_of
from lrsurgery.factorise.options import Calibration, FactoriseOptions
from lrsurgery.files.json import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import public_name
from lrsurgery.report.schema import Report
from lrsurgery.runtime import free_memory

WINDOWS, TOKENS, SAMPLES = 8, 512, 64  # windows of tokens; images or sentences
EXCERPT = 8_000  # characters of each built-in document, at least 1,000 tokens
AT_A_TIME = 1 << 28  # logits in one batch: 1 GB in fp32
RISE = 0.7  # nats: the perplexity doubles
DROP = 0.05  # of top-1


@dataclasses.dataclass(frozen=True)
class _Samples:
    """What both models are measured on."""

    task: str
    batches: list[dict[str, Tensor]]  # with labels
    count: int
    tokens: int | None  # of one sample
    name: str
    own: bool  # the labels are the dense model's own answers


class _UnknownError(SurgeryError):
    """There is nothing to measure the loss by; the text says why and what to do."""


def check_loss(source: Source, output: Path, options: FactoriseOptions, listener: Listener = SILENT) -> Json | None:
    """Compare the loss of the written model in `output` with the dense one's; the `loss_check` of the report.

    `text` is its line for people. Where the loss cannot be measured, the line says why: surgery itself has worked, so
    nothing is raised. None if it is not wanted, or if surgery gives the pretrained values up.
    """
    surgery = options.surgery
    if not options.loss_check or surgery.init != "spectral" or options.source.from_scratch_seed is not None:
        return None
    try:
        return _compare(source, output, options, listener)
    except _UnknownError as e:
        reason = str(e)
    except SurgeryError as e:
        reason = str(e)
    except Exception as e:  # models run code of other libraries
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
    return {"measured": False, "text": f"not measured ({reason})"}


def warnings(report: Report, model: str, output: Path, options: FactoriseOptions) -> list[str]:
    """What to tell the user, and what to type, if the check of a report found a wreck."""
    check = report.loss_check
    if check is None or not check["measured"]:
        return []
    before, after = check["before"], check["after"]
    drop = before.get("top1", 0.0) - after.get("top1", 0.0)
    if after["loss"] is not None and after["loss"] - before["loss"] <= RISE and drop <= DROP:
        return []
    kept = sum(row.parameters_after or 0 for row in report.factorised)
    share = kept / max(1, sum(row.parameters_before for row in report.factorised))
    name = shlex.quote(model)
    figures = check["text"].partition(" (")[0]
    if check["tokens"] is not None:
        figures += f" (perplexity {_perplexity(before['loss'])} -> {_perplexity(after['loss'])})"
    if options.calibration is None:
        data = texts.NAME if check["tokens"] is not None else "DATA"
        advice = f"with data it loses less: lrsurgery factorise {name} --budget {share:.2g} --calibration {data}"
    else:
        healed = f"lrsurgery finetune {shlex.quote(str(output))} --data DATA --teacher {name}"
        advice = f"heal it: {healed}; or keep more than {share:.0%} of the layers"
    return [f"surgery damaged the model: loss {figures}; {advice}"]


def _perplexity(loss: float | None) -> str:
    value = math.exp(loss) if loss is not None and loss < 700 else math.inf
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


def _compare(source: Source, output: Path, options: FactoriseOptions, listener: Listener) -> Json:
    device, trusted = options.compute.device, options.source.trust_remote_code
    calibration = options.calibration
    task = calibration.how.task if calibration is not None else None
    if task is None:
        try:
            task = task_of(source)
        except SurgeryError as e:
            raise _UnknownError("the model has no head; lrsurgery evaluate takes --task") from e
    if not is_for(source, task):
        raise _UnknownError(f"the model has no head for {task}")
    data, how = _data(calibration, task)
    if TASKS[task].is_language:
        load_tokenizer(source, trusted)  # where there is none, no model has to be loaded to know
    room = free_memory(device) // 2
    with tempfile.TemporaryDirectory(prefix="lrsurgery-") as folder:

        def load(of: Source, name: str) -> tuple[Subject, bool]:
            return load_subject(of, task, how, device, trusted, Path(folder, name), room)

        listener.progress("loss check", 0, 2)
        subject, offloaded = load(source, "dense")
        samples = _samples(subject, data, how, calibration, trusted, device)
        before = _figures(subject, offloaded, samples)
        if before["loss"] is None:
            raise _UnknownError("the dense model's loss is not finite")
        del subject
        listener.progress("loss check", 1, 2)
        # the output may lack what the dense model's head needs, never the other way round
        subject, offloaded = load(resolve(str(output)), "low-rank")
        after = _figures(subject, offloaded, samples)
        listener.progress("loss check", 2, 2)
    found = {"before": before, "after": after, "samples": samples.count, "tokens": samples.tokens, "data": samples.name}
    return {"measured": True, **found, "own_answers": samples.own, "text": _text(found, samples)}


def _data(calibration: Calibration | None, task: str) -> tuple[str, DataOptions]:
    """What to measure on. Raises _UnknownError if there is nothing."""
    how = calibration.how if calibration is not None else DataOptions()
    data = calibration.data if calibration is not None else None
    if data is None and not TASKS[task].is_language:
        raise _UnknownError("no data; --calibration DATA measures it, and so does lrsurgery evaluate")
    if TASKS[task].is_language and how.block_size is not None:
        how = dataclasses.replace(how, block_size=min(how.block_size, TOKENS))
    return data or texts.NAME, how


def _samples(
    subject: Subject, data: str, how: DataOptions, calibration: Calibration | None, trusted: bool, device: torch.device
) -> _Samples:
    """Samples that are spread evenly over the data."""
    task = TASKS[subject.task]
    split = calibration.split if calibration is not None else None
    rows = rows_of(data, subject.task, how, split, characters=EXCERPT)
    own = False
    if task.is_language:
        examples, _ = calibration_examples(subject, rows, how, WINDOWS, 0, trust_remote_code=trusted)
    else:
        if subject.problem != SINGLE:  # the bounds below are about classes
            raise _UnknownError(f"a head for {LEARNT_BY[subject.problem]}; lrsurgery evaluate measures it")
        try:
            labelled = open_rows(data, subject.task, how, split=split)
            examples = evaluation_examples(subject, labelled, how, trust_remote_code=trusted)
        except (SurgeryError, ValueError):
            own = True
            examples, _ = calibration_examples(subject, rows, how, SAMPLES, 0, trust_remote_code=trusted)
    length, wanted = len(examples.dataset), WINDOWS if task.is_language else SAMPLES
    if not length:
        raise DataError(f"{data}: holds no example")
    chosen = [i * length // wanted for i in range(wanted)] if length > wanted else list(range(length))
    size = 1 if task.is_language else 16
    if task.is_language:
        vocabulary = subject.config.get_text_config().vocab_size
        size = max(1, min(WINDOWS, AT_A_TIME // (examples.size * vocabulary)))
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    if own:
        model = subject.model
        for batch in batches:
            with torch.no_grad():
                answers = logits_of(call(model, batch)).argmax(1 if task.takes_masks else -1).cpu()
            unread = batch["labels"].eq(IGNORED) if task.data else torch.zeros_like(answers, dtype=torch.bool)
            batch["labels"] = answers.masked_fill(unread, IGNORED)
    name = texts.TITLE if data == texts.NAME else public_name(data)  # a card shows it
    return _Samples(subject.task, batches, len(chosen), examples.size if task.is_language else None, name, own)


def _figures(subject: Subject, offloaded: bool, samples: _Samples) -> dict[str, float | None]:
    """The mean loss (nats; None if not finite), for classes the top-1 too; by block where the blocks are on disk."""
    model, rows = subject.model.eval(), list[Tensor]()
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def answer(**inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": logits_of(call(model, inputs))}

    def run(batch: Batch) -> Callable[[], None]:
        def forward() -> None:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            # where blocks are visited one at a time, a batch is one forward
            rows.append(measure_batch(subject, answer, inputs, whole=offloaded).cpu())

        return forward

    calls: Sequence[Callable[[], None]] = [run(batch) for batch in samples.batches]
    blocks = find_blocks(model) if offloaded else []
    with closing(visit_blocks(model, blocks, calls)) as visits:
        for _ in visits:
            pass
    figures = summarise(samples.task, torch.cat(rows), subject.problem)
    if not figures:
        raise _UnknownError(f"{samples.name}: no answer in the samples")
    loss = round(figures["loss"], 4) if math.isfinite(figures["loss"]) else None
    # outputs that are NaN are hits of nothing
    if samples.tokens is not None or TASKS[samples.task].takes_masks:
        return {"loss": loss}
    return {"loss": loss, "top1": round(figures.get("top1", 0.0), 4)}


def _text(found: Json, samples: _Samples) -> str:
    before, after = found["before"], found["after"]
    text = f"{before['loss']:.2f} -> " + ("NaN" if after["loss"] is None else f"{after['loss']:.2f}")
    if "top1" in before:
        text += f", top-1 {before['top1']:.1%} -> {after['top1']:.1%}"
    if samples.tokens is not None:
        what = f"{samples.count} windows of {samples.tokens} tokens of {samples.name}"
    else:
        what = f"{samples.count} {TASKS[samples.task].unit} of {samples.name}"
    if samples.own:
        what += ", by the dense model's own answers"
    return f"{text} ({what})"
