"""The guide's table of what heals which model: each row on a tiny model, through the three commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from support import families, tiny
from support.families import captions, images, save_clip, save_features, save_segformer, save_t5, save_whisper, texts

from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.source import resolve
from lrsurgery.report.schema import Report
from lrsurgery.training.run_folder import read_metrics

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "healing.md"
WITHOUT = ("--task", "none")


@dataclass(frozen=True)
class Row:
    """A family of the table, by a model of its kind and data without labels for refinement."""

    family: str  # as the guide begins the row
    save: Callable[[Path], object]
    data: Callable[[Path], Path]
    options: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()  # of finetune alone


def _text(folder: Path) -> Path:
    return tiny.write_text(folder)[0]


def _sentences(folder: Path) -> Path:
    return tiny.write_sentences(folder / "sentences.jsonl")


def _pictures(folder: Path) -> Path:
    return tiny.write_images(folder / "pictures")


def _summaries(folder: Path) -> Path:
    rows = [{"text": text, "summary": text.split()[0]} for text in families.sentences()]
    datasets.Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def _without_dropout(cls: str, **options: object) -> Callable[[Path], object]:
    return lambda folder: tiny.save_bert(folder, cls, hidden_dropout_prob=0.0, **options)


def _classifier(folder: Path) -> object:
    names = {"id2label": {0: "raise", 1: "return"}, "label2id": {"raise": 0, "return": 1}}
    return tiny.save_bert(folder, "BertForSequenceClassification", hidden_dropout_prob=0.0, num_labels=2, **names)


ROWS = {
    "gpt2": Row("GPT-2, Llama", lambda folder: tiny.save_gpt2(folder, dropout=0.0), _text, (), ("--block-size", "16")),
    "bert": Row("BERT and RoBERTa", _classifier, _sentences),
    "minilm": Row("encoders without", _without_dropout("BertModel"), texts),
    "vit": Row("ViT, Swin", tiny.save_vit, _pictures, (), ("--no-augment",)),
    "cnn": Row("timm's CNNs", tiny.save_timm, _pictures, (), ("--no-augment",)),
    "clip": Row("CLIP, SigLIP", save_clip, captions),
    "t5": Row("T5, BART", save_t5, _summaries),
    "t5 without targets": Row("T5, BART", save_t5, texts, WITHOUT),
    "whisper": Row("Whisper", save_whisper, families.features, WITHOUT),
    "segformer": Row("SegFormer", save_segformer, images, WITHOUT),
    "reward": Row("reward models", _without_dropout("BertForSequenceClassification", num_labels=1), texts, WITHOUT),
    "features": Row("timm without classes", save_features, images, (), ("--no-augment", "--lr", "3e-4")),
}


def test_each_row_of_the_guide_is_run() -> None:
    table = GUIDE.read_text(encoding="utf-8").split("## What heals which model")[1].split("\n## ")[0]
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(listed) >= 10
    for family in listed:
        assert any(family.startswith(row.family) for row in ROWS.values()), family
    for row in ROWS.values():
        assert any(family.startswith(row.family) for family in listed), row.family


@pytest.mark.parametrize("name", ROWS)
def test_refined_and_then_healed_it_comes_nearer(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    row.save(tmp_path / "dense")
    data = row.data(tmp_path)
    rest = ("--rank", "0.15", "--no-loss-check", "--quiet", "--output", tmp_path / "half")
    assert tiny.run("factorise", tmp_path / "dense", *rest) == 0
    where = ("--against", tmp_path / "dense", "--calibration", data, *row.options, "--quiet")
    rest = ("--samples", "16", "--refine-steps", "8", "--output", tmp_path / "refined")
    assert tiny.run("refine", tmp_path / "half", *where, *rest) == 0
    told = Report.read(tmp_path / "refined").refinement
    assert told is not None
    assert all(block["after"] <= block["before"] for block in told["blocks"])
    assert sum(block["after"] for block in told["blocks"]) < 0.99 * sum(block["before"] for block in told["blocks"])

    where = ("--teacher", tmp_path / "dense", "--data", data, "--eval-data", data, *row.options)
    rest = (
        "--steps",
        "40",
        "--lr",
        "1e-3",
        *row.trained,
        "--device",
        "cpu",
        "--quiet",
        "--output",
        tmp_path / "healed",
    )
    assert tiny.run("finetune", tmp_path / "refined", *where, *rest) == 0
    evaluations = [each["eval"] for each in read_metrics(tmp_path / "healed") if "eval" in each]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    load_source(resolve(str(tmp_path / "healed")))
