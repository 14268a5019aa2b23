"""Semantic segmentation: figures against counts by hand, the processor's masks, training and calibration."""

from __future__ import annotations

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

import lrsurgery
from lrsurgery.errors import DataError
from lrsurgery.surgery.apply import factorised_layers

CLASSES, SIZE = 4, 32


def save_segformer(folder: Path, *, reduce_labels: bool = False, **options: Any) -> Path:
    torch.manual_seed(0)
    config = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        num_labels=CLASSES,
        **options,
    )
    model = tf.SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(40)  # so that predictions differ from pixel to pixel
    model.save_pretrained(folder)
    processor = tf.SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, do_reduce_labels=reduce_labels)
    processor.save_pretrained(folder)
    return folder


def save_upernet(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = tf.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = tf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=16, num_labels=CLASSES
    )
    tf.UperNetForSemanticSegmentation(config).save_pretrained(folder)
    tf.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def make_pairs(count: int = 6, *, high: int = CLASSES) -> list[tuple[Image.Image, Image.Image]]:
    """Images of several sizes: a class for each quarter, its colour, and a frame that is ignored."""
    random = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        height, width = 40 + 4 * number, 48
        mask = np.kron(random.integers(0, high, (2, 2)), np.ones((height // 2, width // 2), int)).astype(np.uint8)
        image = np.stack([mask * 60, 255 - mask * 60, random.integers(0, 255, mask.shape)], -1).astype(np.uint8)
        mask[:3] = 255
        pairs.append((Image.fromarray(image), Image.fromarray(mask)))
    return pairs


def save_columns(folder: Path, pairs: list[tuple[Image.Image, Image.Image]]) -> Path:
    table = {"image": [one for one, _ in pairs], "annotation": [two for _, two in pairs]}
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(folder)
    return folder


def save_folders(folder: Path, pairs: list[tuple[Image.Image, Image.Image]]) -> Path:
    for number, (image, mask) in enumerate(pairs):
        for name, each in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            each.save(folder / name / f"{number}.png")
    return folder


def counted_by_hand(model: Path, pairs: list[tuple[Image.Image, Image.Image]], size: int) -> dict[str, float]:
    """Figures by plain loops over pixels, from transformers' model and a nearest-neighbour mask of our own."""
    loaded = tf.AutoModelForSemanticSegmentation.from_pretrained(model).eval()
    processor = tf.AutoImageProcessor.from_pretrained(model)
    said, true, losses = [], [], []
    for image, mask in pairs:
        classes = np.asarray(mask).astype(int)
        if processor.do_reduce_labels:
            classes = np.where((classes == 0) | (classes == 255), 255, classes - 1)
        rows = ((np.arange(size) + 0.5) * classes.shape[0] / size).astype(int)
        columns = ((np.arange(size) + 0.5) * classes.shape[1] / size).astype(int)
        labels = classes[rows][:, columns]
        with torch.no_grad():
            logits = loaded(processor(image, return_tensors="pt")["pixel_values"]).logits
            large = nn.functional.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)[0]
        chances = large.double().log_softmax(0).numpy()
        kept = labels != 255
        said += large.argmax(0).numpy()[kept].tolist()
        true += labels[kept].tolist()
        losses += (-chances[labels[kept], kept.nonzero()[0], kept.nonzero()[1]]).tolist()
    found = []
    for c in range(CLASSES):
        both = sum(s == c == t for s, t in zip(said, true, strict=True))
        either = sum(s == c or t == c for s, t in zip(said, true, strict=True))
        found += [both / either] if either else []
    right = sum(s == t for s, t in zip(said, true, strict=True))
    return {
        "loss": float(np.mean(losses)),
        "scored": len(true),
        "pixel_accuracy": right / len(true),
        "mean_iou": float(np.mean(found)),
    }


@pytest.mark.parametrize("reduce_labels", [False, True], ids=["as they are", "reduced"])
def test_figures_are_those_counted_pixel_by_pixel(tmp_path: Path, reduce_labels: bool) -> None:
    model = save_segformer(tmp_path / "model", reduce_labels=reduce_labels)
    pairs = make_pairs(high=CLASSES + reduce_labels)
    wanted = counted_by_hand(model, pairs, SIZE)
    for data in (save_columns(tmp_path / "columns", pairs), save_folders(tmp_path / "folders", pairs)):
        found = lrsurgery.evaluate(model, data)
        assert found.task == "semantic-segmentation"
        assert found.values == pytest.approx(wanted, rel=1e-4)
    assert 0.01 < wanted["mean_iou"] < wanted["pixel_accuracy"] < 0.95


def test_a_class_that_occurs_nowhere_is_left_out(tmp_path: Path) -> None:
    model = save_segformer(tmp_path / "model")
    with torch.no_grad():
        loaded = tf.AutoModelForSemanticSegmentation.from_pretrained(model)
        loaded.decode_head.classifier.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
        loaded.save_pretrained(model)
    pairs = make_pairs(high=2)
    wanted = counted_by_hand(model, pairs, SIZE)
    found = lrsurgery.evaluate(model, save_columns(tmp_path / "data", pairs))
    assert found.values["mean_iou"] == pytest.approx(wanted["mean_iou"])
    assert found.values["mean_iou"] == pytest.approx(wanted["pixel_accuracy"] / 2)  # one of the two that occur


def test_upernet_too(tmp_path: Path) -> None:
    model, pairs = save_upernet(tmp_path / "model"), make_pairs(3)
    found = lrsurgery.evaluate(model, save_folders(tmp_path / "data", pairs))
    assert found.values == pytest.approx(counted_by_hand(model, pairs, 64), rel=1e-4)


def test_finetune_learns_and_calibration_factorises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = save_segformer(tmp_path / "model"), save_folders(tmp_path / "data", make_pairs(8))
    half = tmp_path / "half"
    calibration = lrsurgery.Calibration(data=str(data))
    report = lrsurgery.factorise_checkpoint(model, half, budget="0.7", calibration=calibration)
    assert report.factorised
    assert any(row.predicted_loss for row in report.factorised)
    assert report.loss_check is not None
    assert report.loss_check["measured"]
    before = lrsurgery.evaluate(half, data).values
    assert report.loss_check["after"]["loss"] == pytest.approx(before["loss"], abs=1e-3)
    healed = tmp_path / "healed"
    command = ("finetune", half, "--data", data, "--steps", 16, "--lr", "6e-3", "--output", healed, "--batch-size", 4)
    assert tiny.run(*command) == 0
    capsys.readouterr()
    after = lrsurgery.evaluate(healed, data).values
    assert after["loss"] < 0.8 * before["loss"]
    assert after["mean_iou"] > before["mean_iou"]
    loaded: Any = tf.AutoModelForSemanticSegmentation.from_pretrained(healed)
    assert factorised_layers(loaded)
    assert loaded.config.problem_type is None


def test_a_new_head_has_the_classes_of_the_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = save_segformer(tmp_path / "model"), save_folders(tmp_path / "data", make_pairs(4, high=7))
    with pytest.raises(DataError, match=r"mask \d has class \d, the model's head 4 classes"):
        lrsurgery.evaluate(model, data)
    new = tmp_path / "new"
    assert tiny.run("finetune", model, "--data", data, "--steps", 1, "--new-head", "--dense", "--output", new) == 0
    capsys.readouterr()
    largest = max(int(np.asarray(m)[np.asarray(m) != 255].max()) for _, m in make_pairs(4, high=7))
    assert tf.AutoConfig.from_pretrained(new).num_labels == largest + 1
    assert lrsurgery.evaluate(new, data).values["scored"] > 0


def test_flips_take_the_mask_along(tmp_path: Path) -> None:
    from lrsurgery.checkpoints.source import resolve
    from lrsurgery.data.examples import open_rows, prepare_subject, training_examples
    from lrsurgery.data.options import DataOptions

    source = resolve(str(save_segformer(tmp_path / "model")))
    how, data = DataOptions(), str(save_folders(tmp_path / "data", make_pairs(6)))
    rows = open_rows(data, "semantic-segmentation", how)
    subject = prepare_subject(source, how, rows)
    plain = training_examples(subject, rows, how, augment=False).dataset
    flipped = training_examples(subject, rows, how, seed=1).dataset
    seen = set()
    for index in range(len(plain)):
        one, two = plain[index], flipped[index]
        turned = not torch.equal(one["pixel_values"], two["pixel_values"])
        seen.add(turned)
        wanted = one["labels"].flip(-1) if turned else one["labels"]
        torch.testing.assert_close(two["labels"], wanted)
        if turned:
            torch.testing.assert_close(two["pixel_values"], one["pixel_values"].flip(-1), atol=0.05, rtol=0.05)
    assert seen == {True, False}


def test_bad_masks_are_named(tmp_path: Path) -> None:
    model, pairs = save_segformer(tmp_path / "model"), make_pairs(2)
    colours = [(image, image) for image, _ in pairs]
    with pytest.raises(DataError, match=r"mask 0 has shape .* one whole number a pixel"):
        lrsurgery.evaluate(model, save_columns(tmp_path / "colours", colours))
    folder = save_folders(tmp_path / "lacking", pairs)
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: has no mask of that name"):
        lrsurgery.evaluate(model, folder)
