"""Columns of unlabelled data, matched with the arguments of a model: what it is fed, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lrsurgery.data.batches import Rows
from lrsurgery.data.datasets import IMAGE_COLUMNS, TEXT_COLUMNS, column_names, pick_column
from lrsurgery.data.options import NO_TASK, DataOptions, settings_of
from lrsurgery.data.speech.recordings import AUDIO_COLUMNS, SOUNDS
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.modules import arguments_of

TARGET_COLUMNS = ("target", "targets", "summary", "highlights", "transcription", "answer", "labels")
# arguments that say what an example is; the others go along with them
MAIN = ("input_ids", "inputs_embeds", "pixel_values", *SOUNDS)
UNUSED = ("label_column", "label_map", "bos", "join", "image_size", "test_size")  # settings that mean nothing here
TEXT, IMAGE = "text", "image"  # towers of CLIP's kin


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where a model's inputs come from: columns of the data."""

    takes: tuple[str, ...]  # arguments of the model
    tensors: tuple[str, ...] = ()  # columns that are named as arguments, and fed as they are
    text: tuple[str, ...] = ()  # one, or two of a pair
    image: str | None = None
    audio: str | None = None
    target: str | None = None  # text or tokens that a decoder reads
    tower: str | None = None  # TEXT or IMAGE where one tower of two is fed

    @property
    def decodes(self) -> bool:
        """Whether the decoder's inputs have to be made."""
        return "decoder_input_ids" in self.takes and "decoder_input_ids" not in self.tensors


def find_feed(body: nn.Module, rows: Rows, options: DataOptions) -> Feed:
    """Match the columns of the data with what the model takes. Raises DataError, RecipeError for a setting of tasks."""
    check_settings(options)
    takes, names, config = arguments_of(body), column_names(rows.rows), getattr(body, "config", None)
    tensors = [name for name in names if name in takes and name != "labels" and _is_tensor(rows, name)]
    text = image = audio = None
    if options.text_column is not None or (takes_text(takes) and not {"input_ids", "inputs_embeds"} & {*tensors}):
        text = _text(rows, options, needed=options.text_column is not None)
        tensors = [name for name in tensors if not text or name not in ("input_ids", "attention_mask")]
    if "pixel_values" in takes and (options.image_column is not None or "pixel_values" not in tensors):
        image = options.image_column and pick_column(rows.rows, options.image_column, (), "image", rows.reference)
        image = image or next((name for name in IMAGE_COLUMNS if name in names), None)
        tensors = [name for name in tensors if image is None or name != "pixel_values"]
    sound = next((name for name in SOUNDS if name in takes), None)
    if sound is not None and sound not in tensors:
        audio = next((name for name in AUDIO_COLUMNS if name in names), None)
    if not (text or image or audio or set(tensors) & set(MAIN)):
        wanted = " or ".join(name for name in MAIN if name in takes)
        raise DataError(
            f"{rows.reference}: nothing to feed the model, which takes {wanted or 'other inputs'}; it has"
            f" {', '.join(names)}; name columns as the arguments, or say --text-column or --image-column"
        )
    if image and text and getattr(config, "image_token_id", None) is not None:
        raise DataError(
            f"{rows.reference}: this model finds its images by tokens in the text, which its processor puts there;"
            " save what that makes as columns input_ids, attention_mask, pixel_values, ..."
        )
    return Feed(
        takes=takes,
        tensors=tuple(tensors),
        text=text or (),
        image=image,
        audio=audio,
        target=_target(rows, takes, text),
        tower=_tower(body, bool(text) or "input_ids" in tensors, bool(image) or "pixel_values" in tensors),
    )


def check_settings(options: DataOptions) -> None:
    """Raise RecipeError for a setting that only tasks go by."""
    usual = settings_of(DataOptions)
    for name in UNUSED:
        value = getattr(options, name)
        if value != usual[name].default:
            raise RecipeError(f"{name}: is for models with a task, and here there is none ({NO_TASK}); leave it out")


def takes_text(takes: tuple[str, ...]) -> bool:
    """Whether a model's arguments are those of a reader of text."""
    return "input_ids" in takes


def _is_tensor(rows: Rows, name: str) -> bool:
    """Whether a column holds numbers, as a model takes them: of pixels, floats with the channels first."""
    value: Any = rows.rows[0][name]
    if not isinstance(value, list | np.ndarray):
        return False
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return False
    if array.dtype.kind not in "fiub":
        return False
    return name != "pixel_values" or (array.dtype.kind == "f" and array.ndim >= 3 and array.shape[-1] not in (1, 3))


def _text(rows: Rows, options: DataOptions, *, needed: bool) -> tuple[str, ...] | None:
    if needed:
        asked = str(options.text_column).split(",")
        return tuple(pick_column(rows.rows, each, (), "text", rows.reference) for each in asked)
    names = column_names(rows.rows)
    found = next((name for name in (*TEXT_COLUMNS, "caption") if name in names), None)
    return None if found is None else (found,)


def _target(rows: Rows, takes: tuple[str, ...], text: tuple[str, ...] | None) -> str | None:
    if "decoder_input_ids" not in takes:
        return None
    usual = TARGET_COLUMNS if takes_text(takes) else (*TARGET_COLUMNS, *TEXT_COLUMNS)
    known = [name for name in usual if name in column_names(rows.rows) and name not in (text or ())]
    first = rows.rows[0]
    return next((name for name in known if isinstance(first[name], str | list)), None)


def _tower(body: nn.Module, has_text: bool, has_image: bool) -> str | None:
    two = hasattr(body, "get_text_features") and hasattr(body, "get_image_features")
    if not two or has_text == has_image:
        return None
    return TEXT if has_text else IMAGE
