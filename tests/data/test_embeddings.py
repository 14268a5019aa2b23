"""Sentence embeddings: correlations against scipy and plain transformers, pooling, both losses, calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import pearsonr, spearmanr
from support import tiny

import lrsurgery
from lrsurgery.data.embeddings.encoder import SentenceEncoder
from lrsurgery.data.options import DataOptions
from lrsurgery.errors import DataError
from lrsurgery.surgery.apply import factorised_layers

TASK = DataOptions(task="sentence-embeddings")
WORDS = ("the cat sat on the mat", "a dog ran in the park", "rain falls", "the sun is warm", "birds sing at dawn")


def save_bert(folder: Path, pooling: str | None = None) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(around=True)
    config = tf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tf.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, pooling: True}))
    return folder


def make_rows(count: int = 12) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        one, two = random.integers(0, len(WORDS), 2)
        rows.append({"sentence1": WORDS[one], "sentence2": f"{WORDS[two]} now", "score": 5.0 if one == two else 1.0})
    rows[0]["score"] = 3.0
    return rows


def save_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@torch.no_grad()
def cosines(folder: Path, rows: list[dict[str, Any]], pooling: str) -> list[float]:
    """Cosines of embeddings by plain transformers, one sentence at a time, so that nothing is padded."""
    model, tokenizer = tf.AutoModel.from_pretrained(folder).eval(), tf.AutoTokenizer.from_pretrained(folder)
    pools = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "max": lambda h: h.amax(0), "last": lambda h: h[-1]}
    found = []
    for row in rows:
        one, two = (
            pools[pooling](model(**tokenizer(row[name], return_tensors="pt")).last_hidden_state[0].double())
            for name in ("sentence1", "sentence2")
        )
        found.append(float(one @ two / one.norm() / two.norm()))
    return found


@pytest.mark.parametrize(
    ("named", "pooling"),
    [
        (None, "mean"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_max_tokens", "max"),
        ("pooling_mode_lasttoken", "last"),
    ],
    ids=["unnamed", "mean", "cls", "max", "last"],
)
def test_figures_are_scipys_over_embeddings_of_plain_transformers(
    tmp_path: Path, named: str | None, pooling: str
) -> None:
    model, rows = save_bert(tmp_path / "model", named), make_rows()
    data = save_rows(tmp_path / "rows.jsonl", rows)
    found = lrsurgery.evaluate(model, data, TASK)
    wanted, scores = cosines(model, rows, pooling), [row["score"] for row in rows]
    assert found.values["spearman"] == pytest.approx(spearmanr(wanted, scores).statistic, abs=1e-6)
    assert found.values["pearson"] == pytest.approx(pearsonr(wanted, scores).statistic, abs=1e-5)
    mse = float(np.mean([(one - score / 5) ** 2 for one, score in zip(wanted, scores, strict=True)]))
    assert found.values["loss"] == pytest.approx(mse, rel=1e-4)
    assert any("names no pooling" in note for note in found.notes) == (named is None)
    assert any("divided by it" in note for note in found.notes)


def test_the_contrastive_loss_is_cross_entropy_over_the_batch(tmp_path: Path) -> None:
    body = tf.AutoModel.from_pretrained(save_bert(tmp_path / "model")).eval()
    ids = torch.randint(5, 100, (4, 2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 0, 3:] = 0
    with torch.no_grad():
        found = float(SentenceEncoder(body, "mean")(ids, mask)["loss"])
        one, two = (
            torch.stack(
                [
                    body(each[k][m[k].bool()][None]).last_hidden_state[0].mean(0)
                    for each, m in zip(ids, mask, strict=True)
                ]
            )
            for k in (0, 1)
        )
    wanted = 0.0
    for i in range(4):
        scores = [float(one[i] @ two[j] / one[i].norm() / two[j].norm()) / 0.05 for j in range(4)]
        wanted += (float(np.log(np.sum(np.exp(np.array(scores))))) - scores[i]) / 4
    assert found == pytest.approx(wanted, rel=1e-4)


def test_finetune_with_scores_and_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = save_bert(tmp_path / "model", "pooling_mode_cls_token"), make_rows(24)
    data, half, healed = save_rows(tmp_path / "rows.jsonl", rows), tmp_path / "half", tmp_path / "healed"
    calibration = lrsurgery.Calibration(data=str(data), how=TASK)
    report = lrsurgery.factorise_checkpoint(model, half, budget="0.6", calibration=calibration)
    assert any(row.predicted_loss for row in report.factorised)
    before = lrsurgery.evaluate(half, data, TASK).values
    command = ("finetune", half, "--data", data, "--task", "sentence-embeddings", "--steps", 25, "--lr", "3e-3")
    assert tiny.run(*command, "--batch-size", 8, "--output", healed) == 0
    capsys.readouterr()
    after = lrsurgery.evaluate(healed, data, TASK).values
    assert after["loss"] < 0.5 * before["loss"]
    assert after["spearman"] > before["spearman"]
    assert (healed / "1_Pooling" / "config.json").is_file()
    assert factorised_layers(tf.AutoModel.from_pretrained(healed))
    wanted = spearmanr(cosines(healed, rows, "cls"), [row["score"] for row in rows]).statistic
    assert after["spearman"] == pytest.approx(wanted, abs=1e-6)


def test_finetune_without_scores_pulls_pairs_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_bert(tmp_path / "model")
    rows = [{"anchor": text, "positive": f"now {text}"} for text in WORDS]
    data, out = save_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = ("finetune", model, "--data", data, "--task", "sentence-embeddings", "--rank", "0.5", "--steps", 20)
    assert tiny.run(*command, "--lr", "3e-3", "--batch-size", 5, "--output", out) == 0
    assert "among those of the batch" in " ".join(capsys.readouterr().err.split())

    def ranks_right(folder: Path) -> float:
        """Mean of the cosine of a pair, less the largest of another's."""
        grid = [{"sentence1": a["anchor"], "sentence2": b["positive"]} for a in rows for b in rows]
        found = np.array(cosines(folder, grid, "mean")).reshape(len(rows), len(rows))
        others = found - 9 * np.eye(len(rows))
        return float((found.diagonal() - others.max(1)).mean())

    assert ranks_right(out) > ranks_right(model) + 0.1


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model", "pooling_mode_weightedmean_tokens")
    data = save_rows(tmp_path / "rows.jsonl", make_rows())
    with pytest.raises(DataError, match=r"pools by weightedmean; known: one of mean, cls"):
        lrsurgery.evaluate(model, data, TASK)
    plain = save_bert(tmp_path / "plain")
    with pytest.raises(DataError, match=r"no pair of sentences among text"):
        lrsurgery.evaluate(plain, save_rows(tmp_path / "text.jsonl", [{"text": "alone"}]), TASK)
    bad = save_rows(
        tmp_path / "bad.jsonl", [{**row, "score": 7.0 if i == 1 else 1.0} for i, row in enumerate(make_rows(3))]
    )
    with pytest.raises(DataError, match=r"row 1 has 7\.0 in column 'score'"):
        lrsurgery.evaluate(plain, bad, TASK)
