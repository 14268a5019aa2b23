"""What stands in a model's folder and is not what its library wrote: one line that names the file, before anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.odd import mutations
from support.tiny import save_gpt2, save_timm
from torch import nn

import lrsurgery
from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_model, open_factorised
from lrsurgery.checkpoints.source import SourceOptions, resolve
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.checkpoints.upstream.forms import Interpolation
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.export.targets import export_dense


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense GPT-2, the same factorised, a timm model and the same factorised."""
    place = tmp_path_factory.mktemp("made")
    for name, save in (("gpt2", save_gpt2), ("timm", save_timm)):
        save(place / name)
        module = load_model(place / name)
        lrsurgery.factorise_(module, rank=0.25)
        lrsurgery.save_model(module, place / f"low-{name}")
    return place


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(made / name, tmp_path / name))

    return make


def change(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def refusal(do: Callable[[], object]) -> str:
    with pytest.raises(SurgeryError) as found:
        do()
    assert "\n" not in str(found.value)
    return str(found.value)


# config.json


@pytest.mark.parametrize("name", ["gpt2", "low-gpt2", "timm", "low-timm"])
def test_a_config_of_odd_values_builds_or_is_refused(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    file = folder / "config.json"
    for changed, odd in mutations(json.loads(file.read_text()), 40):
        file.write_text(json.dumps(odd))
        try:
            source = resolve(str(folder))
            build_model(source, device="meta")
        except SurgeryError as e:
            if str(folder) not in str(e) or "\n" in str(e):
                raise AssertionError(changed) from e
        except Exception as e:
            raise AssertionError(changed) from e


@pytest.mark.parametrize("version", [99, "x", None, True])
@pytest.mark.parametrize("name", ["low-gpt2", "low-timm"])
def test_a_newer_format_is_read_by_nothing(name: str, version: object, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    config = json.loads((folder / "config.json").read_text())
    change(folder, quantization_config={**config["quantization_config"], "format_version": version})
    readers: list[Callable[[], object]] = [
        lambda: load_model(folder),
        lambda: export_dense(folder, folder.with_name("out")),
        lambda: open_factorised(resolve(str(folder))),
    ]
    for read in readers:
        said = refusal(read)
        assert said.startswith(f"{folder / 'config.json'}: format")
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"a": {"kind": "invented", "rank": 2}}, "unknown kind 'invented'; known: linear"),
        ({"a": {"kind": "linear", "rank": 0}}, "a.rank: input should be greater than 0"),
        ({"a": {"kind": "linear", "rank": True}}, "a.rank: input should be a valid integer"),
        ({"a": {"kind": "linear"}}, "a.rank: field required"),
        ([], "input should be an object"),
    ],
)
def test_layers_have_a_known_kind_and_a_rank(layers: object, words: str, copy: Callable[[str], Path]) -> None:
    own = {"quant_method": "lrsurgery", "format_version": 1, "layers": layers}
    folder = change(copy("low-gpt2"), quantization_config=own)
    assert words in refusal(lambda: resolve(str(folder)))


def test_a_rank_above_full_rank_is_refused(copy: Callable[[str], Path]) -> None:
    own = {"quant_method": "lrsurgery", "format_version": 1}
    layers = {"transformer.h.0.mlp.c_fc": {"kind": "conv1d", "rank": 2**31 - 1}}
    folder = change(copy("low-gpt2"), quantization_config={**own, "layers": layers})
    assert "rank 2147483647 exceeds 32" in refusal(lambda: load_model(folder))


# configs that no file backs


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("gpt2", {"num_labels": 10**9}, "num_labels 1,000,000,000 is above"),
        ("gpt2", {"n_layer": 10**8}, "n_layer 100,000,000 is above"),
        ("gpt2", {"vocab_size": 10**12}, "parameters, and the weight files hold"),
        ("gpt2", {"n_inner": 10**9}, "parameters, and the weight files hold"),
        ("gpt2", {"n_embd": -1}, "n_embd -1 is below 0"),
        ("timm", {"num_classes": 10**9}, "num_classes 1,000,000,000 is above"),
    ],
    ids=["classes", "blocks", "vocabulary", "width", "negative", "timm's classes"],
)
def test_what_no_file_backs_is_refused_at_once(
    name: str, asked: dict[str, int], words: str, copy: Callable[[str], Path]
) -> None:
    folder = change(copy(name), **asked)
    for device in ("meta", "cpu"):
        assert words in refusal(lambda device=device: build_model(resolve(str(folder)), device=device))  # type: ignore[misc]
    assert words in refusal(lambda: load_model(folder))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("gpt2", {"n_head": -1}, "config.json: n_head -1 is below 0; correct it"),
        ("gpt2", {"n_layer": -2}, "config.json: n_layer -2 is below 0; correct it"),
        ("gpt2", {"text_config": {"num_attention_heads": -1}}, "config.json: num_attention_heads -1 is below 0"),
        ("gpt2", {"num_experts": 4, "num_experts_per_tok": -1}, "num_experts_per_tok -1 is below 0"),
        ("gpt2", {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 is above 4, the num_experts"),
        ("timm", {"pretrained_cfg": {"crop_pct": float("nan")}}, "pretrained_cfg.crop_pct: input should be a finite"),
        (
            "timm",
            {"pretrained_cfg": {"std": [0.5, float("inf"), 0.5]}},
            "pretrained_cfg.std.1: input should be a finite",
        ),
        ("timm", {"pretrained_cfg": {"std": [0.5, 0, 0.5]}}, "pretrained_cfg.std.1: input should be greater than 0"),
        (
            "timm",
            {"pretrained_cfg": {"interpolation": "random"}},
            "pretrained_cfg.interpolation: input should be 'nearest'",
        ),
        ("timm", {"pretrained_cfg": {"interpolation": "zzz"}}, "'lanczos', not \"zzz\""),
    ],
    ids=str,
)
def test_numbers_of_no_model_are_named(
    name: str, values: dict[str, Any], words: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = change(copy(name), **values)
    for use in (lambda: load_model(folder), lambda: build_model(resolve(str(folder)), device="meta")):
        assert words in refusal(use)


def test_ids_and_infinities_of_a_config_may_be_what_they_are(copy: Callable[[str], Path]) -> None:
    """As Mamba's time_step_limit, and ids of tokens that a model has none of."""
    folder = change(copy("gpt2"), pad_token_id=-1, time_step_limit=[0.0, float("inf")], num_experts_per_tok=2)
    load_model(folder)


def test_interpolations_are_those_of_timms_transforms() -> None:
    """Each is made a transform of, which raises KeyError for any other."""
    from timm.data import create_transform

    for name in get_args(Interpolation):
        create_transform((3, 8, 8), interpolation=name)
    with pytest.raises(KeyError):
        create_transform((3, 8, 8), interpolation="random")


def test_without_files_the_machine_is_the_bound(copy: Callable[[str], Path]) -> None:
    folder = change(copy("gpt2"), vocab_size=10**12)
    source = SourceOptions(from_scratch_seed=0).resolve(str(folder))
    assert "this machine has" in refusal(lambda: build_model(source, device="cpu"))
    change(folder, vocab_size=320, n_layer=10**7)
    source = SourceOptions(from_scratch_seed=0).resolve(str(folder))
    assert "n_layer 10,000,000 is above 1,000,000" in refusal(lambda: build_model(source, device="cpu"))


def test_construction_itself_is_bounded() -> None:
    """Numbers under any name: the modules are counted as they are registered."""
    from lrsurgery.checkpoints.upstream.construction import Held, bounded

    looks: list[int] = []

    def look() -> Held:
        looks.append(1)
        return Held(tensors=30, parameters=1000, widest=10)

    words = "asks for more than 20,600 modules and parameters, and the weight files hold"
    with pytest.raises(SourceError, match=words), bounded("here", look):
        nn.ModuleList(nn.Identity() for _ in range(10**9))
    looks.clear()
    with bounded("here", look):
        nn.ModuleList(nn.Identity() for _ in range(100))
    assert not looks  # a normal model costs no look at the files
    nn.ModuleList(nn.Identity() for _ in range(30_000))  # and outside of it nothing is counted


# weight files


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x02}", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02" + b"]" * 5000],
    ids=["empty", "text", "cut", "zip", "depth"],
)
def test_a_damaged_pickle_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert refusal(lambda: open_tensors([file])).startswith(f"{file}: ")


def test_a_pickle_that_holds_itself_has_an_end(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(2)}
    state["model"] = state
    torch.save(state, tmp_path / "a.pt")
    assert open_tensors([tmp_path / "a.pt"]).keys() == ["w"]


@pytest.mark.parametrize("kind", ["loop", "folder", "nothing"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file_is_named(kind: str, name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    if kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(name if kind == "loop" else "none")
    assert str(folder / name) in refusal(lambda: resolve(str(folder)))


@pytest.mark.parametrize(
    "index",
    [
        *([], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}}),
        *({"weight_map": {"a": name}} for name in ("a\0.safetensors", "x" * 5000, "../a.bin", "/etc/passwd", "")),
    ],
    ids=["list", "bare", "list of tensors", "number", "none", "nul", "long", "above", "absolute", "empty"],
)
def test_an_index_names_files_of_its_folder(index: object, copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert str(folder) in refusal(lambda: resolve(str(folder)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["low-gpt2", "low-timm"])
def test_a_quantised_factor_is_named_by_every_reader(
    name: str, dtype: torch.dtype, copy: Callable[[str], Path]
) -> None:
    folder = copy(name)
    state = load_file(folder / "model.safetensors")
    key = next(key for key in state if key.endswith(".u.weight"))
    save_file({**state, key: state[key].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    words = f"{key} is quantised ({str(dtype).removeprefix('torch.')})"
    assert words in refusal(lambda: load_model(folder))
    assert words in refusal(lambda: export_dense(folder, folder.with_name("out")))
    assert words in refusal(lambda: open_factorised(resolve(str(folder))))
    assert not folder.with_name("out").exists()


def test_a_quantised_weight_in_a_pickle_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    key = "transformer.h.0.mlp.c_fc.weight"
    torch.save({**state, key: state[key].to(torch.int8)}, folder / "pytorch_model.bin")
    assert f"{key} is quantised (int8)" in refusal(lambda: load_model(folder))


@pytest.mark.parametrize("body", [b'{"eos_token_id": "x", "max_length": [1]}', b"[]", b"{"], ids=["odd", "list", "cut"])
def test_an_odd_file_beside_the_weights_is_the_folders_fault(body: bytes, copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    (folder / "generation_config.json").write_bytes(body)
    try:
        load_model(folder)
    except SourceError as e:
        said = str(e)
    else:
        said = str(folder)
    assert str(folder) in said
