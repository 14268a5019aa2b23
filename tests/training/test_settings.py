"""Settings: what the command line makes of a recipe's fields, and what recipes and flags make of a run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from support import tiny
from torch import nn
from typer.testing import CliRunner

from lrsurgery.checkpoints.source import resolve
from lrsurgery.checkpoints.upstream import transformers as upstream
from lrsurgery.cli.app import app
from lrsurgery.data import scores
from lrsurgery.data.options import DataOptions, settings_of
from lrsurgery.errors import RecipeError, SurgeryError
from lrsurgery.linalg.inits import INITS
from lrsurgery.training import finetune as training
from lrsurgery.training.loop.arguments import training_arguments
from lrsurgery.training.recipe import Recipe, read_recipe, write_recipe
from lrsurgery.training.run_folder import Facts, RunFolder


class Asked(SurgeryError):
    """Raised in the place of a run."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks of `finetune`: its settings, and the other arguments under their names."""
    found: dict[str, Any] = {}

    def refuse(settings: dict[str, object], output: Path | None, **others: object) -> None:
        found.update(others, settings=settings, output=output)
        raise Asked("a run was asked for")

    monkeypatch.setattr(training, "finetune", refuse)
    return found


def help_of(command: str) -> str:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def line_of(text: str, flag: str) -> str:
    (line,) = [line for line in text.splitlines() if re.match(rf"│[ *]+{re.escape(flag)} ", line)]
    return line


def test_help_has_every_field_with_its_default() -> None:
    text = help_of("finetune")
    for field in fields(Recipe):
        if field.name == "model":
            assert line_of(text, "MODEL")
            continue
        line = line_of(text, f"--{field.name.replace('_', '-')}")
        if field.default is MISSING or field.default in (None, ()):
            assert "[default:" not in line
        elif field.default is True:
            assert f"--no-{field.name}" in line
            assert f"[default: {field.name}]" in line
        elif field.default is False:
            assert "[default:" not in line
        else:
            shown = "*" if field.default == ("*",) else str(field.default)
            assert f"[default: {shown}]" in line


def test_help_lists_choices() -> None:
    text = help_of("finetune")
    assert "|".join(INITS) in line_of(text, "--init")
    for flag, names in (
        ("--task", ["masked-lm", "image-classification"]),
        ("--conv", ["channel", "spatial"]),
        ("--decay", ["frobenius", "l2", "none"]),
        ("--optimizer", ["adamw", "sgd"]),
        ("--schedule", ["cosine", "inverse_sqrt"]),
        ("--precision", ["auto", "fp32", "bf16", "fp16"]),
        ("--device", ["auto", "cpu", "cuda"]),
    ):
        for name in names:
            assert name in line_of(text, flag)


def test_help_stands_in_panels() -> None:
    text = help_of("finetune")
    titles = ["Data", "Surgery", "Decay", "Training", "The run", "Machine", "Output"]
    places = [text.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)


def test_measuring_shares_the_settings_of_training() -> None:
    one, other = help_of("finetune"), help_of("evaluate")
    for name, setting in settings_of(DataOptions).items():
        flag = f"--{name.replace('_', '-')}"
        assert setting.help in line_of(one, flag)
        assert setting.help in line_of(other, flag)
    assert "[default: fp32]" in line_of(other, "--precision")
    assert "[default: auto]" in line_of(one, "--precision")


@pytest.mark.process
def test_help_of_training_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from lrsurgery.cli.app import app\n"
        "for words in (['finetune', '--help'], ['evaluate', '--help']):\n"
        "    assert app(words, standalone_mode=False) in (None, 0)\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'safetensors', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_what_is_on_the_command_line_is_a_setting(asked: dict[str, Any]) -> None:
    assert tiny.run("finetune", "gpt2", "--data", "a.txt") == 2
    assert asked["settings"] == {"model": "gpt2", "data": "a.txt"}
    assert (asked["output"], asked["recipe_file"], asked["resume"]) == (None, None, False)


def test_a_default_on_the_command_line_wins_over_a_recipe(asked: dict[str, Any]) -> None:
    """0, false and the defaults themselves are values like any other."""
    tiny.run("finetune", "--seed", 0, "--warmup-steps", 0, "--lr", "auto", "--augment", "--include", "*")
    assert asked["settings"] == {"seed": 0, "warmup_steps": 0, "lr": "auto", "augment": True, "include": ["*"]}
    recipe = Recipe(seed=3, lr=0.1, warmup_steps=5, augment=False, include=("h.*",)).merged(asked["settings"])
    assert recipe == Recipe(warmup_steps=0)


def test_flags_are_values_of_the_recipes_own_types(asked: dict[str, Any]) -> None:
    words = "gpt2 -r 0.5 -r *.mlp.*=64 --no-augment --streaming --epochs 2 --decay none --init he --task masked-lm"
    tiny.run("finetune", *words.split(), "--set", "adam_beta2=0.95", "--set", "optim_args=a=b", "-o", "out")
    wanted = {
        "model": "gpt2",
        "rank": ["0.5", "*.mlp.*=64"],
        "augment": False,
        "streaming": True,
        "epochs": 2.0,
        "decay": "none",
        "init": "he",
        "task": "masked-lm",
        "set": {"adam_beta2": 0.95, "optim_args": "a=b"},
    }
    assert asked["settings"] == wanted
    assert {type(asked["settings"][name]) for name in ("decay", "init", "task")} == {str}
    assert asked["output"] == Path("out")
    yaml.safe_dump(Recipe().merged(asked["settings"]).to_dict())


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("--decay", "l3"), "'frobenius', 'l2', 'none'"),
        (("--optimizer", "lion"), "'adamw', 'sgd'"),
        (("--schedule", "stairs"), "'linear', 'cosine'"),
        (("--precision", "int8"), "'auto', 'fp32', 'bf16', 'fp16'"),
        (("--conv", "temporal"), "'channel', 'spatial'"),
        (("--init", "random"), "'spectral', 'spectral-ones'"),
        (("--task", "segmentation"), "'causal-lm', 'masked-lm'"),
        (("--lr", "fast"), "'fast': write a number or auto"),
        (("--set", "beta"), "--set beta: write KEY=VALUE"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_bad_choice_is_one_line(
    words: tuple[str, str], known: str, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("finetune", "gpt2", "--data", "a.txt", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert known in line
    assert not asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "stride 0: write at least 1"),
        ({"block_size": 1}, "block_size 1: write at least 2"),
        ({"warmup_steps": -1}, "warmup_steps -1: write at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay nan: write a number of at least 0"),
        ({"momentum": -0.1}, "momentum -0.1: write a number of at least 0"),
        ({"temperature": 0.0}, "temperature 0.0: write a number above 0"),
        ({"epochs": float("inf")}, "epochs inf: write a number above 0"),
        ({"teacher_weight": 1.5}, "teacher_weight 1.5: write a number from 0 to 1"),
        ({"conv": "temporal"}, "unknown conv 'temporal'; known: auto, channel, spatial"),
        ({"precision": "int8"}, "unknown precision 'int8'; known: auto, fp32, bf16, fp16"),
        ({"init": "random"}, "unknown init 'random'; known: spectral"),
        ({"rank": ["half"]}, "half"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_value_names_its_bound(changes: dict[str, object], message: str) -> None:
    recipe = Recipe(model="gpt2", data="a.txt").merged(changes)
    with pytest.raises(SurgeryError) as e:
        recipe.check()
    assert message in str(e.value)


def test_a_recipe_file_holds_every_setting_in_the_order_of_the_fields(tmp_path: Path) -> None:
    recipe = Recipe(model="gpt2", data="a.txt", rank=("0.5",), set={"adam_beta2": 0.95})
    write_recipe(recipe, tmp_path / "recipe.yaml", {"torch": "2"})
    body = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert list(body) == [*(field.name for field in fields(Recipe)), "made_with"]
    assert Recipe().merged(read_recipe(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("lr", "1e-3", 1e-3),  # which YAML takes for text
        ("steps", 20.0, 20),
        ("epochs", 2, 2.0),
        ("rank", "0.5", ("0.5",)),
        ("rank", [0.5, 64], ("0.5", "64")),
        ("steps", None, None),
    ],
)
def test_values_of_a_recipe_file_are_typed(key: str, value: object, wanted: object) -> None:
    found = getattr(Recipe(steps=1).merged({key: value}), key)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 2.5, "steps '2.5': write a whole number"),
        ("steps", True, "steps 'True': write a whole number"),
        ("lr", "fast", "lr 'fast': write a number or auto"),
        ("dense", "yes", "dense 'yes': write true or false"),
        ("lr", None, "lr: needs a value"),
        ("set", "adam", "set: write it as 'NAME: value' lines"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError) as e:
        Recipe().merged({key: value})
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_eval_metrics", True, "set batch_eval_metrics: is decided by lrsurgery"),
        ("eval_do_concat_batches", False, "set eval_do_concat_batches: is decided by lrsurgery"),
        ("push_to_hub", True, "set push_to_hub: is decided by lrsurgery; upload the output with `hf upload`"),
        ("use_liger_kernel", True, "a setting needs a package: You have set `use_liger_kernel`"),
        ("optim", "lomo", "the settings do not go together (set: optim): You need to install `lomo_optim`"),
        ("label_smoothing_factor", "abc", "set label_smoothing_factor=abc: write a number"),
        ("learning_rate", -1, "the settings do not go together (set: learning_rate): Invalid learning rate"),
        ("fsdp", "full_shard", "the settings do not go together (set: fsdp): Using fsdp only works in distributed"),
        ("full_determinism", "perhaps", "set full_determinism=perhaps: write true or false"),
        ("gradient_accumulation_steps", 0, "set gradient_accumulation_steps=0: must be at least 1"),
        ("per_device_train_batch_size", 0, "set per_device_train_batch_size=0: must be at least 1"),
        ("eval_accumulation_steps", 0, "set eval_accumulation_steps=0: must be at least 1"),
        ("dataloader_num_workers", -1, "set dataloader_num_workers=-1: must be at least 0"),
        ("data_seed", "x", "set data_seed=x: input should be a valid integer"),
        ("parallelism_config", "x", "set parallelism_config=x: input should be a dictionary"),
        ("lr_scheduler_kwargs", [1], "set lr_scheduler_kwargs=[1]: input should be a valid dictionary"),
        ("log_level", "zzz", "set log_level=zzz: choose one of detail, debug, info"),
        # told apart from our own faults by where they are raised: in the first step, and in the first evaluation
        (
            "lr_scheduler_kwargs",
            {"zz": 1},
            "the settings do not go together (set: lr_scheduler_kwargs): TypeError: get_",
        ),
        (
            "metric_for_best_model",
            "zzz",
            "the settings do not go together (set: metric_for_best_model): The `metric_for",
        ),
    ],
)
def test_what_transformers_refuses_of_set_is_one_line(
    tmp_path: Path, name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # which transformers sets, and does not take back
    tiny.write_text(tmp_path)
    tiny.save_gpt2(tmp_path / "gpt2")
    asked = {"model": str(tmp_path / "gpt2"), "data": str(tmp_path / "train.txt"), "dense": True, "steps": 1}
    asked["eval_data"] = str(tmp_path / "valid.txt")
    with pytest.raises(RecipeError) as e:
        training.finetune({**asked, "device": "cpu", "set": {name: value}}, tmp_path / "out")
    assert str(e.value).startswith(message)
    assert not list(tmp_path.glob("out*"))


def test_a_fault_of_our_own_is_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever --set says, what another room of the package raises beside a model's forward stays what it is."""

    def fail(*_: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(scores, "measure_split", fail)
    tiny.write_text(tmp_path)
    asked = {"model": str(tiny.save_gpt2(tmp_path / "gpt2")), "data": str(tmp_path / "train.txt"), "dense": True}
    asked |= {"steps": 1, "eval_data": str(tmp_path / "valid.txt"), "device": "cpu", "set": {"data_seed": 1}}
    with pytest.raises(ValueError, match=r"^ours$") as e:
        training.finetune(asked, tmp_path / "out")
    assert not isinstance(e.value, SurgeryError)
    assert not list(tmp_path.glob("out*"))


def test_values_that_transformers_takes_are_given_to_it(tmp_path: Path) -> None:
    given = {"data_seed": 3, "lr_scheduler_kwargs": {"num_cycles": 2}, "log_level": "error", "adam_beta1": 0.8}
    found = training_arguments(Recipe(device="cpu", set=given), tmp_path, evaluates=False)
    assert {name: getattr(found, name) for name in given} == given


def test_a_run_goes_on_with_the_label_map_that_it_was_begun_with(tmp_path: Path) -> None:
    tiny.write_text(tmp_path)
    source = resolve(str(tiny.save_gpt2(tmp_path / "gpt2")))
    (tmp_path / "map.json").write_text('{"a": "b"}')
    recipe = Recipe(data=str(tmp_path / "train.txt"), label_map=str(tmp_path / "map.json"))
    run = RunFolder(tmp_path / "out")
    run.begin(recipe, Facts.of(recipe, source, 1), [])
    assert run.check_facts(Facts.of(recipe, source, 1), recipe) is None
    (tmp_path / "map.json").write_text('{"a": "c"}')
    with pytest.raises(RecipeError, match=r"map\.json: has changed since the run in"):
        run.check_facts(Facts.of(recipe, source, 1), recipe)


def test_facts_of_what_the_recipe_does_not_name_are_named_by_their_file(tmp_path: Path) -> None:
    tiny.write_text(tmp_path)
    source = resolve(str(tiny.save_gpt2(tmp_path / "gpt2")))
    recipe = Recipe(data=str(tmp_path / "train.txt"))
    run = RunFolder(tmp_path / "out")
    facts = Facts.of(recipe, source, 1)
    for name in ("eval_data", "label_map"):
        run.begin(recipe, replace(facts, **{name: "another"}), [])
        with pytest.raises(RecipeError) as e:
            run.check_facts(facts, recipe)
        assert str(e.value).startswith(f"{run.path / 'run.json'}: its {name} is not that of recipe.yaml")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (99, "run.json: format 99 is newer than this lrsurgery reads (1); update lrsurgery"),
        (0, "run.json: format_version must be a whole number from 1, not 0"),
        ("1", 'run.json: format_version must be a whole number from 1, not "1"'),
        (None, ""),
        (1, ""),
    ],
    ids=["of a newer program", "none that is", "text", "of an older program", "ours"],
)
def test_a_run_of_another_format_is_not_taken_up(tmp_path: Path, version: object, message: str) -> None:
    tiny.write_text(tmp_path)
    source = resolve(str(tiny.save_gpt2(tmp_path / "gpt2")))
    recipe = Recipe(data=str(tmp_path / "train.txt"))
    run = RunFolder(tmp_path / "out")
    facts = Facts.of(recipe, source, 1)
    run.begin(recipe, facts, [])
    body = json.loads((run.path / "run.json").read_text())
    assert body.pop("format_version") == 1
    if version is not None:
        body["format_version"] = version
    (run.path / "run.json").write_text(json.dumps(body))
    if not message:
        assert run.check_facts(facts, recipe) is None
        return
    with pytest.raises(RecipeError) as e:
        run.check_facts(facts, recipe)
    assert str(e.value).endswith(message)


def test_a_number_that_yaml_takes_for_text_is_one(tmp_path: Path) -> None:
    recipe = Recipe(device="cpu", set={"adam_epsilon": "1e-6"})
    assert training_arguments(recipe, tmp_path, evaluates=False).adam_epsilon == 1e-6


# what is asked of transformers and accelerate beyond their documented interfaces


def test_training_takes_one_gpu_of_several(tmp_path: Path) -> None:
    arguments: Any = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3
    upstream.train_on_one_gpu_(arguments)
    assert arguments.n_gpu == 1


def test_a_module_is_prepared_anew() -> None:
    """accelerate's mark keeps autocast off a module that another Accelerator has prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def answer(precision: str) -> torch.Tensor:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        found: torch.Tensor = Accelerator(mixed_precision=precision, cpu=True).prepare_model(module)(x)
        return found

    try:
        module = nn.Linear(3, 3).requires_grad_(False)
        full = module(x)
        assert torch.equal(answer("no"), full)
        assert torch.equal(answer("bf16"), full)  # marked, so not prepared
        upstream.forget_preparation_([module])
        assert not torch.equal(answer("bf16"), full)
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def test_the_warm_up_is_a_twentieth_of_a_cosine() -> None:
    """Rates of a run, as transformers' own schedule gives them."""
    assert [Recipe().warm_up(total) for total in (1, 19, 20, 150)] == [0, 0, 1, 7]
    assert Recipe(schedule="linear").warm_up(150) == 0
    assert Recipe(warmup_steps=0).warm_up(150) == 0
    assert Recipe(warmup_steps=30, schedule="linear").warm_up(150) == 30


def test_the_default_schedule_is_a_cosine_behind_a_warm_up(tmp_path: Path) -> None:
    recipe = Recipe(model="gpt2", data="a.txt", lr=0.1, device="cpu")
    args = training_arguments(recipe, tmp_path, evaluates=False, total=40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.get_warmup_steps(40)
    schedule = tf.get_scheduler(args.lr_scheduler_type, optimizer, steps, 40)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    wanted = [0.1 * step / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 38)) for step in range(40)]
    assert rates == pytest.approx(wanted)
