"""Sources that others quantised, read as the dense models that they stand for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import quantised, tiny
from support.checks import run
from support.quantised import FLOAT8, KINDS, Made, State, change_config, change_tensors

import lrsurgery
from lrsurgery.checkpoints.output import output_config
from lrsurgery.checkpoints.quantised.dense import open_weights
from lrsurgery.checkpoints.quantised.schemes import scheme_of
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.errors import SourceError

OPTIONS: dict[str, Any] = {"allow_larger": True}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def of(kind: str) -> Made:
        if kind not in made:
            made[kind] = quantised.make(kind, tmp_path_factory.mktemp("made"))
        return made[kind]

    return of


@pytest.fixture
def copy(make: Callable[[str], Made], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(make(kind).quantised, tmp_path / "quantised"))


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_the_dense_ones_bit_for_bit(kind: str, make: Callable[[str], Made]) -> None:
    made = make(kind)
    tensors, wanted = open_weights(resolve(str(made.quantised))), weights(made.dense)
    assert set(tensors.keys()) == set(wanted)
    for key, weight in wanted.items():
        found = tensors.read(key)
        assert tensors.describe(key) == (weight.dtype, tuple(weight.shape)), key
        assert torch.equal(found, weight), key
        assert torch.equal(torch.cat(list(tensors.slices(key))), weight.flatten()), key
        if key in made.packed:
            assert torch.equal(tensors.part(key, 1), weight[1]), key


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_the_dense_folder(kind: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make(kind)
    for name in ("quantised", "dense"):
        lrsurgery.factorise_checkpoint(getattr(made, name), tmp_path / name, rank=0.5, **OPTIONS)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "quantised" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes(), file
    found = json.loads((tmp_path / "quantised" / "rank_report.json").read_text())
    other = json.loads((tmp_path / "dense" / "rank_report.json").read_text())
    assert found["source"]["digest"] == other["source"]["digest"]
    assert found["totals"] == other["totals"]
    (note,) = (note for note in found["notes"] if "dequantised to bfloat16 on reading" in note)
    assert not any("dequantised" in note for note in other["notes"])
    assert f"{(made.quantised / 'model.safetensors').stat().st_size / 1000:.3g} KB" in note


@pytest.mark.parametrize("kind", ["fp8", "fp8 mixture", "mxfp4"])
def test_models_load_as_transformers_loads_them(kind: str, make: Callable[[str], Made]) -> None:
    made = make(kind)
    how = {"fp8": tf.FineGrainedFP8Config, "mxfp4": tf.Mxfp4Config}[kind.split(maxsplit=1)[0]](dequantize=True)
    theirs = tf.AutoModelForCausalLM.from_pretrained(made.quantised, quantization_config=how, dtype="auto")
    ours = lrsurgery.load_model(made.quantised)
    assert type(ours) is type(theirs)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
        assert tensor.dtype == wanted[key].dtype, key


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_models_are_the_dense_ones(kind: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make(kind)
    ours: Any = lrsurgery.load_model(made.quantised)
    wanted = lrsurgery.load_model(made.dense).state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    ours.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    found = {key: value.dtype for key, value in weights(tmp_path / "saved").items()}
    lrsurgery.load_model(made.dense).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    assert found == {key: value.dtype for key, value in weights(tmp_path / "other").items()}


@pytest.mark.parametrize("kind", ["fp8 with blocks cut off", "mxfp4"])
def test_every_command_takes_it_as_the_dense_model(kind: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made, (train, valid) = make(kind), tiny.write_text(tmp_path)
    found, notes, sizes = {}, {}, {}
    for name in ("quantised", "dense"):
        folder, output = getattr(made, name), tmp_path / name
        budget = ["--budget", "0.7", "--calibration", train, "--block-size", "32"]
        run("factorise", folder, *budget, "--output", output)
        evaluation = run("evaluate", folder, "--data", valid)["models"][0]
        report = run("report", folder, "--rank", "0.5")
        reach = run("report", folder, "--reach")["models"][str(folder)]
        plan = run("factorise", folder, "--rank", "0.5", "--dry-run")
        notes[name] = [evaluation.pop("notes"), report.pop("notes"), plan.pop("notes")]
        evaluation.pop("model")
        sizes[name] = evaluation.pop("bytes"), report["totals"].pop("bytes_before")
        found[name] = [weights(output), evaluation, report["layers"], report["totals"], reach, plan["layers"]]
    for one, other in zip(*found.values(), strict=True):
        if isinstance(one, dict) and any(isinstance(value, torch.Tensor) for value in one.values()):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        else:
            assert one == other
    # an ordinary folder's are those of its files, with their headers
    assert sizes["quantised"] == (sum(weight.nbytes for weight in weights(made.dense).values()),) * 2
    for told in notes["quantised"]:
        assert any("dequantised to bfloat16 on reading" in note for note in told)


def test_healing_with_a_quantised_teacher(make: Callable[[str], Made], tmp_path: Path) -> None:
    made, (train, _) = make("fp8"), tiny.write_text(tmp_path)
    options = ["--data", train, "--steps", "2", "--block-size", "32", "--batch-size", "2"]
    for name in ("quantised", "dense"):
        folder = getattr(made, name)
        run("finetune", folder, "--rank", "0.5", "--teacher", folder, *options, "--output", tmp_path / name)
    found, wanted = weights(tmp_path / "quantised"), weights(tmp_path / "dense")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lrsurgery"


def test_export_has_nothing_to_do(make: Callable[[str], Made], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a factorised checkpoint"):
        run("export", make("fp8").quantised, "--to", "dense", "--output", tmp_path / "out")


# scales as others store them


def rename(state: State, *, scale: str) -> None:
    for key in [key for key in state if key.endswith("_scale_inv")]:
        state[f"{key.removesuffix('weight_scale_inv')}{scale}"] = state.pop(key)


def as_powers(state: State, dtype: torch.dtype) -> None:
    """Scales that are powers of 2, of which the exponents are stored."""
    for key in [key for key in state if key.endswith("_scale_inv")]:
        bits = (state[key].log2().round() + quantised.EXPONENT).to(torch.uint8)
        state[key] = bits.view(dtype)


@pytest.mark.parametrize("scale", ["scale", "qscale_weight"])
def test_scales_of_other_names(scale: str, copy: Callable[[str], Path], make: Callable[[str], Made]) -> None:
    folder = copy("fp8")
    change_tensors(folder, lambda state: rename(state, scale=scale))
    tensors, wanted = open_weights(resolve(str(folder))), weights(make("fp8").dense)
    assert set(tensors.keys()) == set(wanted)
    assert all(torch.equal(tensors.read(key), wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_scales_that_are_exponents(dtype: torch.dtype, copy: Callable[[str], Path]) -> None:
    folder = copy("fp8")
    change_tensors(folder, lambda state: as_powers(state, dtype))
    state, tensors = weights(folder), open_weights(resolve(str(folder)))
    key = "model.layers.0.self_attn.q_proj.weight"
    powers = (state[f"{key}_scale_inv"].view(torch.uint8).double() - quantised.EXPONENT).exp2()
    wide = quantised.spread(powers, (8, 16), tuple(state[key].shape))
    assert torch.equal(tensors.read(key), (state[key].float() * wide).bfloat16())


def test_fused_experts_in_float8(tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    folder.mkdir()
    weight = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    elements, scales, dense = quantised.to_float8(weight, (16, 8))
    quantised.save_file(
        {"experts.up_proj": elements, "experts.up_proj_scale_inv": scales}, folder / "model.safetensors"
    )
    body = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": body}))
    tensors = open_weights(resolve(str(folder)))
    assert tensors.keys() == ["experts.up_proj"]
    assert torch.equal(tensors.read("experts.up_proj"), dense)
    assert all(torch.equal(tensors.part("experts.up_proj", i), dense[i]) for i in range(3))


# damage

WEIGHT = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def drop(key: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(key)


def put(key: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key].view(-1)[0] = value

    return change


def reshape(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda state: state.update({key: change(state[key]).contiguous()})


def widen(key: str) -> Callable[[State], None]:
    return lambda state: state.update({key: state[key].bfloat16()})


DAMAGE: dict[str, tuple[str, Callable[[State], None], str]] = {
    "no scales": ("fp8", drop(f"{WEIGHT}_scale_inv"), f"{WEIGHT}_scale_inv, are missing"),
    "scales of another shape": (
        "fp8",
        reshape(f"{WEIGHT}_scale_inv", lambda scales: scales[1:]),
        f"{WEIGHT}_scale_inv has shape (9, 3), and the weight (80, 48) in blocks of 8x16 wants (10, 3)",
    ),
    "transposed scales": (
        "float8 a channel",
        reshape(f"{WEIGHT}_scale", torch.t),
        f"{WEIGHT}_scale has shape (1, 80), and the weight (80, 48) in blocks of 1x48 wants (80, 1)",
    ),
    "a scale that is NaN": ("fp8", put(f"{WEIGHT}_scale_inv", float("nan")), f"the scales of {WEIGHT}, holds NaN or"),
    "a scale that is infinite": ("fp8", put(f"{WEIGHT}_scale_inv", float("inf")), f"the scales of {WEIGHT}, holds NaN"),
    "a scale that is too large": ("fp8", put(f"{WEIGHT}_scale_inv", 3e38), f"{WEIGHT} is not finite once dequantised"),
    "a scale that is NaN, of one expert": (
        "fp8 mixture",
        put(f"{EXPERT}_scale_inv", float("nan")),
        f"the scales of {EXPERT}, holds NaN",
    ),
    "scales alone": ("fp8", widen(WEIGHT), f"{WEIGHT}_scale_inv holds scales, and no float8 weight"),
    "a channel without scales": ("float8 a channel", drop(f"{WEIGHT}_scale"), f"{WEIGHT}_scale, are missing"),
    "experts without scales": ("mxfp4", drop(f"{EXPERTS}_scales"), f"{EXPERTS}_scales, are missing"),
    "experts without elements": ("mxfp4", drop(f"{EXPERTS}_blocks"), f"{EXPERTS}_blocks is missing"),
    "expert scales of another shape": (
        "mxfp4",
        reshape(f"{EXPERTS}_scales", lambda scales: scales[:, 1:]),
        f"{EXPERTS}_scales (4, 63, 2) are no MXFP4 weight",
    ),
    "an exponent that is NaN": ("mxfp4", put(f"{EXPERTS}_scales", 255), f"the scales of {EXPERTS}, holds NaN"),
    "an exponent that is too large": ("mxfp4", put(f"{EXPERTS}_scales", 254), f"{EXPERTS} is not finite"),
    "a weight of another shape": (
        "fp8",
        lambda state: state.update(
            {
                WEIGHT: state[WEIGHT][:48].contiguous(),
                f"{WEIGHT}_scale_inv": state[f"{WEIGHT}_scale_inv"][:6].contiguous(),
            }
        ),
        f"{WEIGHT} has shape (48, 48), the model wants (80, 48)",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(
    case: str, copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, damage, message = DAMAGE[case]
    folder = copy(kind)
    change_tensors(folder, damage)
    _, valid = tiny.write_text(tmp_path)
    before = set(tmp_path.iterdir())
    commands: list[list[object]] = [
        ["factorise", folder, "--rank", "0.5", "--no-loss-check", "--output", tmp_path / "half"],
        ["evaluate", folder, "--data", valid],
        ["report", folder],
    ]
    for command in commands:
        assert tiny.run(*command) == 2, command
        said = capsys.readouterr().err
        (line,) = [line for line in said.splitlines() if line.startswith("lrsurgery: ")]
        assert message in line, command
    assert set(tmp_path.iterdir()) == before


def body(**entries: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", **entries}}}}


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "quantised with awq"),
    "packed": (
        {**COMPRESSED, **body(strategy="group", type="int"), "format": "pack-quantized"},
        "quantised with compressed-tensors (pack-quantized)",
    ),
    "of groups": ({**COMPRESSED, **body(strategy="group")}, "quantised with compressed-tensors (float-quantized)"),
    "with zero points": (
        {**COMPRESSED, **body(strategy="tensor", symmetric=False)},
        "quantised with compressed-tensors (float-quantized)",
    ),
    "sparse": (
        {**COMPRESSED, **body(strategy="tensor"), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "quantised with compressed-tensors (float-quantized)",
    ),
    "experts in fp4": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "quantised with fp8 (experts in fp4)"),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size.0: input should be"),
    "another's config": ({"quant_method": "mxfp4"}, "no tensor of the files is one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_by_name(case: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    quantisation, message = REFUSED[case]
    folder = copy("fp8")
    change_config(folder, quantization_config=quantisation)
    for command in (["factorise", folder, "--rank", "0.5", "--output", tmp_path / "half"], ["report", folder]):
        with pytest.raises(SourceError) as found:
            run(*command)
        assert message in str(found.value)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "half").exists()


def test_inner_config_is_read_and_left_out(make: Callable[[str], Made]) -> None:
    """A composite model's config has it in that of its text model."""
    quantisation = json.loads((make("fp8").quantised / "config.json").read_text())["quantization_config"]
    config = {"model_type": "x", "text_config": {"dtype": "float16", "quantization_config": quantisation}}
    scheme = scheme_of(config, "config.json")
    assert scheme is not None
    assert scheme.blocks == ((8, 16),)
    assert scheme.dtype == torch.float16
    source = Source("x", "transformers", config, None, ())
    assert output_config(source, torch.nn.Identity(), {}) == {"model_type": "x", "text_config": {"dtype": "float16"}}


def test_dtype_is_written_where_the_config_has_none(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fp8")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    lrsurgery.factorise_checkpoint(folder, tmp_path / "half", rank=0.5)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(lrsurgery.load_model(tmp_path / "half").parameters()).dtype == torch.bfloat16


def test_generation_config_is_read(copy: Callable[[str], Path]) -> None:
    folder = copy("fp8")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    model: Any = lrsurgery.load_model(folder)
    assert model.generation_config.max_new_tokens == 7
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(SourceError, match=r"generation_config\.json cannot be read"):
        lrsurgery.load_model(folder)


def test_dtype_of_the_config_is_that_of_the_weights(copy: Callable[[str], Path], make: Callable[[str], Made]) -> None:
    folder = copy("fp8")
    change_config(folder, dtype="float32")
    state = weights(folder)
    found = open_weights(resolve(str(folder))).read(WEIGHT)
    wide = quantised.spread(state[f"{WEIGHT}_scale_inv"], (8, 16), (80, 48))
    assert state[WEIGHT].dtype == FLOAT8
    assert found.dtype == torch.float32
    assert torch.equal(found, state[WEIGHT].float() * wide)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # type: ignore[arg-type]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"GGUF files need the package gguf; pip install 'lrsurgery\[gguf\]'"):
        run("report", tmp_path / "model.gguf")
