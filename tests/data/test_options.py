"""Options of data check themselves; names of the room load on first use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny

import lrsurgery.data
from lrsurgery.data import datasets, labels
from lrsurgery.data.options import DataOptions, check_at_least, check_choice, check_finite
from lrsurgery.errors import RecipeError


def test_options_without_values_are_right() -> None:
    DataOptions().check()
    DataOptions(task="masked-lm", block_size=2, image_size=1).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DataOptions(task="poetry"), "unknown task 'poetry'; known: causal-lm, masked-lm, "),
        (DataOptions(block_size=1), "block_size 1: write at least 2"),
        (DataOptions(image_size=0), "image_size 0: write at least 1"),
    ],
    ids=["unknown task", "sequence of one token", "no pixels"],
)
def test_a_value_out_of_bounds_is_named(options: DataOptions, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        options.check()


def test_bounds_themselves_are_allowed() -> None:
    check_choice("form", "b", ("a", "b"))
    check_at_least("steps", 3, 3)
    check_finite("strength", 0.0, positive=False)
    check_finite("strength", 1e-9, positive=True)


@pytest.mark.parametrize(
    ("value", "positive"),
    [(float("nan"), False), (float("inf"), False), (-0.1, False), (0.0, True)],
    ids=["NaN", "infinity", "negative", "zero"],
)
def test_a_number_that_is_none_is_refused(value: float, positive: bool) -> None:
    with pytest.raises(RecipeError, match=r"strength .*: write a number"):
        check_finite("strength", value, positive=positive)


def test_names_of_the_room_are_those_of_its_files() -> None:
    assert lrsurgery.data.open_data is datasets.open_data
    assert lrsurgery.data.read_labels is labels.read_labels
    assert lrsurgery.data.match_labels is labels.match_labels
    assert dir(lrsurgery.data) == sorted(lrsurgery.data.__all__)
    with pytest.raises(AttributeError, match=r"'lrsurgery\.data' has no attribute 'nothing'"):
        _ = lrsurgery.data.nothing


@pytest.mark.process
def test_names_load_on_first_use() -> None:
    program = """
import sys
import lrsurgery.data, lrsurgery.data.options
heavy = {"torch", "transformers", "datasets", "timm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from lrsurgery.data import open_data  # reads files, which takes torch
from lrsurgery.data import match_labels, read_labels
assert callable(match_labels) and callable(read_labels) and callable(open_data)
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LABELS = {0: "raise", 1: "return"}
DATA_OF = {"running text": "valid.txt", "sentences": "sentences.jsonl", "images": "pictures"}
OPTIONS = {
    "--text-column text": ("running text", "sentences"),
    "--block-size 16": ("running text", "sentences"),
    "--bos always": ("running text",),
    "--join": ("running text",),
    "--stride 4": ("running text",),
    "--label-column label": ("sentences", "images"),
    "--label-map FILE": ("sentences", "images"),
    "--image-column image": ("images",),
    "--image-size 32": ("images",),
    "--test-size": ("images",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_gpt2(folder / "running text")
    tiny.save_bert(folder / "sentences", "BertForSequenceClassification", num_labels=2, id2label=LABELS)
    tiny.save_timm(folder / "images")
    tiny.write_text(folder)
    tiny.write_sentences(folder / "sentences.jsonl")
    tiny.write_images(folder / "pictures")
    maps = {"sentences": {"raise": "raise", "return": "return"}, "images": {f"class{i}": str(i) for i in range(3)}}
    for reads in DATA_OF:
        (folder / f"{reads}.json").write_text(json.dumps(maps.get(reads, {})))
    return folder


@pytest.mark.parametrize("reads", DATA_OF)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_the_model_has_no_use_for_is_refused(
    option: str, reads: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would change nothing, in silence; where the model has a use for it, it is taken."""
    words = [str(models / f"{reads}.json") if word == "FILE" else word for word in option.split()]
    code = tiny.run("evaluate", models / reads, "--data", models / DATA_OF[reads], *words)
    said = capsys.readouterr().err
    if reads in OPTIONS[option]:
        assert code == 0, said
    else:
        assert (code, said.count("\n")) == (2, 1)
        assert f"and this model reads {reads}" in said
