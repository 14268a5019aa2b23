"""Images with a mask of classes, through the checkpoint's own image processor."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lrsurgery.data.batches import Example, Examples, Rows, seed_of
from lrsurgery.data.datasets import IMAGE_COLUMNS, pick_column
from lrsurgery.data.images import Pixels, decode, stack, to_mode
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import BACKGROUND, TASKS, Subject, head_size
from lrsurgery.errors import DataError
from lrsurgery.text import expanded

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from lrsurgery.checkpoints.source import Source

MASK_COLUMNS = ("mask", "annotation", "label", "labels", "segmentation", "segmentation_mask", "semantic_mask")


class Pictures(Dataset[Example]):
    """Images, with their masks where there is a column of them; with a seed, some flipped, by seed, epoch and place."""

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: tuple[str, str | None],  # of images and masks
        processor: Any,
        classes: int,
        mode: str,
        reference: str,
        seed: int | None = None,
    ) -> None:
        from datasets import Image as Feature

        self._image, self._mask = columns
        rows = rows.select_columns([column for column in columns if column is not None])
        for column, feature in rows.features.items():
            if isinstance(feature, Feature):  # decoded below, where the row is known
                rows = rows.cast_column(column, Feature(decode=False))
        self._rows, self._processor, self._classes, self._mode = rows, processor, classes, mode
        self._reference, self._seed, self._epoch = reference, seed, 0
        place = expanded(reference)
        self._folder = place if place.is_dir() else place.parent

    def set_epoch(self, epoch: int) -> None:
        """Flip others from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(index)]
        try:
            image = to_mode(decode(row[self._image], self._folder), self._mode)
            masks = {} if self._mask is None else {"segmentation_maps": self.classes_at(index)}
            if self._seed is not None and seed_of(self._seed, self._epoch, int(index)) % 2:
                image, masks = _flipped(image), {name: np.ascontiguousarray(m[:, ::-1]) for name, m in masks.items()}
            made = self._processor(image, **masks, return_tensors="pt")
        except DataError:
            raise
        except Exception as e:
            raise DataError(
                f"{self._reference}: image {index} cannot be used ({' '.join(str(e).split())[:200]})"
            ) from e
        inputs: Example = {"pixel_values": made["pixel_values"][0].float()}
        if masks:
            inputs["labels"] = self._checked(made["labels"][0].long(), index)
        return inputs

    def classes_at(self, index: int) -> Pixels:
        """The mask of a row (height, width), as it is stored. Raises DataError for one that holds no classes."""
        assert self._mask is not None
        value = self._rows[int(index)][self._mask]
        try:
            image = decode(value, self._folder) if not isinstance(value, list) else np.asarray(value)
        except Exception as e:
            raise DataError(f"{self._reference}: mask {index} does not decode ({e})") from e
        found = np.asarray(image)
        if found.ndim != 2 or found.dtype.kind not in "iub":
            raise DataError(
                f"{self._reference}: mask {index} has shape {found.shape} of {found.dtype}; a mask has one whole number"
                " a pixel, the class"
            )
        return found.astype(np.int64)

    def _checked(self, labels: Tensor, index: int) -> Tensor:
        odd = labels[(labels != BACKGROUND) & ((labels < 0) | (labels >= self._classes))]
        if len(odd):
            raise DataError(
                f"{self._reference}: mask {index} has class {int(odd[0])}, the model's head {self._classes} classes"
                f" from 0 ({BACKGROUND} is ignored); --new-head makes a head for these"
            )
        return labels


def pictures_of(
    subject: Subject,
    rows: Rows,
    options: DataOptions,
    *,
    masks: bool,
    flip_seed: int | None = None,
    trust_remote_code: bool = False,
) -> Examples:
    """Images of the data, with their `masks`. Raises DataError where the checkpoint's processor takes no masks."""
    processor, classes = processor_of(subject.source, trust_remote_code), head_size(subject)
    ignored = getattr(subject.config, "semantic_loss_ignore_index", BACKGROUND)
    if masks and (ignored != BACKGROUND or not 1 < classes < BACKGROUND):
        raise DataError(
            f"{subject.source.reference}: has {classes} classes and ignores {ignored}; only heads for 2 to 254 classes"
            f" that ignore {BACKGROUND} are trained and measured"
        )
    columns = _columns(rows, options, masks=masks)
    mode = "L" if subject.source.config.get("num_channels") == 1 else "RGB"
    made = Pictures(rows.rows, columns, processor, classes, mode, rows.reference, flip_seed)  # type: ignore[arg-type]
    about = f"images: by the checkpoint's {type(processor).__name__}"
    if masks:
        about += ", masks at the size that it makes of them"
        about += ", class 0 is ignored and the others are one lower" if _reduces(processor) else ""
    return Examples(made, stack, TASKS[subject.task].unit, 1, (about,))


def processor_of(source: Source, trust_remote_code: bool) -> Any:
    """The checkpoint's image processor. Raises DataError without one, or for one that takes no masks."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise DataError(
            f"{source.reference}: no image processor that loads; an image task needs preprocessor_config.json"
        ) from e
    if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
        raise DataError(f"{source.reference}: its {type(processor).__name__} takes no segmentation_maps")
    return processor


def classes_of(source: Source, rows: Rows, options: DataOptions, trust_remote_code: bool) -> tuple[str, ...]:
    """Names of the classes up to the largest in all masks, for a head that is made for them."""
    processor = processor_of(source, trust_remote_code)
    made = Pictures(rows.rows, _columns(rows, options, masks=True), processor, BACKGROUND, "RGB", rows.reference)  # type: ignore[arg-type]
    largest = 0
    for index in range(len(made)):
        found = made.classes_at(index)
        largest = max(largest, int(found[found != BACKGROUND].max(initial=0)))
    count = largest + (0 if _reduces(processor) else 1)
    if count < 2:
        raise DataError(f"{rows.reference}: its masks have {count} class; a head for classes needs two at least")
    return tuple(f"LABEL_{i}" for i in range(count))


def _columns(rows: Rows, options: DataOptions, *, masks: bool) -> tuple[str, str | None]:
    image = pick_column(rows.rows, options.image_column, IMAGE_COLUMNS, "image", rows.reference)
    return image, pick_column(rows.rows, options.label_column, MASK_COLUMNS, "label", rows.reference) if masks else None


def _reduces(processor: Any) -> bool:
    return bool(getattr(processor, "do_reduce_labels", False))


def _flipped(image: Image) -> Image:
    from PIL.Image import Transpose

    return image.transpose(Transpose.FLIP_LEFT_RIGHT)
