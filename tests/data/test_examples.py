"""Examples: what a model is fed is what its own tokenizer makes of the data, whole, and nothing else is scored."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from support import tiny

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.examples import (
    Rows,
    calibration_examples,
    evaluation_examples,
    open_rows,
    position_limit,
    prepare_subject,
    training_examples,
)
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import Subject, measure
from lrsurgery.data.text import IGNORED
from lrsurgery.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tiny.save_gpt2(tmp_path_factory.mktemp("data") / "gpt2")
    return prepare_subject(resolve(str(folder)), DataOptions(), None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text"))[1]


def tokens_of(file: Path) -> list[int]:
    ids: list[int] = tiny.tokenizer()(file.read_text(encoding="utf-8"))["input_ids"]
    return ids


def rows_of(**columns: list[object]) -> Rows:
    return Rows(datasets.Dataset.from_dict(columns), "rows")


def test_training_sequences_are_the_text_in_its_order(gpt2: Subject, text: Path) -> None:
    rows = open_rows(str(text), "causal-lm", DataOptions())
    examples = training_examples(gpt2, rows, DataOptions(block_size=16))
    assert (examples.unit, examples.size) == ("tokens", 16)
    found = [examples.dataset[i] for i in range(len(examples.dataset))]
    wanted = tokens_of(text)
    assert [t for each in found for t in each["input_ids"].tolist()] == wanted[: len(wanted) // 16 * 16]
    assert all(torch.equal(each["input_ids"], each["labels"]) for each in found)


def test_padding_changes_no_loss(gpt2: Subject, text: Path) -> None:
    """A padded batch scores as transformers' own loss does on each sequence by itself."""
    rows = open_rows(str(text), "causal-lm", DataOptions())
    examples = evaluation_examples(gpt2, rows, DataOptions(block_size=20))
    last = len(examples.dataset) - 1
    chosen = [examples.dataset[i] for i in (0, last)]
    lengths = [len(each["input_ids"]) for each in chosen]
    assert lengths[0] == 20 > lengths[1] > 1
    batch = examples.collate(chosen)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"][1, lengths[1] :].eq(IGNORED).all()
    with torch.no_grad():
        logits = gpt2.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = measure("causal-lm", logits, batch["labels"])
        for i, length in enumerate(lengths):
            ids = chosen[i]["input_ids"][None]
            wanted = float(gpt2.model(input_ids=ids, labels=ids).loss) * (length - 1)
            assert float(found[i, 0]) == pytest.approx(wanted, rel=1e-4)
            assert int(found[i, 1]) == length - 1


def test_masked_sequences_stand_between_the_tokenizers_own(tmp_path: Path, text: Path) -> None:
    subject = prepare_subject(resolve(str(tiny.save_bert(tmp_path / "bert", "BertForMaskedLM"))), DataOptions(), None)
    rows = open_rows(str(text), "masked-lm", DataOptions())
    examples = evaluation_examples(subject, rows, DataOptions(block_size=16))
    kept = []
    for i in range(len(examples.dataset)):
        each = examples.dataset[i]
        assert each["input_ids"][0] == 2  # [CLS]
        assert each["input_ids"][-1] == 3  # [SEP]
        assert len(each["input_ids"]) <= 16
        # a token is either labelled or shown
        kept += torch.where(each["labels"] == IGNORED, each["input_ids"], each["labels"])[1:-1].tolist()
    assert kept == tiny.tokenizer()(text.read_text(encoding="utf-8"))["input_ids"]


def test_calibration_draws_without_repeats_and_needs_no_labels(tmp_path: Path, gpt2: Subject, text: Path) -> None:
    rows = open_rows(str(text), "causal-lm", DataOptions())
    examples, first = calibration_examples(gpt2, rows, DataOptions(), 5, seed=1)
    assert examples.size == tiny.BLOCK  # the model takes fewer than 512
    assert first == sorted(set(first))
    assert len(first) == 5
    assert first == calibration_examples(gpt2, rows, DataOptions(), 5, seed=1)[1]
    assert first != calibration_examples(gpt2, rows, DataOptions(), 5, seed=2)[1]
    everything = calibration_examples(gpt2, rows, DataOptions(), 10**6, seed=1)[1]
    assert everything == list(range(len(examples.dataset)))
    vit = prepare_subject(resolve(str(tiny.save_vit(tmp_path / "vit"))), DataOptions(), None)
    images = open_rows(
        str(tiny.write_images(tmp_path / "images", count=2)), "image-classification", DataOptions(), labels=False
    )
    assert images.labels == ()
    examples, chosen = calibration_examples(vit, images, DataOptions(), 4, seed=0)
    batch = examples.collate([examples.dataset[i] for i in chosen])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("columns", ["text", "text,other"], ids=["sentences", "pairs"])
def test_sentences_are_batched_as_the_tokenizer_does(tmp_path: Path, columns: str) -> None:
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=2)
    subject = prepare_subject(resolve(str(folder)), DataOptions(), None)
    texts, others = ["raise it", "return a value and more of it"], ["one", "another one"]
    data = datasets.Dataset.from_dict({"text": texts, "other": others})
    rows = Rows(data, "rows", ("0", "1"), (1, 0))
    examples = training_examples(subject, rows, DataOptions(text_column=columns))
    assert (examples.unit, examples.size) == ("sentences", 1)
    batch = examples.collate([examples.dataset[0], examples.dataset[1]])
    pair = [texts, others] if columns == "text,other" else [texts]
    wanted = tiny.tokenizer(around=True)(*pair, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["attention_mask"], wanted["attention_mask"])
    assert batch["labels"].tolist() == [1, 0]


def test_a_new_head_has_the_classes_of_the_data(tmp_path: Path) -> None:
    rows = open_rows(str(tiny.write_sentences(tmp_path / "rows.jsonl")), "sequence-classification", DataOptions())
    assert rows.classes == ("raise", "return")
    assert rows.labels == (0,) * 8 + (1,) * 8
    options = DataOptions(task="sequence-classification")
    subject = prepare_subject(resolve(str(tiny.save_gpt2(tmp_path / "gpt2"))), options, rows)
    assert subject.config.id2label == {0: "raise", 1: "return"}
    examples = training_examples(subject, rows, options)
    assert subject.config.pad_token_id == 1  # [PAD], without which this head finds no last token
    batch = examples.collate([examples.dataset[i] for i in (0, 15)])
    assert subject.model(**batch).logits.shape == (2, 2)


def test_a_timm_model_notes_another_image_size(tmp_path: Path) -> None:
    from timm.data import resolve_data_config

    source = resolve(str(tiny.save_timm(tmp_path / "timm")))
    own = resolve_data_config(source.pretrained_cfg)["input_size"][1]
    assert prepare_subject(source, DataOptions(image_size=own), None).source == source
    subject = prepare_subject(source, DataOptions(image_size=48), None)
    assert subject.source.pretrained_cfg["input_size"] == [3, 48, 48]
    vit = resolve(str(tiny.save_vit(tmp_path / "vit")))
    with pytest.raises(RecipeError, match=r"image_size 48: this model's preprocessor_config\.json says 16"):
        prepare_subject(vit, DataOptions(image_size=48), None)


def test_what_does_not_fit_the_model_is_named(gpt2: Subject, text: Path, tmp_path: Path) -> None:
    rows = open_rows(str(text), "causal-lm", DataOptions())
    with pytest.raises(RecipeError, match="block_size 33: longer than the 32 positions"):
        training_examples(gpt2, rows, DataOptions(block_size=33))
    with pytest.raises(RecipeError, match="stride 17: write 1 to 16"):
        evaluation_examples(gpt2, rows, DataOptions(block_size=16), stride=17)
    with pytest.raises(DataError, match="rows: its 3 tokens are fewer than one sequence of 32"):
        training_examples(gpt2, rows_of(input_ids=[[5, 6, 7]]), DataOptions())
    with pytest.raises(DataError, match="rows: 1 tokens leave nothing to predict"):
        evaluation_examples(gpt2, rows_of(input_ids=[[5]]), DataOptions())
    with pytest.raises(DataError, match=f"rows: has token {tiny.VOCABULARY}, the model knows {tiny.VOCABULARY}"):
        evaluation_examples(gpt2, rows_of(input_ids=[[5, tiny.VOCABULARY]]), DataOptions())
    labelled = tmp_path / "rows.jsonl"
    labelled.write_text(json.dumps({"text": "a", "label": 0}) + "\n")
    with pytest.raises(DataError, match="streaming is for text"):
        open_rows(str(labelled), "sequence-classification", DataOptions(), streaming=True)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.GPT2Config(n_positions=64), (64, False)),
        (transformers.RobertaConfig(max_position_embeddings=514), (512, False)),
        (transformers.LlamaConfig(max_position_embeddings=128), (128, True)),
        (transformers.BloomConfig(), (None, True)),
    ],
    ids=["learned positions", "positions after padding", "rotary positions", "no positions"],
)
def test_the_config_tells_how_long_a_sequence_may_be(
    config: transformers.PreTrainedConfig, wanted: tuple[int | None, bool]
) -> None:
    assert position_limit(config) == wanted
