"""What `report` reads off a dense model, a healed one and runs: every number against numpy on the weights."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import tiny
from support.checks import multiplied_out
from support.warm import program
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lrsurgery
from lrsurgery.errors import PlanError, RecipeError, SourceError, SurgeryError
from lrsurgery.linalg.spectrum import Points, sample
from lrsurgery.report.dense.profile import LADDER, ProfileOptions
from lrsurgery.report.read import read_report
from lrsurgery.report.runs import read_run
from lrsurgery.report.schema import Report, Row
from lrsurgery.runtime import Compute
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.ranks import RankSpec, parse_policy, parse_rank
from lrsurgery.training.finetune import finetune

DENSE = Path(__file__).parents[2] / "examples" / "pydocs-gpt2"


def report(
    *references: Path,
    rank: str | list[str] | None = None,
    against: Path | None = None,
    cache: bool = True,
    form: str = "pivoted",
) -> Report:
    return read_report(
        [str(reference) for reference in references],
        Compute(device=torch.device("cpu"), cache=cache),
        profile_options=ProfileOptions(target=None if rank is None else parse_rank(rank), form=form),
        against=None if against is None else str(against),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reading")
    tiny.write_text(root)
    lrsurgery.factorise_checkpoint(DENSE, root / "half", rank="params:0.5")
    settings = {"model": str(root / "half"), "data": str(root / "train.txt"), "eval_data": str(root / "valid.txt")}
    settings |= {
        "against": str(DENSE),
        "block_size": 32,
        "batch_size": 2,
        "steps": 6,
        "eval_steps": 3,
        "log_steps": 2,
        "lr": 1e-2,
    }
    for decay in ("none", "frobenius"):
        finetune({**settings, "decay": decay, "decay_strength": 0.1}, root / decay)
    return root


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Layer -> its weight (in, out) in fp64, as GPT-2 keeps it."""
    tensors = load_file(DENSE / "model.safetensors")
    return {key.removesuffix(".weight"): tensor.double().numpy() for key, tensor in tensors.items() if tensor.ndim == 2}


def row_of(found: Report, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


# dense models


@pytest.mark.parametrize(("cache", "form"), [(False, "balanced"), (True, "pivoted")])
def test_a_dense_model_is_what_numpy_says(weights: dict[str, Any], cache: bool, form: str) -> None:
    found = report(DENSE, cache=cache, form=form)
    assert found.about == "dense"
    rows = [row for row in found.rows if row.full_rank is not None]
    assert len(rows) == 16
    lost = dict.fromkeys(LADDER, 0.0)
    total, whole, removed = 0.0, 0, dict.fromkeys(LADDER, 0)
    for row in rows:
        weight = weights[row.name]
        values = np.linalg.svd(weight, compute_uv=False)
        squares = values**2
        shares = values / values.sum()
        assert row.before is not None
        assert row.before.nuclear == pytest.approx(values.sum() / values[0], rel=1e-4)
        assert row.before.entropy == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert row.before.stable == pytest.approx(squares.sum() / squares[0], rel=1e-4)
        assert row.before.condition == pytest.approx(values[0] / values[-1], rel=1e-2)
        points = row.spectrum_before
        assert points is not None
        assert points.value == pytest.approx([values[i - 1] for i in points.index], rel=1e-2)
        out, columns = weight.shape[1], weight.shape[0]
        assert row.break_even is not None
        assert row.break_even * (out + columns) < out * columns <= (row.break_even + 1) * (out + columns)
        total += squares.sum()
        whole += row.parameters_before
        assert row.ladder is not None
        for text, rung in zip(LADDER, row.ladder, strict=True):
            pivoted = form == "pivoted"
            rank = RankSpec(parse_policy(text)).rank_of(row.name, out, columns, torch.tensor(values), pivoted=pivoted)
            smaller = rank * (out + columns - (rank if pivoted else 0)) + out  # and the bias
            if rank > (min(out, columns) - 1 if pivoted else row.break_even):
                assert (rung.to, rung.parameters, rung.energy_kept) == (None, row.parameters_before, 1.0)
                continue
            assert (rung.rank, rung.to, rung.parameters) == (text, rank, smaller)
            assert rung.energy_kept == pytest.approx(squares[:rank].sum() / squares.sum(), rel=1e-4)
            assert rung.relative_error == pytest.approx(math.sqrt(squares[rank:].sum() / squares.sum()), rel=1e-3)
            removed[text] += row.parameters_before - smaller
            lost[text] += squares[rank:].sum()
            ratio = 1 - smaller / row.parameters_before
            assert rung.damage == pytest.approx(ratio * squares.sum() / squares[0], rel=1e-4)
    stable = sum(row.before.stable for row in rows if row.before) / len(rows)
    for rung in found.ladder or ():
        assert rung.parameters == found.parameters_before - removed[rung.rank]
        assert rung.relative_error == pytest.approx(math.sqrt(lost[rung.rank] / total), rel=1e-3)
        assert rung.energy_kept == pytest.approx(1 - lost[rung.rank] / total, rel=1e-4)
        assert rung.damage == pytest.approx(removed[rung.rank] / whole * stable, rel=1e-4)


def test_a_second_look_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = report(DENSE)
    monkeypatch.delattr("torch.linalg.eigvalsh")
    assert report(DENSE).to_json() == first.to_json()


@pytest.mark.process
def test_a_plan_predicts_what_surgery_then_measures(folders: Path) -> None:
    planned = report(DENSE, rank="params:0.5")
    done = report(folders / "half")
    assert (planned.about, done.about) == ("plan", "factorised")
    assert planned.parameters_after == done.parameters_after
    for row in done.factorised:
        wanted = row_of(planned, row.name)
        assert (wanted.rank, wanted.parameters_after, wanted.flops_after) == (
            row.rank,
            row.parameters_after,
            row.flops_after,
        )
        assert wanted.energy_kept == pytest.approx(row.energy_kept, rel=1e-4)
        assert wanted.relative_error == pytest.approx(row.relative_error, rel=1e-3)
        assert wanted.spectral_error == pytest.approx(row.spectral_error, rel=1e-3)
        assert wanted.damage == pytest.approx(row.damage, rel=1e-3)
    assert {row.reason for row in planned.dense} == {row.reason for row in done.dense}


def test_layers_that_stay_out_of_a_plan_are_looked_at_all_the_same() -> None:
    found = report(DENSE, rank=["*.c_fc=energy:0.5"])
    assert {row.name.rpartition(".")[2] for row in found.factorised} == {"c_fc"}
    left = row_of(found, "transformer.h.0.attn.c_attn")
    assert (left.status, left.reason) == ("dense", "no rank given for it")
    assert left.before is not None


def test_a_head_that_the_rank_spells_out_is_looked_at(tmp_path: Path) -> None:
    tiny.save_timm(tmp_path / "timm")
    kept = row_of(report(tmp_path / "timm", rank="0.25"), "fc")
    assert (kept.status, kept.reason, kept.before) == ("dense", "output head", None)
    row = row_of(report(tmp_path / "timm", rank=["0.25", "fc=energy:0.6"]), "fc")
    values = np.linalg.svd(load_file(tmp_path / "timm" / "model.safetensors")["fc.weight"].numpy(), compute_uv=False)
    squares = np.cumsum(values**2) / (values**2).sum()
    assert row.rank == int((squares < 0.6).sum()) + 1
    assert row.energy_kept == pytest.approx(squares[row.rank - 1], rel=1e-4)


# healed models


@pytest.mark.process
def test_another_dense_model_than_the_one_it_came_from_is_named(folders: Path, tmp_path: Path) -> None:
    """Of a model that was only factorised, of one healed from it, and of one that was factorised while it trained."""
    switched = {"model": str(DENSE), "rank": 0.5, "data": str(DENSE / "valid.txt"), "steps": 1, "block_size": 16}
    finetune({**switched, "batch_size": 1}, tmp_path / "switched")
    shutil.copytree(DENSE, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for model in (folders / "half", folders / "frobenius", tmp_path / "switched"):
        for against, is_another in ((DENSE, False), (tmp_path / "other", True)):
            note = report(model, against=against).notes[-1]
            assert f"errors, energy and directions are against {against}" in note
            assert (f"is not the model that this one came from ({DENSE})" in note) == is_another, (model, note)


@pytest.mark.process
def test_a_healed_model_against_its_dense_one_is_what_numpy_says(folders: Path, weights: dict[str, Any]) -> None:
    found = report(folders / "frobenius", against=DENSE)
    tensors = load_file(folders / "frobenius" / "model.safetensors")
    for row in found.factorised:
        dense = weights[row.name].T
        product = multiplied_out(tensors, row.name, *dense.shape)
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        ours_left, ours, ours_right = np.linalg.svd(product, full_matrices=False)
        rank = row.rank
        assert rank is not None
        q_u, q_v = ours_left[:, :rank], ours_right[:rank].T
        norm = np.linalg.norm(dense)
        assert row.relative_error == pytest.approx(np.linalg.norm(dense - product) / norm, rel=1e-4)
        assert row.spectral_error == pytest.approx(np.linalg.norm(dense - product, 2) / values[0], rel=1e-3)
        assert row.energy_kept == pytest.approx((np.linalg.norm(q_u.T @ dense @ q_v) / norm) ** 2, rel=1e-4)
        assert row.overlap is not None
        for side, a, b in (("output", left[:, :rank], q_u), ("input", right[:rank].T, q_v)):
            cosines = np.clip(np.linalg.svd(a.T @ b, compute_uv=False), 0, 1)
            assert getattr(row.overlap, side).largest == pytest.approx(math.degrees(math.acos(cosines[-1])), rel=1e-2)
            for share in row.overlap.leading:
                crossed = a[:, : share.k].T @ b[:, : share.k]
                assert getattr(share, side) == pytest.approx(np.linalg.norm(crossed) ** 2 / share.k, abs=2e-3)
        assert row.after is not None
        assert row.after.nuclear == pytest.approx(ours[:rank].sum() / ours[0], rel=1e-4)
        assert row.after.condition == pytest.approx(ours[0] / ours[rank - 1], rel=1e-3)
        assert row.spectrum_after is not None
        assert row.spectrum_after.value == pytest.approx([ours[i - 1] for i in row.spectrum_after.index], rel=1e-3)


@pytest.mark.process
def test_a_healed_model_remembers_the_dense_spectra_from_surgery(folders: Path) -> None:
    half, healed = report(folders / "half"), report(folders / "frobenius")
    assert len(healed.factorised) == 16
    for row in healed.factorised:
        former = row_of(half, row.name)
        assert (row.before, row.spectrum_before) == (former.before, former.spectrum_before)
        assert row.spectrum_after != former.spectrum_after
        assert row.energy_kept is None  # of what training made of the factors, nothing is known without the dense model


# runs


@pytest.mark.process
def test_runs_tell_their_course(folders: Path) -> None:
    found = report(folders / "none", folders / "frobenius")
    assert (found.about, [run["name"] for run in found.training]) == ("runs", ["none", "frobenius"])
    for run in found.training:
        records = [json.loads(line) for line in (folders / run["name"] / "metrics.jsonl").read_text().splitlines()]
        evaluated = [record for record in records if "eval" in record and record["stage"] != "dense"]
        assert set(run["stages"]) == {"dense", "factorised", "healed"}
        assert [e["step"] for e in run["evaluations"]] == [0, 3, 6] == [r["step"] for r in evaluated]
        assert [e["loss"] for e in run["evaluations"]] == [r["eval"]["loss"] for r in evaluated]
        assert [e["step"] for e in run["losses"]] == [2, 3, 4, 6]  # at each checkpoint too
        assert run["settings"]["decay"] == run["name"]
        last = {row.name: row for row in report(folders / run["name"]).factorised}
        for name, course in run["layers"].items():
            assert course["step"] == [0, 3, 6]
            after = last[name].after
            assert after is not None
            assert course["nuclear_rank"][-1] == pytest.approx(after.nuclear, rel=1e-3)
            assert course["entropy_rank"][0] == evaluated[0]["layers"][name]["entropy_rank"]
            spectrum = course["spectrum"]
            assert len(spectrum["values"]) == 3
            assert spectrum["values"][-1][0] == pytest.approx(course["spectral_norm"][-1], rel=1e-5)
    norms = [np.mean([course["frobenius_norm"][-1] for course in run["layers"].values()]) for run in found.training]
    assert norms[1] < norms[0]  # that is what the decay is for


@pytest.mark.process
def test_a_healed_folder_carries_its_run(folders: Path) -> None:
    assert report(folders / "none").training == (read_run(folders / "none"),)


@pytest.mark.process
def test_a_run_that_is_not_finished_is_read_too(folders: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "out.run"
    unfinished.mkdir()
    text = (folders / "none" / "metrics.jsonl").read_text()
    (unfinished / "metrics.jsonl").write_text(text[:-40])  # a kill cut the last line
    (unfinished / "recipe.yaml").write_bytes((folders / "none" / "recipe.yaml").read_bytes())
    found = report(unfinished)
    assert found.about == "runs"
    assert [e["step"] for e in found.training[0]["evaluations"]] in ([0, 3], [0, 3, 6])
    assert json.loads(found.to_json())["totals"] is None


@pytest.mark.process
def test_settings_are_those_that_the_recipe_names(folders: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((folders / "frobenius" / "recipe.yaml").read_text())
    found = dict(read_run(folders / "frobenius")["settings"])
    assert (found.pop("steps"), len(found)) == (6, 17)
    assert found == {name: recipe[name] for name in found}
    (tmp_path / "metrics.jsonl").write_bytes((folders / "frobenius" / "metrics.jsonl").read_bytes())
    bare = read_run(tmp_path)["settings"]
    assert (bare["lr"], bare["decay"], bare["rank"], bare["steps"]) == (None, None, [], 6)
    for ending in ("txt", "md"):
        assert tiny.run("report", tmp_path, "--output", tmp_path / f"shown.{ending}") == 0
    (tmp_path / "recipe.yaml").write_text("lr: 1e-2\nbatch-size: 4\nrank: 0.5\n")  # YAML takes 1e-2 for text
    partial = read_run(tmp_path)["settings"]
    assert (partial["lr"], partial["batch_size"], partial["rank"], partial["seed"]) == (0.01, 4, ["0.5"], None)


# bad input


@pytest.mark.process
@pytest.mark.parametrize(
    ("references", "options", "error", "words"),
    [
        (("half",), {"rank": "0.5"}, SurgeryError, "is factorised already; --rank plans surgery on a dense model"),
        ((DENSE,), {"against": DENSE}, SurgeryError, "is a dense model; --against compares a factorised one with it"),
        (("half",), {"against": "half"}, SurgeryError, "is factorised itself; --against takes the dense model"),
        (("half", "none"), {}, SourceError, "half: no metrics.jsonl in it"),
        (("none", "frobenius"), {"against": DENSE}, SurgeryError, "--against takes one model, not 2 runs"),
        (("half",), {"against": "other"}, PlanError, "transformer.h.0.attn.c_attn: .*other, the model to compare with"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folders: Path, references: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    if not (folders / "other").exists():
        tiny.save_gpt2(folders / "other")
    if "against" in options:
        options = {**options, "against": folders / options["against"]}
    with pytest.raises(error, match=words):
        report(*(folders / reference for reference in references), **options)


@pytest.mark.process
@pytest.mark.parametrize("text", ['{"step": 1}\n[3]\n"x"\n', '{"loss": 1.0}\n', '{"step": 0, "eval": {"loss": 1}}\n'])
def test_metrics_that_are_damaged_are_named(folders: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SourceError, match=r"metrics\.jsonl: line 1 is not a record of a run"):
        report(tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    ("recipe", "words"),
    [("lr: [", "not a recipe"), ("- 1", "one 'setting: value' a line"), ("lr: fast", "lr 'fast': write a number")],
    ids=["not yaml", "a list", "no number"],
)
def test_a_damaged_recipe_is_named(folders: Path, tmp_path: Path, recipe: str, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((folders / "none" / "metrics.jsonl").read_bytes())
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: .*{words}"):
        report(tmp_path)


def test_a_model_that_is_cut_short_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    file = tiny.save_gpt2(tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"model\.safetensors: not a whole safetensors file"):
        lrsurgery.load_model(tmp_path / "cut")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny.save_gpt2(tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match=r"transformer\.h\.1\.mlp\.c_fc: the weight holds NaN"):
        report(tmp_path / "nan")


# what rows count


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_flops_of_a_convolution_are_what_torch_counts(conv: str) -> None:
    module = nn.Sequential(nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=(1, 2), bias=False))
    x = torch.randn(1, 6, 12, 18)
    outputs = []
    with FlopCounterMode(display=False) as dense:
        outputs.append(module(x))
    lrsurgery.factorise_(module, rank=4, conv=conv)
    with FlopCounterMode(display=False) as small:
        outputs.append(module(x))
    row = lrsurgery.rank_report(module).factorised[0]
    positions = outputs[0].shape[2] * outputs[0].shape[3]
    assert row.flops_before is not None
    assert row.flops_after is not None
    assert row.flops_before * positions == dense.get_total_flops()
    assert row.flops_after * positions == small.get_total_flops()


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, 50_000])
def test_points_of_a_spectrum_hold_both_ends(count: int) -> None:
    index = sample(count)
    assert list(index) == sorted(set(index))
    assert (index[0], index[-1]) == (1, count)
    assert len(index) <= 64
    assert len(index) == count or len(index) > 40
    values = torch.linspace(5, 1, count)
    assert Points.of(values).value == pytest.approx([float(values[i - 1]) for i in index], rel=1e-5)


@pytest.mark.process
def test_a_report_of_the_first_format_is_read(folders: Path, tmp_path: Path) -> None:
    body = json.loads((folders / "half" / "rank_report.json").read_text())
    new = ("flops_before", "flops_after", "spectrum_before", "spectrum_after", "overlap", "ladder", "break_even")
    for row in body["layers"]:
        for key in (*new, "damage", "damage_high", "form"):
            del row[key]
        for when in ("before", "after"):
            if row[when]:
                del row[when]["condition"]
    for key in ("about", "name", "ladder", "training", "bench"):
        del body[key]
    body["format_version"] = 1
    (tmp_path / "rank_report.json").write_text(json.dumps(body))
    found = Report.read(tmp_path)
    assert [(row.name, row.rank) for row in found.factorised] == [
        (row.name, row.rank) for row in Report.read(folders / "half").factorised
    ]
    assert found.about == "factorised"


@pytest.mark.process
def test_every_kind_has_a_break_even(folders: Path) -> None:
    for row in report(folders / "half").factorised:
        rows, columns = KINDS[row.kind].matrix_shape(torch.Size(row.shape))
        assert row.form == "pivoted"
        assert row.break_even == min(rows, columns) - 1
        assert replace(row, form="balanced").break_even == (rows * columns - 1) // (rows + columns)


# the command line


def run(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return program(*tiny.PROGRAM, "report", *arguments, cwd=cwd)


@pytest.mark.process
def test_the_command_writes_every_format(folders: Path, tmp_path: Path) -> None:
    shown = run(folders / "half", "--json")
    body = json.loads(shown.stdout)
    written = json.loads((folders / "half" / "rank_report.json").read_text())
    assert body["layers"] == written["layers"]
    for name in ("a.json", "a.html"):
        done = run(folders / "half", "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", f"Written to {tmp_path / name}\n")
    again = json.loads((tmp_path / "a.json").read_text())
    assert {**again, "command": None} == {**body, "command": None}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.json"]
    refused = run(folders / "half", "--output", tmp_path / "a.json")
    assert refused.returncode == 2
    assert refused.stderr == f"lrsurgery: {tmp_path / 'a.json'}: exists already; replace it with --overwrite\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--format", "pdf"),
            "Invalid value for '--format' / '-f': 'pdf' is not one of 'csv', 'html', 'json'",
        ),
        (("--output", "a.doc"), "a.doc: say what to write with --format, or end the name in"),
        (("--sort", "size"), "Invalid value for '--sort': 'size' is not one of 'model', 'name', 'params', 'error'"),
        (("--json", "--format", "html"), "--json and --format html exclude each other"),
        (("--output", "no/such/a.md"), "no/such/a.md: cannot be written (No such file or directory)"),
    ],
)
def test_bad_options_are_one_line(folders: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(folders / "half", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lrsurgery: {words}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
