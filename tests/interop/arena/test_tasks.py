"""The arena's accuracies are those of choosing the likeliest answer, on a task of lm_eval's over a local file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from support import tiny
from support.interop import need
from support.warm import program

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[3] / "examples" / "arena" / "arena.py"
TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: right
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = (
    "The statement",
    "A name",
    "The loop",
    "An exception",
    "The function",
    "Each value",
    "A module",
    "The rest",
)
ANSWERS = ["is a", "raises an exception of that class", "of"]
RIGHT = (0, 2, 1, 2, 0, 2, 1, 0)


def accuracies(folder: Path) -> dict[str, float]:
    """Choose the likeliest answer to each question, whole and by its length in characters."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    chosen: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for right, question in zip(RIGHT, QUESTIONS, strict=True):
        scores = []
        for answer in ANSWERS:
            asked, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(asked), len(whole))))
        chosen["acc"].append(max(scores) == scores[right])
        by_length = [score / len(answer) for score, answer in zip(scores, ANSWERS, strict=True)]
        chosen["acc_norm"].append(max(by_length) == by_length[right])
    return {name: sum(hits) / len(hits) for name, hits in chosen.items()}


def test_accuracies_are_those_of_the_likeliest_answer_and_missing_tasks_are_named(tmp_path: Path) -> None:
    need("lm_eval")
    model = tiny.save_gpt2(tmp_path / "model", seed=3)
    train, valid = tiny.write_text(tmp_path)
    data = tmp_path / "questions.jsonl"
    rows = [
        {"question": question, "answers": ANSWERS, "right": right}
        for right, question in zip(RIGHT, QUESTIONS, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choice.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    words = [model, "--output", tmp_path / "arena", "--keep", "0.6", "--block-size", "16", "--samples", "8", "--json"]
    words += ["--calibration", f"topics={train}", "--texts", f"topics={valid}"]
    words += ["--tasks", "local_choice", "piqa", "--task-folder", tmp_path / "tasks"]
    done = program(sys.executable, SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = accuracies(model)
    assert 0 < expected["acc"] != expected["acc_norm"] > 0
    assert found["rows"][0]["tasks"] == {"local_choice": pytest.approx(expected)}
    assert all(set(row["tasks"]) == {"local_choice"} for row in found["rows"])
    named = [line for line in found["left_out"] if line.startswith("piqa: left out, ")]
    assert len(named) == 1
    assert named[0].endswith("; give --task-folder DIR with a piqa.yaml of lm_eval over local files")
