"""Layers that share one v, from checkpoint to checkpoint: written by the program, read by another process, undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import tiny
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.load import open_factorised
from lrsurgery.checkpoints.source import resolve
from lrsurgery.errors import Interrupted, SourceError, SurgeryError
from lrsurgery.export.forms import export_form
from lrsurgery.export.targets import export_dense
from lrsurgery.report.schema import Report
from lrsurgery.surgery.apply import factorised_layers, specs_of

READ = """
import sys, torch, lrsurgery.hf
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
torch.save(model.eval()(torch.arange(2, 34).reshape(2, 16)).logits, sys.argv[2])
"""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 34).reshape(2, 16)).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_alike(tmp_path_factory.mktemp(request.param) / "dense", request.param)


@pytest.fixture(scope="module")
def low(source: Path) -> Path:
    """What the program writes: pivoted of layers with a bias, balanced of others."""
    form = "pivoted" if source.parent.name.startswith("qwen2") else "balanced"
    output = source.parent / form
    options = ["--budget", 0.4, "--calibration", source / "train.txt", "--samples", 16, "--block-size", 32, "--check"]
    assert tiny.run("factorise", source, "--form", form, "--output", output, *options, "--quiet") == 0
    return output


def led(model: nn.Module) -> dict[str, str]:
    return {name: spec.v_of for name, spec in specs_of(model).items() if spec.v_of is not None}


def test_another_process_reads_what_the_program_writes(low: Path, tmp_path: Path) -> None:
    config = json.loads((low / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    shared = {name: entry for name, entry in config["layers"].items() if "v_of" in entry}
    assert shared
    tensors = load_file(low / "model.safetensors")
    for name, entry in shared.items():
        assert f"{entry['v_of']}.v.weight" in tensors
        assert f"{name}.v.weight" not in tensors
        assert ("pivots" in entry) == (entry["form"] == "pivoted")
    subprocess.run([sys.executable, "-c", READ, low, tmp_path / "logits.pt"], check=True)
    here = lrsurgery.load_model(low)
    assert led(here) == {name: entry["v_of"] for name, entry in shared.items()}
    wanted = logits(here)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=1e-5, atol=1e-5)
    export_dense(low, tmp_path / "dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not factorised_layers(dense)
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-3, atol=1e-3)


def test_the_report_counts_v_once(source: Path, low: Path) -> None:
    report, model = Report.read(low), lrsurgery.load_model(low)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    shared = led(model)
    rows = {row.name: row for row in report.factorised}
    dense = lrsurgery.load_model(source)
    for name, layer in factorised_layers(model).items():
        row = rows[name]
        assert row.v_of == (shared.get(name) or (name if name in shared.values() else None))
        held = sum(p.numel() for p in layer.parameters())
        if layer.side == "rows" and layer.bias is not None and row.v_of is not None:
            parts = [part.bias.numel() for part in (layer.u, layer._modules.get("v")) if part is not None]
            held += layer.matrix_shape[0] - sum(parts)  # biases count for their own layer
        assert row.parameters_after == held
        gap = dense.get_submodule(name).weight - layer.weight
        assert row.relative_error == pytest.approx(
            float(gap.norm() / dense.get_submodule(name).weight.norm()), rel=1e-2, abs=1e-5
        )
    again = lrsurgery.rank_report(model, dense)
    for row in again.factorised:
        written = rows[row.name]
        assert (row.v_of, row.rank, row.full_rank, row.parameters_after, row.flops_after, row.form) == (
            written.v_of,
            written.rank,
            written.full_rank,
            written.parameters_after,
            written.flops_after,
            written.form,
        )
        assert row.relative_error == pytest.approx(written.relative_error, rel=1e-2, abs=1e-5)
        assert row.energy_kept == pytest.approx(written.energy_kept, rel=1e-2)
    assert again.parameters_after == report.parameters_after
    assert tiny.run("report", low, "--against", source, "--quiet") == 0


def test_files_and_memory_agree(source: Path, low: Path) -> None:
    """The factors that one job writes for a group, and those of a model in memory with the statistics of the files."""
    folder = low.parent / f"{low.name} statistics"
    form, output = low.name, low.parent / f"{low.name} again"
    options: dict[str, Any] = {"budget": 0.4, "form": form, "loss_check": False, "cache": False}
    how = lrsurgery.Calibration(data=str(source / "train.txt"), samples=16, save=folder)
    lrsurgery.factorise_checkpoint(source, output, calibration=how, **options)
    from lrsurgery.calibration.statistics import Statistics

    statistics = Statistics.read(folder)
    assert len(statistics.groups()) == 4
    model = lrsurgery.load_model(source)
    lrsurgery.factorise_(model, budget=0.4, statistics=statistics, form=form)
    found = lrsurgery.load_model(output)
    assert specs_of(model) == specs_of(found)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-2, atol=1e-2)
    report = lrsurgery.factorise_checkpoint(
        source, low.parent / f"{low.name} apart", share="never", calibration=how_from(folder), **options
    )
    assert not led(lrsurgery.load_model(low.parent / f"{low.name} apart"))
    together = Report.read(output)
    assert together.predicted_loss is not None
    assert report.predicted_loss is not None
    assert together.predicted_loss < report.predicted_loss


def how_from(folder: Path) -> lrsurgery.Calibration:
    return lrsurgery.Calibration(statistics=folder)


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_forms_of_files(low: Path, tmp_path: Path, form: str) -> None:
    wanted = logits(lrsurgery.load_model(low))
    export_form(low, tmp_path / "other", form=form)
    other = lrsurgery.load_model(tmp_path / "other")
    assert led(other) == led(lrsurgery.load_model(low))
    assert {layer.form for layer in factorised_layers(other).values()} == {form}
    torch.testing.assert_close(logits(other), wanted, rtol=1e-3, atol=1e-3)
    report = Report.read(tmp_path / "other")
    assert report.parameters_after == sum(p.numel() for p in other.parameters())
    with pytest.raises(SurgeryError, match="format 1"):
        export_form(low, tmp_path / "old", form="balanced", format_version=1)
    assert not (tmp_path / "old").exists()


def test_transformers_and_save_model_write_them_again(low: Path, tmp_path: Path) -> None:
    model: Any = lrsurgery.load_model(low)
    wanted, before = logits(model), specs_of(model)
    model.save_pretrained(tmp_path / "transformers")
    lrsurgery.save_model(model, tmp_path / "ours")
    assert specs_of(model) == before
    for folder, form in ((tmp_path / "transformers", low.name), (tmp_path / "ours", "pivoted")):
        again = lrsurgery.load_model(folder)
        assert led(again) == led(model)
        assert {layer.form for layer in factorised_layers(again).values()} == {form}
        torch.testing.assert_close(logits(again), wanted, rtol=1e-3, atol=1e-3)
    base = tf.AutoModel.from_pretrained(low)  # other names than the config's
    assert set(led(base).values()) == {name.removeprefix("model.") for name in led(model).values()}
    opened = open_factorised(resolve(str(low)))
    for name, layer in factorised_layers(model).items():
        u, v = opened.factors[name](torch.device("cpu"))
        torch.testing.assert_close(u @ v, layer.weight + 0, rtol=1e-4, atol=1e-4)
    lrsurgery.densify_(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-3)


def test_configs_are_read_strictly(low: Path, tmp_path: Path) -> None:
    config = json.loads((low / "config.json").read_text())
    name, leader = next(iter(led(lrsurgery.load_model(low)).items()))

    def refuses(match: str, layer: str = name, **changed: Any) -> None:
        body = json.loads(json.dumps(config))
        entry = body["quantization_config"]["layers"][layer]
        body["quantization_config"]["layers"][layer] = {k: v for k, v in {**entry, **changed}.items() if v is not None}
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in low.iterdir():
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
        (folder / "rank_report.json").unlink()  # whose digests would tell first
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(body))
        with pytest.raises(SourceError, match=match) as raised:
            lrsurgery.load_model(folder)
        assert "\n" not in str(raised.value)

    refuses("no layer that stores one", v_of="model.nowhere")
    refuses("no layer that stores one", layer=leader, v_of=name)
    refuses("kind, rank or form", rank=1)
    refuses("v_of", v_of=7)
    if low.name == "pivoted":
        refuses("do not fill", pivots=[0, 1])
        refuses("do not fill", pivots=None)
        refuses("pivots", pivots=[0, -1])
        refuses("pivots", pivots=[0, 1, 2])
    else:
        refuses("balanced and has pivots", pivots=[0, 1])


def test_a_group_is_resumed_from_its_pieces(low: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrsurgery.factorise.work import jobs
    from lrsurgery.factorise.work.rewrite import Rewriter

    output = low.parent / f"{low.name} resumed"
    how = lrsurgery.Calibration(data=str(source / "train.txt"), samples=16)
    options: dict[str, Any] = {"budget": 0.4, "form": low.name, "calibration": how, "loss_check": False}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Rewriter, "check", stop)
        with pytest.raises(Interrupted):
            lrsurgery.factorise_checkpoint(source, output, **options)
    calls = []
    done = jobs.Decomposer.__call__

    def count(self: jobs.Decomposer, job: jobs.Job) -> Any:
        calls.append(job.row.name)
        return done(self, job)

    monkeypatch.setattr(jobs.Decomposer, "__call__", count)
    (piece,) = output.parent.glob(f".{output.name}*/00001.safetensors")
    piece.write_bytes(b"damaged")
    lrsurgery.factorise_checkpoint(source, output, resume=True, **options)
    assert len(calls) == 1
    fresh = low.parent / f"{low.name} fresh"
    lrsurgery.factorise_checkpoint(source, fresh, **options)
    assert (fresh / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.process
def test_several_processes_write_the_same_bytes(low: Path, source: Path) -> None:
    one, two = low.parent / f"{low.name} one", low.parent / f"{low.name} two"
    options = ["--budget", "0.4", "--calibration", source / "train.txt", "--samples", "16", "--form", low.name]
    options += ["--no-loss-check", "--quiet"]
    assert tiny.run("factorise", source, *options, "--output", one) == 0
    command = [*tiny.TORCHRUN, "-m", "lrsurgery", "factorise", source, *options, "--output", two]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert led(lrsurgery.load_model(two))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_dry_runs_tell_of_groups(low: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budget", 0.4, "--calibration", source / "train.txt", "--samples", 8, "--form", low.name]
    capsys.readouterr()
    assert tiny.run("factorise", source, *options, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    shared = [row for row in plan["layers"] if row.get("v_of")]
    assert shared
    assert all(row["parameters_after"] for row in shared)
    assert tiny.run("factorise", source, *options, "--dry-run", "--share", "sometimes") == 2
