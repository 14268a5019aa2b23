"""What a model is for: its task, its loss, and what is counted of each example, for transformers and timm alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_model, load_timm, load_with_head
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.text import IGNORED
from lrsurgery.errors import RecipeError, SourceError

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
HEADS = {  # transformers' own mappings of model classes
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "image-classification": "IMAGE_CLASSIFICATION",
}
LANGUAGE = ("causal-lm", "masked-lm")
CLASSIFICATION = ("sequence-classification", "image-classification")


def task_of(source: Source) -> str:
    """The task that the checkpoint's architecture is for. Raises RecipeError where it is none of ours."""
    if source.library == "timm":
        return "image-classification"
    from lrsurgery.checkpoints.upstream.transformers import head_classes

    name = source.architecture
    for task, mapping in HEADS.items():
        if name in head_classes(mapping):
            return task
    raise RecipeError(
        f"{source.reference}: {name or 'a model without a head'} is for none of {', '.join(AUTO_CLASSES)};"
        " name one of them with --task"
    )


def is_for(source: Source, task: str) -> bool:
    """Whether the checkpoint comes with the head of this task."""
    try:
        return task_of(source) == task
    except RecipeError:
        return False


class ImageClassifier(nn.Module):
    """A timm model in the form that transformers' Trainer asks for."""

    main_input_name = "pixel_values"

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.float(), labels), "logits": logits}

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        if not hasattr(self.body, "set_grad_checkpointing"):
            raise RecipeError(f"gradient_checkpointing: timm's {type(self.body).__name__} cannot do it")
        self.body.set_grad_checkpointing(True)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.gradient_checkpointing_enable(**options)


@dataclass(frozen=True)
class Subject:
    """A model with what it was loaded from and what it is for."""

    source: Source
    task: str
    model: nn.Module  # in fp32; a timm module is wrapped in ImageClassifier
    stored: torch.dtype  # of the checkpoint's weights
    notes: tuple[str, ...] = ()

    @property
    def body(self) -> nn.Module:
        """The transformers or timm module itself."""
        return self.model.body if isinstance(self.model, ImageClassifier) else self.model

    @property
    def is_factorised(self) -> bool:
        return self.source.is_factorised


def load_subject(
    source: Source,
    task: str,
    *,
    from_scratch_seed: int | None = None,
    classes: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """The model in fp32, in eval mode; with `classes`, under a new head for them.

    Raises SourceError, also for weights that are not finite; RecipeError for a task that the library has no head for.
    """
    _stored_dtype(source)  # reads the headers: a damaged file is named here, before any library's loader meets it
    subject = _load(source, task, from_scratch_seed, classes, trust_remote_code)
    for name, parameter in subject.body.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SourceError(f"{source.reference}: {name} holds NaN or Inf; repair the checkpoint first")
    return subject


def _load(
    source: Source, task: str, from_scratch_seed: int | None, classes: Sequence[str] | None, trust_remote_code: bool
) -> Subject:
    if source.library == "timm":
        if task != "image-classification":
            raise RecipeError(f"task {task}: timm models are for image-classification")
        return _load_timm(source, from_scratch_seed, classes)
    own = is_for(source, task)
    notes: tuple[str, ...] = ()
    if from_scratch_seed is not None:
        model = _fresh(source, task, own, from_scratch_seed, classes, trust_remote_code)
    elif own and classes is None:
        model = load_model(_place(source), dtype=torch.float32, trust_remote_code=trust_remote_code)
    else:
        labels = None if classes is None else dict(enumerate(classes))
        model, new = load_with_head(
            source, AUTO_CLASSES[task], id2label=labels, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
        if new:
            notes = (f"new and untrained: {', '.join(new)}",)
    return Subject(source, task, model, _stored_dtype(source), notes)


def _place(source: Source) -> str | Path:
    return source.folder if source.folder is not None else source.reference


def _stored_dtype(source: Source) -> torch.dtype:
    from lrsurgery.checkpoints.tensors import open_tensors

    if not source.files:
        return torch.float32
    tensors = open_tensors(list(source.files))
    kinds = [tensors.describe(key)[0] for key in tensors.keys()]  # noqa: SIM118
    floating = [kind for kind in kinds if kind.is_floating_point]
    return max(set(floating), key=floating.count) if floating else torch.float32


def _fresh(
    source: Source, task: str, own: bool, seed: int, classes: Sequence[str] | None, trust_remote_code: bool
) -> nn.Module:
    import transformers

    skeleton: Any = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    config = skeleton.config
    if classes is not None:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    torch.manual_seed(seed)
    model: nn.Module = (
        type(skeleton)(config) if own else getattr(transformers, AUTO_CLASSES[task]).from_config(config)
    ).float()
    return model.eval()


def _load_timm(source: Source, seed: int | None, classes: Sequence[str] | None) -> Subject:
    if seed is not None:
        torch.manual_seed(seed)
        body: Any = build_model(source, device="cpu").float()
    else:
        body = load_timm(source, torch.float32)
    if classes is not None:
        body.reset_classifier(len(classes))
        config = {**source.config, "num_classes": len(classes)}
        pretrained = {**(config.get("pretrained_cfg") or {}), "num_classes": len(classes)}
        pretrained["label_names"] = list(classes)
        source = dataclasses.replace(source, config={**config, "pretrained_cfg": pretrained})
    return Subject(source, "image-classification", ImageClassifier(body).eval(), _stored_dtype(source))


def _scored(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (batch, positions, classes) and the labels (batch, positions) that they answer."""
    if task == "causal-lm":
        return logits[:, :-1], labels[:, 1:]
    return (logits, labels) if task == "masked-lm" else (logits[:, None], labels.view(-1, 1))


def measure(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Of each example, in fp64 (batch, 4): summed negative log likelihood, positions scored, top-1 and top-5 hits."""
    logits, labels = _scored(task, logits, labels)
    counted = labels.ne(IGNORED)
    nll = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = top.eq(labels.unsqueeze(-1)) & counted.unsqueeze(-1)
    columns = (nll * counted, counted, hits[..., 0], hits.any(-1))
    return torch.stack([column.double().sum(-1) for column in columns], dim=-1)


def summarise(task: str, sums: Tensor) -> dict[str, float]:
    """Quality over a whole set from `measure`'s rows (examples, 4)."""
    nll, count, top1, top5 = (float(value) for value in sums.double().sum(0))
    if not count:
        return {}
    loss = nll / count
    found = {"loss": loss, "scored": count}
    if task in LANGUAGE:
        # exp overflows beyond about 709 nats a token
        found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    found["top1"] = top1 / count
    if task != "sequence-classification":
        found["top5"] = top5 / count
    return found


def distillation(task: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, int]:
    """T^2 KL(teacher || student) at temperature T, summed over the scored positions, and how many there are.

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    student, answers = _scored(task, student, labels)
    teacher, _ = _scored(task, teacher, labels)
    counted = answers.ne(IGNORED)
    ours = log_softmax(student[counted].float() / temperature, dim=-1)
    theirs = log_softmax(teacher[counted].float() / temperature, dim=-1)
    total = kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2
    return total, int(counted.sum())
