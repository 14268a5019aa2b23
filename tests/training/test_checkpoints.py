"""What is looked at before a checkpoint is used again: its files, whose they are, and what they may turn on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import tiny
from torch import nn

from lrsurgery.cli.app import _without_eof
from lrsurgery.errors import RecipeError, SurgeryError
from lrsurgery.training.checkpoints import COMPLETE, State, check_owner, damage_of, mark_complete
from lrsurgery.training.recipe import Recipe, read_recipe, without_permissions, write_recipe
from lrsurgery.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, the output of a run, and `out.run`, what is left of the run that is to write `out`."""
    folder = tmp_path_factory.mktemp("kept")
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "model", blocks=1)
    data = ["--data", folder / "train.txt", "--eval-data", folder / "valid.txt"]
    rest = "--rank 0.5 --steps 6 --save-steps 3 --eval-steps 3 --log-steps 2 --batch-size 2 --keep-checkpoints --best"
    assert tiny.run("finetune", folder / "model", *data, *rest.split(), "--output", folder / "out", "--quiet") == 0
    (folder / "out").rename(folder / "whole")
    return folder


def newest(run: Path) -> Path:
    found = RunFolder(run.with_name(run.name.removesuffix(".run"))).last_good()
    assert found is not None
    return found


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept / "out.run", tmp_path / "out.run"))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def flip(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "flipped": flip,
    "a list": lambda file: file.write_text("[1, 2]"),
    "a pickle that runs": lambda file: torch.save({"state": Bomb(file.parents[3] / "executed")}, file),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_by_the_files_name(run: Path, name: str) -> None:
    """By the digests of the mark, and of an empty mark of older versions by reading, which a flipped bit passes."""
    checkpoint = newest(run)
    original = (checkpoint / name).read_bytes()
    assert damage_of(checkpoint) is None
    for marked in (True, False):
        if not marked:
            (checkpoint / COMPLETE).write_bytes(b"")
            assert damage_of(checkpoint) is None
        for damage, do in DAMAGES.items():
            if not marked and (damage == "flipped" or (damage == "missing" and name == "rng_state.pth")):
                continue
            do(checkpoint / name)
            assert (damage_of(checkpoint) or "").startswith(f"{checkpoint / name}: "), (marked, damage)
            (checkpoint / name).write_bytes(original)
    assert not (run.parent / "executed").exists()


@pytest.mark.parametrize(
    "change",
    [{"global_step": 5}, {"global_step": "x"}, {"log_history": 3}, {"surprise": 1}, {"best_model_checkpoint": []}],
    ids=["another step", "text", "a number", "an unknown key", "a list"],
)
def test_an_odd_state_of_an_old_checkpoint_is_damage(run: Path, change: dict[str, object]) -> None:
    file = newest(run) / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    mark_complete(newest(run))
    assert (damage_of(newest(run)) or "").startswith(f"{file}: ")


def resume(run: Path, *more: object) -> int:
    return tiny.run("finetune", "--resume", "--output", run.with_suffix(""), *more)


def test_the_checkpoint_before_a_damaged_one_is_used(kept: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the run ends as the one that nothing disturbed, its best checkpoint found where the run now lies."""
    damaged = newest(run) / "optimizer.pt"
    flip(damaged)
    assert resume(run) == 0
    assert f"{damaged}: damaged" in capsys.readouterr().err.replace("\n", " ")
    whole = kept / "whole"
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run.with_suffix("") / name).read_bytes() == (whole / name).read_bytes()
    assert not run.exists()


def test_without_a_good_checkpoint_nothing_is_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = sorted(run.glob("*/checkpoint-*"))
    for checkpoint in checkpoints:
        (checkpoint / "optimizer.pt").write_bytes(b"")
    assert resume(run, "--quiet") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "optimizer.pt: damaged" in line
    assert "no other checkpoint is left" in line
    assert sorted(run.glob("*/checkpoint-*")) == checkpoints


def test_a_finished_run_whose_folder_is_left_is_finished(kept: Path, run: Path) -> None:
    """Killed after the output was whole: it is not trained again, and what is left is removed."""
    output = Path(shutil.copytree(kept / "whole", run.with_suffix("")))
    before = (output / "rank_report.json").stat().st_mtime_ns
    shutil.rmtree(run / "factorised")
    (run / "recipe.yaml").unlink()
    assert resume(run, "--quiet") == 0
    assert (output / "rank_report.json").stat().st_mtime_ns == before
    assert not run.exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model["b"].weight = model["a"].weight  # tied, and stored once
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "b.weight"}

    def check(tensors: dict[str, torch.Tensor]) -> None:
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors")
        check_owner(tmp_path, model)

    check(state)
    with pytest.raises(RecipeError, match="which has c"):
        check({**state, "c": torch.zeros(1)})
    with pytest.raises(RecipeError, match=r"has no a\.bias"):
        check({k: v for k, v in state.items() if k != "a.bias"})
    with pytest.raises(RecipeError, match=r"a\.bias is F32 \(3,\) there and float32 \(2,\) here"):
        check({**state, "a.bias": torch.zeros(3)})
    with pytest.raises(RecipeError, match=r"a\.bias is F16"):
        check({**state, "a.bias": torch.zeros(2, dtype=torch.float16)})


def test_a_checkpoint_of_another_model_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = newest(run) / "model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if k.endswith("u.weight"))
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, weights)
    mark_complete(weights.parent)
    assert resume(run, "--quiet") == 2
    assert f"{weights}: is of another model: {key} is" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["exp_avg", "param_groups"])
def test_an_optimizer_of_another_run_is_one_line(run: Path, moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = newest(run)
    shutil.rmtree(checkpoint)
    file = newest(run) / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    if moment == "exp_avg":
        state["state"][0]["exp_avg"] = torch.zeros(7)
    else:
        state["param_groups"] = state["param_groups"][:1]
    torch.save(state, file)
    mark_complete(file.parent)
    assert resume(run, "--quiet") == 2
    assert f"{file.parent}: its optimizer, schedule or random state is of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "[]"),
        ("run.json", '{"model": 1}'),
        ("layers.json", '{"transformer.h.0.mlp.c_fc": 3}'),
        ("layers.json", '{"transformer.h.0.mlp.c_fc": ["conv1d", 1000000000000]}'),
        ("layers.json", '{"transformer.h.7.mlp.c_fc": ["conv1d", 4]}'),
        ("layers.json", '{"transformer.h.0.mlp.c_fc": ["conv1d", 3]}'),
        ("notes.jsonl", "[3]\n"),
        ("recipe.yaml", "- 1\n"),
    ],
)
def test_odd_files_of_a_run_are_one_line(run: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).write_text(text)
    assert resume(run, "--quiet") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(run) in line


def test_a_count_without_gain_goes_on(run: Path) -> None:
    file = newest(run) / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["EarlyStoppingCallback"] = {
        "args": {"early_stopping_patience": 3},
        "attributes": {"early_stopping_patience_counter": 2},
    }
    file.write_text(json.dumps(state))
    assert State.read(file.parent).evaluations_without_gain == 2


PERMITTING: dict[str, dict[str, object]] = {
    "trust_remote_code": {"trust_remote_code": True},
    "trust-remote-code": {"trust-remote-code": True},
    "report_to": {"report_to": ["tensorboard", "wandb"]},
    "set deepspeed": {"set": {"deepspeed": "x.json"}},
    "set trackio_space_id": {"set": {"trackio_space_id": "me/space"}},
}


@pytest.mark.parametrize("settings", PERMITTING.values(), ids=PERMITTING)
def test_a_file_permits_nothing(tmp_path: Path, settings: dict[str, object]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "data": "d", **settings}))
    with pytest.raises(RecipeError, match=r"r\.yaml: .*leave it out.*pass --"):
        read_recipe(file)


def test_a_written_recipe_permits_nothing_and_is_readable(tmp_path: Path) -> None:
    given = {"trust_remote_code": True, "report_to": ["wandb", "tensorboard"], "set": {"deepspeed": "x", "bf16": True}}
    recipe = Recipe().merged({"model": "m", "data": "d", **given})
    write_recipe(recipe, tmp_path / "r.yaml", {})
    read = Recipe().merged(read_recipe(tmp_path / "r.yaml"))
    assert read == without_permissions(recipe)
    assert (read.trust_remote_code, read.report_to, read.set) == (False, ("tensorboard",), {"bf16": True})


def test_a_run_begun_with_trust_needs_it_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "trust_remote_code": True}))
    assert resume(run, "--quiet") == 2
    assert "was begun with --trust-remote-code; pass it again" in capsys.readouterr().err
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("code: false", "code: true"))
    assert resume(run, "--quiet") == 2
    assert "trust_remote_code: no file can turn it on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hub_token", "hub_model_id", "push_to_hub", "report_to", "save_only_model"])
def test_set_pushes_nothing(kept: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [kept / "model", "--data", kept / "train.txt", "--rank", "0.5", "--steps", "1", "--set", f"{name}=true"]
    assert tiny.run("finetune", *asked, "--output", tmp_path / "o", "--quiet") == 2
    assert f"set {name}: is decided by lrsurgery" in capsys.readouterr().err


def test_a_file_that_ends_early_is_no_ctrl_d() -> None:
    def command() -> None:
        raise EOFError("Ran out of input")

    with pytest.raises(SurgeryError, match=r"a file ends before its content does \(Ran out of input\)"):
        _without_eof(command)()
