"""`factorise --calibration` and `--budget`, from data to checkpoint, on real text and images."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file
from support import tiny
from support.checks import multiplied_out
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lrsurgery
from lrsurgery.calibration import collect as calibration
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.source import resolve
from lrsurgery.factorise import calibrate, opening
from lrsurgery.factorise.options import parse_options
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank

SIX = "--budget 0.6 --samples 6"


def factorise(model: Path, options: str, **places: object) -> int:
    """Run the program with these options and `--NAME PLACE` for each place; its exit code."""
    words = [word for name, place in places.items() for word in (f"--{name.replace('_', '-')}", place)]
    return tiny.run("factorise", model, *options.split(), *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and statistics; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("calibration")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", dropout=0.0)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=64,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder / "llama", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(folder / "llama")
    tiny.save_timm(folder / "resnet")
    tiny.save_bert(folder / "bert", "BertForSequenceClassification", num_labels=2)
    tiny.write_sentences(folder / "sentences.jsonl")
    images = tiny.write_images(folder / "classes", count=4)
    (folder / "images").mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))):  # no classes: calibration needs none
        shutil.copy(file, folder / "images" / f"{i}.png")
    keeping = {"save_statistics": folder / "statistics", "output": folder / "six"}
    assert factorise(folder / "gpt2", f"{SIX} --quiet", calibration=folder / "train.txt", **keeping) == 0
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "rank_report.json").read_text())
    return body


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def test_what_is_written_is_best_in_the_metric_of_the_statistics(place: Path) -> None:
    """numpy's SVD of G^(1/2) W C^(1/2), with roots from eigenvectors, says what each layer lost."""
    statistics, report = Statistics.read(place / "statistics"), report_of(place / "six")
    dense, low_rank = tensors_of(place / "gpt2"), tensors_of(place / "six")
    total = 0.0
    for row in report["layers"]:
        if row["status"] != "factorised":
            continue
        metric = statistics.metric(row["name"])
        assert metric is not None
        roots = []
        for moment in metric:
            assert moment is not None
            values, vectors = np.linalg.eigh(moment.numpy())
            roots.append((vectors * np.sqrt(values.clip(0))) @ vectors.T)
        weight = dense[f"{row['name']}.weight"].double().numpy().T  # Conv1D keeps (in, out)
        product = multiplied_out(low_rank, row["name"], *weight.shape)
        tail = np.linalg.svd(roots[1] @ weight @ roots[0], compute_uv=False)[row["rank"] :]
        lost = np.linalg.norm(roots[1] @ (weight - product) @ roots[0]) ** 2
        assert lost == pytest.approx((tail**2).sum(), rel=1e-3)
        assert row["predicted_loss"] == pytest.approx(lost / 2, rel=1e-3)
        assert row["weighted_error"] == pytest.approx(
            np.sqrt(lost) / np.linalg.norm(roots[1] @ weight @ roots[0]), rel=1e-3
        )
        assert row["form"] == "pivoted"
        assert row["balance"] is None
        error = np.linalg.norm(weight - product) / np.linalg.norm(weight)
        assert row["relative_error"] == pytest.approx(error, rel=1e-3)
        total += row["predicted_loss"]
    assert report["totals"]["predicted_loss"] == pytest.approx(total)
    assert report["calibration"]["samples"] == 6
    assert report["calibration"]["metric"] == "fisher"


def parameters_kept(report: dict[str, Any]) -> tuple[int, int]:
    """Of the matrices that could have been factorised, after and before."""
    able = [row for row in report["layers"] if row["status"] == "factorised" or "budget" in (row["reason"] or "")]
    assert able
    bias = sum(row["parameters_before"] - int(np.prod(row["shape"])) for row in able)
    after, before = (sum(row[f"parameters_{when}"] for row in able) - bias for when in ("after", "before"))
    return after, before


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_a_budget_is_met_and_statistics_are_enough_for_another(
    place: Path, tmp_path: Path, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "call", None)  # no model runs
    out = tmp_path / "out"
    assert factorise(place / "gpt2", f"--budget {budget} --quiet", statistics=place / "statistics", output=out) == 0
    after, before = parameters_kept(report_of(out))
    step = max(sum(row["shape"]) for row in report_of(out)["layers"] if row["kind"] == "conv1d")
    assert budget * before - step < after <= budget * before
    lrsurgery.load_model(out)
    if budget == 0.6:
        assert tensors_of(out).keys() == tensors_of(place / "six").keys()
        assert all(torch.equal(tensor, tensors_of(place / "six")[key]) for key, tensor in tensors_of(out).items())


def test_a_plan_says_what_surgery_then_reports(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("factorise", place / "gpt2", "--budget", 0.6, "--statistics", place / "statistics", "--json")
    assert tiny.run(*command, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    done = report_of(place / "six")
    assert planned["totals"]["predicted_loss"] == pytest.approx(done["totals"]["predicted_loss"], rel=1e-3)
    for row, other in zip(planned["layers"], done["layers"], strict=True):
        assert (row["name"], row["rank"], row["status"]) == (other["name"], other["rank"], other["status"])


def test_in_memory_and_from_folder_to_folder_are_one(place: Path) -> None:
    model = lrsurgery.load_model(place / "gpt2")
    lrsurgery.factorise_(model, budget=0.6, statistics=Statistics.read(place / "statistics"), form="pivoted")
    written = tensors_of(place / "six")
    for name, layer in factorised_layers(model).items():
        torch.testing.assert_close(layer.u.weight.detach(), written[f"{name}.u.weight"])
        torch.testing.assert_close(layer.v.weight.detach(), written[f"{name}.v.weight"])


def test_without_calibration_a_budget_goes_by_relative_energy(place: Path, tmp_path: Path) -> None:
    """Compared with every pair of ranks, of at least 3/4 of the uniform ones, of the two layers that are left in."""
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 14))
    values = [torch.linalg.svdvals(layer.weight.detach()).double().square() for layer in model]
    tails = [[float(v[r:].sum() / v.sum()) for r in range(len(v) + 1)] for v in values]
    costs = [(60, 16), (84, 20)]
    options = [
        [(r * rank, tail[r]) for r in range(1, (dense - 1) // rank + 1)] + [(dense, 0.0)]
        for (dense, rank), tail in zip(costs, tails, strict=True)
    ]
    for share in (0.4, 0.6, 0.8, 0.95):
        near = [
            [option for option in each if option[0] >= int(0.75 * share * dense / rank) * rank]
            for each, (dense, rank) in zip(options, costs, strict=True)
        ]
        best = min(a[1] + b[1] for a in near[0] for b in near[1] if a[0] + b[0] <= share * 144)
        low = copy.deepcopy(model)
        lrsurgery.factorise_(low, budget=share)
        lost = kept = 0.0
        for i, layer in enumerate(low):
            rank = getattr(layer, "rank", None)
            lost += 0.0 if rank is None else tails[i][rank]
            kept += costs[i][0] if rank is None else rank * costs[i][1]
        assert kept <= share * 144
        assert lost == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_by_activations_no_layer_goes_below_its_uniform_rank(share: float) -> None:
    """However unlike their spectra: so the budget is never worse than the same share of every layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    for i, layer in enumerate(model):  # the first layer has nearly rank 1, the last one a flat spectrum
        u, _, v = torch.linalg.svd(layer.weight.detach())
        layer.weight.data = u * torch.exp(-torch.arange(32) * (1.0 - 0.3 * i)) @ v  # type: ignore[operator]
    statistics = lrsurgery.collect_statistics(model, [torch.randn(200, 32)], importance="activations")
    low, uniform = copy.deepcopy(model), copy.deepcopy(model)
    lrsurgery.factorise_(low, budget=share, statistics=statistics)
    lrsurgery.factorise_(uniform, rank=f"params:{share}", statistics=statistics)
    ranks = {name: layer.rank for name, layer in factorised_layers(low).items()}
    for name, layer in factorised_layers(uniform).items():
        assert ranks.get(name, 32) >= layer.rank
    assert sum(p.numel() for layer in low for p in layer.parameters() if p.ndim > 1) <= share * 4 * 32 * 32


@pytest.mark.process
@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_images_without_classes_calibrate_a_timm_model(place: Path, tmp_path: Path, conv: str) -> None:
    options = f"--budget flops:0.5 --samples 5 --conv {conv} --quiet"
    assert factorise(place / "resnet", options, calibration=place / "images", output=tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert report["totals"]["predicted_loss"] > 0
    assert report["totals"]["layers_factorised"] > 3
    assert any(row["kind"] == f"conv2d-{conv}" for row in report["layers"])
    model = lrsurgery.load_model(tmp_path / "out")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_a_budget_of_flops_is_what_torch_counts(conv: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, (3, 5), stride=2, padding=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=(2, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 40),
    )
    x = torch.randn(4, 3, 16, 16)
    statistics = lrsurgery.collect_statistics(model, [x], conv=conv)
    low = copy.deepcopy(model)
    lrsurgery.factorise_(low, budget="flops:0.5", statistics=statistics, conv=conv)
    counts = []
    for net in (model, low):
        with FlopCounterMode(display=False) as counter:
            net(x)
        counts.append(counter.get_total_flops())
    assert factorised_layers(low)
    assert 0.48 < counts[1] / counts[0] <= 0.5


def test_ranks_of_a_budget_are_the_multiples_that_were_asked_for(place: Path, tmp_path: Path) -> None:
    options = "--budget 0.6 --multiple-of 4 --quiet"
    assert factorise(place / "gpt2", options, statistics=place / "statistics", output=tmp_path / "out") == 0
    ranks = [row["rank"] for row in report_of(tmp_path / "out")["layers"] if row["status"] == "factorised"]
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)
    after, before = parameters_kept(report_of(tmp_path / "out"))
    assert after <= 0.6 * before


def test_spectra_that_are_kept_are_those_of_their_metric(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LRSURGERY_CACHE", str(tmp_path / "cache"))

    def ranks(*more: Any) -> list[int]:
        assert tiny.run("factorise", place / "gpt2", "--rank", "energy:0.9", "--dry-run", "--json", *more) == 0
        return [row["rank"] for row in json.loads(capsys.readouterr().out)["layers"]]

    plain = ranks()
    weighted = ranks("--statistics", place / "statistics")
    assert weighted == ranks("--statistics", place / "statistics", "--no-cache") != plain
    assert ranks() == plain


@pytest.mark.process
def test_a_model_that_is_sure_of_all_it_sees_is_told_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "resnet", tmp_path / "sure")
    weights = tensors_of(tmp_path / "sure")
    weights["fc.bias"][0] += 30.0
    save_file(weights, tmp_path / "sure" / "model.safetensors")
    for model, told in (("sure", True), ("resnet", False)):
        folder, options = tmp_path if told else place, "--budget 0.5 --samples 5 --overwrite"
        assert factorise(folder / model, options, calibration=place / "images", output=tmp_path / "out") == 0
        assert ("the model is certain of its predictions on this data" in capsys.readouterr().err) == told
    assert report_of(tmp_path / "out")["totals"]["predicted_loss"] > 0


@pytest.mark.process
def test_the_split_that_was_named_is_what_the_model_sees(place: Path, tmp_path: Path) -> None:
    import datasets

    lines = (place / "train.txt").read_text().splitlines()
    held = lines[len(lines) // 2 :]
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": lines}), held=datasets.Dataset.from_dict({"text": held})
    ).save_to_disk(tmp_path / "both")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in held))
    seen = []
    for data, more in (("both", ["--split", "held"]), ("held.jsonl", []), ("both", [])):
        kept = tmp_path / f"statistics-{len(seen)}"
        command = ("factorise", place / "gpt2", "--rank", 0.5, "--calibration", tmp_path / data, "--samples", 4, *more)
        assert tiny.run(*command, "--save-statistics", kept, "-o", tmp_path / "out", "--overwrite", "--quiet") == 0
        seen.append(Statistics.read(kept).moments("transformer.h.0.attn.c_attn").inputs)
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], rtol=0.01)


def test_bytes_are_those_of_the_written_file(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = "--budget bytes:110KB --quiet"
    assert factorise(place / "gpt2", options, statistics=place / "statistics", output=out) == 0
    written = sum(tensor.numel() * 4 for tensor in tensors_of(out).values())
    assert 108_000 < written <= 110_000


def test_sentences_are_padded_and_a_split_head_is_no_matter(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = "--rank params:0.6 --metric activations --json"
    assert factorise(place / "bert", options, calibration=place / "sentences.jsonl", output=out) == 0
    report = report_of(out)
    assert report["totals"]["predicted_loss"] is None  # there are no gradients to tell it by
    assert all(row["weighted_error"] > 0 for row in report["layers"] if row["status"] == "factorised")


@pytest.mark.process
def test_blocks_run_twice_where_their_graph_is_large(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which holds less, is said, and changes nothing."""
    options = "--rank params:0.5 --samples 4 --block-size 24 --no-cache --no-loss-check"
    data = place / "train.txt"
    assert factorise(place / "llama", options, calibration=data, output=tmp_path / "once") == 0
    assert "blocks run twice" not in capsys.readouterr().err
    runs: list[int] = []
    original = calibrate._recompute_blocks_

    def watched(model: Any, graph: int) -> bool:
        found = original(model, graph)
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
        return found

    monkeypatch.setattr(calibrate, "LEAST_GRAPH", 0)
    monkeypatch.setattr(calibrate, "_recompute_blocks_", watched)
    assert factorise(place / "llama", options, calibration=data, output=tmp_path / "twice") == 0
    assert "blocks run twice, to hold less" in capsys.readouterr().err
    assert len(runs) == 2  # one batch, forwards and on the way back
    wanted, found = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, atol=1e-6), key


@pytest.mark.process
def test_blocks_on_disk_give_the_same_factors(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that come and go with their blocks, run again by the backward pass, against the model in memory."""
    options = "--rank params:0.5 --samples 4 --block-size 24 --no-cache --quiet"
    data = place / "train.txt"
    assert factorise(place / "llama", options, calibration=data, output=tmp_path / "whole") == 0
    original, runs = opening.load_offloaded, []

    def counted(*args: Any) -> nn.Module:
        model: Any = original(*args)
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(opening, "load_offloaded", counted)
    monkeypatch.setattr(calibrate, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(calibration, "split", lambda rows, limit: [list(rows)])  # another pass would draw anew
    assert factorise(place / "llama", options, calibration=data, output=tmp_path / "disk") == 0
    assert len(runs) == 2  # one batch, whose blocks are run again on the way back: their weights are not kept
    wanted, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "disk")
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor)


def test_a_checkpoint_without_its_head_calibrates_under_one(place: Path, tmp_path: Path) -> None:
    """GPT-2's head is its embedding, so that nothing is missing: the factors are those of the whole model's."""
    model: Any = lrsurgery.load_model(place / "gpt2")
    model.transformer.save_pretrained(tmp_path / "body")
    tiny.tokenizer().save_pretrained(tmp_path / "body")
    options = f"{SIX} --task causal-lm --quiet"
    assert factorise(tmp_path / "body", options, calibration=place / "train.txt", output=tmp_path / "out") == 0
    wanted = tensors_of(place / "six")
    found = {f"transformer.{key}": tensor for key, tensor in tensors_of(tmp_path / "out").items()}
    assert found.keys() == wanted.keys() - {"lm_head.weight"}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key])


def test_sequential_is_the_old_name_of_refinement_in_closed_form(place: Path, tmp_path: Path) -> None:
    options = "--budget 0.6 --samples 4 --block-size 24 --quiet"
    for name, more in {"old": "--sequential", "new": "--refine --refine-steps 0"}.items():
        where = {"calibration": place / "train.txt", "output": tmp_path / name}
        assert factorise(place / "llama", f"{options} {more}", **where) == 0
    old, new = tensors_of(tmp_path / "old"), tensors_of(tmp_path / "new")
    assert all(torch.equal(tensor, new[key]) for key, tensor in old.items())
    assert report_of(tmp_path / "old")["refinement"] == report_of(tmp_path / "new")["refinement"] is not None


@pytest.mark.parametrize("layers", [0, 2], ids=["before any layer", "after two"])
def test_an_interrupted_job_goes_on_from_its_statistics(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layers: int
) -> None:
    from lrsurgery.factorise.work import jobs

    places = {"calibration": place / "train.txt", "output": tmp_path / "out"}
    done: list[str] = []
    real = jobs.decompose

    def stop(row: Any, *args: Any, **options: Any) -> Any:
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(row.name)
        return real(row, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "decompose", stop)
        assert factorise(place / "gpt2", f"{SIX} --jobs 1", **places) == 130
    kept = "the statistics and 2 of 8 layers are kept" if layers else "the statistics are kept"
    assert f"interrupted; {kept}; run the same command with --resume to continue" in capsys.readouterr().err
    monkeypatch.setattr(calibration, "call", None)  # no model runs
    assert factorise(place / "gpt2", f"{SIX} --jobs 1 --resume", **places) == 0
    wanted = tensors_of(place / "six")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in tensors_of(tmp_path / "out").items())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.process
def test_two_processes_write_what_one_does(place: Path, tmp_path: Path) -> None:
    command = ("factorise", place / "gpt2", *SIX.split(), "--calibration", place / "train.txt", "-o", tmp_path / "out")
    words = [str(word) for word in (*tiny.TORCHRUN, "-m", "lrsurgery", *command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted, found = tensors_of(place / "six"), tensors_of(tmp_path / "out")
    assert wanted.keys() == found.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key])


TEXT = ["--rank", "0.5", "--calibration", "{}/train.txt"]
BAD: dict[str, tuple[list[str], str]] = {
    "rank and budget": (["--rank", "0.5", "--budget", "0.5"], "rank and budget are both given"),
    "neither": ([], "no rank and no budget is given"),
    "budget unreadable": (["--budget", "half"], "budget 'half' is not readable; write a share"),
    "budget out of reach": (
        ["--budget", "0.001", "--statistics", "{}/statistics"],
        "the smallest that can be met is 0.",
    ),
    "budget of what": (["--budget", "0.5", "--budget-of", "world"], "'world' is not one of 'layers', 'model'"),
    "importance unknown": ([*TEXT, "--importance", "cosine"], "'cosine' is not one of 'fisher', 'activations', 'none'"),
    "temperature": ([*TEXT, "--fisher-temperature", "0"], "Fisher temperature 0.0: write a number above 0"),
    "another temperature": (
        ["--rank", "0.5", "--statistics", "{}/statistics", "--fisher-temperature", "1"],
        "collected at Fisher temperature 2, and 1 is asked for; collect again, or remove --fisher-temperature",
    ),
    "a text for images": (
        ["--rank", "0.5", "--calibration", "builtin", "--model", "resnet"],
        "--calibration builtin: is for language models, and image-classification needs data of its own",
    ),
    "no samples": ([*TEXT, "--samples", "0"], "samples 0: write 1 to "),
    "no data": (["--rank", "0.5", "--calibration", "{}/nothing.txt"], "nothing.txt: no such file or folder"),
    "images for text": (["--rank", "0.5", "--calibration", "{}/images"], "which column holds the text?"),
    "no statistics": (["--rank", "0.5", "--statistics", "{}/gpt2"], "gpt2: no statistics.json in it"),
    "both": (["--rank", "0.5", "--statistics", "{}/s", "--calibration", "x.txt"], "are both given; leave one out"),
    "another model": (
        ["--rank", "0.5", "--statistics", "{}/statistics", "--model", "llama"],
        "is missing; collect them again, or add --exclude '",
    ),
    "he": ([*TEXT, "--init", "he"], "--calibration would change nothing"),
    "block too long": ([*TEXT, "--block-size", "99"], "longer than the 32 positions"),
    "save over": ([*TEXT, "--save-statistics", "{}/statistics"], "already exists; reuse it"),
    "save into a file": ([*TEXT, "--save-statistics", "{}/train.txt/x"], "since a parent is a file"),
    "speedup": (["--budget", "0.5", "--min-speedup", "1.0"], "--min-speedup and --budget are both given"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(
    place: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{}", str(place)) for word in options]
    model = "gpt2"
    if "--model" in words:
        at = words.index("--model")
        model = words[at + 1]
        del words[at : at + 2]
    assert tiny.run("factorise", place / model, *words, "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_damaged_statistics_name_the_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "statistics", tmp_path / "statistics")
    file = sorted((tmp_path / "statistics").glob("*.safetensors"))[0]
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    places = {"statistics": tmp_path / "statistics", "output": tmp_path / "o"}
    assert factorise(place / "gpt2", "--rank 0.5", **places) == 2
    assert f"{file}: damaged" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_unused_experts_take_the_share_of_the_whole() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.used(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Routed()
    statistics = lrsurgery.collect_statistics(model, [torch.randn(50, 16)])
    lrsurgery.factorise_(model, budget=0.5, statistics=statistics)
    assert model.unused.rank == 4  # 0.5 * 256 / 32
    assert model.used.rank == 4


def test_what_was_asked_for_is_recorded() -> None:
    assert parse_options(budget="flops:0.5").recorded()["budget"] == "flops:0.5"
    assert parse_options(budget=0.5).recorded()["rank"] is None
    assert parse_options(rank="params:0.5").recorded()["rank"] == "params:0.5"


def test_what_is_seen_is_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by the tokenizer: the text has so many whole sequences."""
    tokens = tiny.tokenizer()((place / "train.txt").read_text(), add_special_tokens=False)["input_ids"]
    whole = len(tokens) // tiny.BLOCK
    data = place / "train.txt"
    for asked in (5, 100_000):
        options = f"--rank params:0.5 --samples {asked} --no-loss-check --overwrite"
        assert factorise(place / "gpt2", options, calibration=data, output=tmp_path / "out") == 0
        told = capsys.readouterr().err
        count = min(asked, whole)
        assert f"calibration: {count:,} sequences of 32 tokens ({count * 32:,} tokens) of {data}; " in told
        assert ("; all that it has, 100,000 were asked for; " in told) == (asked > whole)
        assert re.search(r"; about [\w. ]+\n", told)  # as long as the machine takes
    # of a model that is not in memory the first block tells the time
    options = "--rank params:0.5 --samples 5 --importance activations --no-loss-check --overwrite"
    assert factorise(place / "gpt2", options, calibration=data, output=tmp_path / "out") == 0
    assert re.search(r"block by block from disk, about [\w. ]+ by the first one\n", capsys.readouterr().err)


def test_the_temperature_decides_and_is_recorded(place: Path, tmp_path: Path) -> None:
    found = {}
    for name, option in {"plain": "", "2": "--fisher-temperature 2", "1": "--fisher-temperature 1"}.items():
        options = f"{SIX} {option} --no-loss-check --quiet"
        assert factorise(place / "gpt2", options, calibration=place / "train.txt", output=tmp_path / name) == 0
        report = report_of(tmp_path / name)
        assert report["calibration"]["temperature"] == report["options"]["calibration"]["temperature"]
        found[name] = (report["calibration"]["temperature"], report["totals"]["predicted_loss"])
    assert found["plain"] == found["2"] != found["1"]
    assert [found[name][0] for name in ("2", "1")] == [2.0, 1.0]


def test_statistics_from_before_temperatures_are_of_temperature_1(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "statistics", tmp_path / "statistics")
    file = tmp_path / "statistics" / "statistics.json"
    body = json.loads(file.read_text())
    del body["facts"]["temperature"]
    file.write_text(json.dumps(body))
    assert Statistics.read(tmp_path / "statistics").temperature == 1.0
    options = "--rank 0.5 --no-loss-check --quiet --overwrite"
    places = {"statistics": tmp_path / "statistics", "output": tmp_path / "out"}
    assert factorise(place / "gpt2", f"{options} --fisher-temperature 1", **places) == 0
    assert factorise(place / "gpt2", f"{options} --fisher-temperature 2", **places) == 2
    assert factorise(place / "gpt2", f"{options} --fisher-temperature 2 --importance activations", **places) == 0


def test_a_budget_over_a_language_model_takes_the_text_that_comes_with_the_package(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, option in {"asked": "--calibration builtin", "not asked": "", "declined": "--calibration none"}.items():
        assert factorise(place / "gpt2", f"--budget 0.6 --no-loss-check {option}", output=tmp_path / name) == 0
        told = capsys.readouterr().err
        assert ("calibrated on the built-in text" in told) == (name == "not asked")
        assert ("by the relative energy of their weights" in told) == (name == "declined")
        assert "a budget by activations" not in told
        assert ("tokens) of the built-in text; " in told) == (name != "declined")
    asked, other = tensors_of(tmp_path / "asked"), tensors_of(tmp_path / "not asked")
    assert asked.keys() == other.keys()
    assert all(torch.equal(asked[key], other[key]) for key in asked)
    assert report_of(tmp_path / "not asked")["calibration"]["data"] == "builtin"
    assert report_of(tmp_path / "declined")["calibration"] is None
    model = lrsurgery.load_model(place / "gpt2")
    lrsurgery.factorise_(model, budget=0.6, form="pivoted")  # of a model in memory there is no tokenizer
    written = {name: layer.rank for name, layer in factorised_layers(model).items()}
    declined = [row for row in report_of(tmp_path / "declined")["layers"] if row["status"] == "factorised"]
    assert {row["name"]: row["rank"] for row in declined} == written


def test_the_built_in_text_has_several_kinds_and_says_where_it_is_from() -> None:
    from lrsurgery.calibration import texts

    found = texts.read_texts()
    assert 150_000 < sum(map(len, found.values())) < 300_000
    readme = (Path(texts.__file__).parent / "README.md").read_text()
    assert all(f"`{'python_*' if name.startswith('python_') else name}.txt`" in readme for name in found)
    assert {"public domain", "PSF"} <= {term for term in ("public domain", "PSF") if term in readme}
    assert all(0.9 * 4000 < len(text) <= 4000 for text in texts.excerpts(4000).values())


@pytest.mark.parametrize("importance", ["fisher", "activations"])
def test_an_encoder_without_a_head_is_calibrated_on_its_pooled_output(
    place: Path, tmp_path: Path, importance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_bert(tmp_path / "encoder", "BertModel")
    options = f"--rank params:0.5 --importance {importance}"
    assert factorise(tmp_path / "encoder", options, calibration=place / "sentences.jsonl", output=tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "calibration: 16 sentences of " in told
    head = "random projections of the pooled output stand in for it" if importance == "fisher" else "none is needed"
    assert f"the model has no head, {head}" in told
    report = report_of(tmp_path / "out")
    assert report["calibration"]["head"] == "random projections of the pooled output"
    assert (report["totals"]["predicted_loss"] is None) == (importance == "activations")
    used = [row for row in report["layers"] if row["status"] == "factorised" and "pooler" not in row["name"]]
    assert len(used) == 12
    assert all(row["weighted_error"] > 0 for row in used)
    assert report["loss_check"] == {
        "measured": False,
        "text": "not measured (the model has no head; lrsurgery evaluate takes --task)",
    }


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_fisher_information_is_that_of_the_heads_problem(problem: str, tmp_path: Path) -> None:
    """Of one output, by hand: the pooler's gradients are the head's weights times its tanh's and the loss's slopes."""
    options = {"num_labels": 1, "problem_type": problem, "initializer_range": 0.2}
    folder = tiny.save_bert(tmp_path / "bert", "BertForSequenceClassification", **options)
    data = tiny.write_sentences(tmp_path / "sentences.jsonl")
    places = {"calibration": data, "save_statistics": tmp_path / "statistics", "output": tmp_path / "out"}
    assert factorise(folder, "--rank 0.4 --samples 16 --fisher-temperature 1 --quiet", **places) == 0
    model, tokenizer = tf.BertForSequenceClassification.from_pretrained(folder).eval(), tiny.tokenizer(around=True)
    wanted = torch.zeros(32, 32)
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    for text in texts:
        with torch.no_grad():
            pooled = model.bert(**tokenizer(text, return_tensors="pt")).pooler_output
            p = model.classifier(pooled).sigmoid()
        curvature = p * (1 - p) if problem.startswith("multi") else 2
        slope = model.classifier.weight.detach() * (1 - pooled.square())
        wanted += slope.T @ slope * curvature / len(texts)
    found = Statistics.read(tmp_path / "statistics").moments("bert.pooler.dense").gradients
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_statistics_of_another_job_are_collected_again(place: Path, tmp_path: Path) -> None:
    """A resumed job takes statistics that are its own, and neither another job's nor damaged ones."""
    dense = tf.GPT2LMHeadModel.from_pretrained(place / "gpt2")
    rows = make_plan(dense, SurgeryOptions(target=parse_rank("0.5"))).replacements
    folder = tmp_path / "statistics"
    how = calibrate.Calibration(data=str(place / "train.txt"), samples=4, importance="activations")

    def collected(owner: str) -> int:
        source = resolve(str(place / "gpt2"))
        calibrate.calibrate(source, how, rows, folder, owner=owner, seed=0, device=torch.device("cpu"))
        return (folder / "statistics.json").stat().st_mtime_ns

    first = collected("mine")
    assert collected("mine") == first
    second = collected("another")
    assert second != first
    file = sorted(folder.glob("*.safetensors"))[0]
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    assert collected("another") != second
