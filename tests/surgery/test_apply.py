"""Surgery on modules in memory: aliases, hand-written models, transformers models that save themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

import lrsurgery
import lrsurgery.checkpoints.quantizer.method
from lrsurgery.checkpoints.upstream.forms import FORMAT_VERSION
from lrsurgery.errors import PlanError, WeightError
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.layers import Spec


def test_every_alias_of_a_shared_module_is_replaced() -> None:
    shared = nn.Linear(16, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(64, 4))})
    lrsurgery.factorise_(model, rank=2)
    assert model["a"][0] is model["b"][0]  # type: ignore[index]
    assert model["a"][0].rank == 2  # type: ignore[index]


def test_hand_written_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16()
    lrsurgery.factorise_(model, rank="energy:0.8")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(3, 32).bfloat16()).shape == (3, 32)


def test_energy_rank_matches_lapack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 90))
    squares = torch.linalg.svdvals(model[0].weight.detach().double()).square()
    wanted = int((squares.cumsum(0) / squares.sum() < 0.6).sum()) + 1
    lrsurgery.factorise_(model, rank="energy:0.6")
    assert model[0].rank == wanted


def test_torchvision_model_keeps_its_outputs_at_full_rank() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        lrsurgery.factorise_(model, rank=1.0, allow_larger=True, conv="spatial")
        assert factorised_layers(model)
        assert (model(x) - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_transformer_encoder_fast_path_still_works() -> None:
    """torch's own encoder layer reads `linear1.weight` instead of calling the layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = layer(x)
        lrsurgery.factorise_(layer, rank=1.0, allow_larger=True)
        assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_nan_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    with pytest.raises(WeightError, match=r"^1: .*NaN or Inf"):
        lrsurgery.factorise_(model, rank=0.5)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 64))
    with pytest.raises(PlanError, match="meta device"):
        lrsurgery.factorise_(model, rank=0.5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"9": Spec("linear", 2)}, "9: this Sequential has no such layer"),
        ({"0": Spec("lstm", 2)}, "0: unknown kind 'lstm'"),
        ({"0": Spec("conv2d-channel", 2)}, "0: a Linear cannot become a conv2d-channel layer"),
        ({"0": Spec("linear", 8, "rows")}, "0: a Linear of rank 8 has no pivots among its rows"),
    ],
    ids=["no such layer", "unknown kind", "wrong kind", "pivots at full rank"],
)
def test_swap_refuses_what_does_not_fit(layers: dict[str, Spec], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        swap_(nn.Sequential(nn.Linear(8, 64)), layers)


def test_base_model_loads_from_head_checkpoint_and_the_reverse(tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("bert")
    lrsurgery.factorise_(model, rank=0.5)
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(factorised_layers(base)) == {name.removeprefix("bert.") for name in factorised_layers(model)}
    hidden = base(zoo.IDS).last_hidden_state
    assert torch.equal(hidden, model.bert(zoo.IDS).last_hidden_state)

    base.save_pretrained(tmp_path / "base")
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert all(key.startswith("cls.") for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert torch.equal(again.bert(zoo.IDS).last_hidden_state, hidden)


def test_densified_model_saves_as_an_ordinary_one(tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("gpt2")
    lrsurgery.factorise_(model, rank=0.5)
    lrsurgery.densify_(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(zoo.IDS).logits, model(zoo.IDS).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_dtype_and_device_map_reach_the_factors(dtype: str, tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("llama")
    lrsurgery.factorise_(model, rank=0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    layers = factorised_layers(loaded)
    assert layers
    assert all(layer.u.weight.dtype == layer.v.weight.dtype == wanted for layer in layers.values())
    assert loaded(zoo.IDS).logits.dtype == wanted


def test_pipeline_runs_on_a_factorised_folder(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessor

    zoo.save_transformers("vit", tmp_path / "dense")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5)
    from PIL import Image

    classify = pipeline("image-classification", model=str(tmp_path / "half"))
    assert isinstance(classify.model, ViTForImageClassification)
    assert factorised_layers(classify.model)
    (best, _) = classify(Image.new("RGB", (40, 40), (200, 30, 90)))
    assert 0 <= best["score"] <= 1


def test_timm_model_in_its_wrapper_saves_timm_names(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    zoo.save_timm("resnet18", tmp_path / "timm")
    # what timm itself writes, the wrapper cannot read (num_classes twice); what we export, it can
    lrsurgery.factorise_checkpoint(tmp_path / "timm", tmp_path / "low", rank=0.9)
    lrsurgery.export_dense(tmp_path / "low", tmp_path / "dense")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    lrsurgery.factorise_(model, rank=0.5)
    model.save_pretrained(tmp_path / "half")
    module = lrsurgery.load_model(tmp_path / "half")
    names = {name.removeprefix("timm_model.") for name in factorised_layers(model)}
    assert set(factorised_layers(module)) == names
    pixels = zoo.images("resnet18")
    assert torch.allclose(module(pixels), model(pixels).logits, atol=1e-5)


def test_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    import json

    model: Any = zoo.build_transformers("llama")
    lrsurgery.factorise_(model, rank=0.5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lrsurgery.SurgeryError, match="newer than this lrsurgery reads"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
