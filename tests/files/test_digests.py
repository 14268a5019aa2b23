"""Digests of an output's files: any damage is noticed by every command that reads the file, and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from support import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lrsurgery
import lrsurgery.hf
from lrsurgery.cli.app import app
from lrsurgery.errors import SourceError
from lrsurgery.files.digests import WITHOUT_DIGEST, recorded_digests, verify_folder

DAMAGED = "differs from what was written"


def flip(file: Path, place: float, bit: int = 5) -> None:
    """Flip one bit at a place from 0, the first byte, to 1, the last."""
    content = bytearray(file.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digests")
    tiny.write_text(root)
    tiny.save_gpt2(root / "dense")
    lrsurgery.factorise_checkpoint(root / "dense", root / "whole", rank=4)
    lrsurgery.factorise_checkpoint(root / "dense", root / "shards", rank=4, shard_size="20KB")
    torch.manual_seed(0)
    lrsurgery.save_model(timm.create_model("resnet10t", num_classes=4), root / "dense-timm")
    lrsurgery.factorise_checkpoint(root / "dense-timm", root / "timm", rank=2)
    return root


def settings(models: Path) -> list[object]:
    return ["--data", models / "valid.txt", "--block-size", 16]


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "evaluate": lambda folder, models, out: ["evaluate", folder, *settings(models)],
    "export": lambda folder, models, out: ["export", folder, "--output", out],
    "report --against": lambda folder, models, out: ["report", folder, "--against", models / "dense"],
    "report --verify": lambda folder, models, out: ["report", folder, "--verify"],
    "finetune": lambda folder, models, out: [
        *("finetune", folder, *settings(models), "--steps", 1, "--output", out, "--eval-data", models / "valid.txt")
    ],
}


@pytest.mark.parametrize(("command", "kind"), [*product(COMMANDS, ["whole", "shards"]), ("bench", "shards")])
def test_every_command_that_reads_a_model_names_the_file_with_a_flipped_bit(
    command: str, kind: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{command} {kind}")
    weights = sorted(file.name for file in (models / kind).glob("*.safetensors"))
    assert len(weights) > 1 or kind == "whole"
    others = [name for name in recorded_digests(models / kind) if name not in (*weights, "config.json")]
    assert "tokenizer.json" in others
    small = [(name, chance.random()) for name in ("config.json", *others)]
    damage = ((chance.choice(weights), chance.random()), (weights[-1], 1.0), *small)
    for number, (name, place) in enumerate(damage):
        folder = tmp_path / str(number)
        shutil.copytree(models / kind, folder)
        flip(folder / name, place, chance.randrange(8))
        if command == "bench" and number:  # which starts a process
            continue
        asked = COMMANDS[command](folder, models, tmp_path / "out") if command != "bench" else ["bench", folder]
        code = tiny.run(*asked)
        said = capfd.readouterr()
        assert code == 2, f"{name} at {place}: {said}"
        assert f"{folder / name}: " in (said.out if "verify" in command else said.err), said
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_transformers_itself_and_load_model_refuse_a_flipped_bit(
    name: str, place: float, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "whole", folder)
    lrsurgery.load_model(folder)  # which no memory of may excuse the damage
    flip(folder / name, place)
    with pytest.raises(SourceError, match=DAMAGED):
        lrsurgery.load_model(folder)
    if name == "model.safetensors" and place > 0:  # before us, transformers reads the config and the header's length
        with pytest.raises(SourceError, match=f"{name}: {DAMAGED}"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_timm_model_is_refused_with_a_flipped_bit(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "timm", tmp_path / "model")
    lrsurgery.load_model(tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors", 0.7)
    with pytest.raises(SourceError, match=f"model.safetensors: {DAMAGED}"):
        lrsurgery.load_model(tmp_path / "model")


def test_a_change_on_purpose_loads_once_its_entry_is_deleted(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "whole", tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors", 0.9)
    report = tmp_path / "model" / "rank_report.json"
    body = json.loads(report.read_text())
    del body["files"]["model.safetensors"]
    report.write_text(json.dumps(body))
    lrsurgery.load_model(tmp_path / "model")


@pytest.mark.parametrize("state", ["no report", "a report of version 3"])
def test_a_folder_without_digests_loads_as_before_and_cannot_be_verified(
    state: str, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "whole", tmp_path / "model")
    report = tmp_path / "model" / "rank_report.json"
    body = json.loads(report.read_text())
    del body["files"]
    report.unlink() if state == "no report" else report.write_text(json.dumps({**body, "format_version": 3}))
    lrsurgery.load_model(tmp_path / "model")
    with pytest.raises(SourceError, match="digests"):
        verify_folder(tmp_path / "model")


@pytest.mark.parametrize("kind", ["whole", "shards", "timm", "healed"])
def test_the_report_has_the_digest_of_every_other_file(kind: str, models: Path, tmp_path: Path) -> None:
    folder = models / kind
    if kind == "healed":
        folder = tmp_path / "healed"
        assert tiny.run("finetune", models / "whole", *settings(models), "--steps", 1, "--output", folder, "-q") == 0
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    wanted = {
        name: {"sha256": sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for name, path in files.items()
        if name not in WITHOUT_DIGEST and not name.startswith(".")
    }
    assert json.loads((folder / "rank_report.json").read_text())["files"] == wanted
    found = verify_folder(folder)
    assert found.whole
    assert found.files == len(wanted)
    assert not found.foreign


def test_verify_lists_what_is_missing_damaged_or_foreign(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "whole", folder)
    (folder / "README.md").write_text("my own words")
    (folder / "notes.txt").write_text("mine")
    run = CliRunner().invoke(app, ["report", str(folder), "--verify"])
    assert run.exit_code == 0
    assert f"{folder / 'notes.txt'}: not written by lrsurgery" in run.output.replace("\n", "")
    assert "as written" in run.output
    (folder / "tokenizer.json").unlink()
    flip(folder / "config.json", 0.5)
    found = verify_folder(folder)
    assert (found.missing, found.damaged, found.foreign) == (("tokenizer.json",), ("config.json",), ("notes.txt",))
    shown = CliRunner().invoke(app, ["report", str(folder), "--verify", "--json"])
    assert json.loads(shown.stdout)["folders"][str(folder)]["damaged"] == ["config.json"]
    assert shown.exception is not None


@pytest.mark.parametrize("other", [False, True], ids=["the source", "another model"])
def test_against_another_model_than_the_source_is_said(other: bool, models: Path, tmp_path: Path) -> None:
    dense = tiny.save_gpt2(tmp_path / "other", seed=1) if other else models / "dense"
    shown = CliRunner().invoke(app, ["report", str(models / "shards"), "--against", str(dense), "--json"])
    notes = json.loads(shown.stdout)["notes"]
    assert any("not the model that this one came from" in note for note in notes) is other
