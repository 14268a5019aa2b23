"""`evaluate` against independent sums, and through the program."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny
from support.warm import program
from torch.nn.functional import cross_entropy

import lrsurgery
from lrsurgery.data.options import DataOptions
from lrsurgery.errors import SurgeryError


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2")
    lrsurgery.factorise_checkpoint(folder / "gpt2", folder / "half", rank=0.5)
    tiny.save_vit(folder / "vit")
    tiny.write_images(folder / "images", count=5)
    return folder


def windows_by_hand(model: Any, ids: torch.Tensor, stride: int) -> tuple[float, int, int, int]:
    """Summed loss, positions, top-1 and top-5 hits: one window at a time, no padding, in fp64 sums."""
    total, count, top1, top5, scored, start = 0.0, 0, 0, 0, 0, 0
    while scored < len(ids) - 1:
        window = ids[start : start + tiny.BLOCK]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1]
        first = 0 if start == 0 else tiny.BLOCK - stride - 1  # the token after a window's old part is scored by it
        if stride == tiny.BLOCK:
            first = 0
        answers = window[1:][first:]
        logits = logits[first:]
        total += float(cross_entropy(logits, answers, reduction="sum").double())
        best = logits.topk(5).indices
        top1 += int((best[:, 0] == answers).sum())
        top5 += int((best == answers[:, None]).sum())
        count += len(answers)
        scored = start + len(window) - 1
        start += stride
    return total, count, top1, top5


@pytest.mark.process
@pytest.mark.parametrize("stride", [tiny.BLOCK, 8])
@pytest.mark.parametrize("batch", [1, 7])
def test_language_figures_are_exact(bench: Path, stride: int, batch: int) -> None:
    found = lrsurgery.evaluate(bench / "gpt2", bench / "valid.txt", stride=stride, batch_size=batch).values
    model = tf.AutoModelForCausalLM.from_pretrained(bench / "gpt2").eval()
    tokens = tf.AutoTokenizer.from_pretrained(bench / "gpt2")((bench / "valid.txt").read_text())["input_ids"]
    total, count, top1, top5 = windows_by_hand(model, torch.tensor(tokens), stride)
    assert found["scored"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["top1"] == pytest.approx(top1 / count)
    assert found["top5"] == pytest.approx(top5 / count)


def test_image_figures_are_exact(bench: Path) -> None:
    from PIL import Image

    processor = tf.ViTImageProcessor.from_pretrained(bench / "vit")
    model = tf.ViTForImageClassification.from_pretrained(bench / "vit").eval()
    losses, hits = [], []
    for label in range(3):
        for file in sorted((bench / "images" / f"class{label}").glob("*.png")):
            with torch.no_grad():
                logits = model(**processor(Image.open(file), return_tensors="pt")).logits
            losses.append(float(cross_entropy(logits, torch.tensor([label]))))
            hits.append(int(logits.argmax()) == label)
    found = lrsurgery.evaluate(str(bench / "vit"), str(bench / "images"), split="train", batch_size=4).values
    assert found["scored"] == 15
    assert found["loss"] == pytest.approx(sum(losses) / 15, rel=1e-4)
    assert found["top1"] == pytest.approx(sum(hits) / 15)


@pytest.mark.process
def test_top1_is_that_of_transformers_pipeline(tmp_path: Path) -> None:
    """On wide images whose class shows at the borders, which a crop of the middle would lose."""
    import numpy as np
    from PIL import Image

    random, names = np.random.default_rng(0), ("left", "middle", "right")
    files, classes = [], []
    for k, name in enumerate(names):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 60, (16, 48, 3), dtype=np.uint8)
            pixels[:, 16 * k : 16 * k + 16] += 150
            files.append(tmp_path / "wide" / name / f"{i}.png")
            classes.append(k)
            Image.fromarray(pixels).save(files[-1])
    folder = tiny.save_vit(tmp_path / "vit")
    model = tf.ViTForImageClassification.from_pretrained(folder, id2label=dict(enumerate(names)))
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    inputs = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    optimizer, labels = torch.optim.Adam(model.parameters(), 3e-3), torch.tensor(classes)
    for _ in range(25):
        optimizer.zero_grad()
        model(pixel_values=inputs, labels=labels).loss.backward()
        optimizer.step()
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    answers = tf.pipeline("image-classification", model=str(folder), device="cpu")(list(map(str, files)), top_k=1)
    right = [answer[0]["label"] == names[k] for answer, k in zip(answers, classes, strict=True)]
    assert sum(right) > 24  # the borders are seen
    found = lrsurgery.evaluate(str(folder), str(tmp_path / "wide"), split="train", batch_size=5)
    assert found.values["scored"] == len(files)
    assert found.values["top1"] == pytest.approx(sum(right) / len(files))


@pytest.mark.process
def test_the_program_puts_a_model_beside_another(bench: Path) -> None:
    command = [
        *tiny.PROGRAM,
        "evaluate",
        str(bench / "half"),
        "--data",
        str(bench / "valid.txt"),
        "--against",
        str(bench / "gpt2"),
    ]
    done = program(*command, "--json")
    assert done.returncode == 0, done.stderr
    dense, half = json.loads(done.stdout)["models"]
    assert dense["parameters"] == sum(p.numel() for p in tf.AutoModel.from_pretrained(bench / "gpt2").parameters())
    assert half["bytes"] == (bench / "half" / "model.safetensors").stat().st_size
    assert half["parameters"] < dense["parameters"]
    again = lrsurgery.evaluate(str(bench / "half"), str(bench / "valid.txt"), DataOptions(block_size=tiny.BLOCK))
    assert half["values"] == pytest.approx(again.values)
    refused = program(*command[:6], "nowhere.txt")
    assert refused.returncode == 2
    assert refused.stderr == "lrsurgery: nowhere.txt: no such file or folder\n"


@pytest.mark.process
def test_the_program_heals_and_says_what_comes_next(bench: Path, tmp_path: Path) -> None:
    command = [
        *tiny.PROGRAM,
        "finetune",
        str(bench / "half"),
        "--data",
        str(bench / "train.txt"),
        "--eval-data",
        str(bench / "valid.txt"),
        "--steps",
        "4",
        "--seed",
        "0",
        "--set",
        "adam_beta2=0.95",
    ]

    done = program(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Written to half-finetuned" in done.stderr
    assert "Next: lrsurgery report half-finetuned" in done.stderr
    assert [line.split()[0] for line in done.stdout.strip().splitlines()] == ["model", "factorised", "healed"]
    made = program(*command, "--json", "--output", "other", cwd=tmp_path)
    assert json.loads(made.stdout)["stages"]["healed"]["scored"] > 0
    shown = program(*tiny.PROGRAM, "report", "other", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr


DOCUMENTS = ("the cat sat on the mat ; warm @-@ very warm .\n" * 9 + "it 's\n", "a cat", "one @,@ two ( three )\n" * 4)


def rolling_by_hand(model: Any, ids: list[int], size: int, prefix: int) -> float:
    """Log likelihood of a document, one token at a time, each after what its window has before it."""
    total = 0.0
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        begin = max(0, last - size)
        before = [prefix] if begin == 0 else [ids[begin - 1]]
        for place in range(first, last):
            context = torch.tensor([before + ids[begin:place]])
            with torch.no_grad():
                total += float(model(input_ids=context).logits[0, -1].log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize(("protocol", "size"), [("lm-eval", None), ("lm-eval", 7), ("lm-eval-plain", None)])
def test_rolling_windows_score_each_token_of_a_document_once(
    bench: Path, tmp_path: Path, protocol: str, size: int | None
) -> None:
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in DOCUMENTS))
    model = tf.AutoModelForCausalLM.from_pretrained(bench / "gpt2").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(bench / "gpt2")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    shown = DOCUMENTS
    if protocol == "lm-eval":
        shown = ("the cat sat on the mat; warm-very warm .\n" * 9 + "it's\n", "a cat", "one,two (three)\n" * 4)
    encoded = [tokenizer(text)["input_ids"] for text in shown]
    total = sum(rolling_by_hand(model, ids, size or tiny.BLOCK, prefix) for ids in encoded)
    assert len(encoded[0]) > 2 * tiny.BLOCK  # several windows, the last one shorter
    options = DataOptions(block_size=size)
    found = lrsurgery.evaluate(bench / "gpt2", tmp_path / "documents.jsonl", options, protocol=protocol, batch_size=3)
    words = sum(len(text.split()) + text.endswith("\n") for text in DOCUMENTS)  # as lm_eval counts
    length = sum(len(text.encode()) for text in DOCUMENTS)
    assert found.values["scored"] == sum(map(len, encoded))
    assert found.values["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert found.values["byte_perplexity"] == pytest.approx(math.exp(-total / length), rel=1e-5)
    assert found.values["bits_per_byte"] == pytest.approx(-total / length / math.log(2), rel=1e-5)
    assert f"3 documents, {sum(map(len, encoded))} tokens" in found.notes[0]


@pytest.mark.parametrize(
    ("model", "data", "changes", "message"),
    [
        ("vit", "images", {}, "protocol lm-eval: is for causal-lm, and this model is for image-classification"),
        ("gpt2", "valid.txt", {"stride": 4}, "stride 4: lm_eval's windows do not overlap; leave it out"),
        ("gpt2", "valid.txt", {"options": DataOptions(bos="never")}, "bos never: lm_eval's protocol has a rule"),
        ("gpt2", "valid.txt", {"protocol": "mine"}, "unknown protocol 'mine'; known: windows, lm-eval, lm-eval-plain"),
    ],
)
def test_what_lm_evals_protocol_cannot_be_asked_for(
    bench: Path, model: str, data: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SurgeryError, match=re.escape(message)):
        lrsurgery.evaluate(bench / model, bench / data, **{"protocol": "lm-eval", **changes})


@pytest.mark.parametrize("command", ["evaluate", "finetune", "fisher", "activations", "bench"])
def test_what_a_model_raises_of_its_input_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A processor whose images are smaller than the model's, and what the model itself says of such images."""
    folder, images = tiny.save_vit(tmp_path / "vit"), tiny.write_images(tmp_path / "images", count=5)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 8, "width": 8}}))
    with pytest.raises(ValueError, match="Input image size") as told:
        tf.ViTForImageClassification.from_pretrained(folder)(torch.zeros(1, 3, 8, 8))
    factorise = ["factorise", folder, "--rank", "0.25", "--calibration", images, "--samples", "4"]
    commands: dict[str, list[Any]] = {
        "evaluate": ["evaluate", folder, "--data", images],
        "finetune": ["finetune", folder, "--dense", "--data", images, "--steps", "2", "--output", tmp_path / "out"],
        "fisher": [*factorise, "--output", tmp_path / "out"],
        "activations": [*factorise, "--importance", "activations", "--output", tmp_path / "out"],
        "bench": ["bench", folder, "--seconds", "0.01", "--batch", "1"],
    }
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert tiny.run(*commands[command], "--device", "cpu", "--quiet") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("lrsurgery: "))
    assert line.startswith(f"lrsurgery: {folder}: ")
    assert f"ValueError: {told.value}" in line
    assert sorted(tmp_path.iterdir()) == before
