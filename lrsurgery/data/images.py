"""Images into tensors: the checkpoint's own size and normalisation, and augmentation that repeats on resuming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.text import seed_of
from lrsurgery.errors import DataError, RecipeError

SMALL = 96  # pixels; below, cropping with padding as for CIFAR, above, random resized crops as for ImageNet


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint expects of an image."""

    size: int  # pixels, square
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0  # the central share kept after resizing the shorter side
    interpolation: str = "bilinear"

    @staticmethod
    def of(source: Source, model: Any, size: int | None) -> Preprocessing:
        """The checkpoint's own, with another size where one is asked for. Raises DataError, RecipeError."""
        found = _of_timm(source, model) if source.library == "timm" else _of_transformers(source, model)
        if size is None or size == found.size:
            return found
        if source.library == "timm" and (source.config.get("pretrained_cfg") or {}).get("fixed_input_size"):
            raise RecipeError(f"image_size {size}: this model works with {found.size} pixels only")
        return Preprocessing(size, found.mean, found.std, 1.0, found.interpolation)

    def for_evaluation(self) -> Callable[[Any], torch.Tensor]:
        """A PIL image -> (3, size, size), resized, cropped in the middle and normalised."""
        v2, mode = _transforms(self.interpolation)
        whole = round(self.size / self.crop)
        return v2.Compose([v2.Resize(whole, mode), v2.CenterCrop(self.size), *self._to_tensor(v2)])  # type: ignore[no-any-return]

    def for_training(self) -> Callable[[Any], torch.Tensor]:
        """The same with random crops and horizontal flips."""
        v2, mode = _transforms(self.interpolation)
        if self.size < SMALL:
            crop = [v2.Resize((self.size, self.size), mode), v2.RandomCrop(self.size, padding=max(1, self.size // 8))]
        else:
            crop = [v2.RandomResizedCrop(self.size, scale=(0.25, 1.0), interpolation=mode)]
        return v2.Compose([*crop, v2.RandomHorizontalFlip(), *self._to_tensor(v2)])  # type: ignore[no-any-return]

    def _to_tensor(self, v2: Any) -> list[Any]:
        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]


def _transforms(interpolation: str) -> tuple[Any, Any]:
    from torchvision.transforms import InterpolationMode, v2

    return v2, InterpolationMode(interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bilinear")


def _of_timm(source: Source, model: Any) -> Preprocessing:
    from timm.data import resolve_model_data_config

    saved = {k: v for k, v in (source.config.get("pretrained_cfg") or {}).items() if v is not None}
    found = {**resolve_model_data_config(model), **saved}
    channels, height, _ = found["input_size"]
    if channels != 3:
        raise DataError(f"{source.reference}: takes images of {channels} channels; only 3 are supported")
    return Preprocessing(
        height, tuple(found["mean"]), tuple(found["std"]), found.get("crop_pct") or 1.0, found["interpolation"]
    )


def _of_transformers(source: Source, model: Any) -> Preprocessing:
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(source.folder, use_fast=True)
    except Exception as e:
        raise DataError(
            f"{source.reference}: no image processor that loads; an image task needs preprocessor_config.json"
        ) from e
    size = getattr(processor, "crop_size", None) or processor.size
    edge = size.get("height") or size.get("shortest_edge")
    shortest = processor.size.get("shortest_edge")
    cropped = getattr(processor, "crop_size", None) is not None and getattr(processor, "do_center_crop", False)
    crop = edge / shortest if cropped and shortest else getattr(processor, "crop_pct", None) or 1.0
    modes = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    resample = getattr(processor, "resample", None)
    mode = modes.get(2 if resample is None else int(resample), "bilinear")
    if not getattr(processor, "do_normalize", True):
        return Preprocessing(edge, (0.0,) * 3, (1.0,) * 3, crop, mode)
    return Preprocessing(edge, tuple(processor.image_mean), tuple(processor.image_std), crop, mode)


class Images(Dataset[dict[str, Any]]):
    """Images with their classes. Augmentation is drawn by seed, epoch and place, so a resumed run repeats it."""

    def __init__(
        self, rows: Any, column: str, labels: Sequence[int], transform: Callable[[Any], torch.Tensor], reference: str,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self._rows, self._column, self._labels = rows.select_columns([column]), column, labels
        self._transform, self._reference, self._seed, self._epoch = transform, reference, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self._rows[int(index)][self._column].convert("RGB")
        except Exception as e:
            cause = " ".join(str(e).split())[:150]
            raise DataError(f"{self._reference}: image {index} does not decode ({cause})") from e
        if self._seed is None:
            return {"pixel_values": self._transform(image), "labels": self._labels[index]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, self._epoch, int(index)))
            return {"pixel_values": self._transform(image), "labels": self._labels[index]}
