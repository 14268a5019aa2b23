"""Images into model inputs: the checkpoint's own processor or transform, and augmentation that a resumed run repeats.

What a checkpoint says of its images is done by the library that wrote it: transformers' `AutoImageProcessor`, or
timm's `create_transform(**resolve_data_config(...))`. Training augments the image first and ends with the same steps.
The file is long because it goes all the way from a column of a dataset to a batch.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import Batch, Example, seed_of
from lrsurgery.errors import DataError, RecipeError
from lrsurgery.text import expanded

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

Inputs: TypeAlias = dict[str, torch.Tensor]  # of one image, by name; most models take `pixel_values` alone
Pixels: TypeAlias = np.ndarray[Any, Any]

SMALL = 96  # pixels; below, cropping with padding as for CIFAR, above, random resized crops as for ImageNet
SHOWN = 200  # characters of a path or a cause in a message
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # of PIL: more than 8 bits a channel
CHANNELS = (1, 3, 4)  # of an array of pixels
READINGS = "integers above 255 are 16-bit levels, floats go from 0 to 1 (an image with values above 1: to 255)"
PROBES = ((96, 64), (64, 96))  # width and height of two images that tell whether all come out at one size
COLOUR = (200, 120, 40)  # of an image that resizing and cropping leave as it is


class Transform(Protocol):
    """Makes inputs, or another image, of an image of PIL."""

    def __call__(self, image: Image, /) -> Any: ...


@dataclass(frozen=True)
class TimmTransform:
    """timm's transform, under the name of the model's input."""

    steps: Transform

    def __call__(self, image: Image) -> Inputs:
        return {"pixel_values": self.steps(image)}


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers, for one image at a time; `options` are those of its call."""

    processor: Any
    options: Mapping[str, bool] = field(default_factory=dict)

    def __call__(self, image: Image) -> Inputs:
        made = self.processor(image, return_tensors="pt", **self.options)
        tensors = {name: value[0] for name, value in made.items() if isinstance(value, torch.Tensor)}
        # without do_rescale and do_normalize they are still bytes, which few models take
        return {name: value.float() if name == "pixel_values" else value for name, value in tensors.items()}


@dataclass(frozen=True)
class Augmented:
    """Random changes of an image, drawn from torch's global generator, before it is made into inputs."""

    augment: Transform
    last: Transform

    def __call__(self, image: Image) -> Inputs:
        inputs: Inputs = self.last(self.augment(image))
        return inputs


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the checkpoint's own library makes of an image."""

    mode: str  # of the PIL images that it takes: "RGB", or "L" for a model of one channel
    shape: tuple[int, int, int] | None  # (channels, height, width) of its pixels; None: it depends on the image
    transform: Transform  # all that the library does
    last: Transform  # the same without resizing and cropping, where these can be told apart
    interpolation: Any  # of augmentation, as torchvision takes it
    note: str  # the size and who made it, for the user

    @staticmethod
    def of(
        source: Source,
        model: nn.Module,
        size: int | None,
        *,
        test_size: bool = False,
        trust_remote_code: bool = False,
    ) -> Preprocessing:
        """Read the checkpoint's own; for timm, with another size (pixels) or its test size where asked for.

        Raises DataError for a checkpoint that says nothing of images, RecipeError for a size that it cannot have.
        """
        if source.library == "timm":
            return _of_timm(source, model, size, test_size)
        if test_size:
            raise RecipeError("test_size: only timm's checkpoints name one; leave it out")
        found = _of_transformers(source, trust_remote_code)
        if size is not None and (found.shape is None or found.shape[1:] != (size, size)):
            own = "no fixed size" if found.shape is None else _edges(found.shape)
            raise RecipeError(f"image_size {size}: this model's preprocessor_config.json says {own}; change it there")
        return found

    def for_evaluation(self) -> Transform:
        """Return the library's own transform: an image of PIL in, `Inputs` out."""
        return self.transform

    def for_training(self) -> Transform:
        """Make the same with random crops and horizontal flips before it."""
        from torchvision.transforms import v2

        flip = v2.RandomHorizontalFlip()
        if self.shape is None:
            return Augmented(flip, self.transform)
        edges, mode = self.shape[1:], self.interpolation
        if min(edges) < SMALL:
            crop = [v2.Resize(edges, mode), v2.RandomCrop(edges, padding=max(1, min(edges) // 8))]
        else:
            aspect = edges[1] / edges[0]
            crop = [v2.RandomResizedCrop(edges, (0.25, 1.0), (3 / 4 * aspect, 4 / 3 * aspect), mode)]
        return Augmented(v2.Compose([*crop, flip]), self.last)


def other_pixels(ours: Preprocessing, theirs: Preprocessing, who: str) -> str | None:
    """A note where a model is fed images as another one wants them; None where both get the same pixels.

    Found by an image that both make something of, whatever their settings are called.
    """
    from PIL import Image

    levels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((400, 300))
    one, two = (each.for_evaluation()(image.convert(each.mode))["pixel_values"] for each in (ours, theirs))
    if one.shape == two.shape and torch.allclose(one, two, atol=1e-2):
        return None
    return f"{who}: is fed images as the model wants them; its own would be other pixels ({theirs.note})"


def _of_timm(source: Source, model: nn.Module, size: int | None, test_size: bool) -> Preprocessing:
    from timm.data import create_transform, resolve_data_config
    from torchvision.transforms import InterpolationMode

    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or source.pretrained_cfg)
    fixed = cfg.get("fixed_input_size")
    if fixed:
        cfg.pop("test_input_size", None)  # as timm's validate.py
    at_train, at_test = (resolve_data_config(pretrained_cfg=cfg, model=model, use_test_size=t) for t in (False, True))
    config = at_test if test_size else at_train
    channels, *edges = config["input_size"]
    if channels not in (1, 3):
        raise DataError(f"{source.reference}: takes images of {channels} channels; only 1 and 3 are supported")
    which = "test size" if test_size else "train size"
    if test_size and at_test == at_train:
        which += ", the only one that the checkpoint names"
    elif not test_size and at_test != at_train:
        which += f"; --test-size: {_measures(at_test)}"
    if size is not None and edges != [size, size]:
        if test_size:
            raise RecipeError("image_size and test_size are both given; leave one out")
        if fixed:
            own = _edges(config["input_size"])
            raise RecipeError(f"image_size {size}: this model works with {own} pixels only")
        edges, which = [size, size], "as asked"
        config = {**config, "input_size": (channels, size, size), "crop_pct": 1.0}
    if channels == 1:  # weights of three channels keep three values here; timm's validate.py takes their mean
        config = {**config, **{name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}}
    modes = {mode.value: mode for mode in InterpolationMode}
    return Preprocessing(
        mode="RGB" if channels == 3 else "L",
        shape=(channels, edges[0], edges[1]),
        transform=TimmTransform(create_transform(**config)),
        # an image that has the size already is neither resized nor cropped by this
        last=TimmTransform(create_transform(**{**config, "crop_pct": 1.0})),
        interpolation=modes.get(config["interpolation"], InterpolationMode.BILINEAR),
        note=f"images: {_measures(config)} ({which}), {config['interpolation']}, by timm's transform",
    )


def _measures(config: Mapping[str, Any]) -> str:
    _, height, width = config["input_size"]
    return f"{height} x {width}, {config['crop_mode']} crop of {config['crop_pct']:g}"


def _of_transformers(source: Source, trust_remote_code: bool) -> Preprocessing:
    import PIL.Image
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise DataError(
            f"{source.reference}: no image processor that loads; an image task needs preprocessor_config.json"
        ) from e
    name = type(processor).__name__
    # transformers' pipeline makes every image RGB, which a model of one channel does not take
    mode = "L" if source.config.get("num_channels") == 1 else "RGB"
    transform = ProcessorTransform(processor)
    try:
        shapes = {_shape_of(transform(PIL.Image.new(mode, size))) for size in PROBES}
    except Exception as e:
        raise DataError(f"{source.reference}: its {name} fails on an image ({_cause(e)})") from e
    shape = shapes.pop() if len(shapes) == 1 else None
    last = ProcessorTransform(processor, {"do_resize": False, "do_center_crop": False})
    if shape is None or not _agree(transform, last, PIL.Image.new("RGB", (shape[2], shape[1]), COLOUR).convert(mode)):
        last = transform
    resample = getattr(processor, "resample", None)
    made = "sizes that depend on the image" if shape is None else f"{shape[1]} x {shape[2]}"
    return Preprocessing(
        mode=mode,
        shape=shape,
        transform=transform,
        last=last,
        interpolation=2 if resample is None else int(resample) if isinstance(resample, int) else resample,
        note=f"images: {made}, by the checkpoint's {name}",
    )


def _shape_of(inputs: Inputs) -> tuple[int, int, int] | None:
    shape = tuple(inputs["pixel_values"].shape) if "pixel_values" in inputs else ()
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None


def _agree(transform: Transform, last: Transform, plain: Image) -> bool:
    """Whether `last` does all but resizing and cropping, which do not change an image of one colour."""
    try:
        ours, theirs = last(plain), transform(plain)
        return ours.keys() == theirs.keys() and all(
            torch.allclose(ours[name].float(), theirs[name].float(), rtol=0.02, atol=0.02) for name in theirs
        )
    except Exception:  # a processor may refuse these options
        return False


def _edges(shape: Sequence[int]) -> str:
    _, height, width = shape
    return str(height) if height == width else f"{height} x {width}"


class Images(Dataset[Example]):
    """Images with their classes; with a seed, augmented by seed, epoch and place, so that a resumed run repeats it.

    The column holds images of `datasets`, the bytes of image files, their paths (relative to the data or to the
    current folder), both in a dictionary, or arrays of pixels.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        labels: Sequence[Any],  # of each row, as the task has them
        how: Preprocessing,
        reference: str,
        seed: int | None = None,
    ) -> None:
        from datasets import Image as Feature

        rows = rows.select_columns([column])
        if isinstance(rows.features[column], Feature):  # decoded below, where the file's name is known
            rows = rows.cast_column(column, Feature(decode=False))
        self._rows, self._column, self._labels, self._mode = rows, column, labels, how.mode
        self._transform = how.for_evaluation() if seed is None else how.for_training()
        self._reference, self._seed, self._epoch = reference, seed, 0
        place = expanded(reference)
        self._folder = place if place.is_dir() else place.parent

    @property
    def notes(self) -> tuple[str, ...]:
        """How pixels that are not plainly 8 bits are read, judged by the first image. Raises DataError."""
        image = self._decode(0)
        if isinstance(self._value(0), list):
            return (f"column '{self._column}' holds arrays of pixels: {READINGS}",)
        return (f"images have pixels of PIL's mode {image.mode}: {READINGS}",) if image.mode in DEEP_MODES else ()

    def set_epoch(self, epoch: int) -> None:
        """Augment otherwise from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image = self._decode(index)
        try:
            image = to_mode(image, self._mode)
            if self._seed is None:
                inputs = self._transform(image)
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_of(self._seed, self._epoch, int(index)))
                    inputs = self._transform(image)
        except Exception as e:
            raise DataError(self._message(index, "cannot be used", e)) from e
        return {**inputs, "labels": self._labels[index]}

    def _value(self, index: int) -> Any:
        return self._rows[int(index)][self._column]

    def _decode(self, index: int) -> Image:
        try:
            return decode(self._value(index), self._folder)
        except Exception as e:
            raise DataError(self._message(index, "does not decode", e)) from e

    def _message(self, index: int, what: str, e: Exception) -> str:
        value = self._value(index)
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        shown = f"{path[:SHOWN]}...: " if path and len(path) > SHOWN else f"{path}: " if path else ""
        return f"{self._reference}: image {index} {what} ({shown}{_cause(e)[:SHOWN]})"


def decode(value: Any, folder: Path) -> Image:
    """Read an image from its path, its bytes, both in a dictionary or an array of pixels, turned upright by EXIF.

    A relative path is looked up in `folder`, then in the current one. Raises OSError or ValueError if it is no image.
    """
    import datasets

    if isinstance(value, list | np.ndarray):
        return _from_array(np.asarray(value))
    if isinstance(value, str):
        value = {"path": value}
    elif isinstance(value, bytes):
        value = {"bytes": value}
    if not isinstance(value, dict):
        raise ValueError("missing" if value is None else f"{type(value).__name__} in place of an image")
    path, data = value.get("path"), value.get("bytes")
    if data == b"":
        raise ValueError("no byte is in it")
    if data is None:
        if not path:
            raise ValueError("neither bytes nor a path")
        if path.startswith("data:"):  # a data URL, as web pages hold images
            head, _, body = path.partition(",")
            data, path = base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body), None
        elif path.startswith("file://"):
            path = url2pathname(urlsplit(path).path)
        if path is not None and "://" not in path:
            places = (folder / path, expanded(path))  # an absolute path stays what it is
            path = next((str(place) for place in places if place.is_file()), None)
        if path is None and data is None:
            raise FileNotFoundError(f"no such file in {folder} or the current folder")
    image: Image = datasets.Image().decode_example({"path": path, "bytes": data})
    return image


def _from_array(pixels: Pixels) -> Image:
    """Make an image of pixels (height, width), (height, width, channels) or (channels, height, width)."""
    import PIL.Image

    if pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS and pixels.shape[0] in CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not pixels.size or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in CHANNELS)):
        raise ValueError(f"an array of shape {pixels.shape}; write (height, width) or (height, width, 3)")
    return PIL.Image.fromarray(np.ascontiguousarray(to_bytes(pixels)))


def to_mode(image: Image, mode: str) -> Image:
    """Convert an image to "RGB" or "L", its 16-bit or float pixels scaled, which PIL would clip at 255.

    Raises ValueError for values that have no such reading.
    """
    import PIL.Image

    if image.mode in DEEP_MODES:
        image = PIL.Image.fromarray(to_bytes(np.asarray(image)))
    return image.convert(mode)


def to_bytes(pixels: Pixels) -> Pixels:
    """Scale pixels of any type to 0 to 255: the upper 8 bits of 16-bit integers, floats from 0 to 1 or 0 to 255.

    Raises ValueError for values out of these ranges.
    """
    if pixels.dtype == np.uint8:
        return pixels
    low, high, floats = float(pixels.min()), float(pixels.max()), pixels.dtype.kind == "f"
    if not 0 <= low <= high <= (255 if floats else 65535):  # NaN neither
        wanted = "0 to 1 or 0 to 255" if floats else "0 to 255 or 0 to 65535"
        raise ValueError(f"values from {low:g} to {high:g}; images before normalisation have {wanted}")
    if floats:
        return np.rint(pixels * 255 if high <= 1 else pixels).astype(np.uint8)
    if pixels.dtype.kind == "b":
        return np.where(pixels, 255, 0).astype(np.uint8)
    shift = 8 if high > 255 or pixels.dtype.itemsize == 2 else 0
    return (pixels.astype(np.int64) >> shift).astype(np.uint8)


def stack(examples: Sequence[Example]) -> Batch:
    """Collate images of one size into a batch. Raises DataError for several sizes."""
    from transformers import default_data_collator

    shapes = sorted({tuple(each["pixel_values"].shape) for each in examples if "pixel_values" in each})
    if len(shapes) > 1:
        raise DataError(
            f"the checkpoint's processor makes images of several sizes ({shapes[0]}, {shapes[-1]}), which no batch"
            " holds; give images of one size, or --batch-size 1"
        )
    batch: Batch = default_data_collator(list(examples))
    return batch


def _cause(e: Exception) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
