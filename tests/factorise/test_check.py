"""The loss check after surgery, against losses by plain transformers and timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file
from support import tiny

import lrsurgery
import lrsurgery.hf
from lrsurgery.factorise import check, opening

EXAMPLE = Path(__file__).parents[2] / "examples" / "pydocs-gpt2"


def report_of(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "rank_report.json").read_text())
    return body


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    tiny.save_timm(folder / "resnet")
    tiny.write_images(folder / "classes", size=32)
    (folder / "images").mkdir()
    for i, file in enumerate(sorted((folder / "classes").rglob("*.png"))):
        (folder / "images" / f"{i:02d}.png").write_bytes(file.read_bytes())
    return folder


def test_the_losses_are_those_of_transformers_on_windows_spread_over_the_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("factorise", place / "gpt2", "--rank", 2, "--calibration", place / "train.txt", "--samples", 4)
    assert tiny.run(*command, "--output", out) == 0
    shown = capsys.readouterr().out
    ids = tiny.tokenizer()((place / "train.txt").read_text(), add_special_tokens=False)["input_ids"]
    whole = len(ids) // tiny.BLOCK
    assert whole > 8
    starts = [i * whole // 8 * tiny.BLOCK for i in range(8)]
    windows = torch.tensor([ids[start : start + tiny.BLOCK] for start in starts])
    found = report_of(out)["loss_check"]
    for name, folder in {"before": place / "gpt2", "after": out}.items():
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            loss = float(model(input_ids=windows, labels=windows).loss)
        assert found[name]["loss"] == pytest.approx(loss, abs=2e-4), name
    assert (found["samples"], found["tokens"], found["measured"]) == (8, 32, True)
    text = f"{found['before']['loss']:.2f} -> {found['after']['loss']:.2f} (8 windows of 32 tokens of train.txt)"
    assert f"loss:       {text}" in shown
    assert text in (out / "README.md").read_text().replace("\\", "")  # as Markdown shows it
    assert text in report_of(out)["loss_check"]["text"]


def test_it_changes_nothing_that_a_model_is_made_of_and_can_be_left_out(place: Path, tmp_path: Path) -> None:
    for name, option in {"with": (), "without": ("--no-loss-check",)}.items():
        command = ("factorise", place / "gpt2", "--rank", 0.5, "--quiet", "--output", tmp_path / name)
        assert tiny.run(*command, *option) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert report_of(tmp_path / "with")["loss_check"]["data"] == "the built-in text"
    assert report_of(tmp_path / "without")["loss_check"] is None


def test_a_wreck_is_named_with_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert tiny.run("factorise", EXAMPLE, "--rank", "params:0.25", "--output", out) == 0
    told = capsys.readouterr().err
    assert "plain SVD: without data it minimises the error of the weights" in told
    (line,) = [line for line in told.splitlines() if "surgery damaged the model" in line]
    found = report_of(out)["loss_check"]
    assert found["after"]["loss"] - found["before"]["loss"] > 0.7
    assert f"lrsurgery factorise {EXAMPLE} --budget 0.25 --calibration builtin" in line
    assert tiny.run("factorise", EXAMPLE, "--rank", "params:0.9", "--output", tmp_path / "mild") == 0
    assert "damaged" not in capsys.readouterr().err


def test_images_without_classes_are_held_against_the_dense_models_answers(place: Path, tmp_path: Path) -> None:
    """The share of images that both models give one class, by timm's own transform."""
    out = tmp_path / "out"
    command = ("factorise", place / "resnet", "--rank", 1, "--calibration", place / "images", "--samples", 4)
    assert tiny.run(*command, "--quiet", "--output", out) == 0
    found = report_of(out)["loss_check"]
    dense, low = lrsurgery.load_model(place / "resnet"), lrsurgery.load_model(out)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=dense))
    files = sorted((place / "images").glob("*.png"))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        answers, others = dense(pixels).argmax(-1), low(pixels)
    assert found["before"]["top1"] == 1.0
    assert found["after"]["top1"] == pytest.approx(float((others.argmax(-1) == answers).float().mean()), abs=1e-4)
    assert found["after"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(others, answers)), abs=1e-3)
    assert found["own_answers"]
    assert found["text"].endswith("24 images of images, by the dense model's own answers)")


def test_vision_without_data_is_not_measured(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("factorise", place / "resnet", "--rank", 0.5, "--output", tmp_path / "out") == 0
    assert "loss:       not measured (no data; --calibration DATA measures it" in capsys.readouterr().out
    assert report_of(tmp_path / "out")["loss_check"]["measured"] is False


def test_surgery_that_worked_never_fails_by_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(check, "call", fails)
    assert tiny.run("factorise", place / "gpt2", "--rank", 0.5, "--output", tmp_path / "out") == 0
    assert "not measured (RuntimeError: out of memory)" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_values_that_are_given_up_on_purpose_are_not_compared(place: Path, tmp_path: Path) -> None:
    command = ("factorise", place / "gpt2", "--rank", 0.5, "--quiet", "--init", "he", "--output", tmp_path / "out")
    assert tiny.run(*command) == 0
    assert report_of(tmp_path / "out")["loss_check"] is None


@pytest.mark.process
def test_a_model_that_does_not_fit_is_measured_block_by_block(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = opening.load_offloaded

    def counted(*args: Any) -> Any:
        loads.append(args)
        return real(*args)

    for name, free in {"whole": None, "blocks": 4}.items():
        with monkeypatch.context() as patch:
            if free is not None:
                patch.setattr(check, "free_memory", lambda device, free=free: free)
                patch.setattr(opening, "load_offloaded", counted)
            command = ("factorise", place / "gpt2", "--rank", 0.5, "--quiet", "--output", tmp_path / name)
            assert tiny.run(*command) == 0
    assert len(loads) == 2
    assert report_of(tmp_path / "whole")["loss_check"] == report_of(tmp_path / "blocks")["loss_check"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--budget 0.5 --samples 4", "--samples: about calibration, which has no data"),
        ("--rank 0.5 --importance activations --block-size 8", "--importance, --block-size: about calibration"),
        ("--rank 0.5 --fisher-temperature 3", "--fisher-temperature: about"),
    ],
)
def test_options_of_calibration_without_data_are_not_dropped_in_silence(
    words: str, named: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("factorise", place / "gpt2", *words.split(), "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
