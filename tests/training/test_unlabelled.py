"""Training on a teacher's outputs from unlabelled inputs, for models of every family that has no task."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import tiny, zoo
from support.families import (
    VISION,
    captions,
    features,
    images,
    save_clip,
    save_features,
    save_segformer,
    save_t5,
    save_whisper,
    sentences,
    texts,
    write_columns,
)

import lrsurgery
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.options import DataOptions
from lrsurgery.data.unlabelled.columns import find_feed
from lrsurgery.data.unlabelled.inputs import unlabelled_examples
from lrsurgery.data.unlabelled.models import load_bare, open_unlabelled
from lrsurgery.errors import Interrupted, SurgeryError
from lrsurgery.measure.evaluate import evaluate_all
from lrsurgery.progress import Listener, TrainingStep
from lrsurgery.report.runs import read_metrics

pytestmark = pytest.mark.process  # most train a model: seconds a test

STEPS = 10


@dataclass(frozen=True)
class Family:
    save: Callable[[Path], Path]
    data: Callable[[Path], Path]
    said: tuple[str, ...]  # of the notes
    figures: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "encoder": Family(
        lambda folder: tiny.save_bert(folder, "BertModel"),
        texts,
        ("last_hidden_state by relative squared error, pooler_output by relative squared error",),
        ("cosine", "relative_mse", "pooler_output.cosine"),
    ),
    "both towers": Family(
        save_clip,
        captions,
        ("text_embeds by cosine, image_embeds by cosine", "not compared: logits_per_image"),
        ("cosine",),
    ),
    "text tower": Family(save_clip, texts, ("text_embeds by cosine", "the text tower alone"), ("cosine",)),
    "image tower": Family(save_clip, images, ("image_embeds by cosine", "the image tower alone"), ("cosine",)),
    "t5": Family(
        save_t5,
        texts,
        ("logits by KL, encoder_last_hidden_state by relative", "the decoder reads the input's tokens, shifted by one"),
        ("kl", "top1", "cosine"),
        {"task": "none"},
    ),
    "whisper": Family(
        save_whisper,
        features,
        ("logits by KL", "input_features as they are", "the decoder reads its first token (1) alone"),
        ("kl", "top1"),
        {"task": "none"},
    ),
    "timm features": Family(save_features, images, ("features by relative",), ("cosine", "relative_mse")),
    "reward": Family(
        lambda folder: tiny.save_bert(folder, "BertForSequenceClassification", num_labels=1, hidden_dropout_prob=0.0),
        texts,
        ("logits by relative squared error",),
        ("relative_mse",),
        {"task": "none"},
    ),
    "segmentation": Family(save_segformer, images, ("logits by KL",), ("kl", "top1"), {"task": "none"}),
}


class Notes(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], tuple[Path, Path]]:
    """The dense model of a family and its factorised one, made once."""
    made: dict[Any, tuple[Path, Path]] = {}

    def get(family: Family) -> tuple[Path, Path]:
        if family.save not in made:
            folder = tmp_path_factory.mktemp("models")
            dense = family.save(folder / "dense")
            lrsurgery.factorise_checkpoint(dense, folder / "low", rank=0.3)
            made[family.save] = dense, folder / "low"
        return made[family.save]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_falls_and_the_folder_loads(
    name: str, tmp_path: Path, models: Callable[[Family], tuple[Path, Path]]
) -> None:
    family = FAMILIES[name]
    (dense, low), data = models(family), family.data(tmp_path)
    heard = Notes()
    settings = {"model": str(low), "teacher": str(dense), "data": str(data), "eval_data": str(data)}
    settings |= {"steps": STEPS, "lr": 5e-3, "device": "cpu", "augment": False, "eval_steps": STEPS, **family.settings}
    outcome = lrsurgery.finetune(settings, tmp_path / "healed", listener=heard)
    evaluations = [each["eval"] for each in read_metrics(tmp_path / "healed") if "eval" in each]
    assert evaluations[-1]["loss"] < 0.9 * evaluations[0]["loss"]
    assert set(family.figures) <= set(evaluations[-1])
    for text in family.said:
        assert any(text in note for note in heard.notes), heard.notes
    task = family.settings.get("task")
    options = DataOptions(task=task)
    again = lrsurgery.evaluate(tmp_path / "healed", data, options, against=dense, batch_size=5).values
    assert again["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-3)
    assert outcome.stages["healed"]["loss"] == evaluations[-1]["loss"]
    assert "without labels" in " ".join(outcome.report.notes)


def test_batch_norms_keep_their_statistics(tmp_path: Path, models: Callable[[Family], tuple[Path, Path]]) -> None:
    """As the teacher's do: a student that sees those of a batch is fitted to something else than it computes later."""
    (dense, low), heard = models(FAMILIES["timm features"]), Notes()
    settings = {"model": str(low), "teacher": str(dense), "data": str(images(tmp_path)), "steps": 3, "device": "cpu"}
    lrsurgery.finetune(settings, tmp_path / "healed", listener=heard)
    before, after = (load_file(folder / "model.safetensors") for folder in (low, tmp_path / "healed"))
    kept = [name for name in before if "running" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert any("batch normalisation keeps" in note for note in heard.notes), heard.notes


def test_evaluate_is_what_transformers_gives_one_example_at_a_time(
    tmp_path: Path, models: Callable[[Family], tuple[Path, Path]]
) -> None:
    (dense, low), data = models(FAMILIES["t5"]), texts(tmp_path)
    found = lrsurgery.evaluate(low, data, DataOptions(task="none"), against=dense, batch_size=5)
    tokenizer = tf.AutoTokenizer.from_pretrained(dense)
    model, teacher = (tf.T5ForConditionalGeneration.from_pretrained(each).eval() for each in (low, dense))
    kl, hits, error, square, cosine = [], [], 0.0, 0.0, []
    for text in sentences():
        ids = tokenizer(text, return_tensors="pt", truncation=True).input_ids
        shifted = torch.cat([torch.full((1, 1), 1), ids[:, :-1]], dim=1)
        with torch.no_grad():
            ours, theirs = (each(input_ids=ids, decoder_input_ids=shifted) for each in (model, teacher))
        p, q = theirs.logits[0].double().softmax(-1), ours.logits[0].double().softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
        hits += (p.argmax(-1) == q.argmax(-1)).tolist()
        x, y = ours.encoder_last_hidden_state[0].double(), theirs.encoder_last_hidden_state[0].double()
        error, square = error + float((x - y).pow(2).sum()), square + float(y.pow(2).sum())
        cosine += ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).tolist()
    values = found.values
    assert values["scored"] == 16
    assert values["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert values["top1"] == pytest.approx(sum(hits) / len(hits))
    assert values["relative_mse"] == pytest.approx(error / square, rel=1e-3)
    assert values["cosine"] == pytest.approx(sum(cosine) / len(cosine), rel=1e-4)
    assert values["loss"] == pytest.approx((values["kl"] + values["relative_mse"]) / 2)
    assert found.against == str(dense)


def test_a_decoder_reads_the_targets(tmp_path: Path, models: Callable[[Family], tuple[Path, Path]]) -> None:
    dense, _ = models(FAMILIES["t5"])
    data = write_columns(tmp_path / "pairs.parquet", text=sentences(), summary=sentences()[::-1])
    rows = open_unlabelled(str(data), DataOptions())
    subject = load_bare(resolve(str(dense)), rows, DataOptions())
    examples = unlabelled_examples(subject, rows, find_feed(subject.body, rows, DataOptions()), DataOptions())
    tokenizer = tf.AutoTokenizer.from_pretrained(dense)
    batch = examples.collate([examples.dataset[i] for i in range(2)])
    for i, text in enumerate(sentences()[::-1][:2]):
        ids = tokenizer(text)["input_ids"]
        assert batch["decoder_input_ids"][i][: len(ids)].tolist() == [1, *ids[:-1]]
        assert int(batch["decoder_attention_mask"][i].sum()) == len(ids)
    assert any("column 'summary', shifted by one" in note for note in examples.notes)


def test_padding_does_not_count_for_a_model_that_takes_no_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    for name in ("model", "teacher"):
        tf.FNetModel(tf.FNetConfig(**sizes, max_position_embeddings=32, pad_token_id=1)).save_pretrained(
            tmp_path / name
        )
        tiny.tokenizer(around=True).save_pretrained(tmp_path / name)
    data = texts(tmp_path)
    one, many = (
        lrsurgery.evaluate(tmp_path / "model", data, against=tmp_path / "teacher", batch_size=size).values
        for size in (1, 7)
    )
    assert one == pytest.approx(many, rel=1e-4)


def test_siglip_reads_texts_of_one_length_without_a_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**VISION, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "projection_size": 32}
    config = tf.SiglipConfig(text_config=text, vision_config={**VISION, "image_size": 16, "patch_size": 4})
    tf.SiglipModel(config).save_pretrained(tmp_path / "siglip")
    tiny.tokenizer().save_pretrained(tmp_path / "siglip")
    rows = open_unlabelled(str(texts(tmp_path)), DataOptions())
    subject = load_bare(resolve(str(tmp_path / "siglip")), rows, DataOptions())
    examples = unlabelled_examples(subject, rows, find_feed(subject.body, rows, DataOptions()), DataOptions())
    batch = examples.collate([examples.dataset[i] for i in range(3)])
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "siglip")
    wanted = tokenizer(sentences()[:3], padding="max_length", max_length=16, truncation=True)["input_ids"]
    assert {name: value.tolist() for name, value in batch.items()} == {"input_ids": wanted}


def test_sound_goes_through_the_feature_extractor(tmp_path: Path) -> None:
    model = zoo.save_transformers("wav2vec2", tmp_path / "sound")
    extractor = tf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    extractor.save_pretrained(tmp_path / "sound")
    noise = torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    sounds = [{"array": each.tolist(), "sampling_rate": 16000} for each in noise]
    data = write_columns(tmp_path / "sound.parquet", audio=sounds)
    rows = open_unlabelled(str(data), DataOptions())
    subject = load_bare(resolve(str(tmp_path / "sound")), rows, DataOptions())
    examples = unlabelled_examples(subject, rows, find_feed(subject.body, rows, DataOptions()), DataOptions())
    batch = examples.collate([examples.dataset[i] for i in range(4)])
    wanted = extractor([each.numpy() for each in noise], sampling_rate=16000, return_tensors="pt").input_values
    torch.testing.assert_close(batch["input_values"], wanted)
    with torch.no_grad():
        model(**batch)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, `dense` and `low`, a causal model and texts."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny.save_bert(folder / "dense", "BertModel")
    lrsurgery.factorise_checkpoint(folder / "dense", folder / "low", rank=0.3)
    tiny.save_gpt2(folder / "gpt2")
    short = {**VISION, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 8}
    tf.BertModel(tf.BertConfig(**short)).save_pretrained(folder / "short")
    texts(folder)
    write_columns(folder / "numbers.parquet", price=[1.0, 2.0])
    return folder


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no teacher", {"teacher": None}, "or the dense model whose outputs it learns with --teacher"),
    ("none asked for", {"teacher": None, "task": "none"}, "name it with --teacher"),
    ("labels", {"label_column": "text"}, "label_column: is for models with a task"),
    ("the loss of labels", {"teacher_weight": 0.9}, "teacher_weight: is for models with a task"),
    ("a dense model beside", {"against": "dense"}, "against: is for models with a task"),
    ("another teacher", {"teacher": "gpt2"}, "teacher .*gpt2: "),
    ("a shorter teacher", {"teacher": "short"}, "takes 8 tokens, the model is fed up to 32; lower --block-size"),
    ("no column", {"data": "numbers.parquet"}, "nothing to feed the model, which takes input_ids or inputs_embeds"),
    ("no such column", {"text_column": "body"}, "no column 'body'"),
]


@pytest.mark.parametrize(("changes", "said"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_done_is_said_in_one_line(encoder: Path, changes: dict[str, Any], said: str) -> None:
    settings = {"model": "low", "teacher": "dense", "data": "text.parquet", "steps": 1, **changes}
    places = {"model", "teacher", "data", "against"}
    settings = {k: str(encoder / v) if k in places else v for k, v in settings.items() if v is not None}
    with pytest.raises(SurgeryError, match=said) as refused:
        lrsurgery.finetune(settings, encoder / "healed")
    assert "\n" not in str(refused.value)
    assert not (encoder / "healed").exists()
    assert not (encoder / "healed.run").exists()


def test_the_program_measures_agreement(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, data = encoder / "low", encoder / "text.parquet"
    assert tiny.run("evaluate", low, "--data", data, "--json") == 2
    assert "name the dense model to compare its outputs with by --against" in capsys.readouterr().err
    assert tiny.run("evaluate", low, "--data", data, "--against", encoder / "dense", "--json") == 0
    (measured,) = json.loads(capsys.readouterr().out)["models"]
    assert measured["task"] == "none"
    assert measured["against"] == str(encoder / "dense")
    assert measured["values"] == lrsurgery.evaluate(low, data, against=encoder / "dense").values
    assert {"loss", "scored", "cosine", "relative_mse", "last_hidden_state.cosine"} <= set(measured["values"])


def test_without_labels_a_classifier_is_measured_by_agreement(tmp_path: Path) -> None:
    dense = tiny.save_bert(tmp_path / "dense", "BertForSequenceClassification", num_labels=3)
    lrsurgery.factorise_checkpoint(dense, tmp_path / "low", rank=0.3)
    (found,) = evaluate_all(str(tmp_path / "low"), str(texts(tmp_path)), DataOptions(), against=str(dense))
    assert set(found.values) == {"loss", "scored", "kl", "top1"}
    labelled = tiny.write_sentences(tmp_path / "labelled.jsonl")
    with pytest.raises(SurgeryError, match="classes"):  # by its labels, which here are others
        evaluate_all(str(tmp_path / "low"), str(labelled), DataOptions(), against=str(dense))


class Stops(Notes):
    """Sends the signal of Ctrl-C at a step."""

    def step(self, at: TrainingStep) -> None:
        if at.step == 5:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(encoder: Path) -> None:
    settings = {"model": str(encoder / "low"), "teacher": str(encoder / "dense"), "data": str(encoder / "text.parquet")}
    settings |= {"eval_data": settings["data"], "steps": 9, "save_steps": 3, "device": "cpu", "best": True}
    lrsurgery.finetune(settings, encoder / "whole")
    with pytest.raises(Interrupted):
        lrsurgery.finetune(settings, encoder / "stopped", listener=Stops())
    lrsurgery.finetune({}, encoder / "stopped", resume=True)
    one, other = (load_file(encoder / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "cosine" in (encoder / "whole" / "README.md").read_text()
