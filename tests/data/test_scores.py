"""Targets, figures and teachers, against plain arithmetic and transformers' own losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import correlation
from typing import Any

import pytest
import torch
import transformers
from support import tiny
from torch.nn.functional import cross_entropy

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.examples import evaluation_examples, open_rows, prepare_subject, training_examples
from lrsurgery.data.interfaces.wrapped import MULTI, REGRESSION, SINGLE
from lrsurgery.data.labels import Labels
from lrsurgery.data.options import DataOptions
from lrsurgery.data.scores import (
    distillation,
    measure,
    measure_batch,
    new_head_for,
    problem_of,
    summarise,
    targets_of,
)
from lrsurgery.data.tasks import TASKS, Subject, load_subject
from lrsurgery.errors import DataError, SourceError
from lrsurgery.training.loop.teacher import match_teacher

CLASSES = "sequence-classification"
# masks and embeddings have tests of their own
LOGITS = [name for name, task in TASKS.items() if not task.takes_masks and not task.embeds]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _case(task: str) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Logits, labels, and what they must be scored as: (example, position of the logits, label)."""
    generator = torch.Generator().manual_seed(0)
    if TASKS[task].classifies:
        labels = torch.tensor([3, 0])
        return torch.randn(2, 7, generator=generator), labels, [(0, 0, 3), (1, 0, 0)]
    labels = torch.tensor([[4, 5, IGNORED], [1, IGNORED, 6]])
    logits = torch.randn(2, 3, 7, generator=generator)
    if task == "causal-lm":  # position t answers label t + 1
        return logits, labels, [(0, 0, 5), (1, 1, 6)]
    return logits, labels, [(0, 0, 4), (0, 1, 5), (1, 0, 1), (1, 2, 6)]


@pytest.mark.parametrize("task", LOGITS)
def test_figures_are_those_of_plain_arithmetic(task: str) -> None:
    logits, labels, scored = _case(task)
    losses, ranks = [], []
    for example, position, label in scored:
        row = [float(x) for x in (logits[example] if logits.ndim == 2 else logits[example, position])]
        losses.append(math.log(sum(map(math.exp, row))) - row[label])
        ranks.append(sum(x > row[label] for x in row))
    loss = sum(losses) / len(losses)
    wanted = {
        "loss": loss,
        "scored": len(scored),
        "perplexity": math.exp(loss),
        "top1": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5": sum(rank < 5 for rank in ranks) / len(ranks),
    }
    found = summarise(task, measure(task, logits, labels))
    assert tuple(found) == TASKS[task].figures
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5)


def test_a_large_vocabulary_costs_no_digits() -> None:
    """Against fp64: a sum of 262,144 terms in fp32 goes wrong in the fourth digit if it is made one by one."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 7, 1 << 18, generator=draw) * 3, torch.randint(1 << 18, (2, 7), generator=draw)
    wanted = cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert float(measure("causal-lm", logits, labels)[:, 0].sum()) == pytest.approx(float(wanted), rel=5e-6)


@pytest.mark.parametrize("task", LOGITS)
def test_distillation_is_the_divergence_of_the_scored_positions(task: str) -> None:
    student, labels, scored = _case(task)
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    wanted = 0.0
    for example, position, _ in scored:
        rows = [x[example] if x.ndim == 2 else x[example, position] for x in (student, teacher)]
        ours, theirs = ([math.exp(float(x) / 2) for x in row] for row in rows)
        for mine, other in zip(ours, theirs, strict=True):
            p = other / sum(theirs)
            wanted += 4 * p * math.log(p / (mine / sum(ours)))
    found, count = distillation(task, student, teacher, labels, 2.0)
    assert count == len(scored)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


# numbers to predict, and any number of classes


def ranks(values: list[float]) -> list[float]:
    return [sum(x < v for x in values) + (1 + sum(x == v for x in values)) / 2 for v in values]


def test_figures_of_regression_are_those_of_statistics() -> None:
    answers, labels = noise(9, 1), torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 0.0, 4.0, 3.0, 2.0])
    found = summarise(CLASSES, measure(CLASSES, answers, labels, REGRESSION), REGRESSION)
    x, y = answers[:, 0].tolist(), labels.tolist()
    mse = sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 9
    wanted = {
        "loss": mse,
        "scored": 9,
        "mse": mse,
        "pearson": correlation(x, y),
        "spearman": correlation(ranks(x), ranks(y)),
    }
    assert found == pytest.approx(wanted, rel=1e-6)
    constant = summarise(CLASSES, measure(CLASSES, answers, torch.ones(9), REGRESSION), REGRESSION)
    assert set(constant) == {"loss", "scored", "mse"}  # a constant correlates with nothing


def test_figures_of_many_classes_are_those_of_counting() -> None:
    logits, labels = noise(6, 4), (noise(6, 4, seed=1) > 0).float()
    labels[0] = (logits[0] > 0).float()
    found = summarise(CLASSES, measure(CLASSES, logits, labels, MULTI), MULTI)
    pairs = [(float(a) > 0, bool(b)) for a, b in zip(logits.flatten(), labels.flatten(), strict=True)]
    hits, wrong = sum(a and b for a, b in pairs), sum(a != b for a, b in pairs)
    losses = [
        -math.log(1 / (1 + math.exp(-float(a if b else -a))))
        for a, b in zip(logits.flatten(), labels.flatten(), strict=True)
    ]
    wanted = {
        "loss": sum(losses) / len(losses),
        "scored": 6,
        "f1": 2 * hits / (2 * hits + wrong),
        "exact_match": sum(bool(((a > 0) == (b > 0)).all()) for a, b in zip(logits, labels, strict=True)) / 6,
    }
    assert 0 < wanted["exact_match"] < 1
    assert found == pytest.approx(wanted, rel=1e-5)


def test_distillation_of_other_problems() -> None:
    student, teacher = noise(3, 4), noise(3, 4, seed=1)
    total, count = distillation(CLASSES, student, teacher, torch.zeros(3, 4), 2.0, MULTI)
    wanted = 0.0
    for mine, other in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x / 2)) for x in (other, mine))
        wanted += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert (float(total), count) == (pytest.approx(4 * wanted / 4, rel=1e-5), 3)
    total, count = distillation(CLASSES, student[:, :1], teacher[:, :1], torch.zeros(3), 2.0, REGRESSION)
    assert float(total) == pytest.approx(float((student[:, 0] - teacher[:, 0]).square().sum()))


def test_the_problem_is_the_configs_or_what_the_labels_are() -> None:
    one, many = Labels(kind="class", of_rows=(0,)), Labels(kind="classes", of_rows=((0,),))
    assert problem_of(MULTI, 3, one) == MULTI
    assert problem_of(None, 1, one) == REGRESSION  # as transformers takes one output
    assert problem_of(None, 3, one) == problem_of(None, 3, None) == SINGLE
    assert problem_of(None, 3, many) == MULTI
    assert new_head_for(Labels(kind="value", of_rows=(0.5,))) == (REGRESSION, ("LABEL_0",))
    assert new_head_for(Labels(kind="classes", of_rows=((0,),), names=("a", "b"))) == (MULTI, ("a", "b"))


def test_targets_have_the_form_of_the_head() -> None:
    head = ["a", "b", "c"]
    sets = Labels(kind="classes", of_rows=((0, 1), (), None), names=("c", "a"))
    found = targets_of(sets, MULTI, head, "rows")
    assert (found.rows, found.labels) == ((0, 1), [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert "1 of 3 rows have no label" in found.notes[-1]
    one = Labels(kind="class", of_rows=(0, -1, 2), names=("0", "1", "2"), numbered=True)
    assert targets_of(one, SINGLE, head, "rows").labels == [0, 2]
    assert targets_of(one, MULTI, head, "rows").labels == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert targets_of(one, REGRESSION, ["LABEL_0"], "rows").labels == [0.0, -1.0, 2.0]  # -1 is a number like others
    whole = Labels(kind="value", of_rows=(1.0, 2.0))
    assert targets_of(whole, SINGLE, head, "rows").labels == [1, 2]


@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [
        (Labels(kind="class", of_rows=(-1, None), names=("0",), numbered=True), SINGLE, "no row has a label"),
        (Labels(kind="class", of_rows=(-1, -1), names=("0",), numbered=True), REGRESSION, "no row has a label"),
        (
            Labels(kind="value", of_rows=(0.5,)),
            SINGLE,
            r"numbers to predict \(0.5\), the model's head is for 2 classes",
        ),
        (Labels(kind="class", of_rows=(0,), names=("a",)), REGRESSION, "its labels are classes, the model's head pred"),
        (Labels(kind="classes", of_rows=((0, 1),), names=("a", "b")), SINGLE, "rows have several classes"),
        (Labels(kind="value", of_rows=((0.5, 1.5),)), REGRESSION, "rows have 2 numbers each, the model's head 1"),
        (
            Labels(kind="classes", of_rows=((0,),), names=("0", "1", "2"), multi_hot=True),
            MULTI,
            "has 3 classes, the model's head 2",
        ),
    ],
    ids=["hidden", "hidden numbers", "numbers", "classes", "sets", "vectors", "flags"],
)
def test_labels_that_do_not_fit_the_head(labels: Labels, problem: str, message: str) -> None:
    head = ["LABEL_0"] if problem == REGRESSION else ["a", "b"]
    with pytest.raises(DataError, match=message):
        targets_of(labels, problem, head, "rows")


@pytest.mark.parametrize(
    ("label", "options"),
    [
        (0.5, {"num_labels": 1}),
        (["x", "z"], {"id2label": dict(enumerate("xyz")), "label2id": {n: i for i, n in enumerate("xyz")}}),
    ],
    ids=["regression", "many classes"],
)
def test_the_loss_is_that_of_transformers(tmp_path: Path, label: Any, options: dict[str, Any]) -> None:
    """`measure` against the model's own loss, which goes by its config and the labels."""
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", **options)
    other = 1.5 if label == 0.5 else ["y"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "raise it", "label": v}) + "\n" for v in (label, other)))
    rows = open_rows(str(data), CLASSES, DataOptions())
    subject = prepare_subject(resolve(str(folder)), DataOptions(), rows)
    examples = evaluation_examples(subject, rows, DataOptions())
    batch = examples.collate([examples.dataset[0], examples.dataset[1]])
    with torch.no_grad():
        found = summarise(CLASSES, measure_batch(subject, subject.model, batch), subject.problem)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert found["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)


# padding


def decoder(folder: Path, *, pad: int | None, side: str = "right", token: str | None = "[PAD]") -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=tiny.BLOCK, pad_token_id=pad
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    if token is None:
        tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("pad", "side", "token"),
    [(1, "left", "[PAD]"), (0, "right", "[PAD]"), (None, "left", "[PAD]"), (None, "right", None)],
    ids=["on the left", "stale token in the config", "no token in the config", "no token at all"],
)
def test_figures_do_not_depend_on_padding(tmp_path: Path, pad: int | None, side: str, token: str | None) -> None:
    """A batch of sentences of all lengths, against transformers' own model on each sentence by itself."""
    folder = decoder(tmp_path / "gpt2", pad=pad, side=side, token=token)
    data = tiny.write_sentences(tmp_path / "rows.jsonl")
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(texts)))
    rows = open_rows(str(data), CLASSES, DataOptions())
    subject = prepare_subject(resolve(str(folder)), DataOptions(), rows)
    examples = evaluation_examples(subject, rows, DataOptions())
    batch = examples.collate([examples.dataset[i] for i in range(len(texts))])
    with torch.no_grad():
        found = measure_batch(subject, subject.model, batch)[:, 0]
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        wanted = [
            float(model(torch.tensor([tiny.tokenizer()(t)["input_ids"]]), labels=torch.tensor([i % 2])).loss)
            for i, t in enumerate(texts)
        ]
    assert len({int(n) for n in batch["attention_mask"].sum(-1)}) > 1
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_training_pads_with_the_tokenizers_own_token(tmp_path: Path) -> None:
    data = tiny.write_sentences(tmp_path / "rows.jsonl")
    rows = open_rows(str(data), CLASSES, DataOptions())
    options = DataOptions()
    subject = prepare_subject(
        resolve(str(decoder(tmp_path / "stale", pad=0, side="left"))), options, rows, new_head=True
    )
    examples = training_examples(subject, rows, options)
    batch = examples.collate([examples.dataset[0], examples.dataset[15]])
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    assert subject.config.pad_token_id == 1
    assert any("pad_token_id 0 of the config is not the tokenizer's 1" in note for note in examples.notes)
    without = decoder(tmp_path / "without", pad=None, token=None)
    subject = prepare_subject(resolve(str(without)), options, rows, new_head=True)
    with pytest.raises(DataError, match="no token to pad with"):
        training_examples(subject, rows, options)


# teachers


def vit(folder: Path, names: list[str]) -> Subject:
    options = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    tiny.save_vit(folder, classes=len(names))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
    return load_subject(resolve(str(folder)), "image-classification")


def test_a_teachers_classes_are_matched_by_name(tmp_path: Path) -> None:
    pupil, teacher = vit(tmp_path / "pupil", ["cat", "dog", "cow"]), vit(tmp_path / "teacher", ["Cow", "cat", "dog"])
    found = match_teacher(pupil, teacher)
    pixels = noise(2, 3, 16, 16)
    with torch.no_grad():
        logits = teacher.model(pixel_values=pixels).logits
        assert torch.equal(found.model(pixel_values=pixels)["logits"], logits[:, [1, 2, 0]])
    assert any("stand in another order" in note for note in found.notes)
    assert any("'cow' is 'Cow'" in note for note in found.notes)
    assert match_teacher(pupil, pupil).model is pupil.model
    with pytest.raises(SourceError, match="its classes are cat, dog, bird; the model's are cat, dog, cow"):
        match_teacher(pupil, vit(tmp_path / "other", ["cat", "dog", "bird"]))
    with pytest.raises(SourceError, match="only the model has names for its classes"):
        match_teacher(pupil, vit(tmp_path / "nameless", ["LABEL_0", "LABEL_1", "LABEL_2"]))


def test_a_teacher_has_the_models_task_and_outputs(tmp_path: Path) -> None:
    gpt2 = load_subject(resolve(str(tiny.save_gpt2(tmp_path / "gpt2"))), "causal-lm")
    three, four = (
        load_subject(resolve(str(tiny.save_vit(tmp_path / f"vit{n}", classes=n))), "image-classification")
        for n in (3, 4)
    )
    timm = load_subject(resolve(str(tiny.save_timm(tmp_path / "timm", classes=3))), "image-classification")
    assert match_teacher(gpt2, gpt2).model is gpt2.model
    assert match_teacher(three, timm).model is timm.model  # of another library
    with pytest.raises(SourceError, match="is for image-classification, the model for causal-lm"):
        match_teacher(gpt2, three)
    with pytest.raises(SourceError, match="has 4 outputs, the model 3; they must be the same"):
        match_teacher(three, four)


def test_a_teachers_vocabulary_is_compared(tmp_path: Path) -> None:
    pupil, other = (load_subject(resolve(str(tiny.save_gpt2(tmp_path / n))), "causal-lm") for n in ("pupil", "other"))
    file = tmp_path / "other" / "tokenizer.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    a, b = (token for token, number in body["model"]["vocab"].items() if number in (40, 41))
    vocabulary = body["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(SourceError, match=r"token 40 is .* distil from a model with the same vocabulary"):
        match_teacher(pupil, other)
    for each in (tmp_path / "other").glob("tokenizer*"):
        each.unlink()
    assert "no tokenizer to compare" in match_teacher(pupil, other).notes[0]
