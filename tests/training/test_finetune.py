"""Training with the real Trainer on tiny models: every task, what is written, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
import yaml
from datasets import Dataset
from datasets import Image as ImageFeature
from safetensors.torch import load_file, save_file
from support import tiny

import lrsurgery
import lrsurgery.checkpoints.quantizer.method
from lrsurgery.errors import SurgeryError
from lrsurgery.progress import Listener, TrainingStep
from lrsurgery.training import publish
from lrsurgery.training.finetune import finetune
from lrsurgery.training.loop import trainer
from lrsurgery.training.publish import Outcome

pytestmark = pytest.mark.process  # each trains or reads a model: seconds a test


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    lrsurgery.factorise_checkpoint(folder / "gpt2", folder / "half", rank=0.5)
    tiny.save_bert(folder / "masked", "BertForMaskedLM")
    tiny.save_bert(folder / "encoder", "BertModel")
    tiny.save_bert(folder / "classifier", "BertForSequenceClassification", num_labels=2)
    tiny.save_vit(folder / "vit")
    tiny.save_timm(folder / "timm")
    tiny.write_images(folder / "images")
    tiny.write_sentences(folder / "sentences.jsonl")
    return folder


def text(bench: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(bench / "train.txt"), "eval_data": str(bench / "valid.txt"), "batch_size": 4, **more}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Heard(Listener):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[tuple[str, int, int]] = []
        self.steps: list[TrainingStep] = []
        self.batches: list[tuple[int, int]] = []
        self.evaluations: list[tuple[str, int, int, Mapping[str, float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, name: str, step: int, total: int) -> None:
        self.stages.append((name, step, total))

    def step(self, at: TrainingStep) -> None:
        self.steps.append(at)

    def evaluating(self, batch: int, total: int) -> None:
        self.batches.append((batch, total))

    def evaluated(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        self.evaluations.append((stage, step, total, values))


def healed(settings: dict[str, Any], output: Path, **more: Any) -> tuple[Outcome, Heard]:
    heard = Heard()
    return finetune(settings, output, listener=heard, **more), heard


# what a run gives


def test_a_factorised_language_model_heals(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=30, eval_steps=10, lr=3e-3, against=str(bench / "gpt2"))
    outcome, heard = healed(given, tmp_path / "out")
    stages = outcome.stages
    assert stages["healed"]["perplexity"] < 0.7 * stages["factorised"]["perplexity"]
    assert set(stages) == {"dense", "factorised", "healed"}
    assert [(stage, step, total) for stage, step, total, _ in heard.evaluations] == [
        ("dense", 0, 0),
        *(("factorised", step, 30) for step in (0, 10, 20, 30)),
    ]
    assert heard.evaluations[-1][3] == stages["healed"]
    assert heard.stages == [("factorised", 0, 30)]
    assert [at.step for at in heard.steps] == sorted(at.step for at in heard.steps)
    assert {at.step for at in heard.steps} == set(range(1, 31))
    assert {at.unit for at in heard.steps} == {"tokens"}
    assert {at.units_per_step for at in heard.steps} == {4 * tiny.BLOCK}
    assert "loss" in heard.steps[-1].logged
    of_each = heard.batches[-1][1]
    assert heard.batches == [(batch, of_each) for batch in range(1, of_each + 1)] * 5
    names = {file.name for file in outcome.output.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "rank_report.json",
        "recipe.yaml",
        "metrics.jsonl",
        "tokenizer.json",
    } <= names
    assert f"{stages['healed']['perplexity']:.4f}" in (outcome.output / "README.md").read_text()
    assert not (tmp_path / "out.run").exists()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (bench / "half", outcome.output)]
    assert configs[0] == configs[1]
    # the folder is what was measured: plain transformers, an independent loss over the same windows
    model = tf.AutoModelForCausalLM.from_pretrained(outcome.output)
    assert plain_loss(model, bench / "valid.txt") == pytest.approx(stages["healed"]["loss"], rel=1e-5)
    told, former = lrsurgery.Report.read(outcome.output), lrsurgery.Report.read(bench / "half")
    assert [(r.name, r.reason, r.rank, r.before) for r in told.rows] == [
        (r.name, r.reason, r.rank, r.before) for r in former.rows
    ]
    assert (told.parameters_before, told.parameters_after) == (former.parameters_before, former.parameters_after)
    after = {row.name: row.after for row in told.factorised}
    for row in lrsurgery.rank_report(model).factorised:
        assert row.after.stable == pytest.approx(after[row.name].stable, rel=1e-5)


def plain_loss(model: Any, file: Path) -> float:
    """Mean negative log likelihood a token by transformers' own loss, block by block."""
    tokenizer = tf.AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(file.read_text(), add_special_tokens=False)["input_ids"])
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), tiny.BLOCK):
            block = ids[None, start : start + tiny.BLOCK]
            if block.shape[1] > 1:
                total += float(model(input_ids=block, labels=block).loss) * (block.shape[1] - 1)
                count += block.shape[1] - 1
    return total / count


def test_metrics_hold_every_layer_at_every_evaluation(bench: Path, tmp_path: Path) -> None:
    outcome, _ = healed(text(bench, model=str(bench / "half"), steps=4, eval_steps=2, log_steps=1), tmp_path / "out")
    found = records(outcome.output)
    assert [r["step"] for r in found if "loss" in r] == [1, 2, 3, 4]
    evaluated = [r for r in found if "eval" in r and r["stage"] == "factorised"]
    assert [r["step"] for r in evaluated] == [0, 2, 4]
    model = lrsurgery.load_model(outcome.output)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "FactorisedLinear"}
    assert set(evaluated[-1]["layers"]) == set(layers)
    for name, row in evaluated[-1]["layers"].items():
        values = torch.linalg.svdvals(layers[name].weight.detach().double())
        assert row["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-4)
        assert row["nuclear_rank"] == pytest.approx(float(values.sum() / values[0]), rel=1e-4)
        share = values / values.sum()
        entropy = float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))
        assert row["entropy_rank"] == pytest.approx(entropy, rel=1e-4)
        assert row["frobenius_norm"] == pytest.approx(float(values.norm()), rel=1e-4)


TEXT = {"data": "train.txt", "eval_data": "valid.txt"}
IMAGES = {"data": "images", "eval_split": "train"}
SENTENCES = {"data": "sentences.jsonl", "eval_data": "sentences.jsonl", "new_head": True}
TASKS: list[tuple[str, dict[str, str], str, str]] = [
    ("masked", TEXT, "masked-lm", "perplexity"),
    ("encoder", {**TEXT, "task": "masked-lm", "new_head": True}, "masked-lm", "perplexity"),
    ("classifier", SENTENCES, "sequence-classification", "top1"),
    ("vit", IMAGES, "image-classification", "top1"),
    ("timm", IMAGES, "image-classification", "top1"),
]


@pytest.mark.parametrize(("model", "data", "task", "figure"), TASKS, ids=[t[0] for t in TASKS])
def test_every_task_learns(
    bench: Path, tmp_path: Path, model: str, data: dict[str, str], task: str, figure: str
) -> None:
    places = {k: str(bench / v) if k in ("data", "eval_data") else v for k, v in data.items()}
    given = {**places, "model": str(bench / model), "rank": ["0.5"], "batch_size": 8, "lr": 2e-3, "augment": False}
    outcome, _events = healed({**given, "steps": 40, "eval_steps": 20}, tmp_path / "out")
    before, after = outcome.stages["factorised"], outcome.stages["healed"]
    assert after["loss"] < before["loss"]
    assert figure in after
    if figure == "top1":
        assert after["top1"] > 0.9  # colours and words that a classifier cannot miss
    again = lrsurgery.load_model(outcome.output)
    assert len(lrsurgery.rank_report(again).factorised) > 0
    assert lrsurgery.Report.read(outcome.output).parameters_after == sum(p.numel() for p in again.parameters())
    from lrsurgery.data.options import DataOptions
    from lrsurgery.measure.evaluate import evaluate

    measured = evaluate(
        str(outcome.output),
        places.get("eval_data", places["data"]),
        DataOptions(task=task),
        batch_size=3,
        split=places.get("eval_split"),
    )
    assert measured.values == pytest.approx(after, rel=1e-5)


def test_dense_training_then_the_switch(bench: Path, tmp_path: Path) -> None:
    given = text(
        bench, model=str(bench / "gpt2"), rank=["0.5"], dense_steps=6, steps=12, eval_steps=3, log_steps=1, lr=2e-3
    )
    outcome, heard = healed({**given, "schedule": "constant"}, tmp_path / "out")
    assert heard.stages == [("dense", 0, 12), ("factorised", 6, 12)]
    rates = {r["step"]: r["learning_rate"] for r in records(outcome.output) if "loss" in r}
    assert rates[6] == pytest.approx(2e-3)
    assert rates[7] == pytest.approx(1e-3)
    assert set(outcome.stages) == {"dense", "factorised", "healed"}
    assert len(outcome.report.factorised) > 0


def test_from_scratch_is_the_config_alone(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "gpt2"), from_scratch=True, steps=1, lr=1e-9, seed=3)
    outcome, _ = healed(given, tmp_path / "out")
    torch.manual_seed(3)
    fresh = tf.GPT2LMHeadModel(tf.GPT2Config.from_pretrained(bench / "gpt2")).state_dict()
    for key, tensor in load_file(outcome.output / "model.safetensors").items():
        torch.testing.assert_close(tensor, fresh[key], atol=1e-6, rtol=0)


def test_a_recipe_runs_again(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=3, decay_strength=0.02, set={"adam_beta2": 0.95})
    first, _ = healed(given, tmp_path / "first")
    recipe = first.output / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["set"] == {"adam_beta2": 0.95}
    again, _ = healed({}, tmp_path / "again", recipe_file=recipe)
    other, _ = healed({"seed": 1}, tmp_path / "other", recipe_file=recipe)
    one, two, three = (load_file(o.output / "model.safetensors") for o in (first, again, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one)


def test_weights_keep_the_checkpoints_dtype(bench: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    tiny.save_gpt2(folder)
    tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    outcome, _ = healed(text(bench, model=str(folder), rank=["0.5"], steps=2), tmp_path / "out")
    dtypes = {key: t.dtype for key, t in load_file(outcome.output / "model.safetensors").items()}
    assert {dtype for key, dtype in dtypes.items() if not key.endswith(".order")} == {torch.bfloat16}
    model = tf.AutoModelForCausalLM.from_pretrained(outcome.output, dtype=torch.float32)
    # what was measured is what was written
    assert plain_loss(model, bench / "valid.txt") == pytest.approx(outcome.stages["healed"]["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_shrinks_the_product(bench: Path, tmp_path: Path, optimizer: str) -> None:
    """With a loss that hardly pulls, Frobenius decay makes every product smaller; none leaves it alone."""
    norms = {}
    for decay in ("frobenius", "l2", "none"):
        given = text(
            bench,
            model=str(bench / "half"),
            steps=5,
            lr=1e-3,
            schedule="constant",
            decay=decay,
            decay_strength=20.0,
            optimizer=optimizer,
            log_steps=1,
            set={"max_grad_norm": 1e-6} if optimizer == "sgd" else {},
        )
        outcome, _ = healed(given, tmp_path / f"{decay}-{optimizer}")
        layers = [r["layers"] for r in records(outcome.output) if "layers" in r]
        norms[decay] = [sum(row["frobenius_norm"] for row in rows.values()) for rows in (layers[0], layers[-1])]
    for decay in ("frobenius", "l2"):
        assert norms[decay][1] < 0.995 * norms["none"][1], norms
    if optimizer == "sgd":
        # torch's SGD runs its decay through the momentum: each factor shrinks as this number does
        size, speed = 1.0, 0.0
        for _ in range(5):
            speed = 0.9 * speed + 20.0 * size
            size -= 1e-3 * speed
        assert norms["l2"][1] / norms["l2"][0] == pytest.approx(size**2, rel=1e-3)
        assert norms["none"][1] == pytest.approx(norms["none"][0], rel=1e-3)


def test_a_teacher_is_matched(bench: Path, tmp_path: Path) -> None:
    """Distillation alone brings the model's answers closer to the teacher's than the labels do."""
    distances = {}
    teacher = tf.AutoModelForCausalLM.from_pretrained(bench / "gpt2")
    ids = torch.randint(6, 300, (4, tiny.BLOCK), generator=torch.Generator().manual_seed(0))
    for weight in (1.0, 0.0):
        given = text(
            bench,
            model=str(bench / "half"),
            steps=30,
            lr=2e-3,
            decay="none",
            teacher=str(bench / "gpt2"),
            teacher_weight=weight,
            temperature=1.0,
        )
        outcome, _ = healed(given, tmp_path / f"out-{weight}")
        student = tf.AutoModelForCausalLM.from_pretrained(outcome.output)
        with torch.no_grad():
            ours, theirs = student(input_ids=ids).logits.log_softmax(-1), teacher(input_ids=ids).logits.log_softmax(-1)
        distances[weight] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert distances[1.0] < 0.5 * distances[0.0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_distillation_in_parts_trains_as_the_whole(
    accumulate: int, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, scale and gradients of a run are those of whole logits."""
    parts: list[int] = []
    original = trainer.distil_split

    def counted(*args: Any) -> Any:
        parts.append(1)
        return original(*args)

    monkeypatch.setattr(trainer, "distil_split", counted)
    how = {"steps": 3, "lr": 2e-3, "teacher": str(bench / "gpt2"), "accumulate": accumulate}
    given = text(bench, model=str(bench / "half"), **how)
    whole, _ = healed(given, tmp_path / "whole")
    assert not parts
    monkeypatch.setattr(trainer, "MOST_WHOLE", 0)
    split, _ = healed(given, tmp_path / "split")
    assert len(parts) == 3 * accumulate
    wanted = load_file(whole.output / "model.safetensors")
    found = load_file(split.output / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_teacher_whose_classes_stand_in_another_order(tmp_path: Path) -> None:
    """A pupil that learns from its teacher alone answers as the teacher does, class by class."""
    write = {"id2label": {0: "return", 1: "raise"}, "label2id": {"return": 0, "raise": 1}}
    dense = {"dense": True, "steps": 40, "lr": 3e-3, "batch_size": 8, "augment": False, "eval_split": "train"}
    data = {"data": str(tiny.write_sentences(tmp_path / "sentences.jsonl"))}
    tiny.save_bert(tmp_path / "untaught", "BertForSequenceClassification", **write)
    teacher, _ = healed({**dense, **data, "model": str(tmp_path / "untaught")}, tmp_path / "teacher")
    assert teacher.stages["trained"]["top1"] == 1
    turned = {"id2label": {0: "RAISE", 1: "RETURN"}, "label2id": {"RAISE": 0, "RETURN": 1}}
    tiny.save_bert(tmp_path / "pupil", "BertForSequenceClassification", **turned)
    only = {"teacher": str(teacher.output), "teacher_weight": 1.0, "model": str(tmp_path / "pupil")}
    pupil, heard = healed({**dense, **data, **only}, tmp_path / "out")
    assert pupil.stages["trained"]["top1"] == 1
    assert any("stand in another order" in note for note in heard.notes)
    assert any("'raise' is 'RAISE'" in note for note in heard.notes)


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("problem", ["regression", "many classes"])
def test_numbers_and_many_classes_are_learnt(bench: Path, tmp_path: Path, library: str, problem: str) -> None:
    place = tmp_path / "images"
    tiny.write_images(place, count=6)
    files = sorted(place.glob("*/*.png"))
    labels = [float(f.parent.name[-1]) * 0.7 - 1 if problem == "regression" else f.parent.name[-1:] for f in files]
    rows = [
        {"image": str(f), "label": v if problem == "regression" else [v, "any"]}
        for f, v in zip(files, labels, strict=True)
    ]
    table = Dataset.from_list(rows).cast_column("image", ImageFeature())
    table.save_to_disk(str(tmp_path / "rows"))
    given = {
        "model": str(bench / ("vit" if library == "transformers" else "timm")),
        "data": str(tmp_path / "rows"),
        "eval_data": str(tmp_path / "rows"),
        "dense": True,
        "new_head": True,
        "steps": 60,
        "eval_steps": 60,
        "lr": 3e-3,
        "batch_size": 9,
        "augment": False,
        **({"image_size": 64} if library == "timm" else {}),
    }
    outcome, _ = healed(given, tmp_path / "out")
    before, after = outcome.stages["before"], outcome.stages["trained"]
    assert after["loss"] < 0.5 * before["loss"]
    again = lrsurgery.evaluate(outcome.output, tmp_path / "rows")
    assert again.values == pytest.approx(after, rel=1e-5)
    if problem == "regression":
        assert after["pearson"] > 0.9
        assert any("the head predicts numbers" in note for note in again.notes)
    else:
        assert after["f1"] > 0.9
        assert any("any number of classes" in note for note in again.notes)


def test_the_dense_model_is_trained_as_long(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=6, eval_steps=3, lr=2e-3, against=str(bench / "gpt2"))
    outcome, _ = healed({**given, "against_trained": True}, tmp_path / "out")
    assert list(outcome.stages) == ["dense", "dense trained", "factorised", "healed"]
    # a run of its own, of the same settings, ends at the same figures
    same = {**given, "model": given.pop("against"), "dense": True}
    same.pop("against")
    alone, _ = healed(same, tmp_path / "alone")
    assert outcome.stages["dense trained"] == pytest.approx(alone.stages["trained"], rel=1e-5)
    assert outcome.stages["dense"] == pytest.approx(alone.stages["before"], rel=1e-5)
    assert "flatters" not in (outcome.output / "README.md").read_text()
    assert not (tmp_path / "out.run").exists()
    plain, _ = healed({**given, "against": str(bench / "gpt2")}, tmp_path / "plain")
    assert "flatters the healed one; --against-trained" in (plain.output / "README.md").read_text()
    assert plain.stages["healed"] == outcome.stages["healed"]


def test_streamed_text_trains(bench: Path, tmp_path: Path) -> None:
    outcome, _ = healed(text(bench, model=str(bench / "half"), steps=6, streaming=True, lr=2e-3), tmp_path / "out")
    assert outcome.stages["healed"]["loss"] < outcome.stages["factorised"]["loss"]


def test_the_best_model_is_kept_and_training_stops_early(bench: Path, tmp_path: Path) -> None:
    given = text(
        bench, model=str(bench / "half"), steps=60, eval_steps=2, lr=0.3, early_stopping=2, decay="none", warmup_steps=4
    )
    outcome, _ = healed(given, tmp_path / "out")
    losses = [r["eval"]["loss"] for r in records(outcome.output) if "eval" in r]
    assert outcome.steps < 60
    assert outcome.stages["healed"]["loss"] == pytest.approx(min(losses[1:]), rel=1e-6)


def test_a_new_head_for_other_classes(bench: Path, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "four", classes=4, count=2)
    given = {"data": str(tmp_path / "four"), "eval_split": "train", "rank": ["0.5"], "steps": 2, "new_head": True}
    for model in ("vit", "timm"):
        outcome, _ = healed({**given, "model": str(bench / model)}, tmp_path / f"out-{model}")
        loaded = lrsurgery.load_model(outcome.output)
        logits = loaded(torch.zeros(1, 3, 16, 16) if model == "vit" else torch.zeros(1, 3, 32, 32))
        assert getattr(logits, "logits", logits).shape == (1, 4)


def test_gradient_checkpointing_and_accumulation_change_nothing(bench: Path, tmp_path: Path) -> None:
    base = text(bench, model=str(bench / "half"), steps=3, lr=1e-3)
    plain, _ = healed(base, tmp_path / "plain")
    other, _ = healed({**base, "batch_size": 2, "accumulate": 2, "gradient_checkpointing": True}, tmp_path / "other")
    one, two = (load_file(o.output / "model.safetensors") for o in (plain, other))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-5, rtol=1e-4)


def test_timm_output_is_timms(bench: Path, tmp_path: Path) -> None:
    given = {
        "model": str(bench / "timm"),
        "data": str(bench / "images"),
        "dense": True,
        "steps": 2,
        "eval_split": "train",
    }
    outcome, _ = healed({**given, "dense": True, "steps": 2}, tmp_path / "out")
    model = timm.create_model(f"local-dir:{outcome.output}", pretrained=True).eval()
    ours = lrsurgery.load_model(outcome.output)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(image), ours(image))
    config = json.loads((outcome.output / "config.json").read_text())
    assert config["num_classes"] == 3
    assert "quantization_config" not in config


# what is refused, or warned of


def test_a_decay_that_overshoots_is_warned_of_with_its_bound(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=1, lr=1e-2, decay_strength=1e3)
    model = lrsurgery.load_model(bench / "half")
    lrsurgery.balance_(model)  # as it trains
    top = max(
        float(torch.linalg.matrix_norm(f.detach(), 2)) ** 2
        for m in model.modules()
        if type(m).__name__ == "FactorisedLinear"
        for f in m.factors
    )
    outcome, heard = healed(given, tmp_path / "out")
    (note,) = [text for text in heard.notes if "overshoots" in text]
    assert f"is {1e-2 * 1e3 * top:.3g} at" in note
    assert f"write at most {1 / (1e-2 * top):.2g}" in note
    assert note in outcome.report.notes
    calm = healed({**given, "decay_strength": 0.1}, tmp_path / "calm")[1].notes
    assert not [text for text in calm if "overshoots" in text]


def test_a_loss_that_is_not_finite_stops_the_run(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=50, lr=1e18, optimizer="sgd", save_steps=1, decay="none")
    with pytest.raises(SurgeryError) as e:
        healed({**given, "set": {"max_grad_norm": 0.0}}, tmp_path / "out")
    message = str(e.value)
    assert "step" in message
    assert "largest gradient is that of transformer" in message
    assert not (tmp_path / "out").exists()
    whole = [file.parent for file in (tmp_path / "out.run").glob("factorised/*/complete")]
    assert bool(whole) == ("the last good checkpoint stays" in message)
    for checkpoint in whole:
        assert all(bool(torch.isfinite(t).all()) for t in load_file(checkpoint / "model.safetensors").values())


def broken_image(bench: Path, folder: Path) -> Path:
    tiny.write_images(folder)
    (folder / "class0" / "0.png").write_bytes(b"not a picture")
    return folder


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dense model", {"model": "gpt2"}, "is dense; pass --rank R to factorise it first, --dense-steps N"),
    ("factorised twice", {"model": "half", "rank": ["0.5"]}, "is factorised already; leave --rank"),
    ("from scratch", {"model": "half", "from_scratch": True}, "lrsurgery factorise DENSE --from-scratch"),
    ("no such data", {"data": "nowhere.txt"}, "nowhere.txt: no such file"),
    ("empty file", {"data": "empty.txt"}, "empty.txt: is empty"),
    ("short text", {"data": "short.txt"}, "fewer than one sequence of 32; lower --block-size"),
    ("not json", {"data": "bad.jsonl"}, "bad.jsonl: cannot be read as a dataset"),
    ("no text column", {"data": "columns.jsonl"}, "which column holds the text? It has a, b; say --text-column"),
    ("wrong column", {"text_column": "words"}, "no column 'words'; it has text"),
    ("long block", {"block_size": 64}, "block_size 64: longer than the 32 positions"),
    ("other task", {"task": "image-segmentation"}, "unknown task 'image-segmentation'"),
    ("decay", {"decay": "l3"}, "unknown decay 'l3'; known: frobenius, l2, none"),
    ("strength", {"decay_strength": -1}, "decay_strength -1.0: write a number of at least 0"),
    ("lr", {"lr": 0}, "lr 0.0: write a number above 0"),
    ("steps and epochs", {"epochs": 1}, "epochs and steps are both given"),
    ("late switch", {"model": "gpt2", "rank": ["0.5"], "dense_steps": 5}, "dense_steps 5: must be below the 2 steps"),
    ("switch to what", {"model": "gpt2", "dense_steps": 1}, "say with --rank what to factorise to"),
    ("nothing gained", {"model": "gpt2", "rank": ["1.0"]}, "nothing to factorise at rank 1.0"),
    ("best of what", {"best": True}, "best and early_stopping need --eval-data"),
    ("unknown field", {"set": {"lerning_rate": 1}}, "set lerning_rate: transformers' TrainingArguments has no"),
    ("own field", {"set": {"max_steps": 1}}, "set max_steps: is decided by lrsurgery; use --steps"),
    ("tracker", {"report_to": ["abacus"]}, "report_to abacus: is not installed"),
    ("precision", {"precision": "fp16", "device": "cpu"}, "precision fp16: this machine trains on the CPU"),
    ("teacher", {"teacher": "masked"}, "is for masked-lm, the model for causal-lm"),
    ("no head", {"model": "encoder", "rank": ["0.5"], "task": "masked-lm"}, "encoder: has no head for masked-lm"),
    ("names", {"model": "classifier", "rank": ["0.5"], "data": "sentences.jsonl"}, "--label-map FILE says which is"),
    ("as long as what", {"against_trained": True, "eval_data": "train.txt"}, "name the dense model to train as long"),
    ("as long, unmeasured", {"against_trained": True}, "against_trained needs --eval-data"),
    ("no tokenizer", {"model": "mute"}, "no tokenizer"),
    ("labels", {"model": "vit", "rank": ["0.5"], "data": "images4"}, "has 4 classes, the model's head 3; --new-head"),
    ("truncated", {"model": "truncated"}, "truncated/model.safetensors"),
    ("not finite", {"model": "nan"}, "holds NaN or Inf; repair the checkpoint first"),
    ("image", {"model": "vit", "rank": ["0.5"], "data": "broken"}, "image 0 does not decode"),
]


@pytest.fixture(scope="module")
def spoiled(bench: Path) -> Path:
    (bench / "empty.txt").write_text("")
    (bench / "short.txt").write_text("one line")
    (bench / "bad.jsonl").write_text("{not json")
    (bench / "columns.jsonl").write_text('{"a": "x", "b": "y"}\n')
    tf.AutoModelForCausalLM.from_pretrained(bench / "half").save_pretrained(bench / "mute")
    tiny.write_images(bench / "images4", classes=4, count=1)
    broken_image(bench, bench / "broken")
    weights = (bench / "half" / "model.safetensors").read_bytes()
    for name in ("truncated", "nan"):
        shutil.copytree(bench / "half", bench / name)
        (bench / name / "rank_report.json").unlink()  # whose digests would tell before
    (bench / "truncated" / "model.safetensors").write_bytes(weights[:-100])
    (bench / "nan" / "model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\xc0\x7f")
    return bench


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_bad_input_is_one_line(spoiled: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": "half", "data": "train.txt", "steps": 2, "batch_size": 24, **change}
    for key in ("model", "data", "eval_data", "teacher"):
        if key in given:
            given[key] = str(spoiled / given[key])
    with pytest.raises(SurgeryError) as e:
        finetune(given, tmp_path / "out")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_an_unknown_setting_names_its_like(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("decay_strengh: 0.1\n")
    with pytest.raises(SurgeryError, match="unknown setting 'decay_strengh'; did you mean 'decay_strength'"):
        finetune({}, tmp_path / "out", recipe_file=recipe)
    recipe.write_text("- a\n")
    with pytest.raises(SurgeryError, match="one 'setting: value' a line"):
        finetune({}, tmp_path / "out", recipe_file=recipe)


def test_perplexity_is_the_exponential_of_the_loss(bench: Path, tmp_path: Path) -> None:
    outcome, _ = healed(text(bench, model=str(bench / "half"), steps=1), tmp_path / "out")
    assert outcome.stages["healed"]["perplexity"] == pytest.approx(math.exp(outcome.stages["healed"]["loss"]))


def test_bf16_autocast_trains_after_the_model_was_measured(bench: Path, tmp_path: Path) -> None:
    """The dense model is measured, trained, factorised and trained on, each time under autocast."""
    given = text(bench, model=str(bench / "gpt2"), rank=["0.5"], dense_steps=10, steps=20, lr=2e-3, precision="bf16")
    outcome, _ = healed(given, tmp_path / "out")
    full, _ = healed({**given, "precision": "fp32"}, tmp_path / "full")
    found, wanted = outcome.stages["healed"]["loss"], full.stages["healed"]["loss"]
    assert found == pytest.approx(wanted, rel=0.02)
    assert found != wanted  # it was bf16


def test_tensorboard_logs_come_with_the_output(bench: Path, tmp_path: Path) -> None:
    given = text(bench, model=str(bench / "half"), steps=2, log_steps=1, report_to=["tensorboard"])
    outcome, _ = healed(given, tmp_path / "out")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logs,) = (outcome.output / "runs" / "factorised").iterdir()
    events = EventAccumulator(str(logs))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("train/loss")}
    assert logged == pytest.approx({r["step"]: r["loss"] for r in records(outcome.output) if "loss" in r})


def test_an_output_that_does_not_load_is_told(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And written all the same: the training is worth more than the name of a tensor."""
    original = publish.write_transformers

    def forgetful(model: Any, stage: Path) -> None:
        original(model, stage)
        state = load_file(stage / "model.safetensors")
        del state["transformer.ln_f.weight"]
        save_file(state, stage / "model.safetensors", {"format": "pt"})

    given = {"model": str(bench / "gpt2"), "data": str(bench / "train.txt"), "rank": ["0.5"], "steps": 1}
    whole, _ = healed(given, tmp_path / "whole")
    assert not [note for note in whole.report.notes if "load" in note]
    monkeypatch.setattr(publish, "write_transformers", forgetful)
    broken, _ = healed(given, tmp_path / "broken")
    (note,) = [note for note in broken.report.notes if "load" in note]
    assert note.startswith("the output does not load as it is: ")
    assert "transformer.ln_f.weight is missing" in note
    assert note in lrsurgery.Report.read(tmp_path / "broken").notes
