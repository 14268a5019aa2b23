"""Folders with the code of their layers: they load without lrsurgery, compute the same, and are ours to read, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import moe, tiny, zoo
from support.interop import in_its_job
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.export.targets import export
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.shared.modules import SharedLinear

pytestmark = [pytest.mark.process, in_its_job]

# a finder that hides the package, as where it is not installed, whatever .pth files and folders say
WITHOUT = """
import sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "lrsurgery":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden)
try:
    import lrsurgery
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("lrsurgery is there")
"""
COMPUTE = """
import json, pathlib, torch, transformers as tf
from safetensors.torch import load_file, save_file

def compute(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    names = ("logits", "predicted_depth", "audio_values", "last_hidden_state")
    return next(found[name] for name in names if isinstance(getattr(found, name, None), torch.Tensor)).contiguous()

for folder in map(pathlib.Path, sys.argv[1:]):
    inputs, auto = load_file(folder / "inputs.safetensors"), getattr(tf, (folder / "auto").read_text())
    model, told = auto.from_pretrained(folder / "code", trust_remote_code=True, output_loading_info=True)
    assert not any(told.values()), told
    found = {"loaded": compute(model, inputs)}
    model.save_pretrained(folder / "again")
    found["again"] = compute(auto.from_pretrained(folder / "again", trust_remote_code=True), inputs)
    wide = auto.from_pretrained(folder / "code", trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.bfloat16}
    save_file(found, folder / "found.safetensors")
"""

IDS = {"input_ids": torch.arange(16).reshape(2, 8) + 3}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
VISION: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


def _save(model: Callable[[], nn.Module]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        torch.manual_seed(0)
        saved: Any = model()
        saved.save_pretrained(folder)

    return save


def _encodec() -> nn.Module:
    sizes: dict[str, Any] = {"num_filters": 8, "hidden_size": 32, "upsampling_ratios": [4, 2], "codebook_size": 16}
    return tf.EncodecModel(tf.EncodecConfig(**sizes, num_lstm_layers=2, codebook_dim=32))


def _siglip() -> nn.Module:
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION, image_size=32, patch_size=8))


def _dpt() -> nn.Module:
    sizes: dict[str, Any] = {"neck_hidden_sizes": [16, 16, 16, 16], "reassemble_factors": [4, 2, 1, 0.5]}
    config = tf.DPTConfig(**VISION, **sizes, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3])
    config.fusion_hidden_size = 16
    return tf.DPTForDepthEstimation(config)


def _resnet() -> nn.Module:
    config = tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    return tf.ResNetForImageClassification(config)


def _regnet() -> nn.Module:
    config = tf.RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], groups_width=16, num_labels=5)
    return tf.RegNetForImageClassification(config)


def _bit() -> nn.Module:
    config = tf.BitConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, num_labels=5)
    return tf.BitForImageClassification(config)


SHARED: dict[str, Any] = {"rank": None, "budget": 0.4, "loss_check": False, "cache": False}
# name -> what saves the model, its inputs, options of the surgery
CASES: dict[str, tuple[Callable[[Path], Any], dict[str, Tensor], dict[str, Any]]] = {
    "tied table": (tiny.save_gpt2, IDS, {"embeddings": True}),
    "balanced": (tiny.save_gpt2, IDS, {"form": "balanced"}),
    "shared v": (lambda folder: tiny.save_alike(folder, "qwen2"), IDS, SHARED),
    "shared v balanced": (lambda folder: tiny.save_alike(folder, "llama"), IDS, {**SHARED, "form": "balanced"}),
    "weight norm": (_save(lambda: zoo.build_transformers("wav2vec2")), zoo.TRANSFORMERS["wav2vec2"].inputs, {}),
    "video": (_save(lambda: zoo.build_transformers("vivit")), zoo.TRANSFORMERS["vivit"].inputs, {}),
    "experts": (_save(lambda: moe.build("mixtral")), IDS, {}),
    "turned experts": (_save(lambda: moe.build("llama4")), IDS, {}),
    "audio": (_save(_encodec), {"input_values": torch.linspace(-1, 1, 400)[None, None]}, {}),
    "pooling": (_save(_siglip), IMAGES, {}),
    "depth": (_save(_dpt), IMAGES, {"heads": True}),
    "spatial": (_save(_resnet), IMAGES, {"conv": "spatial"}),
    "groups": (_save(_regnet), IMAGES, {}),
    "standardised": (_save(_bit), IMAGES, {}),
}


def to_code(source: Path, output: Path) -> None:
    export(str(source), output, SourceOptions(), OutputOptions(), to="remote-code")


def without_lrsurgery(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT + code, *map(str, words)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case: `dense` (the source), `half`, `code`, and what a process without lrsurgery found."""
    top = tmp_path_factory.mktemp("code")
    for name, (save, inputs, options) in CASES.items():
        folder = top / name
        save(folder / "dense")
        settings = {"rank": 0.5, **options}
        if options.get("budget"):
            data = str(folder / "dense" / "train.txt")
            settings["calibration"] = lrsurgery.Calibration(data=data, samples=16)
        lrsurgery.factorise_checkpoint(folder / "dense", folder / "half", **settings)
        to_code(folder / "half", folder / "code")
        save_file(inputs, folder / "inputs.safetensors")
        config = json.loads((folder / "code" / "config.json").read_text())
        wanted = f"modeling_lowrank.{config['architectures'][0]}"
        (folder / "auto").write_text(next(auto for auto, name in config["auto_map"].items() if name == wanted))
    done = without_lrsurgery(COMPUTE, *(top / name for name in CASES))
    assert done.returncode == 0, done.stderr
    return top


def _compute(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    names = ("logits", "predicted_depth", "audio_values", "last_hidden_state")
    return next(found[name] for name in names if isinstance(getattr(found, name, None), Tensor))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_a_process_without_lrsurgery_computes_what_the_low_rank_model_does(folders: Path, name: str) -> None:
    found, inputs = load_file(folders / name / "found.safetensors"), CASES[name][1]
    low = lrsurgery.load_model(folders / name / "half")
    for each in ("loaded", "again"):  # a convolution rounds by where its tensors lie in memory
        torch.testing.assert_close(found[each], _compute(low, inputs), rtol=1e-6, atol=1e-6)
    # the dense product of each layer in the classes of transformers alone
    lrsurgery.densify_(low)
    dense = _compute(low, inputs)
    assert (dense - found["loaded"]).abs().max() <= 1e-4 * dense.abs().max()


def test_every_kind_and_form_is_among_the_cases(folders: Path) -> None:
    layers = [
        layer for name in CASES for layer in factorised_layers(lrsurgery.load_model(folders / name / "half")).values()
    ]
    assert {layer.kind for layer in layers} == set(KINDS)
    assert {layer.side for layer in layers} == {None, "rows", "columns"}
    assert {layer.side for layer in layers if isinstance(layer, SharedLinear)} == {None, "rows"}
    assert any(layer.tied for layer in layers)
    assert any(layer.folded for layer in layers)
    assert any(layer.groups > 1 for layer in layers)


def test_nothing_in_the_folder_makes_an_installed_lrsurgery_swap_again(folders: Path) -> None:

    folder = folders / "tied table" / "code"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert all(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    model = tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not factorised_layers(model)  # of this package: they are of the folder's code
    inner = [module for module in model.modules() if type(module).__name__.startswith("Factorised")]
    assert len(inner) == len(config["lowrank"]["layers"])
    assert torch.equal(_compute(model, IDS), load_file(folder.parent / "found.safetensors")["loaded"])


@pytest.mark.parametrize("name", ["tied table", "shared v", "audio"])
def test_this_package_reads_the_folder_as_its_own(folders: Path, tmp_path: Path, name: str) -> None:
    folder, inputs = folders / name, CASES[name][1]
    model: Any = lrsurgery.load_model(folder / "code")
    assert type(model).__module__.startswith("transformers.models.")  # no code of the folder was run
    wanted = load_file(folder / "found.safetensors")["loaded"]
    assert torch.equal(_compute(model, inputs), wanted)
    model.save_pretrained(tmp_path / "back")
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "lrsurgery"
    )
    assert torch.equal(_compute(lrsurgery.load_model(tmp_path / "back"), inputs), wanted)
    lrsurgery.export_dense(folder / "code", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"auto_map", "lowrank", "quantization_config"} & set(config)
    assert not (tmp_path / "dense" / "modeling_lowrank.py").exists()
    dense = _compute(type(model).from_pretrained(tmp_path / "dense"), inputs)
    assert (dense - wanted).abs().max() <= 1e-4 * wanted.abs().max()


REFUSED = """
import transformers as tf
for auto in (tf.AutoModelForCausalLM, tf.AutoModel, tf.AutoConfig):
    try:
        auto.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as e:
        assert "trust_remote_code=True" in str(e), e
    else:
        raise SystemExit(f"{auto.__name__} loads random layers")
whole = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
base = tf.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
import torch
ids = torch.arange(8)[None]
assert torch.equal(base(ids).last_hidden_state, whole.transformer(ids).last_hidden_state)
base.save_pretrained(sys.argv[2])
again = tf.AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
assert torch.equal(base(ids).last_hidden_state, again(ids).last_hidden_state)
assert whole.transformer.wte.u.weight is whole.lm_head.u.weight
assert whole.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
whole.resize_token_embeddings(330)
assert whole(ids).logits.shape == (1, 8, 330)
try:
    tf.AutoModelForCausalLM.from_config(whole.config, trust_remote_code=True)
except Exception as e:
    assert "use from_pretrained" in str(e), e
else:
    raise SystemExit("from_config has no weights for the layers")
print("done")
"""


def test_without_trust_nothing_loads_and_with_it_all_else_works(folders: Path, tmp_path: Path) -> None:
    done = without_lrsurgery(REFUSED, folders / "tied table" / "code", tmp_path / "base")
    assert done.stdout.endswith("done\n"), done.stderr


def test_factorise_writes_the_same_folder(folders: Path, tmp_path: Path) -> None:
    folder = folders / "balanced"
    done = tiny.run(
        *("factorise", folder / "dense", "--rank", "0.5", "--form", "balanced", "--remote-code", "--no-loss-check"),
        *("--output", tmp_path / "code", "--quiet"),
    )
    assert done == 0
    for name in ("config.json", "modeling_lowrank.py"):
        assert (tmp_path / "code" / name).read_text() == (folder / "code" / name).read_text(), name
    one, other = (load_file(place / "model.safetensors") for place in (tmp_path / "code", folder / "code"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    card = (tmp_path / "code" / "README.md").read_text()
    assert "import lrsurgery" not in card
    assert "trust_remote_code=True" in card


def test_a_timm_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_timm(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5)
    assert tiny.run("export", tmp_path / "half", "--to", "remote-code", "--output", tmp_path / "code") == 2
    assert (
        "a timm model, and remote code is for transformers' Auto classes; export it --to dense"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "code").exists()
