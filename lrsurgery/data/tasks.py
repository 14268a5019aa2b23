"""Tasks: the head that each one needs, how it is scored, and models loaded for it, from transformers and timm alike.

To add a task: a `Task` in `TASKS`, its name in `data/options.py`, and its examples in `data/examples.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_source, load_timm, load_with_head
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.own import is_own, lacks_for_measuring
from lrsurgery.data.options import IMAGES, SENTENCES, TEXT
from lrsurgery.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# problems that a head solves, by transformers' names: one class of several, any number of classes, numbers
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class MissingHeadError(RecipeError):
    """A checkpoint without the head of the task."""


def _next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1], labels[:, 1:]


def _same_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits, labels


def _one_class(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, None], labels.view(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is for."""

    name: str
    auto_class: str  # transformers' AutoModelFor... that loads a model under the task's head
    heads: str  # transformers' mapping that lists the model classes with this head
    unit: str  # what progress and throughput count: "tokens", "sentences" or "images"
    figures: tuple[str, ...]  # of quality, in the order of reports
    # logits and labels -> logits (batch, positions, classes) and the labels (batch, positions) that they answer
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    is_language: bool = False  # predicts tokens of running text; the other tasks predict one class for each example
    generates: bool = False  # decodes token by token
    masks: bool = False  # hides the tokens that it predicts
    takes_images: bool = False
    needs_padding: bool = False  # the head may find the last token by the padding token in the config

    @property
    def reads(self) -> str:
        """What settings of data go by: running text, sentences or images."""
        if self.is_language:
            return TEXT
        return IMAGES if self.takes_images else SENTENCES

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what transformers' models are given."""
        return ("pixel_values",) if self.takes_images else ("input_ids", "attention_mask")


CAUSAL_LM = Task(
    name="causal-lm",
    auto_class="AutoModelForCausalLM",
    heads="CAUSAL_LM",
    unit="tokens",
    figures=("loss", "scored", "perplexity", "top1", "top5"),
    align=_next_tokens,
    is_language=True,
    generates=True,
)
MASKED_LM = Task(
    name="masked-lm",
    auto_class="AutoModelForMaskedLM",
    heads="MASKED_LM",
    unit="tokens",
    figures=("loss", "scored", "perplexity", "top1", "top5"),
    align=_same_tokens,
    is_language=True,
    masks=True,
)
SEQUENCE_CLASSIFICATION = Task(
    name="sequence-classification",
    auto_class="AutoModelForSequenceClassification",
    heads="SEQUENCE_CLASSIFICATION",
    unit="sentences",
    figures=("loss", "scored", "top1"),
    align=_one_class,
    needs_padding=True,
)
IMAGE_CLASSIFICATION = Task(
    name="image-classification",
    auto_class="AutoModelForImageClassification",
    heads="IMAGE_CLASSIFICATION",
    unit="images",
    figures=("loss", "scored", "top1", "top5"),
    align=_one_class,
    takes_images=True,
)
# a checkpoint is for the first task whose mapping lists its model class
TASKS = {task.name: task for task in (CAUSAL_LM, MASKED_LM, SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION)}
TIMM = IMAGE_CLASSIFICATION  # the task of every timm model


def task_of(source: Source) -> str:
    """Name the task that the checkpoint's architecture is for. Raises RecipeError if it is for none of `TASKS`."""
    if source.library == "timm":
        return TIMM.name
    from lrsurgery.checkpoints.upstream.transformers import head_classes

    name = source.architecture
    for task in TASKS.values():
        if name in head_classes(task.heads):
            return task.name
    raise RecipeError(
        f"{source.reference}: {name or 'a model without a head'} is for none of {', '.join(TASKS)};"
        " name one of them with --task"
    )


def is_for(source: Source, task: str) -> bool:
    """Tell whether the checkpoint comes with the head of this task."""
    try:
        return task_of(source) == task
    except RecipeError:
        return False


class ImageClassifier(nn.Module):
    """A timm model behind the interface that transformers' Trainer expects."""

    main_input_name = "pixel_values"

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.problem = SINGLE

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": self._loss(logits.float(), labels), "logits": logits}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem == REGRESSION:
            return mse_loss(logits.reshape(-1), labels.float().reshape(-1))
        if self.problem == MULTI:
            return binary_cross_entropy_with_logits(logits, labels.float())
        return cross_entropy(logits, labels)

    def gradient_checkpointing_enable(self, **_: object) -> None:
        if not hasattr(self.body, "set_grad_checkpointing"):
            raise RecipeError(f"gradient_checkpointing: timm's {type(self.body).__name__} cannot do it")
        self.body.set_grad_checkpointing(True)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **options: object) -> None:
        self.gradient_checkpointing_enable(**options)


@dataclass(frozen=True)
class Subject:
    """A model, the checkpoint that it was loaded from, and its task."""

    source: Source
    task: str
    model: nn.Module  # in fp32; a timm module is wrapped in ImageClassifier
    stored: torch.dtype  # of the checkpoint's weights
    notes: tuple[str, ...] = ()
    problem: str = SINGLE  # of a head for classification or regression

    @property
    def body(self) -> nn.Module:
        """The transformers or timm module itself."""
        return self.model.body if isinstance(self.model, ImageClassifier) else self.model

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of a transformers model."""
        return self.body.config

    @property
    def is_factorised(self) -> bool:
        return self.source.is_factorised


def load_subject(
    source: Source,
    task: str,
    *,
    from_scratch_seed: int | None = None,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
) -> Subject:
    """Load the model in fp32 and eval mode; with `classes`, under a new head for them.

    A head that the checkpoint lacks is made, untrained, only with `new_head` or `classes`.

    Raises SourceError, also for weights that are not finite; RecipeError for a task that the library has no head for,
    MissingHeadError for a checkpoint without one.
    """
    _stored_dtype(source)  # reads the headers: a damaged file is named here, before any library's loader meets it
    subject = _load(source, task, from_scratch_seed, classes, new_head or classes is not None, trust_remote_code)
    for name, parameter in subject.body.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SourceError(f"{source.reference}: {name} holds NaN or Inf; repair the checkpoint first")
    if source.library == "transformers" and is_own(subject.body):
        lacks = lacks_for_measuring(subject.body, TASKS[task].inputs)
        if lacks is not None:
            raise SourceError(f"{source.reference}: {type(subject.body).__name__}: {lacks}")
    return subject


def _load(
    source: Source,
    task: str,
    from_scratch_seed: int | None,
    classes: Sequence[str] | None,
    new_head: bool,
    trust_remote_code: bool,
) -> Subject:
    if source.library == "timm":
        if task != TIMM.name:
            raise RecipeError(f"task {task}: timm models are for {TIMM.name}")
        return _load_timm(source, from_scratch_seed, classes, new_head)
    own = is_for(source, task)
    notes: tuple[str, ...] = ()
    if from_scratch_seed is not None:
        model = _initialise(source, task, own, from_scratch_seed, classes, trust_remote_code)
    elif own and classes is None:
        model = load_source(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    else:
        model, new = load_with_head(
            source,
            TASKS[task].auto_class,
            id2label=None if classes is None else dict(enumerate(classes)),
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
        )
        if new and not new_head:
            raise MissingHeadError(_no_head(source, task, new))
        if new:
            notes = (f"new and untrained: {', '.join(new)}",)
    return Subject(source, task, model, _stored_dtype(source), notes)


def _stored_dtype(source: Source) -> torch.dtype:
    """The dtype of most of the checkpoint's floating-point tensors."""
    from lrsurgery.checkpoints.quantised.dense import open_weights

    if not source.files:
        return torch.float32
    tensors = open_weights(source)
    dtypes = [tensors.describe(key)[0] for key in tensors.keys()]  # noqa: SIM118
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(set(floating), key=floating.count) if floating else torch.float32


def _initialise(
    source: Source, task: str, own: bool, seed: int, classes: Sequence[str] | None, trust_remote_code: bool
) -> nn.Module:
    """A transformers model with random weights, of the checkpoint's own class if that has the task's head."""
    import transformers

    skeleton: PreTrainedModel = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    config = skeleton.config
    if classes is not None:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    torch.manual_seed(seed)
    auto_class = getattr(transformers, TASKS[task].auto_class)
    model: nn.Module = type(skeleton)(config) if own else auto_class.from_config(config)
    return model.float().eval()


def _no_head(source: Source, task: str, new: Sequence[str]) -> str:
    parts = f"{new[0]}{f' and {len(new) - 1} more' if len(new) > 1 else ''} would be random"
    return f"{source.reference}: has no head for {task}: {parts}; `lrsurgery finetune --new-head` makes and trains one"


def _load_timm(source: Source, seed: int | None, classes: Sequence[str] | None, new_head: bool) -> Subject:
    if seed is not None:
        torch.manual_seed(seed)
        body = build_model(source, device="cpu").float()
    else:
        body = load_timm(source, torch.float32)
        if not new_head and getattr(body, "num_classes", None) == 0:
            raise MissingHeadError(_no_head(source, TIMM.name, ["the classifier"]))
    if classes is not None:
        if not hasattr(body, "reset_classifier"):
            name = type(body).__name__
            raise RecipeError(f"{source.reference}: {name} has no reset_classifier, by which timm makes a new head")
        body.reset_classifier(len(classes))  # type: ignore[operator]
        source = source.with_classes(classes)
    return Subject(source, TIMM.name, ImageClassifier(body).eval(), _stored_dtype(source))


def class_names(subject: Subject) -> list[str]:
    """Name the classes of the model's head as its config does; by numbers where it has no names."""
    count = head_size(subject)
    if subject.source.library == "transformers":
        names = subject.config.id2label
        return [names.get(i, str(i)) for i in range(count)]
    names = subject.source.config.get("label_names") or subject.source.pretrained_cfg.get("label_names")
    return list(names) if names and len(names) == count else [str(i) for i in range(count)]


def head_size(subject: Subject) -> int:
    """Count the outputs of the model's head for classes or numbers."""
    if subject.source.library == "timm":
        return int(getattr(subject.body, "num_classes", 0))
    return int(subject.config.num_labels)


def count_logits(subject: Subject) -> int:
    """Count the logits of one prediction: classes, or tokens of the vocabulary."""
    if not TASKS[subject.task].is_language:
        return head_size(subject)
    return int(subject.config.get_text_config().vocab_size)


def with_problem(subject: Subject, problem: str) -> Subject:
    """Tell the model, whose own loss goes by it, which problem its head solves."""
    if isinstance(subject.model, ImageClassifier):
        subject.model.problem = problem
    else:
        subject.config.problem_type = problem
    return dataclasses.replace(subject, problem=problem)
