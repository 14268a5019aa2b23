"""Spans that answer questions: figures against transformers and SQuAD's script, one window at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny
from support.answers import calibrated, flops_of, moments_by_hand, write_rows
from tokenizers.processors import TemplateProcessing

import lrsurgery
import lrsurgery.hf
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.answers.spans import Question, QuestionWindows, SpanJudge
from lrsurgery.data.examples import open_rows, prepare_subject, training_examples
from lrsurgery.data.options import DataOptions
from lrsurgery.errors import DataError

CONTEXT = "The statement of {a} returns a value from {b}, and {c} raises it again. Nothing else is returned by {a}."


def asked(count: int = 10) -> list[dict[str, Any]]:
    """Questions about a context that is longer than a window, as SQuAD's rows are; some have several answers."""
    rows = []
    for i in range(count):
        names = [("Ada", "Alan", "Grace")[(i + j) % 3] for j in range(3)]
        context = CONTEXT.format(a=names[0], b=names[1], c=names[2])
        wanted = [f"a value from {names[1]}", f"{names[1]}"] if i % 2 else [f"{names[2]} raises it"]
        answers = {"text": wanted, "answer_start": [context.index(text) for text in wanted]}
        question = "what is returned" if i % 2 else "who raises"
        rows.append({"id": str(i), "question": question, "context": context, "answers": answers})
    return rows


def squad_score(said: str, true: str) -> tuple[float, float]:
    """Exact match and F1 as in SQuAD's evaluate-v1.1.py."""
    import collections
    import re
    import string

    def normalize_answer(s: str) -> str:
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

    prediction, truth = normalize_answer(said).split(), normalize_answer(true).split()
    same = sum((collections.Counter(prediction) & collections.Counter(truth)).values())
    exact = float(normalize_answer(said) == normalize_answer(true))
    if same == 0:
        return exact, 0.0
    precision, recall = same / len(prediction), same / len(truth)
    return exact, 2 * precision * recall / (precision + recall)


def spans_by_hand(folder: Path, rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """As transformers' example prepares SQuAD and picks answers, one window at a time; its model's own loss."""
    model = tf.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    losses, hits, scores = [], [], []
    for row in rows:
        room = size - len(tokenizer(row["question"], "")["input_ids"])
        how = {"truncation": "only_second", "max_length": size, "stride": min(128, room // 2)}
        encoded = tokenizer(
            row["question"], row["context"], return_overflowing_tokens=True, return_offsets_mapping=True, **how
        )
        start_char = row["answers"]["answer_start"][0]
        end_char = start_char + len(row["answers"]["text"][0])
        best = (-1e9, "")
        for i, offsets in enumerate(encoded["offset_mapping"]):
            own = [k for k, part in enumerate(encoded.sequence_ids(i)) if part == 1]
            first, last = own[0], own[-1]
            if not (offsets[first][0] <= start_char and offsets[last][1] >= end_char):
                start = end = 0
            else:
                while first < len(offsets) and offsets[first][0] <= start_char:
                    first += 1
                while offsets[last][1] >= end_char:
                    last -= 1
                start, end = first - 1, last + 1
            inputs = {k: torch.tensor([encoded[k][i]]) for k in ("input_ids", "attention_mask", "token_type_ids")}
            with torch.no_grad():
                out = model(**inputs, start_positions=torch.tensor([start]), end_positions=torch.tensor([end]))
            losses.append(float(out.loss))
            hits += [int(out.start_logits.argmax()) == start, int(out.end_logits.argmax()) == end]
            for a in own:
                for b in own:
                    score = float(out.start_logits[0, a].double() + out.end_logits[0, b].double())
                    if a <= b < a + 30 and score > best[0]:
                        best = score, row["context"][offsets[a][0] : offsets[b][1]]
        scores.append(
            [max(each) for each in zip(*(squad_score(best[1], t) for t in row["answers"]["text"]), strict=True)]
        )
    return {
        "loss": sum(losses) / len(losses),
        "scored": 2.0 * len(losses),
        "top1": sum(hits) / len(hits),
        "exact_match": sum(score[0] for score in scores) / len(scores),
        "f1": sum(score[1] for score in scores) / len(scores),
    }


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pointers")
    tiny.save_bert(folder / "pointer", "BertForQuestionAnswering")
    tokenizer = tiny.tokenizer(around=True)  # one that tells the question from the context, as BERT's does
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_input_names=names,
        model_max_length=tiny.BLOCK,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder / "pointer")
    rows = write_rows(folder / "rows.jsonl", asked())
    command = ["finetune", folder / "pointer", "--data", rows, "--eval-data", rows, "--rank", "0.5", "--steps", "40"]
    command += ["--lr", "3e-3", "--batch-size", "8", "--teacher", folder / "pointer", "--teacher-weight", "0.05"]
    assert tiny.run(*command, "--output", folder / "half", "--device", "cpu", "--quiet") == 0
    return folder


@pytest.mark.parametrize("batch", [1, 5])
def test_spans_are_scored_as_squads_script_does(pointers: Path, batch: int) -> None:
    found = lrsurgery.evaluate(pointers / "half", pointers / "rows.jsonl", batch_size=batch)
    wanted = spans_by_hand(pointers / "half", asked(), tiny.BLOCK)
    assert found.task == "question-answering"
    assert wanted["scored"] > 4 * len(asked())  # more than two windows a question
    assert found.values == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted["f1"] < 1
    assert wanted["loss"] < spans_by_hand(pointers / "pointer", asked(), tiny.BLOCK)["loss"]


def test_questions_without_an_answer_are_no_match_and_no_miss(pointers: Path, tmp_path: Path) -> None:
    bare = {"question": "who", "context": "It returns nothing.", "answers": {"text": [], "answer_start": []}}
    rows = write_rows(tmp_path / "rows.jsonl", [*asked(), bare])
    found = lrsurgery.evaluate(pointers / "half", rows)
    plain = lrsurgery.evaluate(pointers / "half", pointers / "rows.jsonl").values
    assert {name: found.values[name] for name in ("f1", "exact_match")} == pytest.approx(
        {name: plain[name] for name in ("f1", "exact_match")}
    )
    assert found.values["scored"] == plain["scored"] + 2
    assert any("1 questions have no answer: [CLS] is their label in the loss" in note for note in found.notes)
    with pytest.raises(DataError, match="no question has an answer"):
        lrsurgery.evaluate(pointers / "half", write_rows(tmp_path / "bare.jsonl", [bare]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": {"text": ["raise"], "answer_start": [3]}}, "does not hold the answer 'raise' at character 3"),
        ({"answers": {"text": ["The"], "answer_start": []}}, "write text and answer_start, a list each"),
        ({"question": "what " * 40}, "row 0 has a question of .* tokens, a window has 32; raise --block-size or leave"),
    ],
    ids=["another place", "half an answer", "a long question"],
)
def test_questions_that_do_not_fit_are_named(pointers: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lrsurgery.evaluate(pointers / "half", write_rows(tmp_path / "rows.jsonl", [{**asked(1)[0], **row}]))


def test_calibration_reads_questions_without_answers(pointers: Path, tmp_path: Path) -> None:
    rows = [
        {"question": row["question"], "context": "It returns a value."[: 9 + 3 * i]} for i, row in enumerate(asked(4))
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    layer = "bert.encoder.layer.1.attention.self.query"
    tokenizer = tf.AutoTokenizer.from_pretrained(pointers / "pointer")
    model = tf.AutoModelForQuestionAnswering.from_pretrained(pointers / "pointer").eval()
    inputs = [dict(tokenizer(row["question"], row["context"], return_tensors="pt")) for row in rows]
    for importance in ("activations", "fisher"):
        found = calibrated(pointers / "pointer", data, tmp_path / importance, "--importance", importance)
        wanted = moments_by_hand(model, layer, inputs)
        torch.testing.assert_close(found.moments(layer).inputs, wanted, rtol=1e-4, atol=1e-6)


def test_pointers_are_benched(pointers: Path) -> None:
    work, unit, flops = flops_of(pointers / "half")
    assert (work, unit) == ("forward", "windows")
    assert flops < flops_of(pointers / "pointer")[-1]


def test_padding_is_no_place_of_an_answer(pointers: Path) -> None:
    """The loss of a padded batch is the mean of those of its windows alone, in training too."""
    subject = prepare_subject(resolve(str(pointers / "pointer")), DataOptions(), None)
    rows = open_rows(str(pointers / "rows.jsonl"), "question-answering", DataOptions())
    examples = training_examples(subject, rows, DataOptions())
    chosen = [examples.dataset[i] for i in range(len(examples.dataset))]
    assert len({len(each["input_ids"]) for each in chosen}) > 1
    with torch.no_grad():
        together = subject.model(**examples.collate(chosen))["loss"]
        alone = []
        for each in chosen:
            inputs = {k: torch.tensor([v]) for k, v in each.items() if k != "labels"}
            start, end = each["labels"]
            pair = {"start_positions": torch.tensor([start]), "end_positions": torch.tensor([end])}
            alone.append(subject.body(**inputs, **pair).loss)
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("said", "wanted"), [("a value", 0), ("nothing", 1)], ids=["the first", "the second"])
def test_any_answer_that_people_gave_is_right(said: str, wanted: int) -> None:
    context = "It returns a value or nothing."
    answers = tuple((text, context.index(text)) for text in ("value", "nothing"))
    asked = [Question("what", context, answers), Question("what", context, ((said, context.index(said)),))]
    windows = QuestionWindows(asked, tiny.tokenizer(around=True), tiny.BLOCK, "rows", placed=True)
    logits = torch.zeros(1, 2, len(windows[1]["input_ids"]))
    for i, token in enumerate(windows[1]["labels"]):
        logits[0, i, token] = 9.0
    judge = SpanJudge(windows)
    assert judge.summarise(judge.measure({"logits": logits}, {"places": torch.tensor([0])})) == {
        "f1": 1.0,  # without its article the first is right, too
        "exact_match": 1.0,
    }
    assert squad_score(said, answers[wanted][0]) == (1.0, 1.0)
    assert squad_score(said, answers[1 - wanted][0]) == (0.0, 0.0)
