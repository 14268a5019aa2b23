"""Options of data, which calibration, `evaluate` and `finetune` share; and how a field of options is described."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TypeVar

from lrsurgery.errors import RecipeError

# names of `data.tasks.TASKS`, for a command line that does not import torch
TASKS = (
    "causal-lm",
    "masked-lm",
    "sequence-classification",
    "image-classification",
    "token-classification",
    "seq2seq",
    "speech-seq2seq",
    "question-answering",
    "semantic-segmentation",
    "sentence-embeddings",
)
NO_TASK = "none"  # whatever the model returns, compared with what a teacher returns
DATA = "Data"  # panel of help
TEXT, SENTENCES, IMAGES = "running text", "sentences", "images"  # what a model reads
WORDS, PAIRS, QUESTIONS, SPEECH = "tagged words", "pairs of texts", "questions", "speech"
BOS = ("auto", "always", "never")
LARGEST = 2**31 - 1  # of whole numbers
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Help of one field of options, and bounds that hold for every model and all data."""

    default: object
    help: str  # a noun phrase; the default is shown behind it
    panel: str
    metavar: str | None = None
    short: str | None = None  # one-letter flag
    choices: tuple[str, ...] = ()
    table: tuple[str, str] | None = None  # module and name of a table whose keys are the choices
    suggestions: tuple[str, ...] = ()  # choices that help lists among others
    least: int | None = None
    positive: bool = False
    of: tuple[str, ...] = ()  # what a model reads that the setting is about; nothing: whatever it reads


def setting(
    default: Value,
    help: str,
    *,
    panel: str,
    metavar: str | None = None,
    short: str | None = None,
    choices: tuple[str, ...] = (),
    table: tuple[str, str] | None = None,
    suggestions: tuple[str, ...] = (),
    least: int | None = None,
    positive: bool = False,
    of: tuple[str, ...] = (),
) -> Value:
    """Make a field of a dataclass, with its `Setting` as metadata."""
    about = Setting(
        default=default,
        help=help,
        panel=panel,
        metavar=metavar,
        short=short,
        choices=choices,
        table=table,
        suggestions=suggestions,
        least=least,
        positive=positive,
        of=of,
    )
    return field(default=default, metadata={"setting": about})


def settings_of(options: type[DataOptions]) -> dict[str, Setting]:
    """List the settings by name, in the order of the fields."""
    return {each.name: each.metadata["setting"] for each in fields(options)}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How text or images become examples."""

    task: str | None = setting(
        None,
        "Purpose of the model; from its architecture by default; none: whatever it returns, as a teacher returns it.",
        panel=DATA,
        choices=(*TASKS, NO_TASK),
    )
    subset: str | None = setting(None, "Configuration of a hub dataset that has several.", panel=DATA)
    text_column: str | None = setting(
        None,
        "Column of the text or the words; for sentence pairs, or question and context, two with a comma between.",
        panel=DATA,
        of=(TEXT, SENTENCES, WORDS, PAIRS, QUESTIONS),
    )
    target_column: str | None = setting(
        None, "Column of the text to write, for seq2seq and speech.", panel=DATA, of=(PAIRS, SPEECH)
    )
    audio_column: str | None = setting(None, "Column of the recording.", panel=DATA, of=(SPEECH,))
    language: str | None = setting(
        None, "Language that is spoken, such as en, for a model of several.", panel=DATA, of=(SPEECH,)
    )
    label_column: str | None = setting(
        None,
        "Column of the class, the classes, the number, the tags, the answers or the mask.",
        panel=DATA,
        of=(SENTENCES, IMAGES, WORDS, QUESTIONS),
    )
    label_map: str | None = setting(
        None,
        "JSON or CSV file: class of the data, class of the model.",
        panel=DATA,
        metavar="FILE",
        of=(SENTENCES, IMAGES, WORDS),
    )
    image_column: str | None = setting(None, "Column of the image.", panel=DATA, of=(IMAGES,))
    block_size: int | None = setting(
        None,
        "Tokens of a sequence; the model's maximum by default, 2,048 at most.",
        panel=DATA,
        least=2,
        of=(TEXT, SENTENCES, WORDS, PAIRS, QUESTIONS),
    )
    bos: str = setting(
        "auto",
        "BOS token at the head of each sequence; auto: where the tokenizer adds one.",
        panel=DATA,
        choices=BOS,
        of=(TEXT,),
    )
    join: bool = setting(
        False,
        "All rows of text as one document, each row on lines of its own, as WikiText's are meant.",
        panel=DATA,
        of=(TEXT,),
    )
    generate: int | None = setting(
        None,
        "Tokens to generate for each text at most, which is slow: ROUGE and the word error rate beside the loss.",
        panel=DATA,
        metavar="N",
        least=1,
        of=(PAIRS, SPEECH),
    )
    image_size: int | None = setting(
        None, "Pixels of an image's side; the checkpoint's own size by default.", panel=DATA, least=1, of=(IMAGES,)
    )
    test_size: bool = setting(
        False, "Images measured at the size and crop that a timm checkpoint names for tests.", panel=DATA, of=(IMAGES,)
    )

    def check(self) -> None:
        """Check every setting. Raises RecipeError for a value that no data could make right."""
        self.check_values()

    def check_values(self) -> None:
        """Check each setting by itself. Raises RecipeError."""
        for name, about in settings_of(type(self)).items():
            value = getattr(self, name)
            if value is None:
                continue
            if about.choices:
                check_choice(name, value, about.choices)
            if isinstance(value, float):
                check_finite(name, value, positive=about.positive)
            elif isinstance(value, int) and not isinstance(value, bool):
                check_at_least(name, value, about.least or 0)
                if value > LARGEST:
                    raise RecipeError(f"{name} {str(value)[:20]}: write at most {LARGEST:,}")

    def check_for(self, reads: str) -> None:
        """Check that every setting is about what the model reads, such as TEXT or IMAGES. Raises RecipeError."""
        for name, about in settings_of(type(self)).items():
            value = getattr(self, name)
            # turning off what is not there is no mistake
            if about.of and reads not in about.of and value != about.default and value is not False:
                shown = name if value is True else f"{name} {value}"
                raise RecipeError(
                    f"{shown}: is for {' and '.join(about.of)}, and this model reads {reads}; leave it out"
                )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Check that a value is among the known ones. Raises RecipeError that lists them."""
    if value not in known:
        raise RecipeError(f"unknown {name} '{value}'; known: {', '.join(known)}")


def check_at_least(name: str, value: float, bound: int) -> None:
    """Check a lower bound. Raises RecipeError for a value below it."""
    if value < bound:
        raise RecipeError(f"{name} {value}: write at least {bound}")


def check_finite(name: str, value: float, *, positive: bool) -> None:
    """Check for a number of at least 0, or above 0 if `positive`. Raises RecipeError, also for NaN and infinities."""
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise RecipeError(f"{name} {value}: write a number {'above 0' if positive else 'of at least 0'}")
