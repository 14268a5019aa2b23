"""Images into tensors: the checkpoint's own size and normalisation, and augmentation that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch.utils.data import Dataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.text import Example, seed_of
from lrsurgery.errors import DataError, RecipeError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image
    from torchvision.transforms import InterpolationMode

    Transform: TypeAlias = Callable[[Image], torch.Tensor]  # (3, size, size)

SMALL = 96  # pixels; below, cropping with padding as for CIFAR, above, random resized crops as for ImageNet
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers in preprocessor_config.json


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a checkpoint expects of an image."""

    size: int  # pixels, square
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0  # the central share kept after resizing the shorter side
    interpolation: str = "bilinear"

    @staticmethod
    def of(source: Source, model: nn.Module, size: int | None) -> Preprocessing:
        """Read the checkpoint's own, with another size where one is asked for. Raises DataError, RecipeError."""
        found = _of_timm(source, model) if source.library == "timm" else _of_transformers(source)
        if size is None or size == found.size:
            return found
        if source.library == "timm" and source.pretrained_cfg.get("fixed_input_size"):
            raise RecipeError(f"image_size {size}: this model works with {found.size} pixels only")
        return replace(found, size=size, crop=1.0)

    def for_evaluation(self) -> Transform:
        """Make a transform of images to (3, size, size): resized, cropped in the middle, normalised."""
        from torchvision.transforms import v2

        whole = round(self.size / self.crop)
        crop = [v2.Resize(whole, self._mode()), v2.CenterCrop(self.size)]
        return v2.Compose([*crop, *self._to_tensor()])  # type: ignore[no-any-return]

    def for_training(self) -> Transform:
        """Make the same with random crops and horizontal flips, drawn from torch's global generator."""
        from torchvision.transforms import v2

        mode = self._mode()
        if self.size < SMALL:
            crop = [v2.Resize((self.size, self.size), mode), v2.RandomCrop(self.size, padding=max(1, self.size // 8))]
        else:
            crop = [v2.RandomResizedCrop(self.size, scale=(0.25, 1.0), interpolation=mode)]
        return v2.Compose([*crop, v2.RandomHorizontalFlip(), *self._to_tensor()])  # type: ignore[no-any-return]

    def _to_tensor(self) -> list[nn.Module]:
        from torchvision.transforms import v2

        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]

    def _mode(self) -> InterpolationMode:
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(self.interpolation if self.interpolation in RESAMPLING.values() else "bilinear")


def _of_timm(source: Source, model: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config

    saved = {k: v for k, v in source.pretrained_cfg.items() if v is not None}
    found = {**resolve_model_data_config(model), **saved}
    channels, height, _ = found["input_size"]
    if channels != 3:
        raise DataError(f"{source.reference}: takes images of {channels} channels; only 3 are supported")
    return Preprocessing(
        size=height,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        crop=found.get("crop_pct") or 1.0,
        interpolation=found["interpolation"],
    )


def _of_transformers(source: Source) -> Preprocessing:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, use_fast=True)
    except Exception as e:
        raise DataError(
            f"{source.reference}: no image processor that loads; an image task needs preprocessor_config.json"
        ) from e
    size = getattr(processor, "crop_size", None) or processor.size
    edge = size.get("height") or size.get("shortest_edge")
    shortest = processor.size.get("shortest_edge")
    cropped = getattr(processor, "crop_size", None) is not None and getattr(processor, "do_center_crop", False)
    resample = getattr(processor, "resample", None)
    normalised = getattr(processor, "do_normalize", True)
    return Preprocessing(
        size=edge,
        mean=tuple(processor.image_mean) if normalised else (0.0,) * 3,
        std=tuple(processor.image_std) if normalised else (1.0,) * 3,
        crop=edge / shortest if cropped and shortest else getattr(processor, "crop_pct", None) or 1.0,
        interpolation=RESAMPLING.get(2 if resample is None else int(resample), "bilinear"),
    )


class Images(Dataset[Example]):
    """Images with their classes; with a seed, augmented by seed, epoch and place, so that a resumed run repeats it."""

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        labels: Sequence[int],
        transform: Transform,
        reference: str,
        seed: int | None = None,
    ) -> None:
        self._rows, self._column, self._labels = rows.select_columns([column]), column, labels
        self._transform, self._reference, self._seed, self._epoch = transform, reference, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Augment otherwise from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
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
