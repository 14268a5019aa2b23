"""Images: pixels are those that the checkpoint's own library makes of the same file; augmentation that repeats."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from support import tiny
from torch import nn
from transformers.image_utils import load_image

import lrsurgery
from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.datasets import open_data
from lrsurgery.data.images import Augmented, Images, Preprocessing, other_pixels, stack
from lrsurgery.errors import DataError, RecipeError

SQUARE = (16, 16)
HALF = [0.5] * 3
BASE: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
    "resample": 3,
}


def sides(height: int, width: int | None = None) -> dict[str, int]:
    return {"height": height, "width": width or height}


CROPPED = {"size": {"shortest_edge": 112}, "do_center_crop": True, "crop_size": sides(96)}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT squashes": {**BASE, "image_processor_type": "ViTImageProcessor", "size": sides(96)},
    "ViT not square": {**BASE, "image_processor_type": "ViTImageProcessor", "size": sides(96, 128)},
    "ViT lanczos": {**BASE, "image_processor_type": "ViTImageProcessor", "size": sides(96), "resample": 1},
    "ViT bytes": {
        **BASE,
        "image_processor_type": "ViTImageProcessor",
        "size": sides(96),
        "do_rescale": False,
        "do_normalize": False,
    },
    "DeiT": {**BASE, **CROPPED, "image_processor_type": "DeiTImageProcessor", "size": sides(112)},
    "BEiT": {**BASE, **CROPPED, "image_processor_type": "BeitImageProcessor", "size": sides(112)},
    "MobileViT flips channels": {**BASE, **CROPPED, "image_processor_type": "MobileViTImageProcessor"},
    "MobileNetV2": {**BASE, **CROPPED, "image_processor_type": "MobileNetV2ImageProcessor", "resample": 2},
    "LeViT": {**BASE, **CROPPED, "image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 96}},
    "PoolFormer": {
        **BASE,
        **CROPPED,
        "image_processor_type": "PoolFormerImageProcessor",
        "size": {"shortest_edge": 96},
        "crop_pct": 0.9,
    },
    "ConvNeXT crops": {**BASE, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}},
    "ConvNeXT 384 squashes": {**BASE, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "EfficientNet": {**BASE, "image_processor_type": "EfficientNetImageProcessor", "size": sides(96)},
    "EfficientNet, offset": {
        **BASE,
        "image_processor_type": "EfficientNetImageProcessor",
        "size": sides(96),
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "include_top": False,
    },
    "CLIP": {**BASE, **CROPPED, "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True},
    "SigLIP": {**BASE, "image_processor_type": "SiglipImageProcessor", "size": sides(96)},
}
# processors that do more to the levels than to scale and normalise them
OWN_LEVELS = ("ViT bytes", "MobileViT flips channels", "EfficientNet", "EfficientNet, offset")

CENTER: dict[str, Any] = {
    "input_size": [3, 96, 96],
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
}
TIMM: dict[str, dict[str, Any]] = {
    "center": CENTER,
    "center, not square": {**CENTER, "input_size": [3, 96, 128], "interpolation": "bilinear"},
    "center, odd": {**CENTER, "input_size": [3, 97, 97], "crop_pct": 0.95},
    "center, lanczos": {**CENTER, "interpolation": "lanczos"},
    "squash": {**CENTER, "crop_mode": "squash", "crop_pct": 1.0},
    "squash, not square": {**CENTER, "crop_mode": "squash", "input_size": [3, 128, 96], "interpolation": "hamming"},
    "border": {**CENTER, "crop_mode": "border", "crop_pct": 1.0},
    "border, not square": {**CENTER, "crop_mode": "border", "input_size": [3, 96, 128], "interpolation": "box"},
    "nearest": {**CENTER, "interpolation": "nearest"},
}


def pixels(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray[Any, Any]:
    """Blocks of noise, so that it matters where one crops and how one resizes."""
    drawn = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, channels), dtype=np.uint8)
    return np.kron(drawn, np.ones((8, 8, 1), np.uint8))[:height, :width]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(width, height, seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several shapes, formats and modes."""
    folder = tmp_path_factory.mktemp("files")
    picture(150, 110, 1).save(folder / "wide.png")
    picture(60, 140, 2).save(folder / "tall.png")
    picture(150, 110, 3).convert("L").save(folder / "grey.png")
    picture(150, 110, 4).convert("P").save(folder / "palette.png")
    Image.fromarray(pixels(150, 110, 5, channels=4)).save(folder / "transparent.png")
    picture(150, 110, 6).convert("CMYK").save(folder / "print.jpg")
    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    picture(150, 110, 7).save(folder / "turned.jpg", exif=turned)
    return sorted(folder.iterdir())


def save_processor(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    tf.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(folder)
    return folder


def save_timm(folder: Path, config: dict[str, Any]) -> Path:
    tiny.save_timm(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["pretrained_cfg"].update(config)
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def preprocessing(folder: Path, size: int | None = None, *, test_size: bool = False) -> Preprocessing:
    source = resolve(str(folder), weights=False)
    model = build_model(source, device="meta") if source.library == "timm" else nn.Identity()
    return Preprocessing.of(source, model, size, test_size=test_size)


def dataset_of(how: Preprocessing, column: list[Any], reference: str = "rows", seed: int | None = None) -> Images:
    rows = datasets.Dataset.from_dict({"image": column})
    return Images(rows, "image", list(range(len(rows))), how, reference, seed)


def assert_same(found: dict[str, Any], wanted: torch.Tensor) -> None:
    assert found["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(found["pixel_values"], wanted.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_transformers_model_sees_what_its_processor_makes_of_a_file(
    tmp_path: Path, files: list[Path], name: str
) -> None:
    folder = save_processor(tmp_path / "model", PROCESSORS[name])
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    found = dataset_of(preprocessing(folder), list(map(str, files)))
    for i, file in enumerate(files):
        assert_same(found[i], processor(load_image(str(file)), return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model_sees_what_timm_makes_of_a_file(tmp_path: Path, files: list[Path], name: str) -> None:
    folder = save_timm(tmp_path / "model", TIMM[name])
    processor = tf.AutoImageProcessor.from_pretrained(folder)  # TimmWrapper's
    how = preprocessing(folder)
    assert how.shape == tuple(TIMM[name]["input_size"])
    found = dataset_of(how, list(map(str, files)))
    for i, file in enumerate(files):
        assert_same(found[i], processor(load_image(str(file)), return_tensors="pt")["pixel_values"][0])


def test_the_test_size_is_that_of_timms_validation(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    cfg = {**CENTER, "test_input_size": [3, 128, 128], "test_crop_pct": 1.0}
    folder = save_timm(tmp_path / "model", cfg)
    found = preprocessing(folder, test_size=True)
    wanted = create_transform(**resolve_data_config(pretrained_cfg=cfg, use_test_size=True))(picture(150, 110))
    assert found.shape == (3, 128, 128) == tuple(wanted.shape)
    assert_same(found.transform(picture(150, 110)), wanted)
    assert found.note == "images: 128 x 128, center crop of 1 (test size), bicubic, by timm's transform"
    hint = "train size; --test-size: 128 x 128, center crop of 1"
    assert preprocessing(folder).note == f"images: 96 x 96, center crop of 0.875 ({hint}), bicubic, by timm's transform"
    only = preprocessing(save_timm(tmp_path / "one size", CENTER), test_size=True)
    assert "96 x 96" in only.note
    assert "test size, the only one that the checkpoint names" in only.note
    with pytest.raises(RecipeError, match="image_size and test_size are both given"):
        preprocessing(folder, 64, test_size=True)
    with pytest.raises(RecipeError, match="test_size: only timm's checkpoints name one"):
        preprocessing(save_processor(tmp_path / "vit", PROCESSORS["ViT squashes"]), test_size=True)


def test_another_image_size_is_timms_transform_at_that_size(tmp_path: Path) -> None:
    from timm.data import create_transform

    cfg = {**CENTER, "crop_mode": "squash"}
    found = preprocessing(save_timm(tmp_path / "model", cfg), 48)
    wanted = create_transform(**{**cfg, "input_size": (3, 48, 48), "crop_pct": 1.0})(picture(150, 110))
    assert_same(found.transform(picture(150, 110)), wanted)
    assert "48 x 48, squash crop of 1 (as asked)" in found.note
    fixed = nn.Module()
    fixed.pretrained_cfg = {**CENTER, "fixed_input_size": True}  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="image_size 48: this model works with 96 pixels only"):
        Preprocessing.of(resolve(str(tmp_path / "model"), weights=False), fixed, 48)
    wide = save_processor(tmp_path / "wide", PROCESSORS["ViT not square"])
    with pytest.raises(RecipeError, match=r"image_size 48: this model's preprocessor_config\.json says 96 x 128"):
        preprocessing(wide, 48)


def test_a_timm_model_of_one_channel_sees_grey(tmp_path: Path) -> None:
    from timm.data import create_transform

    cfg = {**CENTER, "input_size": [1, 32, 32], "mean": [0.3], "std": [0.2]}
    folder = tmp_path / "model"
    tiny.save_timm(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["pretrained_cfg"].update(cfg)
    (folder / "config.json").write_text(json.dumps({**saved, "model_args": {"in_chans": 1}}))
    wanted = create_transform(**cfg)(picture(40, 50).convert("L"))
    assert wanted.shape == (1, 32, 32)
    picture(40, 50).save(tmp_path / "a.png")
    assert_same(dataset_of(preprocessing(folder), [str(tmp_path / "a.png")])[0], wanted)


def test_a_checkpoint_without_a_processor_is_named(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"vit: no image processor that loads; .* preprocessor_config\.json"):
        preprocessing(tmp_path / "vit")


# training


@pytest.mark.parametrize("name", [*PROCESSORS, *TIMM])
def test_training_ends_with_the_steps_of_evaluation(tmp_path: Path, name: str) -> None:
    """Crops and flips do not change an image of one colour, so what is left is the last steps."""
    save = save_processor if name in PROCESSORS else save_timm
    how = preprocessing(save(tmp_path / "model", {**PROCESSORS, **TIMM}[name]))
    assert how.shape is not None
    _, height, width = how.shape
    plain = Image.new("RGB", (2 * width, 2 * height), (20, 90, 210))
    wanted = how.for_evaluation()(plain)["pixel_values"]
    training = how.for_training()
    found = training(plain)["pixel_values"]
    assert found.shape == wanted.shape == how.shape
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)
    # an image of the model's size is neither resized nor cropped after the augmentation
    assert isinstance(training, Augmented)
    exact = pixels(width, height)
    last = training.last(Image.fromarray(exact))["pixel_values"]
    if name not in OWN_LEVELS:
        by_hand = (exact / 255 - BASE["image_mean"]) / BASE["image_std"]
        torch.testing.assert_close(last, torch.from_numpy(by_hand).permute(2, 0, 1).float(), rtol=0, atol=1e-5)
    assert torch.equal(training.last(Image.fromarray(exact[:, ::-1].copy()))["pixel_values"], last.flip(-1))


def augmented(seed: int | None, folder: Path, size: int = 16) -> Images:
    how = preprocessing(save_processor(folder, {**PROCESSORS["ViT squashes"], "size": sides(size)}))
    rows = datasets.Dataset.from_dict({"image": [picture(150, 110, seed=i) for i in range(4)]})
    return Images(rows.cast_column("image", datasets.Image()), "image", [0, 1, 2, 3], how, "rows", seed)


@pytest.mark.parametrize("size", [16, 96], ids=["padded crops", "resized crops"])
def test_augmentation_repeats_by_seed_epoch_and_place(tmp_path: Path, size: int) -> None:
    first, again = augmented(7, tmp_path, size), augmented(7, tmp_path, size)
    torch.rand(3)  # earlier draws do not matter
    assert all(torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in (3, 0, 2, 1))
    again.set_epoch(1)
    assert not all(torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in range(4))
    plain = augmented(None, tmp_path, size)
    assert not any(torch.equal(first[i]["pixel_values"], plain[i]["pixel_values"]) for i in range(4))


def test_augmentation_leaves_the_random_state_alone(tmp_path: Path) -> None:
    data = augmented(7, tmp_path)
    state = torch.get_rng_state()
    _ = data[0]
    assert torch.equal(torch.get_rng_state(), state)


# columns


@pytest.fixture
def plain(tmp_path: Path) -> Preprocessing:
    """A processor that changes nothing but the layout of the pixels."""
    config = {"image_processor_type": "ViTImageProcessor", "size": sides(16)}
    config |= {"do_resize": False, "do_rescale": False, "do_normalize": False}
    made = {**config, "do_resize": True, "resample": 0}
    return preprocessing(save_processor(tmp_path / "plain", made))


def assert_pixels(data: Images, wanted: np.ndarray[Any, Any]) -> None:
    assert torch.equal(data[0]["pixel_values"], torch.from_numpy(wanted.copy()).permute(2, 0, 1).float())


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def test_images_are_read_from_bytes_paths_and_structs(
    tmp_path: Path, plain: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    levels = pixels(16, 16)
    Image.fromarray(levels).save(tmp_path / "data" / "photos" / "a.png")
    Image.fromarray(levels).save(tmp_path / "elsewhere" / "b.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    table = str(tmp_path / "data" / "rows.csv")
    content = encoded(Image.fromarray(levels))
    columns: list[Any] = [
        content,
        {"bytes": content, "path": None},
        {"bytes": content},
        {"bytes": None, "path": "photos/a.png"},
        "photos/a.png",
        "b.png",
        str(tmp_path / "data" / "photos" / "a.png"),
    ]
    for value in columns:
        assert_pixels(dataset_of(plain, [value], table), levels)
    assert_pixels(dataset_of(plain, ["photos/a.png"], str(tmp_path / "data")), levels)  # a folder of tables
    rows = datasets.Dataset.from_dict({"image": [content]}).cast_column("image", datasets.Image())
    assert_pixels(Images(rows, "image", [0], plain, "rows"), levels)


GREY = pixels(16, 16, channels=1)
RGB = pixels(16, 16)


@pytest.mark.parametrize(
    "array",
    [
        GREY[..., 0],
        GREY,
        GREY.astype(np.uint16) * 257,
        GREY.astype(np.uint16) * 256,
        GREY[..., 0].astype(np.float32) / 255,
        GREY[..., 0].astype(np.float32),
    ],
    ids=["8 bits", "one channel", "16 bits", "16 bits by a shift", "floats to 1", "floats to 255"],
)
def test_grey_arrays_have_the_levels_of_8_bits(plain: Preprocessing, array: np.ndarray[Any, Any]) -> None:
    data = dataset_of(plain, [array.tolist()])
    assert_pixels(data, GREY.repeat(3, axis=2))
    assert "column 'image' holds arrays of pixels" in data.notes[0]


@pytest.mark.parametrize(
    "array",
    [RGB, RGB.transpose(2, 0, 1), RGB / 255, RGB.astype(np.uint16) * 257],
    ids=["channels last", "channels first", "floats", "16 bits"],
)
def test_colour_arrays_have_the_levels_of_8_bits(plain: Preprocessing, array: np.ndarray[Any, Any]) -> None:
    assert_pixels(dataset_of(plain, [array.tolist()]), RGB)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), "PNG"),
        (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), "TIFF"),
        (Image.fromarray(GREY[..., 0].astype(np.int32) * 257), "TIFF"),
        (Image.fromarray(GREY[..., 0].astype(np.float32) / 255), "TIFF"),
        (Image.fromarray(GREY[..., 0].astype(np.float32)), "TIFF"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "32-bit TIFF", "float TIFF to 1", "float TIFF to 255"],
)
def test_files_of_more_than_8_bits_are_scaled_and_not_clipped(
    plain: Preprocessing, image: Image.Image, kind: str
) -> None:
    data = dataset_of(plain, [encoded(image, kind)])
    assert_pixels(data, GREY.repeat(3, axis=2))
    assert "integers above 255 are 16-bit levels" in data.notes[0]
    assert dataset_of(plain, [encoded(Image.fromarray(RGB))]).notes == ()


def test_what_is_no_image_is_named_with_its_file(tmp_path: Path, plain: Preprocessing) -> None:
    (tmp_path / "broken.png").write_bytes(encoded(picture(64, 64))[:200])
    normalised = encoded(Image.fromarray(np.full((16, 16), -1.5, np.float32)), "TIFF")
    cases: list[tuple[Any, str]] = [
        (b"no image", r"pets: image 0 does not decode \(cannot identify image file"),
        ("a/b.png", r"pets: image 0 does not decode \(a/b\.png: no such file in \. or the current folder\)"),
        (str(tmp_path / "broken.png"), r"pets: image 0 does not decode \(.*/broken\.png: .*truncated"),
        ({"bytes": normalised, "path": "x.tif"}, r"pets: image 0 cannot be used \(x\.tif: values from -1\.5 to -1\.5"),
        ([[0.5, 300.0]], r"pets: image 0 does not decode \(values from 0\.5 to 300; .* 0 to 1 or 0 to 255\)"),
        ([[[[1]]]], r"pets: image 0 does not decode \(an array of shape \(1, 1, 1, 1\)"),
        ({"bytes": None, "path": None}, r"pets: image 0 does not decode \(neither bytes nor a path\)"),
        (5, r"pets: image 0 does not decode \(int in place of an image\)"),
    ]
    for value, message in cases:
        with pytest.raises(DataError, match=message):
            dataset_of(plain, [value], "pets")[0]
    with pytest.raises(DataError, match=r"image 1 does not decode \(missing\)"):
        dataset_of(plain, ["x.png", None], "pets")[1]


def test_images_of_several_sizes_are_no_batch(tmp_path: Path) -> None:
    config = {**BASE, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    how = preprocessing(save_processor(tmp_path / "model", {**config, "do_center_crop": False}))
    assert how.shape is None
    assert "sizes that depend on the image" in how.note
    data = dataset_of(how, [encoded(picture(64, 32)), encoded(picture(32, 64))])
    assert stack([data[0]])["pixel_values"].shape == (1, 3, 32, 64)
    with pytest.raises(DataError, match=r"several sizes \(\(3, 32, 64\), \(3, 64, 32\)\).*--batch-size 1"):
        stack([data[0], data[1]])


@pytest.mark.parametrize("between", ["", "images"], ids=["in the class's folder", "in a folder of it"])
@pytest.mark.parametrize("split", ["train", "all"])
def test_the_class_of_an_image_is_its_folder(tmp_path: Path, between: str, split: str) -> None:
    """Tiny-ImageNet's images lie in CLASS/images."""
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / part / name / between).mkdir(parents=True)
            for i in range(2):
                picture(16, 16).save(tmp_path / part / name / between / f"{i}.JPEG")
    rows = open_data(str(tmp_path), split=split)
    names = rows.features["label"].names
    assert names == ["n01", "n02"]
    assert len(rows) == (8 if split == "all" else 4)
    files = [Path(row["path"]) for row in rows.cast_column("image", datasets.Image(decode=False))["image"]]
    assert [names[label] for label in rows["label"]] == [file.relative_to(tmp_path).parts[1] for file in files]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({}, True),
        ({"image_mean": [0.4, 0.5, 0.6]}, False),
        ({"size": {"height": 24, "width": 24}}, False),
        ({"resample": 0}, False),
        ({"do_convert_rgb": True}, True),  # which changes nothing of an RGB image
    ],
)
def test_a_teacher_that_wants_other_pixels_is_told(tmp_path: Path, other: dict[str, Any], same: bool) -> None:
    found = []
    for name, changes in (("ours", {}), ("theirs", other)):
        folder = tiny.save_vit(tmp_path / name)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        source = resolve(str(folder))
        found.append(Preprocessing.of(source, lrsurgery.load_model(folder), None))
    note = other_pixels(*found, "teacher t")
    assert (note is None) is same
    assert same or str(note).startswith("teacher t: is fed images as the model wants them")
