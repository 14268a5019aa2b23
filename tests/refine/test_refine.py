"""Refinement of whole models: what the blocks are fitted to, that nothing gets worse, and the folders it writes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import tiny
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.source import resolve
from lrsurgery.errors import CalibrationError
from lrsurgery.factorise.work import blocks, opened
from lrsurgery.progress import Listener
from lrsurgery.refine.options import Refinement
from lrsurgery.refine.walk import Walk, refine_blocks_
from lrsurgery.report.schema import Report
from lrsurgery.surgery.apply import factorised_layers

IDS = torch.arange(12 * 16).reshape(12, 16) * 7 % 300
BATCHES = [{"input_ids": part} for part in IDS.split(2)]
FEW = Refinement(steps=30, batch=4, anchored=True)


def pair(rank: float = 0.3, form: str = "pivoted", **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=300, n_embd=24, n_layer=3, n_head=2, n_positions=16, **options)
    dense = tf.GPT2LMHeadModel(config).eval()
    for parameter in dense.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # weights that matter more than the residual stream
    compressed = tf.GPT2LMHeadModel(config).eval()
    compressed.load_state_dict(dense.state_dict())
    lrsurgery.factorise_(compressed, rank=rank, form=form, allow_larger=True)
    return dense, compressed


def walk(dense: nn.Module, compressed: nn.Module, options: Refinement = FEW, **more: Any) -> Walk:
    return Walk(dense=dense, compressed=compressed, batches=BATCHES, options=options, per_call=2, **more)


def hidden(model: Any, block: int, ids: Tensor) -> Tensor:
    """What a block returns in the model's own forward."""
    found: list[Tensor] = []
    handle = model.transformer.h[block].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("anchored", [True, False])
def test_blocks_come_nearer_to_the_dense_ones_as_the_model_itself_computes_them(form: str, anchored: bool) -> None:
    dense, compressed = pair(form=form)
    held = IDS[10:]  # the last call
    before = [float((hidden(compressed, n, held) - hidden(dense, n, held)).square().mean()) for n in range(3)]
    fits = refine_blocks_(walk(dense, compressed, replace(FEW, anchored=anchored)))
    assert [fit.name for fit in fits] == [f"transformer.h.{n}" for n in range(3)]
    for n, fit in enumerate(fits):
        scale = sum(float(hidden(dense, n, ids).square().mean()) for ids in IDS.split(2)) / 6
        after = float((hidden(compressed, n, held) - hidden(dense, n, held)).square().mean())
        assert after < 0.9 * before[n]
        assert fit.after == pytest.approx(after / scale, rel=1e-3)
    assert all(layer.form == form for layer in factorised_layers(compressed).values())


def test_a_model_in_memory_is_refined_by_one_call() -> None:
    dense, compressed = pair()
    other = pair()[1].train()
    refine_blocks_(walk(dense, compressed))
    fits = lrsurgery.refine_(other, dense, BATCHES, refinement=FEW)
    assert other.training
    assert all(fit.after < fit.before for fit in fits)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in compressed.state_dict().items())


def test_few_batches_are_told_and_one_is_refused() -> None:
    """A single one would be fitted to nothing, in silence, since it is what is held out."""
    dense, compressed = pair()
    before = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    notes: list[str] = []

    class Notes(Listener):
        def note(self, text: str) -> None:
            notes.append(text)

    with pytest.raises(CalibrationError, match="too few batches to refine on: 1 in a process"):
        lrsurgery.refine_(compressed, dense, BATCHES[:1], refinement=FEW, listener=Notes())
    assert all(torch.equal(before[name], tensor) for name, tensor in compressed.state_dict().items())
    lrsurgery.refine_(compressed, dense, BATCHES[:2], refinement=FEW, listener=Notes())
    assert notes[0] == "refinement: 1 of 2 batches held out; 8 or more, smaller, leave more to fit to"


@pytest.mark.process
def test_a_sample_alone_is_refused(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "refine",
        text_model / "half",
        "--against",
        text_model / "dense",
        "--calibration",
        text_model / "train.txt",
    ]
    assert tiny.run(*words, "--samples", 1, "--output", tmp_path / "out") == 2
    assert "too few batches to refine on" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_nothing_changes_where_nothing_is_lost() -> None:
    dense, compressed = pair(rank=1.0, form="balanced")
    fits = refine_blocks_(walk(dense, compressed))
    assert all(fit.after < 1e-9 for fit in fits)
    with torch.no_grad():
        torch.testing.assert_close(compressed(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_block_that_steps_make_worse_stays_as_it_was() -> None:
    dense, compressed = pair()
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    fits = refine_blocks_(walk(dense, compressed, Refinement(steps=3, batch=2, lr=1e6, anchored=False)))
    assert [(fit.after == fit.before, fit.steps) for fit in fits] == [(True, 0)] * 3
    assert all(torch.equal(tensor, state[name]) for name, tensor in compressed.state_dict().items())


def test_outputs_that_are_not_finite_are_an_error_that_names_the_block() -> None:
    dense, compressed = pair()
    compressed.transformer.h[1].mlp.c_fc.u.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"transformer\.h\.1: what it returns holds NaN"):
        refine_blocks_(walk(dense, compressed))


def test_what_is_outside_of_blocks_or_tied_to_it_stays() -> None:
    dense, compressed = pair()
    inside = {name for name, _ in compressed.named_parameters() if ".h." in name}
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    refine_blocks_(walk(dense, compressed))
    after = compressed.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state if name not in inside and ".order" not in name)
    assert any(not torch.equal(after[name], state[name]) for name in inside if name in state)


def test_activations_on_disk_give_the_same(tmp_path: Path) -> None:
    dense, compressed = pair()
    other = pair()[1]
    refine_blocks_(walk(dense, compressed))
    refine_blocks_(walk(dense, other, folder=tmp_path, room=0))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in compressed.state_dict().items())
    assert not list(tmp_path.rglob("*.pt"))


def test_weights_are_rounded_to_the_dtype_that_is_written_before_the_next_block_sees_them() -> None:
    dense, compressed = pair()
    refine_blocks_(walk(dense, compressed, stored=torch.bfloat16))
    for name, tensor in compressed.transformer.h.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, tensor.bfloat16().float()), name


def test_blocks_that_share_their_weights_are_left(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = tf.AlbertConfig(vocab_size=300, embedding_size=16, max_position_embeddings=16, **sizes)
    dense = tf.AlbertModel(config).eval()
    compressed = tf.AlbertModel(config).eval()
    compressed.load_state_dict(dense.state_dict())
    lrsurgery.factorise_(compressed, rank=0.3)
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    assert refine_blocks_(walk(dense, compressed)) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in compressed.state_dict().items())


# folders


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "dense")
    assert tiny.run("factorise", folder / "dense", "--rank", "0.3", "--quiet", "--output", folder / "half") == 0
    return folder


SAMPLES = ("--samples", "12", "--refine-steps", "6")


def refined(folder: Path, output: Path, *options: object, source: str = "half") -> int:
    data = ("--against", folder / "dense", "--calibration", folder / "train.txt")
    return tiny.run("refine", folder / source, *data, *SAMPLES, "--quiet", "--output", output, *options)


def test_refine_writes_the_same_folder_with_other_values(text_model: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (text_model / "half").iterdir()}
    assert refined(text_model, tmp_path / "out") == 0
    assert {file.name: file.read_bytes() for file in (text_model / "half").iterdir()} == before
    old, new = (load_file(folder / "model.safetensors") for folder in (text_model / "half", tmp_path / "out"))
    assert {key: (t.shape, t.dtype) for key, t in old.items()} == {key: (t.shape, t.dtype) for key, t in new.items()}
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert all(".h." in key for key in changed)
    assert (tmp_path / "out/config.json").read_bytes() == before["config.json"]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == before["tokenizer.json"]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    report = Report.read(tmp_path / "out")
    dense = tf.AutoModelForCausalLM.from_pretrained(text_model / "dense")
    again = lrsurgery.rank_report(model, against=dense)
    for row, other in zip(report.factorised, again.factorised, strict=True):
        assert row.relative_error == pytest.approx(other.relative_error, rel=1e-3)
        assert row.energy_kept == pytest.approx(other.energy_kept, rel=1e-3)
    assert report.refinement is not None
    assert len(report.refinement["blocks"]) == 2
    assert "fitted to the dense model's" in (tmp_path / "out/README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_factorise_with_refine_is_factorise_and_then_refine(text_model: Path, tmp_path: Path) -> None:
    rest = ("--rank", "0.3", "--quiet", "--no-loss-check", "--calibration", text_model / "train.txt", "--samples", "12")
    assert tiny.run("factorise", text_model / "dense", *rest, "--output", tmp_path / "plain") == 0
    assert tiny.run("factorise", text_model / "dense", *rest, *SAMPLES[2:], "--output", tmp_path / "both") == 0
    data = ("--against", text_model / "dense", "--calibration", text_model / "train.txt")
    assert tiny.run("refine", tmp_path / "plain", *data, *SAMPLES, "--quiet", "--output", tmp_path / "then") == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "then"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert Report.read(tmp_path / "both").options["refine"]["steps"] == 6


def test_an_interrupted_job_goes_on_where_it_was(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refined(text_model, tmp_path / "whole") == 0
    written = blocks.save_piece
    with monkeypatch.context() as patch:

        def stop(file: Path, piece: Any) -> None:
            written(file, piece)
            raise KeyboardInterrupt

        patch.setattr(blocks, "save_piece", stop)
        assert refined(text_model, tmp_path / "out") == 130
    assert "1 refined blocks are kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert refined(text_model, tmp_path / "out", "--refine-steps", 7, "--resume") == 2
    assert "another refinement" in capsys.readouterr().err

    def count(file: Path, piece: Any) -> None:
        names.append(file.stem)
        written(file, piece)

    names: list[str] = []
    monkeypatch.setattr(blocks, "save_piece", count)
    assert refined(text_model, tmp_path / "out", "--resume") == 0
    assert names == ["transformer.h.1"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_models_on_disk_give_the_same(text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refined(text_model, tmp_path / "memory") == 0
    monkeypatch.setattr(opened, "free_memory", lambda _: 4)
    assert refined(text_model, tmp_path / "disk") == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=1e-5)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    tiny.save_gpt2(tmp_path / "dense")
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "dense"
    )
    data, _ = tiny.write_text(tmp_path)
    assert tiny.run("factorise", tmp_path / "dense", "--rank", "0.3", "--quiet", "--output", tmp_path / "half") == 0
    rest = ("--samples", "16", "--refine-steps", "10", "--quiet", "--output", tmp_path / "out")
    assert tiny.run("refine", tmp_path / "half", "--against", tmp_path / "dense", "--calibration", data, *rest) == 0
    told = Report.read(tmp_path / "out").refinement
    assert told is not None
    assert sum(block["after"] for block in told["blocks"]) < 0.99 * sum(block["before"] for block in told["blocks"])
    before, after = (load_source(resolve(str(tmp_path / name))) for name in ("half", "out"))
    assert {k: v.dtype for k, v in before.state_dict().items()} == {k: v.dtype for k, v in after.state_dict().items()}


def test_bad_input_is_one_line(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(wanted: str, *words: object) -> None:
        assert tiny.run(*words, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert wanted in error, error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))

    dense, half, text = text_model / "dense", text_model / "half", text_model / "train.txt"
    data = ("--calibration", text, "--samples", 4)
    fails("not a factorised checkpoint", "refine", dense, "--against", dense, *data)
    fails("is factorised itself", "refine", half, "--against", half, *data)
    fails("write 0 to", "refine", half, "--against", dense, *data, "--refine-steps", -1)
    tiny.save_gpt2(tmp_path / "other", n_inner=40)
    fails("name the dense model that was factorised", "refine", half, "--against", tmp_path / "other", *data)
    fails("--refine needs data", "factorise", dense, "--rank", 0.3, "--refine")
    fails("no such", "refine", half, "--against", dense, "--calibration", tmp_path / "nothing.txt")


def test_json_has_the_blocks(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert refined(text_model, tmp_path / "out", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert [block["name"] for block in body["refinement"]["blocks"]] == ["transformer.h.0", "transformer.h.1"]


@pytest.mark.process
def test_processes_share_the_samples(text_model: Path, tmp_path: Path) -> None:
    """Two processes come as near as one does, and leave nothing but the folder."""
    data = ["--against", text_model / "dense", "--calibration", text_model / "train.txt", "--samples", 32]
    words = ["refine", text_model / "half", *data, "--refine-steps", 8, "--json", "--output"]
    command = [*tiny.TORCHRUN, "-m", "lrsurgery", *words, tmp_path / "two"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert tiny.run(*words, tmp_path / "alone") == 0
    told, alone = (Report.read(tmp_path / name).refinement for name in ("two", "alone"))
    assert told is not None
    assert alone is not None
    for found, wanted in zip(told["blocks"], alone["blocks"], strict=True):
        assert found["before"] == pytest.approx(wanted["before"], rel=0.2)  # other samples are held out
        assert found["after"] < found["before"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.process
def test_processes_that_factorise_refine_together(text_model: Path, tmp_path: Path) -> None:
    """What two processes write at once is what they write in two commands, and neither is what one process writes."""
    data = ["--calibration", text_model / "train.txt", "--samples", 32, "--refine-steps", 8, "--quiet"]
    cut = ["factorise", text_model / "dense", "--rank", "0.4", "--importance", "activations", "--no-loss-check"]
    launch = [*tiny.TORCHRUN, "-m", "lrsurgery"]
    for name, begin, more in (("at-once", launch, ["--refine"]), ("cut", launch, []), ("alone", None, ["--refine"])):
        how = data if more else [each for each in data if each not in ("--refine-steps", 8)]
        words = [*cut, *how, *more, "--output", tmp_path / name]
        if begin is None:
            assert tiny.run(*words) == 0
        else:
            subprocess.run(list(map(str, [*begin, *words])), check=True, capture_output=True)
    words = ["refine", tmp_path / "cut", "--against", text_model / "dense", *data, "--output", tmp_path / "later"]
    subprocess.run(list(map(str, [*launch, *words])), check=True, capture_output=True)
    once, later, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("at-once", "later", "alone"))
    assert once.keys() == later.keys()
    assert all(torch.equal(once[key], later[key]) for key in once)
    assert any(not torch.equal(once[key], alone[key]) for key in once)
    assert not list(tmp_path.glob(".*"))


def test_statistics_weigh_the_closed_form(text_model: Path, tmp_path: Path) -> None:
    """Kept by factorise, and given later: what `factorise --refine` does at once. Without them the fit is another."""
    data = ["--calibration", text_model / "train.txt", "--samples", 32, "--quiet"]
    cut = ["factorise", text_model / "dense", "--rank", "0.4", "--no-loss-check", *data]
    how = ["--refine-steps", 0]
    assert tiny.run(*cut, "--refine", *how, "--output", tmp_path / "at-once") == 0
    assert tiny.run(*cut, "--save-statistics", tmp_path / "kept", "--output", tmp_path / "cut") == 0
    for name, more in (("later", ("--statistics", tmp_path / "kept")), ("without", ())):
        words = ["refine", tmp_path / "cut", "--against", text_model / "dense", *data, *how, *more]
        assert tiny.run(*words, "--output", tmp_path / name) == 0
    once, later, without = (
        load_file(tmp_path / name / "model.safetensors") for name in ("at-once", "later", "without")
    )
    assert all(torch.equal(once[key], later[key]) for key in once)
    assert any(not torch.equal(once[key], without[key]) for key in once)


def test_statistics_that_weigh_nothing_are_named(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--calibration", text_model / "train.txt", "--samples", 16]
    kept = ["--no-loss-check", "--save-statistics"]
    cut = ["factorise", text_model / "dense", "--rank", "0.4", *data, "--quiet", *kept]
    assert tiny.run(*cut, tmp_path / "fisher", "--output", tmp_path / "cut") == 0
    assert tiny.run(*cut, tmp_path / "plain", "--importance", "activations", "--output", tmp_path / "by-inputs") == 0
    tiny.save_alike(tmp_path / "llama")
    other = ["factorise", tmp_path / "llama", "--rank", "0.4", *data, "--quiet", *kept]
    assert tiny.run(*other, tmp_path / "other", "--output", tmp_path / "llama-half") == 0
    words = ["refine", tmp_path / "cut", "--against", text_model / "dense", *data, "--output", tmp_path / "out"]
    for name, wanted in (("plain", "holds no gradients"), ("other", "is of another model"), ("none", "none")):
        capsys.readouterr()
        assert tiny.run(*words, "--refine-steps", 0, "--quiet", "--statistics", tmp_path / name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line
        assert not (tmp_path / "out").exists()
    assert tiny.run(*words, "--refine-steps", 2, "--statistics", tmp_path / "fisher") == 0
    assert "weighs the closed form alone" in " ".join(capsys.readouterr().err.split())
