"""`prepare_for_inference_`: the same model, laid out otherwise in memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

import lrsurgery

IDS = torch.arange(12).reshape(2, 6)


def gpt2(form: str) -> PreTrainedModel:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    return factorised(AutoModelForCausalLM.from_config(config), form)


def llama(form: str) -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return factorised(AutoModelForCausalLM.from_config(config), form)


def factorised(model: PreTrainedModel, form: str) -> PreTrainedModel:
    if form != "dense":
        lrsurgery.factorise_(model, rank=0.25, form=form)
    return model.eval()


MODELS = {
    f"{make.__name__}, {form}": (make, form) for make in (gpt2, llama) for form in ("dense", "balanced", "pivoted")
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    make, form = MODELS[request.param]
    return make(form)


def lies_across(weight: torch.Tensor) -> bool:
    return weight.stride(int(weight.shape[0] <= weight.shape[1])) != 1


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of linear layers and Conv1D, by name."""
    return {
        f"{name}.weight": layer.weight
        for name, layer in model.named_modules()
        if type(layer).__name__ in ("Linear", "Conv1D")
    }


def test_weights_lie_along_their_longer_side_and_nothing_else_changes(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = model(IDS).logits
    across = {name for name, weight in matrices(model).items() if lies_across(weight)}
    changed = lrsurgery.prepare_for_inference_(model)
    assert across
    assert set(changed) == across
    assert not any(lies_across(weight) for weight in matrices(model).values())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert lrsurgery.prepare_for_inference_(model) == []


def test_a_prepared_model_saves_and_loads_as_before(model: PreTrainedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    lrsurgery.prepare_for_inference_(model)
    model.save_pretrained(tmp_path / "prepared")
    digests = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("before", "prepared")]
    assert digests[0] == digests[1]
    fresh = pickle.loads(pickle.dumps(model))
    fresh.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    assert all(torch.equal(before[name] + 1, tensor) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_a_prepared_model_saves_through_our_function(form: str, tmp_path: Path) -> None:
    model = llama(form)
    lrsurgery.prepare_for_inference_(model)
    lrsurgery.save_model(model, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_model_as_it_was(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    lrsurgery.prepare_for_inference_(other)
    for each in (model, other):
        each(IDS, labels=IDS).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_other_classes_and_devices_stay() -> None:
    class Own(nn.Linear):
        pass

    with torch.device("meta"):
        away = nn.Linear(4, 8)
    model = nn.ModuleDict({"own": Own(4, 8), "away": away, "wide": nn.Linear(8, 4), "conv": nn.Conv2d(3, 8, 1)})
    assert lrsurgery.prepare_for_inference_(model) == []
    assert lrsurgery.prepare_for_inference_(nn.Linear(4, 8)) == ["weight"]
