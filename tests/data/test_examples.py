"""Examples: what a model is fed is what its own tokenizer makes of the data, whole, and nothing else is scored."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from support import tiny
from tokenizers import processors

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.examples import (
    Examples,
    Rows,
    calibration_examples,
    evaluation_examples,
    open_rows,
    prepare_subject,
    training_examples,
)
from lrsurgery.data.labels import Labels
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import measure
from lrsurgery.data.tasks import Subject
from lrsurgery.data.text.padding import position_limit
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


def numbered(*labels: int) -> Labels:
    return Labels(kind="class", of_rows=labels, names=("0", "1"), numbered=True)


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
    assert images.labels is None
    examples, chosen = calibration_examples(vit, images, DataOptions(), 4, seed=0)
    batch = examples.collate([examples.dataset[i] for i in chosen])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("columns", ["text", "text,other"], ids=["sentences", "pairs"])
def test_sentences_are_batched_as_the_tokenizer_does(tmp_path: Path, columns: str) -> None:
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=2)
    subject = prepare_subject(resolve(str(folder)), DataOptions(), None)
    texts, others = ["raise it", "return a value and more of it"], ["one", "another one"]
    data = datasets.Dataset.from_dict({"text": texts, "other": others})
    rows = Rows(data, "rows", Labels(kind="class", of_rows=(1, 0), names=("0", "1"), numbered=True))
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
    assert rows.labels is not None
    assert rows.labels.names == ("raise", "return")
    assert rows.labels.of_rows == (0,) * 8 + (1,) * 8
    options = DataOptions(task="sequence-classification")
    subject = prepare_subject(resolve(str(tiny.save_gpt2(tmp_path / "gpt2"))), options, rows, new_head=True)
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


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A model whose tokenizer begins a text with [CLS], as Llama's and Gemma's do with theirs."""
    folder = tiny.save_gpt2(tmp_path_factory.mktemp("bos") / "gpt2")
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    return prepare_subject(resolve(str(folder)), DataOptions(), None)


def loss_of(subject: Subject, examples: Examples) -> tuple[float, int]:
    """Summed loss and scored tokens of all examples, in one padded batch."""
    batch = examples.collate([examples.dataset[i] for i in range(len(examples.dataset))])
    with torch.no_grad():
        logits = subject.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    sums = measure("causal-lm", logits, batch["labels"]).sum(0)
    return float(sums[0]), int(sums[1])


@pytest.mark.parametrize("stride", [None, 8], ids=["side by side", "sliding"])
def test_each_window_begins_as_the_tokenizer_begins_a_text(bos: Subject, text: Path, stride: int | None) -> None:
    """Against transformers' own loss on what its tokenizer makes of each window, one at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bos.source.folder)
    tokens = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    assert tokens[0] == 2
    begin, tokens = tokens[:1], tokens[1:]
    rows = open_rows(str(text), "causal-lm", DataOptions())
    examples = evaluation_examples(bos, rows, DataOptions(), stride=stride)
    assert examples.dataset[0]["input_ids"].tolist() == begin + tokens[: tiny.BLOCK - 1]
    assert examples.notes == (
        f"{text}: 1 document, {len(tokens):,} tokens, BOS added, windows of {tiny.BLOCK} with stride {stride or 31}",
    )
    total, done, start = 0.0, 0, 0
    while done < len(tokens):
        window = tokens[start : start + tiny.BLOCK - 1]
        labels = [IGNORED] * (1 + done - start) + window[done - start :]
        with torch.no_grad():
            out = bos.model(input_ids=torch.tensor([begin + window]), labels=torch.tensor([labels]))
        total += float(out.loss) * (len(window) - (done - start))
        done, start = start + len(window), start + (stride or tiny.BLOCK - 1)
    assert loss_of(bos, examples) == (pytest.approx(total, rel=1e-4), len(tokens))


def test_training_and_calibration_begin_as_evaluation_does(bos: Subject, text: Path) -> None:
    rows = open_rows(str(text), "causal-lm", DataOptions())
    trained = training_examples(bos, rows, DataOptions())
    calibrated, _ = calibration_examples(bos, rows, DataOptions(), 4, seed=0)
    measured = evaluation_examples(bos, rows, DataOptions())
    for i in range(3):
        assert torch.equal(trained.dataset[i]["input_ids"], measured.dataset[i]["input_ids"])
        assert torch.equal(calibrated.dataset[i]["input_ids"], measured.dataset[i]["input_ids"])
        assert trained.dataset[i]["labels"].tolist() == [IGNORED, *trained.dataset[i]["input_ids"].tolist()[1:]]
    streamed = training_examples(
        bos, open_rows(str(text), "causal-lm", DataOptions(), streaming=True), DataOptions(), streaming=True
    )
    assert next(iter(streamed.dataset))["input_ids"][0] == 2  # type: ignore[call-overload]
    without = training_examples(bos, rows, DataOptions(bos="never"))
    after = int(trained.dataset[1]["input_ids"][1])
    assert without.dataset[0]["input_ids"].tolist() == [*trained.dataset[0]["input_ids"].tolist()[1:], after]
    assert "no BOS added" in without.notes[0]


def test_rows_of_tokens_keep_their_masks_and_labels(gpt2: Subject) -> None:
    ids = [[7, 8, 9, 10, 11], [1, 1, 12, 13, 14], [15, 16, 17]]
    masks = [[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0]]
    labels = [[IGNORED, IGNORED, 9, 10, 11], [IGNORED] * 3 + [13, 14], [IGNORED, 16, IGNORED]]
    options = DataOptions()
    for given in ({"attention_mask": masks, "labels": labels}, {"labels": labels}, {"attention_mask": masks}):
        examples = evaluation_examples(gpt2, rows_of(input_ids=ids, **given), options)
        total, count = 0.0, 0
        for i, row in enumerate(ids):
            mask = given["attention_mask"][i] if "attention_mask" in given else [1] * len(row)
            own = [t if m else IGNORED for t, m in zip(row, mask, strict=True)]
            target = torch.tensor([given["labels"][i] if "labels" in given else own])
            with torch.no_grad():
                out = gpt2.model(input_ids=torch.tensor([row]), attention_mask=torch.tensor([mask]), labels=target)
            scored = int(target[:, 1:].ne(IGNORED).sum())
            total, count = total + float(out.loss) * scored, count + scored
        assert loss_of(gpt2, examples) == (pytest.approx(total, rel=1e-4), count)
        assert "3 rows of tokens as they are" in examples.notes[0]
    trained = training_examples(gpt2, rows_of(input_ids=ids, labels=labels), options)
    assert trained.dataset[0]["labels"].tolist() == labels[0]
    with pytest.raises(DataError, match="rows: row 0 has 40 tokens, the model takes 32; cut the rows, or --join them"):
        evaluation_examples(gpt2, rows_of(input_ids=[[5] * 40], attention_mask=[[1] * 40]), options)


def test_tokens_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=2)
    tokenizer = tiny.tokenizer(around=True)
    tokenizer.add_tokens(["unheard", "of"])
    tokenizer.save_pretrained(folder)
    subject = prepare_subject(resolve(str(folder)), DataOptions(), None)
    data = datasets.Dataset.from_dict({"text": ["raise it", "unheard"]})
    with pytest.raises(DataError, match=f"rows: row 1 has token {tiny.VOCABULARY}, the model knows {tiny.VOCABULARY}"):
        training_examples(subject, Rows(data, "rows", numbered(0, 1)), DataOptions())
    known = training_examples(
        subject,
        Rows(
            data.select([0]),
            "rows",
            numbered(
                0,
            ),
        ),
        DataOptions(),
    )
    assert len(known.dataset) == 1
    masked = prepare_subject(resolve(str(tiny.save_bert(tmp_path / "m", "BertForMaskedLM"))), DataOptions(), None)
    tokenizer.save_pretrained(tmp_path / "m")
    ids = torch.arange(6, 316).repeat(60).tolist()
    examples = evaluation_examples(masked, rows_of(input_ids=[ids]), DataOptions())
    assert max(int(examples.dataset[i]["input_ids"].max()) for i in range(len(examples.dataset))) < tiny.VOCABULARY
    tokenizer.mask_token = "of"
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match="its tokenizer's mask token is 321, the model knows 320"):
        evaluation_examples(masked, rows_of(input_ids=[ids]), DataOptions())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["good", None]}, "rows: row 1 of column 'text' holds nothing, not text"),
        ({"text": [12, 13]}, "rows: row 0 of column 'text' holds int, not text"),
        ({"text": [["good", "film"]] * 2}, "rows: row 0 of column 'text' holds list, not text"),
        ({"text": ["good", "bad"], "other": ["one", None]}, "rows: row 1 of column 'other' holds nothing, not text"),
    ],
    ids=["nothing", "numbers", "lists", "half a pair"],
)
def test_sentences_that_are_no_text_are_named(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=2)
    subject = prepare_subject(resolve(str(folder)), DataOptions(), None)
    rows = Rows(datasets.Dataset.from_dict(columns), "rows", numbered(0, 1))
    with pytest.raises(DataError, match=message):
        training_examples(subject, rows, DataOptions(text_column=",".join(columns)))


def test_a_file_of_text_is_sentences_for_a_classifier(tmp_path: Path) -> None:
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=2)
    subject = prepare_subject(resolve(str(folder)), DataOptions(), None)
    (tmp_path / "a.txt").write_text("raise it\n\nreturn a value\n")
    rows = open_rows(str(tmp_path / "a.txt"), "sequence-classification", DataOptions(), labels=False)
    examples, chosen = calibration_examples(subject, rows, DataOptions(), 8, seed=0)
    assert chosen == [0, 1]
    wanted = tiny.tokenizer(around=True)(["raise it", "return a value"])["input_ids"]
    assert [examples.dataset[i]["input_ids"] for i in chosen] == wanted
    assert examples.notes == (f"{tmp_path / 'a.txt'}: 2 sentences, cut to 32 tokens",)
    with pytest.raises(RecipeError, match="bos never: is for running text"):
        calibration_examples(subject, rows, DataOptions(bos="never"), 8, seed=0)


def test_windows_are_2048_tokens_where_the_model_takes_more(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=131072,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    subject = prepare_subject(resolve(str(tmp_path)), DataOptions(), None)
    rows = rows_of(input_ids=[[5] * 5000])
    examples = evaluation_examples(subject, rows, DataOptions())
    assert [len(examples.dataset[i]["input_ids"]) for i in range(len(examples.dataset))] == [2048, 2048, 904]
    assert "windows of 2048 with stride 2048" in examples.notes[0]
    assert evaluation_examples(subject, rows, DataOptions(block_size=5000)).size == 5000


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.GPT2Config(n_positions=64), (64, False)),
        (transformers.BertConfig(max_position_embeddings=64), (64, False)),
        (transformers.RobertaConfig(max_position_embeddings=66), (64, False)),
        (transformers.RobertaConfig(max_position_embeddings=66, pad_token_id=0), (65, False)),
        (transformers.CamembertConfig(max_position_embeddings=66), (64, False)),
        (transformers.MPNetConfig(max_position_embeddings=66), (64, False)),
        (transformers.LongformerConfig(max_position_embeddings=66, attention_window=8), (64, False)),
        (
            transformers.EsmConfig(vocab_size=99, max_position_embeddings=66, pad_token_id=1),
            (64, False),
        ),
        (transformers.Data2VecTextConfig(max_position_embeddings=66), (64, False)),
        (transformers.OPTConfig(max_position_embeddings=64), (64, False)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_model_tells_how_long_a_sequence_may_be(
    config: transformers.PreTrainedConfig, wanted: tuple[int, bool]
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "n_layer": 1}
    for name, value in {**small, "word_embed_proj_dim": 16, "ffn_dim": 16, "n_embd": 16, "n_head": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = transformers.AutoModel.from_config(config).eval()
    limit, relative = position_limit(model)
    assert (limit, relative) == wanted
    assert limit is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):  # one more has no position
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.LlamaConfig(max_position_embeddings=131072), (131072, True)),
        (transformers.BloomConfig(n_layer=1), (None, True)),
    ],
    ids=["rotary positions", "no positions"],
)
def test_relative_positions_have_no_end(config: transformers.PreTrainedConfig, wanted: tuple[int | None, bool]) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert position_limit(model) == wanted
