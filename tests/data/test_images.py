"""Images: what the checkpoint's own library would make of them; augmentation that repeats."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from support import tiny

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.images import Images, Preprocessing
from lrsurgery.data.tasks import load_subject
from lrsurgery.errors import DataError

SQUARE, WIDE = (16, 16), (40, 24)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("size", [SQUARE, WIDE, (224, 224)], ids=["square", "wide", "large"])
def test_a_timm_model_sees_what_timm_makes_of_an_image(tmp_path: Path, size: tuple[int, int]) -> None:
    from timm.data import create_transform, resolve_data_config

    subject = load_subject(resolve(str(tiny.save_timm(tmp_path / "timm"))), "image-classification")
    config = resolve_data_config(subject.source.pretrained_cfg)
    wanted = create_transform(**config)(picture(*size))
    found = Preprocessing.of(subject.source, subject.body, None).for_evaluation()(picture(*size))
    torch.testing.assert_close(found, wanted)


def test_a_transformers_model_sees_what_its_processor_makes_of_an_image(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = tiny.save_vit(tmp_path / "vit")
    subject = load_subject(resolve(str(folder)), "image-classification")
    wanted = AutoImageProcessor.from_pretrained(folder)(picture(*SQUARE), return_tensors="pt")["pixel_values"][0]
    found = Preprocessing.of(subject.source, subject.body, None).for_evaluation()(picture(*SQUARE))
    torch.testing.assert_close(found, wanted)


def images(seed: int | None) -> Images:
    how = Preprocessing(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    rows = datasets.Dataset.from_dict({"image": [picture(*SQUARE, seed=i) for i in range(4)]})
    rows = rows.cast_column("image", datasets.Image())
    return Images(rows, "image", [0, 1, 2, 3], how.for_training(), "rows", seed)


def test_augmentation_repeats_by_seed_epoch_and_place() -> None:
    first, again = images(seed=7), images(seed=7)
    torch.rand(3)  # earlier draws do not matter
    assert all(torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in (3, 0, 2, 1))
    again.set_epoch(1)
    assert not all(torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in range(4))


def test_augmentation_leaves_the_random_state_alone() -> None:
    data = images(seed=7)
    state = torch.get_rng_state()
    _ = data[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_that_does_not_decode_is_named() -> None:
    rows = datasets.Dataset.from_dict({"image": [b"no image"]})
    how = Preprocessing(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(DataError, match="pets: image 0 does not decode"):
        Images(rows, "image", [0], how.for_evaluation(), "pets")[0]
