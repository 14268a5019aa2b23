"""Tags of words: figures against transformers and seqeval, one sentence at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from support import tiny
from support.answers import calibrated, flops_of, moments_by_hand, write_rows
from torch.nn.functional import cross_entropy

import lrsurgery
import lrsurgery.hf
from lrsurgery.data.options import DataOptions
from lrsurgery.errors import DataError, RecipeError

NAMES = ["O", "B-PER", "I-PER", "B-LOC"]
PEOPLE, PLACES, VERBS = ("Ada Lovelace", "Grace Hopper", "Alan"), ("Paris", "Rome", "Oslo"), ("raises", "returns to")


def tagged(count: int = 18) -> list[dict[str, Any]]:
    """Sentences of one to three people and places, with the tags as names."""
    rows = []
    for i in range(count):
        words, tags = [], []
        for part in (
            PEOPLE[i % 3],
            VERBS[i % 2],
            PLACES[i % 3 - i % 2],
            *(["and", PEOPLE[i // 3 % 3]] if i % 4 else []),
        ):
            own = part.split()
            words += own
            is_name = part in PEOPLE
            tags += [
                f"{'I' if j else 'B'}-PER" if is_name else "B-LOC" if part in PLACES else "O" for j in range(len(own))
            ]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def save_tagger(folder: Path, names: list[str] = NAMES, **options: Any) -> Path:
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return tiny.save_bert(folder, "BertForTokenClassification", **named, **options)


def tags_by_hand(folder: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """As transformers' example of token classification aligns tags, with seqeval's own F1; one sentence at a time."""
    from seqeval.metrics import f1_score

    model = tf.AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    losses, hits, true, said = [], [], [], []
    for row in rows:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        places = encoded.word_ids()
        first = [places.index(word) for word in sorted({p for p in places if p is not None})]
        labels = torch.tensor([model.config.label2id[tag] for tag in row["ner_tags"][: len(first)]])
        losses += cross_entropy(logits[first], labels, reduction="none").tolist()
        answers = logits[first].argmax(-1)
        hits += answers.eq(labels).tolist()
        true.append(row["ner_tags"][: len(first)])
        said.append([model.config.id2label[int(answer)] for answer in answers])
    return {
        "loss": sum(losses) / len(losses),
        "scored": float(len(losses)),
        "top1": sum(hits) / len(hits),
        "f1": float(f1_score(true, said)),
    }


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tags")
    save_tagger(folder / "tagger")
    write_rows(folder / "rows.jsonl", tagged())
    command = ["finetune", folder / "tagger", "--data", folder / "rows.jsonl", "--eval-data", folder / "rows.jsonl"]
    learn = ["--rank", "0.5", "--steps", "60", "--lr", "3e-3", "--batch-size", "8", "--teacher", folder / "tagger"]
    command += [*learn, "--teacher-weight", "0.05", "--output", folder / "half", "--device", "cpu", "--quiet"]
    assert tiny.run(*command) == 0
    return folder


@pytest.mark.parametrize("batch", [1, 5])
def test_figures_of_tags_are_seqevals_and_transformers_own(tags: Path, batch: int) -> None:
    found = lrsurgery.evaluate(tags / "half", tags / "rows.jsonl", batch_size=batch)
    wanted = tags_by_hand(tags / "half", tagged())
    assert found.task == "token-classification"
    assert found.values == pytest.approx(wanted, rel=1e-5)
    assert 0.3 < wanted["f1"] < 1  # learnt, and not all of it
    assert wanted["f1"] != pytest.approx(wanted["top1"], abs=0.01)


def test_tags_go_by_name_in_whatever_form(tags: Path, tmp_path: Path) -> None:
    other = ["B-LOC", "I-PER", "O", "B-PER"]
    kinds = datasets.Features(
        {
            "words": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=other)),
        }
    )
    rows = tagged()
    columns = {"words": [r["tokens"] for r in rows], "tags": [[other.index(t) for t in r["ner_tags"]] for r in rows]}
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(tmp_path / "numbered")
    wanted = lrsurgery.evaluate(tags / "half", tags / "rows.jsonl").values
    assert lrsurgery.evaluate(tags / "half", tmp_path / "numbered").values == pytest.approx(wanted)
    plain = [{"text": r["tokens"], "label": [NAMES.index(t) for t in r["ner_tags"]]} for r in rows]
    assert lrsurgery.evaluate(tags / "half", write_rows(tmp_path / "a.jsonl", plain)).values == pytest.approx(wanted)
    renamed = [{**r, "ner_tags": [t.replace("B-LOC", "place") for t in r["ner_tags"]]} for r in rows]
    (tmp_path / "map.json").write_text(json.dumps({"place": "B-LOC"}))
    options = DataOptions(label_map=str(tmp_path / "map.json"))
    found = lrsurgery.evaluate(tags / "half", write_rows(tmp_path / "b.jsonl", renamed), options)
    assert found.values == pytest.approx(wanted)
    (tmp_path / "map.json").write_text(json.dumps({"place": None}))
    fewer = lrsurgery.evaluate(tags / "half", tmp_path / "b.jsonl", options)
    assert fewer.values["scored"] == wanted["scored"] - sum(r["ner_tags"].count("B-LOC") for r in rows)


def test_words_beyond_the_cut_are_counted(tags: Path) -> None:
    options = DataOptions(block_size=12)
    found = lrsurgery.evaluate(tags / "half", tags / "rows.jsonl", options)
    words = sum(len(row["tokens"]) for row in tagged())
    assert 0 < found.values["scored"] < words
    assert f"{words - int(found.values['scored'])} words are beyond the cut and not scored" in " ".join(found.notes)


def test_no_f1_without_entities_or_seqeval(tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tagger(tmp_path / "pos", ["NOUN", "VERB"])
    rows = [{"tokens": ["Ada", "returns"], "tags": ["NOUN", "VERB"]}]
    found = lrsurgery.evaluate(tmp_path / "pos", write_rows(tmp_path / "rows.jsonl", rows))
    assert set(found.values) == {"loss", "scored", "top1"}
    assert any("no F1 of entities: the head's class 'NOUN'" in note for note in found.notes)
    monkeypatch.setitem(sys.modules, "seqeval", None)
    found = lrsurgery.evaluate(tags / "half", tags / "rows.jsonl")
    assert set(found.values) == {"loss", "scored", "top1"}
    assert any("pip install 'lrsurgery[metrics]'" in note for note in found.notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 1 has 2 words and 1 tags; write one tag for each word"),
        ({"tokens": [], "tags": []}, "row 1 of column 'tokens' holds no word; a row is a list of words"),
        ({"tokens": ["a"], "tags": ["B-ORG"]}, "'B-ORG' is none of the model's"),
        ({"tokens": ["a"], "tags": None}, "row 1 of column 'tags' holds None; a row is a list of tags"),
    ],
    ids=["too few tags", "no word", "an unknown tag", "no tags"],
)
def test_tags_that_do_not_fit_are_named(tags: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["Ada"], "tags": ["O"]}, row])
    with pytest.raises(DataError) as told:
        lrsurgery.evaluate(tags / "half", rows)
    assert message in str(told.value)
    with pytest.raises(RecipeError, match="bos never: is for running text, and this model reads tagged words"):
        lrsurgery.evaluate(tags / "half", tags / "rows.jsonl", DataOptions(bos="never"))


def test_calibration_reads_words_without_tags(tags: Path, tmp_path: Path) -> None:
    rows = tagged(5)
    data = write_rows(tmp_path / "rows.jsonl", [{"tokens": row["tokens"]} for row in rows])
    layer = "bert.encoder.layer.0.attention.self.query"
    tokenizer = tf.AutoTokenizer.from_pretrained(tags / "tagger")
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    model = tf.AutoModelForTokenClassification.from_pretrained(tags / "tagger").eval()
    how = {"is_split_into_words": True, "truncation": True, "return_tensors": "pt"}
    inputs = [dict(tokenizer(row["tokens"], **how)) for row in rows]
    for importance in ("activations", "fisher"):
        found = calibrated(tags / "tagger", data, tmp_path / importance, "--importance", importance)
        wanted = moments_by_hand(model, layer, inputs)
        torch.testing.assert_close(found.moments(layer).inputs, wanted, rtol=1e-4, atol=1e-6)
    check = json.loads((tmp_path / "fisher" / "rank_report.json").read_text())["loss_check"]
    assert check["measured"]
    assert check["own_answers"]
    assert check["before"]["top1"] == 1.0  # of the dense model, by its own answers


def test_taggers_are_benched(tags: Path) -> None:
    work, unit, flops = flops_of(tags / "half")
    assert (work, unit) == ("forward", "sentences")
    assert flops < flops_of(tags / "tagger")[-1]


def test_accumulated_batches_are_one_large_batch(tags: Path, tmp_path: Path) -> None:
    """Against a batch of all of them; transformers' own models of this kind do not divide their loss by the parts."""
    row = {"tokens": ["Ada", "raises", "Oslo"], "tags": ["B-PER", "O", "B-LOC"]}
    data = write_rows(tmp_path / "rows.jsonl", [row] * 8)
    save_tagger(tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    command = ["finetune", tmp_path / "still", "--dense", "--data", data, "--steps", "1", "--optimizer", "sgd"]
    command += ["--lr", "0.5", "--set", "max_grad_norm=0", "--warmup-steps", "0", "--device", "cpu", "--quiet"]
    found = []
    for name, sizes in {"one": ["8", "--accumulate", "1"], "parts": ["2", "--accumulate", "4"]}.items():
        assert tiny.run(*command, "--batch-size", *sizes, "--output", tmp_path / name) == 0
        found.append(tf.AutoModelForTokenClassification.from_pretrained(tmp_path / name).state_dict())
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-4, atol=1e-6)
