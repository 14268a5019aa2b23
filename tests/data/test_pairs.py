"""Texts that encoder-decoders write: figures against transformers, rouge_score and jiwer, one pair at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny
from support.answers import calibrated, flops_of, moments_by_hand, write_rows

import lrsurgery
import lrsurgery.hf
from lrsurgery.data.options import DataOptions
from lrsurgery.errors import DataError, RecipeError


def save_writer(folder: Path, kind: str, *, around: bool = True) -> Path:
    """An encoder-decoder that reads and writes the tiny tokenizer's text."""
    torch.manual_seed(0)
    known = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 1, "eos_token_id": 3, "decoder_start_token_id": 1}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model: Any = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **known))
    else:
        layers = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()
        }
        config = {"bart": tf.BartConfig, "m2m": tf.M2M100Config}[kind]
        options = {"d_model": 32, "max_position_embeddings": 64, "bos_token_id": 2, "forced_eos_token_id": None}
        sizes = {**layers, **options, **known, "decoder_start_token_id": 3}
        model = {"bart": tf.BartForConditionalGeneration, "m2m": tf.M2M100ForConditionalGeneration}[kind](
            config(**sizes)
        )
        model.model.decoder.embed_tokens.weight.data.mul_(20)
    model.save_pretrained(folder)
    tiny.tokenizer(around=around).save_pretrained(folder)
    return folder


def said(count: int = 12) -> list[dict[str, str]]:
    """Sentences of several lengths, and what is left of them."""
    words = ["return", "a", "value", "from", "the", "statement", "and", "raise", "it", "again"]
    rows = []
    for i in range(count):
        text = " ".join(words[i % 4 : 3 + i % 7])
        rows.append({"text": text, "summary": " ".join(text.split()[: 1 + i % 3])})
    return rows


def pairs_by_hand(folder: Path, rows: list[dict[str, str]], new_tokens: int = 0) -> dict[str, float]:
    """transformers' own loss on labels, one pair at a time, and each metric's library on the generated texts."""
    import jiwer
    from rouge_score.rouge_scorer import RougeScorer

    model = tf.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    total, count, hits, texts, scores = 0.0, 0, 0, [], []
    for row in rows:
        read = {k: v for k, v in tokenizer(row["text"], return_tensors="pt").items() if k != "token_type_ids"}
        labels = tokenizer(row["summary"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(**read, labels=labels)
            made = model.generate(**read, max_new_tokens=max(1, new_tokens), do_sample=False)
        total, count = total + float(out.loss) * labels.numel(), count + labels.numel()
        hits += int(out.logits.argmax(-1).eq(labels).sum())
        texts.append(tokenizer.decode(made[0], skip_special_tokens=True))
        scores.append(scorer.score(row["summary"], texts[-1]))
    figures = {"loss": total / count, "scored": float(count), "top1": hits / count}
    figures["perplexity"] = float(torch.tensor(total / count, dtype=torch.float64).exp())
    if new_tokens:
        figures |= {name: sum(each[name].fmeasure for each in scores) / len(scores) for name in scores[0]}
        figures["wer"] = jiwer.wer([row["summary"] for row in rows], texts)
    return figures


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    for kind in ("t5", "bart", "m2m"):
        save_writer(folder / kind, kind)
    rows = write_rows(folder / "rows.jsonl", said())
    command = ["finetune", folder / "t5", "--data", rows, "--eval-data", rows, "--rank", "0.5", "--steps", "80"]
    command += ["--lr", "1e-2", "--batch-size", "6", "--teacher", folder / "t5", "--teacher-weight", "0.02"]
    assert tiny.run(*command, "--output", folder / "half", "--device", "cpu", "--quiet") == 0
    return folder


@pytest.mark.parametrize("batch", [1, 5])
def test_generated_text_is_scored_as_by_the_libraries(writers: Path, batch: int) -> None:
    options = DataOptions(generate=12)
    found = lrsurgery.evaluate(writers / "half", writers / "rows.jsonl", options, batch_size=batch)
    wanted = pairs_by_hand(writers / "half", said(), 12)
    assert found.task == "seq2seq"
    assert found.values == pytest.approx(wanted, rel=1e-5)
    assert 0.2 < wanted["rouge1"] < 1  # learnt, and not all of it
    assert 0 < wanted["wer"] < 1.5
    assert wanted["loss"] < pairs_by_hand(writers / "t5", said())["loss"]


@pytest.mark.parametrize("kind", ["bart", "m2m"])
def test_every_decoder_is_fed_as_its_own_loss_feeds_it(writers: Path, kind: str) -> None:
    found = lrsurgery.evaluate(writers / kind, writers / "rows.jsonl", batch_size=4)
    assert found.task == "seq2seq"
    assert found.values == pytest.approx(pairs_by_hand(writers / kind, said()), rel=1e-5)


def test_calibration_masks_reader_and_writer_each_by_its_own(writers: Path, tmp_path: Path) -> None:
    """Sources and targets of the same longest length, both padded: the same shape, and other masks."""
    rows = [
        {"text": "a value", "summary": "raise it again and return the statement"},
        {"text": "from", "summary": "it"},
    ]
    tokenizer = tf.AutoTokenizer.from_pretrained(writers / "bart")
    rows.append({"text": rows[0]["summary"], "summary": "and"})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(writers / "bart").eval()
    inputs = [
        {
            "input_ids": tokenizer(row["text"], return_tensors="pt")["input_ids"],
            "labels": tokenizer(row["summary"], return_tensors="pt")["input_ids"],
        }
        for row in rows
    ]
    assert max(i["input_ids"].shape[1] for i in inputs) == max(i["labels"].shape[1] for i in inputs)
    for importance in ("activations", "fisher"):
        found = calibrated(writers / "bart", data, tmp_path / importance, "--importance", importance)
        for layer in ("encoder.layers.0.fc1", "decoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj"):
            wanted = moments_by_hand(model, f"model.{layer}", inputs)
            torch.testing.assert_close(found.moments(f"model.{layer}").inputs, wanted, rtol=1e-4, atol=1e-6)
    check = json.loads((tmp_path / "fisher" / "rank_report.json").read_text())["loss_check"]
    assert check["before"]["loss"] == pytest.approx(pairs_by_hand(writers / "bart", rows)["loss"], abs=1e-3)


def test_pairs_are_benched(writers: Path) -> None:
    work, unit, flops = flops_of(writers / "half")
    assert (work, unit) == ("forward", "pairs")
    assert flops < flops_of(writers / "t5")[-1]


def test_columns_of_pairs_are_named_also_inside_others(writers: Path, tmp_path: Path) -> None:
    nested = write_rows(
        tmp_path / "nested.jsonl", [{"translation": {"en": r["text"], "de": r["summary"]}} for r in said()]
    )
    options = DataOptions(text_column="translation.en", target_column="translation.de")
    found = lrsurgery.evaluate(writers / "bart", nested, options).values
    assert found == pytest.approx(lrsurgery.evaluate(writers / "bart", writers / "rows.jsonl").values)
    with pytest.raises(
        DataError, match=r"which column holds the target\? It has translation\.en, translation\.de; say"
    ):
        lrsurgery.evaluate(writers / "bart", nested, DataOptions(text_column="translation.en"))
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "a", "summary": "b"}, {"text": "a", "summary": None}])
    with pytest.raises(DataError, match="row 1 of column 'summary' holds nothing, not text"):
        lrsurgery.evaluate(writers / "bart", odd)


def test_generating_needs_its_packages(writers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(RecipeError, match=r"^generate 8: .* need rouge_score and jiwer .*'lrsurgery\[metrics\]'$"):
        lrsurgery.evaluate(writers / "bart", writers / "rows.jsonl", DataOptions(generate=8))
    assert "loss" in lrsurgery.evaluate(writers / "bart", writers / "rows.jsonl").values
