"""Tasks: the head that each one needs, how it is scored, and models loaded for it, from transformers and timm alike.

To add a task: a `Task` in `TASKS`, its name in `data/options.py`, and its examples in `data/examples.py`.

The file is long because the table and the loading of models by it stand together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_source, load_with_head
from lrsurgery.checkpoints.loading.modules import load_timm
from lrsurgery.checkpoints.quantised.dense import usual_dtype
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.own import is_own, lacks_for_measuring
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.embeddings.encoder import SentenceEncoder, pooling_of
from lrsurgery.data.interfaces.wrapped import REGRESSION, SINGLE, ImageClassifier, SpanPointer, Wrapped
from lrsurgery.data.options import IMAGES, PAIRS, QUESTIONS, SENTENCES, SPEECH, TEXT, WORDS
from lrsurgery.errors import RecipeError, SourceError
from lrsurgery.surgery.layers import plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BACKGROUND = 255  # the class of a mask that no loss counts, as transformers' configs have it


class MissingHeadError(RecipeError):
    """A checkpoint without the head of the task."""


def _next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1], labels[:, 1:]


def _same_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits, labels


def _one_class(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, None], labels.view(-1, 1)


def _pixels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (batch, classes, h, w) at the size of the labels (batch, height, width), as transformers enlarges them."""
    large = interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    answers = labels.flatten(1).long()
    return large.flatten(2).transpose(1, 2), answers.masked_fill(answers == BACKGROUND, IGNORED)


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
    is_language: bool = False  # predicts tokens of running text
    generates: bool = False  # decodes token by token
    masks: bool = False  # hides the tokens that it predicts
    takes_images: bool = False
    takes_masks: bool = False  # predicts a class for each pixel of an image; logits have the classes on axis 1
    embeds: bool = False  # compares sentences, without a head
    needs_padding: bool = False  # the head may find the last token by the padding token in the config
    scored: str = ""  # what one term of the loss is about, where that is not the unit
    data: str = ""  # what settings of data call it, where that is neither running text, sentences nor images

    @property
    def reads(self) -> str:
        """What settings of data go by: running text, sentences, images, or the task's own `data`."""
        if self.data:
            return self.data
        if self.is_language:
            return TEXT
        return IMAGES if self.takes_images else SENTENCES

    @property
    def classifies(self) -> bool:
        """Whether a head answers each example with one class, any number of classes, or numbers."""
        return not (self.is_language or self.data or self.takes_masks or self.embeds)

    @property
    def tags(self) -> bool:
        """Whether a head answers each word with one class."""
        return self.data == WORDS

    @property
    def decodes(self) -> bool:
        """Whether a decoder writes a text for each example, one token of its target after the other."""
        return self.data in (PAIRS, SPEECH)

    @property
    def listens(self) -> bool:
        """Whether a model is fed sound."""
        return self.data == SPEECH

    @property
    def points(self) -> bool:
        """Whether a head answers with the first and the last token of a span."""
        return self.data == QUESTIONS

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what transformers' models are given."""
        if self.takes_images:
            return ("pixel_values",)
        return ("input_features",) if self.listens else ("input_ids", "attention_mask")


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
TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    auto_class="AutoModelForTokenClassification",
    heads="TOKEN_CLASSIFICATION",
    unit="sentences",
    figures=("loss", "scored", "top1"),
    align=_same_tokens,
    scored="word",
    data=WORDS,
)
SEQ2SEQ = Task(
    name="seq2seq",
    auto_class="AutoModelForSeq2SeqLM",
    heads="SEQ_TO_SEQ_CAUSAL_LM",
    unit="pairs",
    figures=("loss", "scored", "perplexity", "top1"),
    align=_same_tokens,
    scored="token",
    data=PAIRS,
)
SPEECH_SEQ2SEQ = Task(
    name="speech-seq2seq",
    auto_class="AutoModelForSpeechSeq2Seq",
    heads="SPEECH_SEQ_2_SEQ",
    unit="recordings",
    figures=("loss", "scored", "perplexity", "top1"),
    align=_same_tokens,
    scored="token",
    data=SPEECH,
)
QUESTION_ANSWERING = Task(
    name="question-answering",
    auto_class="AutoModelForQuestionAnswering",
    heads="QUESTION_ANSWERING",
    unit="windows",
    figures=("loss", "scored", "top1"),
    align=_same_tokens,
    scored="position",
    data=QUESTIONS,
)
SEMANTIC_SEGMENTATION = Task(
    name="semantic-segmentation",
    auto_class="AutoModelForSemanticSegmentation",
    heads="SEMANTIC_SEGMENTATION",
    unit="images",
    figures=("loss", "scored", "pixel_accuracy", "mean_iou"),
    align=_pixels,
    scored="pixel",
    takes_images=True,
    takes_masks=True,
)
SENTENCE_EMBEDDINGS = Task(
    name="sentence-embeddings",
    auto_class="AutoModel",
    heads="",  # only for those who ask for it
    unit="sentences",
    figures=("loss", "scored", "mse", "pearson", "spearman"),
    align=_one_class,
    embeds=True,
)
# a checkpoint is for the first task whose mapping lists its model class; for MASKED_LM after all others
TASKS = {
    task.name: task
    for task in (
        *(CAUSAL_LM, MASKED_LM, SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION),
        *(
            TOKEN_CLASSIFICATION,
            SEQ2SEQ,
            SPEECH_SEQ2SEQ,
            QUESTION_ANSWERING,
            SEMANTIC_SEGMENTATION,
            SENTENCE_EMBEDDINGS,
        ),
    )
}
TIMM = IMAGE_CLASSIFICATION  # the task of every timm model


def task_of(source: Source) -> str:
    """Name the task that the checkpoint's architecture is for. Raises RecipeError if it is for none of `TASKS`."""
    if source.library == "timm":
        return TIMM.name
    from lrsurgery.checkpoints.upstream.transformers import head_classes

    name = source.architecture
    # of BART and its kin, which transformers lists as masked models, too
    for task in sorted(TASKS.values(), key=lambda task: task is MASKED_LM):
        # transformers' mappings also have decoders that read sound among their tokens
        fits = not task.decodes or bool(source.config.get("is_encoder_decoder"))
        if fits and task.heads and name in head_classes(task.heads):
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


@dataclass(frozen=True)
class Subject:
    """A model, the checkpoint that it was loaded from, and its task."""

    source: Source
    task: str
    model: nn.Module  # in fp32; behind an interface (`Wrapped`) where it is timm's, marks spans, embeds or has no task
    stored: torch.dtype  # of the checkpoint's weights
    notes: tuple[str, ...] = ()
    problem: str = SINGLE  # of a head for classification or regression

    @property
    def body(self) -> nn.Module:
        """The transformers or timm module itself."""
        return self.model.body if isinstance(self.model, Wrapped) else self.model

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
    usual_dtype(source)  # reads the headers: a damaged file is named here, before any library's loader meets it
    subject = _load(source, task, from_scratch_seed, classes, new_head or classes is not None, trust_remote_code)
    check_finite_weights(source, subject.body)
    if source.library == "transformers" and is_own(subject.body) and not TASKS[task].points:
        lacks = lacks_for_measuring(subject.body, TASKS[task].inputs)
        if lacks is not None:
            raise SourceError(f"{source.reference}: {type(subject.body).__name__}: {lacks}")
    return subject


def check_finite_weights(source: Source, body: nn.Module) -> None:
    """Raise SourceError that names a parameter which holds NaN or Inf."""
    for name, parameter in body.named_parameters():
        if not bool(torch.isfinite(plain(parameter)).all()):
            raise SourceError(f"{source.reference}: {name} holds NaN or Inf; repair the checkpoint first")


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
    if TASKS[task].embeds:
        return _load_encoder(source, from_scratch_seed, trust_remote_code)
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
    return Subject(source, task, behind_interface(model, task), usual_dtype(source), notes)


def behind_interface(model: nn.Module, task: str) -> nn.Module:
    """Wrap a transformers model whose outputs for the task are no logits."""
    return SpanPointer(model).train(model.training) if TASKS[task].points else model


def _load_encoder(source: Source, seed: int | None, trust_remote_code: bool) -> Subject:
    task = SENTENCE_EMBEDDINGS
    pooling, note = pooling_of(source.folder)
    if seed is not None:
        body = _initialise(source, task.name, False, seed, None, trust_remote_code)
    else:
        body, new = load_with_head(source, task.auto_class, trust_remote_code=trust_remote_code, dtype=torch.float32)
        new = [name for name in new if "pooler" not in name.split(".")]  # which nobody reads
        if new:
            raise SourceError(f"{source.reference}: lacks {new[0]}, which would be random")
    notes = () if note is None else (f"{source.reference}: {note}",)
    return Subject(source, task.name, SentenceEncoder(body, pooling).eval(), usual_dtype(source), notes, REGRESSION)


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
    return Subject(source, TIMM.name, ImageClassifier(body).eval(), usual_dtype(source))


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
    if not (TASKS[subject.task].is_language or TASKS[subject.task].decodes):
        return head_size(subject)
    return int(subject.config.get_text_config().vocab_size)


def with_problem(subject: Subject, problem: str) -> Subject:
    """Tell the model, whose own loss goes by it, which problem its head solves."""
    if isinstance(subject.model, ImageClassifier):
        subject.model.problem = problem
    else:
        subject.config.problem_type = problem
    return dataclasses.replace(subject, problem=problem)
