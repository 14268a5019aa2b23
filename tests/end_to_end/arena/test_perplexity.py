"""The arena: perplexities are those of transformers, a second run measures nothing, what is missing is named."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers as tf
from support import tiny
from support.warm import program
from tokenizers import processors

pytestmark = pytest.mark.process

FOLDER = Path(__file__).parents[3] / "examples" / "arena"
HEADING = " = Assert = \n \n An assert @-@ statement \n\n"  # a file of WikiText has a blank line between its rows


def arguments(folder: Path) -> list[str]:
    """A model of 32 positions, whose tokenizer begins a text with a BOS token, and two texts."""
    model = tiny.save_gpt2(folder / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(model)
    train, valid = tiny.write_text(folder)
    (folder / "wiki.txt").write_text(HEADING * 9, encoding="utf-8")
    texts = [f"topics={valid}", f"wikitext2={folder / 'wiki.txt'}"]
    words = [str(model), "--output", str(folder / "arena"), "--keep", "0.6", "--block-size", "16", "--no-tasks"]
    return [*words, "--samples", "8", "--calibration", f"topics={train}", "--texts", *texts]


def run(*words: object) -> tuple[list[str], list[str]]:
    """Lines of stdout and of stderr."""
    done = program(sys.executable, FOLDER / "arena.py", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def by_transformers(folder: Path, text: str) -> float:
    """Perplexity of whole blocks of 16 tokens, block by block."""
    import lrsurgery.hf  # noqa: F401

    ids = tf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0]
    assert ids[0] == 0
    assert 0 not in ids[1:]
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for block in ids[: len(ids) // 16 * 16].reshape(-1, 16):
        with torch.no_grad():
            scores = model(block[None]).logits[0, :-1].double().log_softmax(-1)
        losses += (-scores[torch.arange(15), block[1:]]).tolist()
    return math.exp(sum(losses) / len(losses))


def arena(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import arena as found

    return found


def test_figures_are_those_of_transformers_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments(tmp_path)
    out, err = run(*words, "--json")
    found = json.loads("\n".join(out))
    methods = {row["method"]: row for row in found["rows"]}
    assert list(methods) == ["dense", "plain SVD", "budget", "budget, refined"]
    # WikiText's rows are its lines, and rows are joined by an empty line
    wiki = "\n\n".join([" = Assert = \n", "", " An assert @-@ statement \n", ""] * 9)
    texts = {"topics": (tmp_path / "valid.txt").read_text(), "wikitext2": wiki}
    made = {name: next((tmp_path / "arena" / "models").glob(f"model-{name}-0.6*/")) for name in ("plain-SVD", "budget")}
    folders = {"dense": tmp_path / "model", "plain SVD": made["plain-SVD"], "budget": made["budget"]}
    for method, folder in folders.items():
        for name, text in texts.items():
            expected = by_transformers(folder, text)
            assert methods[method]["texts"][name]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["left_out"] == [line for line in err if ": left out, " in line]
    assert [line.partition(",")[0] for line in found["left_out"]] == ["c4", "tasks: left out"]

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "arena").rglob("*.json")}
    assert len([file for file in kept if "measured" in file.parts]) == 4 * 2
    script = arena(monkeypatch)
    monkeypatch.setattr(script.figures, "lrsurgery", lambda *_: pytest.fail("made or measured again"))
    with pytest.raises(SystemExit, match="0"):
        script.main(words)
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "arena").rglob("*.json")}

    # what changed is measured again, and nothing else: a text, then the dense model and so what is made of it
    called: list[str] = []

    def told(*given: object) -> dict[str, object]:
        called.append(str(given[0]))
        return {"models": [{"values": {"perplexity": 1.0, "loss": 0.0, "scored": 1}, "bytes": 1, "parameters": 1}]}

    monkeypatch.setattr(script.figures, "lrsurgery", told)
    (tmp_path / "valid.txt").write_text(texts["topics"] * 2, encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        script.main(words)
    assert called == ["evaluate"] * 4
    called.clear()
    os.utime(tmp_path / "model" / "config.json", (0, 0))
    with pytest.raises(SystemExit, match="0"):
        script.main(words)
    assert called == ["evaluate"] * 2 + ["factorise"] * 3


def test_the_table_says_what_is_in_the_calibrations_domain(tmp_path: Path) -> None:
    words = arguments(tmp_path)
    out, _ = run(*words, "--limit", "2")
    titles = [title.strip() for title in out[0].strip("|").split("|")]
    assert titles == [
        *("model", "method", "keep", "calibration", "topics, in domain", "wikitext2, out of domain"),
        *("MB", "parameters"),
    ]
    rows = [dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in out[2:6]]
    assert [row["calibration"] for row in rows] == ["", "", "topics", "topics"]
    counts = [int(row["parameters"].replace(",", "")) for row in rows]
    assert counts[0] > counts[1]
    assert abs(counts[1] - counts[2]) < 0.05 * counts[0]
    assert any(line.startswith("- a trial on 2 ") for line in out)

    # a folder of ours is measured as it is
    given = next((tmp_path / "arena" / "models").glob("model-plain-SVD*/"))
    out, _ = run(given, "--output", tmp_path / "other", *words[words.index("--block-size") :], "--limit", "2")
    lines = [line for line in out if line.startswith("|")][2:]
    assert len(lines) == 1
    cells = dict(zip(titles, (cell.strip() for cell in lines[0].strip("|").split("|")), strict=True))
    assert cells["method"] == "as given"
    assert float(cells["keep"]) == pytest.approx(0.6, abs=0.05)
    assert {name: cells[name] for name in titles[4:]} == {name: rows[1][name] for name in titles[4:]}


def test_missing_data_and_positions_are_told_in_one_line(tmp_path: Path) -> None:
    model = arguments(tmp_path)[0]
    done = program(sys.executable, FOLDER / "arena.py", model, "--output", tmp_path / "arena")
    assert done.returncode == 2
    assert done.stderr == f"{model}: has 32 positions, fewer than blocks of 2,048; give --block-size 32 or less\n"
    assert not (tmp_path / "arena").exists()

    texts = ["--texts", f"topics={tmp_path / 'valid.txt'}", "wikitext2", "c4"]
    out, err = run(model, "--output", tmp_path / "arena", "--block-size", "16", "--no-tasks", "--keep", "0.6", *texts)
    for name, side in (("wikitext2", "test"), ("c4", "test"), ("wikitext2", "train")):
        lines = [line for line in err if line.startswith(f"{name}, {side} text: left out, ")]
        assert len(lines) == 1
        assert lines[0].endswith(f"; give {name}=FILE (.txt, .jsonl or .parquet)")
        assert f"- {lines[0]}" in out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param(["--keep", "1.5"], "--keep 1.5: write a share between 0 and 1", id="share"),
        pytest.param(["--samples", "0"], "--samples 0: write 1 or more", id="samples"),
        pytest.param(["--texts", "topics=missing.txt"], "nothing is left to measure", id="no text"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_made(
    tmp_path: Path, changes: list[str], line: str
) -> None:
    done = program(sys.executable, FOLDER / "arena.py", *arguments(tmp_path), *changes)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert not (tmp_path / "arena" / "models").exists()
