"""Layers that a model holds beside its registered children, against the same model without surgery."""

from __future__ import annotations

import functools
import re
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from support.checks import assert_close, load
from torch import Tensor, nn

import lrsurgery
from lrsurgery.errors import PlanError, RankError, SurgeryError
from lrsurgery.modules import model_faults
from lrsurgery.surgery.apply import replace_module_

Pair = namedtuple("Pair", "layer name")


class Model(nn.Module):
    """A layer that is called through whatever `hold` makes of it."""

    def __init__(self, hold: Callable[[nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 24)
        self.held = hold(self.layer)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


def hidden(layer: nn.Module) -> Any:
    """A container that is no registered child."""
    return [nn.Sequential(layer)]


def closure(layer: nn.Module) -> Any:
    def call(x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    return call


REPLACED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, Tensor], Tensor]]] = {
    "list": (lambda layer: [layer], lambda held, x: held[0](x)),
    "dict": (lambda layer: {"a": layer}, lambda held, x: held["a"](x)),
    "tuple": (lambda layer: (1, layer), lambda held, x: held[1](x)),
    "named tuple": (lambda layer: Pair(layer, "a"), lambda held, x: held.layer(x)),
    "lists in dicts": (lambda layer: {"a": [(layer, layer)]}, lambda held, x: held["a"][0][1](x)),
    "another object": (lambda layer: SimpleNamespace(layer=layer), lambda held, x: held.layer(x)),
    "weak reference": (weakref.ref, lambda held, x: held()(x)),
    "weak proxy": (weakref.proxy, lambda held, x: held(x)),
    "closure": (closure, lambda held, x: held(x)),
    "hidden container": (hidden, lambda held, x: held[0](x)),
    "keyword of a partial function": (
        lambda layer: functools.partial(lambda x, f: f(x), f=layer),
        lambda held, x: held(x),
    ),
}
KEPT: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, Tensor], Tensor]]] = {
    "a bound method": (lambda layer: layer.forward, lambda held, x: held(x)),
    "a set": (lambda layer: {layer}, lambda held, x: next(iter(held))(x)),
    "a partial function": (functools.partial, lambda held, x: held(x)),
}


@pytest.mark.parametrize("way", REPLACED)
def test_layer_is_replaced_where_it_is_held(way: str) -> None:
    torch.manual_seed(0)
    model, x = Model(*REPLACED[way]), torch.randn(3, 16)
    dense = model(x)
    lrsurgery.factorise_(model, rank=2)
    u, v = model.layer.u, model.layer.v  # type: ignore[union-attr]
    assert_close(model(x), x @ v.weight.T @ u.weight.T + u.bias, 1e-5)  # type: ignore[union-attr, operator]
    assert not torch.allclose(model(x), dense, atol=1e-3)
    lrsurgery.densify_(model)
    assert_close(model(x), nn.functional.linear(x, model.layer.weight, model.layer.bias), 1e-5)


@pytest.mark.parametrize("way", KEPT)
def test_layer_that_cannot_be_replaced_stays_dense_with_the_reason(way: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Model(*KEPT[way]), nn.Linear(24, 16)), torch.randn(3, 16)
    dense, weight = model[0](x), model[0].layer.weight
    lrsurgery.factorise_(model, rank=2)
    assert torch.equal(model[0](x), dense)
    assert model[0].layer.weight is weight
    reasons = {row.name: row.reason for row in lrsurgery.rank_report(model).rows}
    assert reasons["0.layer"] == f"also held by {way}, 0.held"
    assert model[1].rank == 2
    with pytest.raises(PlanError, match=rf"^0\.layer: also held by {way}, 0\.held, so it cannot be replaced"):
        replace_module_(model, model[0].layer, nn.Linear(16, 24))


def test_reference_of_a_layer_to_itself_is_no_obstacle() -> None:
    """As accelerate's hooks keep a module's own forward on it."""
    model = nn.Sequential(nn.Linear(16, 24))
    model[0]._old_forward = model[0].forward  # type: ignore[assignment]
    lrsurgery.factorise_(model, rank=2)
    assert model[0].rank == 2


def test_watching_a_layer_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    layer = model[1]
    model[0].register_forward_hook(lambda *_: layer.weight)  # type: ignore[arg-type, return-value]
    lrsurgery.factorise_(model, rank=2)
    assert (model[0].rank, model[1].rank) == (2, 2)


def small_maskformer() -> Any:
    torch.manual_seed(0)
    swin = tf.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    resnet = tf.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage4"],
    )
    decoder = tf.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=resnet,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    )
    config = tf.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=swin, decoder_config=decoder
    )
    return tf.MaskFormerForInstanceSegmentation(config).eval()


def test_maskformer_in_memory_and_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prediction heads and its pyramid call layers through plain lists."""
    # its loss, which is not computed here, asks for scipy
    monkeypatch.setattr(tf.models.maskformer.modeling_maskformer, "requires_backends", lambda *_: None)
    model = small_maskformer()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def masks(module: Any) -> Tensor:
        with torch.no_grad():
            return module(pixel_values=pixels).masks_queries_logits  # type: ignore[no-any-return]

    dense = masks(model)
    model.save_pretrained(tmp_path / "dense")
    which = ["*mask_embedder*", "*fpn*"]
    lrsurgery.factorise_(model, rank="0.1", include=which)
    wanted = masks(model)
    assert (wanted - dense).abs().max() > 1e-3 * dense.abs().max()
    model.save_pretrained(tmp_path / "low")
    assert torch.equal(masks(load(type(model), tmp_path / "low")), wanted)
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "files", rank="0.1", include=which, form="balanced")
    assert torch.equal(masks(load(type(model), tmp_path / "files")), wanted)
    back = load(type(model), tmp_path / "low")
    lrsurgery.densify_(back)
    assert_close(masks(back), wanted, 1e-4)


# what the code of a model raises


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("odd\nsize"), IndexError("out of range"), KeyError("x")], ids=repr)
def test_what_a_forward_pass_raises_names_the_model(error: Exception) -> None:
    with pytest.raises(SurgeryError) as e, model_faults("models/mine"):
        nn.Sequential(nn.Identity(), Failing(error))(torch.ones(1))
    said = " ".join(str(error).split())
    assert str(e.value).startswith(f"models/mine: the model cannot work on this data: {type(error).__name__}: {said}; ")


def test_other_faults_stay_what_they_are() -> None:
    """Those beside a forward pass, those of this package within one, as in a hook, and a lack of memory."""
    with pytest.raises(ValueError, match=r"^beside$"), model_faults("mine"):
        raise ValueError("beside")
    for error in (RankError("ours"), torch.OutOfMemoryError("full"), OSError(28, "No space left")):
        with pytest.raises(type(error)) as e, model_faults("mine"):
            Failing(error)(torch.ones(1))
        assert e.value is error
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: replace_module_(None, "x", layer))  # type: ignore[arg-type]
    with pytest.raises(AttributeError), model_faults("mine"):
        nn.Sequential(layer)(torch.ones(2))


def test_a_factorised_layer_is_of_its_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    lrsurgery.factorise_(model, rank=4)
    with pytest.raises(RuntimeError) as told:
        nn.Linear(64, 4, bias=False)(torch.ones(1, 3))
    with pytest.raises(SurgeryError, match=re.escape(str(told.value))), model_faults("mine"):
        model(torch.ones(1, 3))
