"""Odd but ordinary data: what it says is what is measured, by hand, or it is refused by its row."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

import lrsurgery
from lrsurgery.data.datasets import digest_of, open_data
from lrsurgery.data.images import decode
from lrsurgery.data.labels import read_label_map
from lrsurgery.errors import DataError, RecipeError, SourceError
from lrsurgery.files.yaml import read_yaml
from lrsurgery.training.finetune import finetune

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "the", "a"]


def save_tokenizer(folder: Path, **named: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **named)
    fast.save_pretrained(folder)


def save_bert(folder: Path, *names: str, seed: int = 0, inputs: Sequence[str] = (), **options: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    config = tf.BertConfig(**sizes, intermediate_size=16, pad_token_id=0, **labels, **options)
    model = tf.BertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, **({"model_input_names": list(inputs)} if inputs else {}))
    return folder


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def loss_by_hand(folder: Path, rows: Sequence[tuple[str, Any]], loss: Callable[..., torch.Tensor]) -> float:
    """One text at a time."""
    model: Any = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    taken = {"input_ids", "token_type_ids"} if "FNet" in type(model).__name__ else {"input_ids", "attention_mask"}
    found = []
    for text, label in rows:
        inputs = {k: v for k, v in tokenizer(text, return_tensors="pt").items() if k in taken}
        with torch.no_grad():
            found.append(float(loss(model(**inputs).logits, torch.tensor([label]))))
    return sum(found) / len(found)


# tables


def test_a_row_longer_than_its_heading_is_refused(tmp_path: Path) -> None:
    for name, comma in (("rows.csv", ","), ("rows.tsv", "\t")):
        (tmp_path / name).write_text(f"text{comma}label\ngood{comma} bad film{comma}1\n")
        with pytest.raises(DataError, match=rf"{name}: its first row has 3 fields and its heading 2; put a text"):
            open_data(str(tmp_path / name))
    (tmp_path / "quoted.csv").write_text('text,label\n"good, bad film",1\n"a, ""film""",0\n')
    assert open_data(str(tmp_path / "quoted.csv"))["text"][:] == ["good, bad film", 'a, "film"']  # type: ignore[index]
    (tmp_path / "later.csv").write_text("text,label\ngood,1\nbad, film,0\n")
    with pytest.raises(DataError, match="Expected 2 fields in line 3, saw 3"):
        open_data(str(tmp_path / "later.csv"))


def test_classes_may_be_named_as_what_is_missing(tmp_path: Path) -> None:
    names = ["None", "NA", "null", "nan"]
    model = save_bert(tmp_path / "model", *names)
    rows = [("good film", 0), ("bad", 1), ("the film", 2), ("a", 3)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{names[i]}\n" for text, i in rows))
    found = lrsurgery.evaluate(model, tmp_path / "rows.csv").values
    assert found["scored"] == 4
    assert found["loss"] == pytest.approx(loss_by_hand(model, rows, torch.nn.functional.cross_entropy), rel=1e-5)
    (tmp_path / "missing.csv").write_text("text,label\ngood,NA\nbad,\n")
    assert lrsurgery.evaluate(model, tmp_path / "missing.csv").values["scored"] == 1


# files and folders


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_mark_inside_a_compressed_file_is_no_text(tmp_path: Path, kind: str) -> None:
    body = {"txt": "good film\n", "jsonl": '{"text": "good film\\n"}\n', "csv": 'text\n"good film\n"\n'}[kind]
    for name, content in ((f"plain.{kind}", body.encode()), (f"marked.{kind}", b"\xef\xbb\xbf" + body.encode())):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    texts = {name.name: open_data(str(name))["text"][:] for name in tmp_path.iterdir()}  # type: ignore[index]
    assert {tuple(found) for found in texts.values()} == {("good film\n",)}, texts


def image(file: Path, shade: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(file)


def test_linked_folders_are_read_and_circles_are_not(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        image(tmp_path / "data" / name / "0.png")
    for number in range(2):
        image(tmp_path / "elsewhere" / f"{number}.png")
    (tmp_path / "data" / "car").symlink_to(tmp_path / "elsewhere")
    rows: Any = open_data(str(tmp_path / "data"))
    assert sorted(rows.features["label"].int2str(label) for label in rows["label"]) == ["bus", "car", "car", "train"]
    before = digest_of(str(tmp_path / "data"), None, None)
    image(tmp_path / "elsewhere" / "2.png")
    assert digest_of(str(tmp_path / "data"), None, None) != before
    (tmp_path / "data" / "car" / "circle").symlink_to(tmp_path / "data")
    assert len(open_data(str(tmp_path / "data"))) == 5


@pytest.mark.parametrize("top", ["val", "."])
def test_a_class_with_a_splits_name_keeps_it_above_its_images(tmp_path: Path, top: str) -> None:
    for name in ("bus", "car", "train"):
        image(tmp_path / "data" / top / name / "images" / "0.png")
    rows: Any = open_data(str(tmp_path / "data"), split=None if top == "." else "val")
    assert rows.features["label"].names == ["bus", "car", "train"]


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("Train", "Val"), ("TRAIN", "validation")])
def test_splits_in_other_spellings(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (3, 1), strict=True):
        for number in range(count):
            image(tmp_path / name / "bus" / f"{number}.png")
    assert len(open_data(str(tmp_path))) == 3
    assert len(open_data(str(tmp_path), split="validation")) == 1
    assert len(open_data(str(tmp_path), split=names[1])) == 1


# masks, labels and lengths


@pytest.mark.parametrize("kind", ["BERT without a mask", "FNet"])
def test_figures_of_models_whose_tokenizer_gives_no_mask(tmp_path: Path, kind: str) -> None:
    if kind == "FNet":
        torch.manual_seed(0)
        sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
        tf.FNetForSequenceClassification(tf.FNetConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model", model_input_names=["input_ids", "token_type_ids"])
    else:
        save_bert(tmp_path / "model", inputs=["input_ids"])
    rows = [(" ".join(["good", "film", "the", "bad", "a"][: i + 1]), i % 2) for i in range(5)]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in rows])
    wanted = loss_by_hand(tmp_path / "model", rows, torch.nn.functional.cross_entropy)
    for size in (1, 2, 8):
        found = lrsurgery.evaluate(tmp_path / "model", data, batch_size=size).values["loss"]
        assert found == pytest.approx(wanted, rel=1e-6), size
    if kind == "FNet":  # which takes no mask, when it is calibrated and trained either
        calibration = lrsurgery.Calibration(data=str(data), samples=2)
        lrsurgery.factorise_checkpoint(tmp_path / "model", tmp_path / "low", rank=2, calibration=calibration)
        finetune({"model": str(tmp_path / "low"), "data": str(data), "steps": 1, "batch_size": 2}, tmp_path / "healed")


def test_as_many_labels_as_tokens_are_labels(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model", "x", "y", "z", problem_type="multi_label_classification")
    rows = [("good film the", [1.0, 0.0, 1.0]), ("good film", [0.0, 1.0, 1.0])]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": t, "labels": [int(x) for x in label]} for t, label in rows])
    wanted = loss_by_hand(model, rows, torch.nn.functional.binary_cross_entropy_with_logits)
    for size in (1, 2):
        assert lrsurgery.evaluate(model, data, batch_size=size).values["loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6, 2], "labels": [-100, -100, -100]}, "every label is -100, so that none is left"),
        ({"input_ids": [5, 6, 2], "labels": [5, -1, 2]}, r"row 0 of column 'labels' holds \[5, -1, 2\]"),
        ({"input_ids": [5, 6, 2], "attention_mask": [0, 0, 0]}, "row 0 has an attention_mask that hides all of it"),
        ({"input_ids": [5, 6, 2], "labels": [5, -100, -100]}, "nothing is left to score"),  # the first is not predicted
    ],
)
def test_rows_that_leave_nothing_to_score_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    model, data = tiny.save_gpt2(tmp_path / "model", blocks=1), write_rows(tmp_path / "rows.jsonl", [row] * 2)
    with pytest.raises(DataError, match=message):
        lrsurgery.evaluate(model, data)


def test_a_text_without_any_token_is_named(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    rows = [{"text": "good", "label": 0}, {"text": "", "label": 1}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    message = r"rows.jsonl: row 1 is empty, and the tokenizer adds no token of its own"
    with pytest.raises(DataError, match=message):
        lrsurgery.evaluate(model, data)
    with pytest.raises(DataError, match=message):
        finetune({"model": str(model), "dense": True, "data": str(data), "steps": 1}, tmp_path / "out")


def test_outputs_that_are_not_numbers_hit_nothing(tmp_path: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model", blocks=1)
    tensors = load_file(model / "model.safetensors")
    huge = {key: tensor * 1e30 if "wte" in key or "ln_f" in key else tensor for key, tensor in tensors.items()}
    save_file(huge, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "a.txt").write_text("good film " * 100)
    found = lrsurgery.evaluate(model, tmp_path / "a.txt")
    assert math.isnan(found.values["loss"])
    assert math.isnan(found.values["perplexity"])
    assert not {"top1", "top5"} & found.values.keys()
    assert any("not all finite, so hits are not counted" in note for note in found.notes)


def test_models_without_a_limit_or_with_one_of_their_own_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "d_model": 16, "n_head": 2, "d_inner": 16, "n_layer": 1}
    tf.XLNetForSequenceClassification(tf.XLNetConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "xlnet")
    save_tokenizer(tmp_path / "xlnet")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "good film", "label": 0}, {"text": "bad", "label": 1}])
    assert lrsurgery.evaluate(tmp_path / "xlnet", data).values["scored"] == 2
    mpt = tf.MptConfig(vocab_size=len(WORDS), d_model=16, n_heads=2, n_layers=1, max_seq_len=24)
    tf.MptForCausalLM(mpt).save_pretrained(tmp_path / "mpt")
    save_tokenizer(tmp_path / "mpt")
    (tmp_path / "a.txt").write_text("good film the bad " * 30)
    found = lrsurgery.evaluate(tmp_path / "mpt", tmp_path / "a.txt")
    assert any("windows of 24" in note for note in found.notes)


# teachers


def test_a_teacher_that_takes_less_is_refused(tmp_path: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model", blocks=1)
    config = tf.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    short = tiny.save_gpt2(tmp_path / "short", blocks=1)  # for its tokenizer
    tf.GPT2LMHeadModel(config).save_pretrained(short)
    (tmp_path / "a.txt").write_text("good film the bad " * 200)
    settings = {"model": str(model), "dense": True, "data": str(tmp_path / "a.txt"), "steps": 1, "block_size": 32}
    with pytest.raises(SourceError, match="takes 16 tokens, the examples have up to 32; lower --block-size"):
        finetune({**settings, "teacher": str(short)}, tmp_path / "out")


# what a report may overwrite


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_a_report_overwrites_no_file_of_what_it_reads(tmp_path: Path, name: str) -> None:
    model = tiny.save_gpt2(tmp_path / "model", blocks=1)
    (model / "README.md").write_text("card")
    content = (model / name).read_bytes()
    for asked in ([model], [model / ".." / "model"]):
        code = tiny.run("report", *asked, "--output", model / name, "--format", "json", "--overwrite", "--quiet")
        assert code == 2
    assert (model / name).read_bytes() == content
    assert tiny.run("report", model, "--output", model / "view.html", "--quiet") == 0
    assert tiny.run("report", model, "--output", model / "view.html", "--overwrite", "--quiet") == 0


# images in columns, maps of labels, recipes


def test_images_as_urls_of_files_and_of_data(tmp_path: Path) -> None:
    image(tmp_path / "red.png", 200)
    encoded = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    plain = np.asarray(decode(str(tmp_path / "red.png"), tmp_path))
    for value in (f"file://{tmp_path}/red.png", f"data:image/png;base64,{encoded}"):
        assert np.array_equal(np.asarray(decode(value, tmp_path)), plain)
    with pytest.raises(ValueError, match="no byte is in it"):
        decode(b"", tmp_path)


def test_a_long_entry_is_not_shown_whole(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "iVBOR" * 2000, "label": 0}, {"image": "x", "label": 1}])
    model = tiny.save_timm(tmp_path / "model")
    with pytest.raises(DataError, match="image 0 does not decode") as error:
        lrsurgery.evaluate(model, rows)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("name", ["map.json", "map.csv"])
def test_a_label_map_that_names_a_class_twice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": "x", "a": "y"}' if name.endswith("json") else "a,x\na,y\n")
    with pytest.raises(DataError, match=rf"{name}: names a class of the dataset twice"):
        read_label_map(tmp_path / name)


def test_a_key_that_stands_twice_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 0.1\nsteps: 3\nlr: 0.2\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: not a recipe \('lr' stands twice in the mapping of line 1\)"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(tmp_path / "merged.yaml")["b"] == {"x": 3, "y": 2}


def test_rows_of_packed_texts_are_refused(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}]
    with pytest.raises(DataError, match="has position_ids, as rows of several packed texts do"):
        lrsurgery.evaluate(tiny.save_gpt2(tmp_path / "m", blocks=1), write_rows(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(("name", "message"), [("", "has no name"), (" ", "has no name"), ("*.nope", "no file has")])
def test_data_that_names_nothing(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(name)


def test_the_home_of_nobody_is_a_name() -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_data("~no-such-user/rows.jsonl")


def test_a_tokenizer_need_not_know_words_that_no_text_has(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "film": 2}, "[NONE]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(model)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "good film", "label": 0}, {"text": "film", "label": 1}])
    assert lrsurgery.evaluate(model, rows).values["scored"] == 2
