"""Weights as others save them: wrapped, quantised, of odd dtypes; configs by hand; heads that a base model lacks."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import tiny, zoo
from support.checks import assert_same_layers, load, run
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.source import resolve
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.data.tasks import task_of
from lrsurgery.errors import PlanError, SourceError
from lrsurgery.surgery.apply import factorised_layers

State = dict[str, Tensor]
NETWORK = "test_resnet"
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NETWORK, num_classes=3).eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


# what is saved, and what the note names
WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "compiled, then DDP": (lambda s: prefixed("module._orig_mod.", s), "'module._orig_mod.'"),
    "DDP, then compiled": (lambda s: prefixed("_orig_mod.module.", s), "'_orig_mod.module.'"),
    "Lightning": (lambda s: {"state_dict": prefixed("model.", s), "epoch": 3}, "state_dict, 'model.'"),
    "Lightning with a loss": (
        lambda s: {"state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(3)}},
        "state_dict, 'model.', which was taken off; left out beside them: criterion.weight",
    ),
    "Lightning, compiled": (
        lambda s: {"state_dict": prefixed("model._orig_mod.", s)},
        "state_dict, 'model._orig_mod.'",
    ),
    "averaged": (lambda s: {"model_ema": {"module": s, "decay": 0.9}, "model": other(s)}, "model_ema.module"),
    "averaged beside trained": (
        lambda s: {"state_dict": {**prefixed("model.", other(s)), **prefixed("ema_model.module.", s)}},
        "state_dict, 'ema_model.module.'",
    ),
    "entry in an entry": (lambda s: {"model": {"state_dict": prefixed("module.", s)}}, "model.state_dict, 'module.'"),
    "numbers of numpy": (lambda s: {"state_dict": s, "epoch": np.float64(3), "order": np.arange(3)}, "state_dict"),
    "averages of BasicSR": (
        lambda s: {"params": other(s), "params_ema": s},
        "params_ema, which was taken off; left out beside them: params",
    ),
    "counters of an average": (
        lambda s: {"model": s, "ema": {"decay": torch.tensor(0.9), "num_updates": torch.tensor(7)}},
        "model, which was taken off",
    ),
    "parts compiled": (
        lambda s: {key.replace(".0.", "._orig_mod.0.", 1): value for key, value in s.items()},
        "'_orig_mod.' within names, which was taken off",
    ),
    "FSDP, of parts and all": (
        lambda s: prefixed(
            "_fsdp_wrapped_module.",
            {re.sub(r"^(layer\d|fc)\.", r"\1._fsdp_wrapped_module.", key): value for key, value in s.items()},
        ),
        "'_fsdp_wrapped_module.' within names, '_fsdp_wrapped_module.'",
    ),
    "activation checkpointing under DDP": (
        lambda s: {f"module.{re.sub(r'^layer1', 'layer1._checkpoint_wrapped_module', k)}": v for k, v in s.items()},
        "'_checkpoint_wrapped_module.' within names, 'module.'",
    ),
    "options of a script": (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)}, "state_dict"),
}


@pytest.mark.parametrize("ending", [".pth", ".th", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_weight_file(wrap: str, ending: str, tmp_path: Path) -> None:
    if ending != ".pth" and wrap != "averaged":
        pytest.skip("each ending once")
    dense, (change, named) = network(), WRAPPED[wrap]
    torch.save(change(dense.state_dict()), tmp_path / f"best{ending}")
    made = run(
        *("factorise", tmp_path / f"best{ending}", "--architecture", NETWORK),
        *("--rank", "0.5", "--output", tmp_path / "half"),
    )
    (note,) = [note for note in made["notes"] if "wrapped" in note]
    assert f"wrapped in {named}" in note
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    with torch.no_grad():
        assert torch.equal(lrsurgery.load_model(tmp_path / "half")(PIXELS), dense(PIXELS))


def test_plain_weights_get_no_note(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "best.pth.tar")
    made = run(
        *("factorise", tmp_path / "best.pth.tar", "--architecture", NETWORK, "--rank", "0.5"),
        *("--output", tmp_path / "half"),
    )
    assert not [note for note in made["notes"] if "wrapped" in note]
    assert resolve(str(tmp_path / "best.pth.tar"), architecture=NETWORK).name == "best"


@pytest.mark.parametrize("plain_first", [True, False])
def test_a_second_set_of_weights_is_named(plain_first: bool, tmp_path: Path) -> None:
    dense = network()
    sets = [dense.state_dict(), prefixed("module.", other(dense.state_dict()))]
    torch.save({**sets[not plain_first], **sets[plain_first]}, tmp_path / "two.pth")
    made = run(
        *("factorise", tmp_path / "two.pth", "--architecture", NETWORK, "--rank", "0.5"),
        *("--output", tmp_path / "half"),
    )
    (note,) = [note for note in made["notes"] if "left out beside the weights: module." in note]
    assert note.endswith(f" and {len(dense.state_dict()) - 3} more")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    with torch.no_grad():
        assert torch.equal(lrsurgery.load_model(tmp_path / "half")(PIXELS), dense(PIXELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {"student": s, "teacher": s, "epoch": 3},
            "holds 2 state dicts in 'student', 'teacher', which are no entry that is known for the model's weights;"
            " save the one that is wanted by itself: torch.save(torch.load(FILE)['student'], NEW)",
        ),
        (
            lambda s: {"generator": {"state_dict": s}, "discriminator": s},
            "2 state dicts in 'generator', 'discriminator'",
        ),
        (lambda s: {"encoder": s, "step": torch.tensor(3)}, "holds a state dict in 'encoder', which is no entry"),
        (lambda s: {"epoch": 3, "loss": torch.tensor(0.1)}, "holds no state dict, but a dict of 'epoch', 'loss'; save"),
        (lambda s: [1, 2], "holds no state dict, but a list; save the model's state_dict()"),
    ],
    ids=["student and teacher", "two networks", "one of an unknown name", "none", "a list"],
)
def test_entries_of_unknown_names_are_named(change: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    torch.save(change(network().state_dict()), tmp_path / "best.pth")
    with pytest.raises(SourceError) as e:
        open_tensors([tmp_path / "best.pth"])
    assert str(e.value).startswith(f"{tmp_path / 'best.pth'}: ")
    assert message in str(e.value)


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    state = {key: value.contiguous().clone() for key, value in change(load_file(folder / "model.safetensors")).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "module.model."])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_wrapped_transformers_folder(name: str, prefix: str, tmp_path: Path) -> None:
    model = zoo.save_transformers(name, tmp_path / "dense")
    rewrite(tmp_path / "dense", lambda state: prefixed(prefix, state))
    inputs = zoo.TRANSFORMERS[name].inputs
    assert torch.equal(zoo.outputs(lrsurgery.load_model(tmp_path / "dense"), inputs), zoo.outputs(model, inputs))
    made = run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    # of Llama's own prefix transformers takes another one off by itself
    named = prefix.removesuffix("model.") if name == "llama" else prefix
    assert any(f"wrapped in '{named}'" in note for note in made["notes"]) or not named
    lrsurgery.factorise_(model, rank=0.5, form="pivoted")
    half = load(type(model), tmp_path / "half")
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(model, inputs))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("around", ["_orig_mod", "_fsdp_wrapped_module"])
def test_transformers_folder_with_wrapped_blocks(name: str, around: str, tmp_path: Path) -> None:
    model = zoo.save_transformers(name, tmp_path / "dense")
    block = re.compile(r"\b(h|layers)\.(\d)\.")
    rewrite(tmp_path / "dense", lambda s: {block.sub(rf"\1.\2.{around}.", key): value for key, value in s.items()})
    assert sum(around in key for key in load_file(tmp_path / "dense" / "model.safetensors")) > 10
    inputs = zoo.TRANSFORMERS[name].inputs
    assert torch.equal(zoo.outputs(lrsurgery.load_model(tmp_path / "dense"), inputs), zoo.outputs(model, inputs))
    made = run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    assert any(f"wrapped in '{around}.' within names" in note for note in made["notes"])
    lrsurgery.factorise_(model, rank=0.5, form="pivoted")
    half = load(type(model), tmp_path / "half")
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(model, inputs))


def test_every_command_reads_wrapped_weights_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle's entries, into which transformers itself does not look, with a wrapper's prefix inside."""
    tiny.write_text(tmp_path)
    dense, folder = tiny.save_gpt2(tmp_path / "dense"), tmp_path / "folder"
    shutil.copytree(dense, folder)
    state, named = load_file(folder / "model.safetensors"), "model_ema.module, 'model.'"
    (folder / "model.safetensors").unlink()
    averaged = prefixed("model.", {key: value.clone() for key, value in state.items()})
    torch.save({"model": other(averaged), "model_ema": {"module": averaged}}, folder / "pytorch_model.bin")
    data = ["--data", tmp_path / "valid.txt"]
    values = run("evaluate", dense, *data)["models"][0]["values"]
    found = run("evaluate", folder, *data)["models"][0]
    assert found["values"] == values
    assert any(f"weights are wrapped in {named}" in note for note in found["notes"])
    half = run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half")
    reported = run("report", folder, "--rank", "0.5")
    timed = run("bench", folder, "--seconds", "0.01", "--batch", "1", "--length", "4", "--new-tokens", "0")
    for told in (half, reported, timed):
        assert any(f"weights are wrapped in {named}" in note for note in told["notes"])
    model = tf.AutoModelForCausalLM.from_pretrained(dense)
    assert_same_layers(load(tf.GPT2LMHeadModel, tmp_path / "half"), half_of(model))
    rows = [{"text": "the cat", "label": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    head = ["--task", "sequence-classification", "--new-head", "--dense", "--lr", "1e-9", "--steps", "1"]
    more = [*head, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    assert tiny.run("finetune", folder, *more) == 0
    assert f"weights are wrapped in {named}" in capsys.readouterr().err
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in state.items():
        if key in trained:
            torch.testing.assert_close(trained[key], value)
    assert len(trained.keys() & state.keys()) > 20


def half_of(model: nn.Module) -> nn.Module:
    """The dense model with what surgery leaves of each of its layers."""
    lrsurgery.factorise_(model, rank="0.5", form="pivoted")
    lrsurgery.densify_(model)
    return model


# dtypes


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("command", ["factorise", "report", "load"])
def test_quantised_weights_without_a_config_are_refused(dtype: torch.dtype, command: str, tmp_path: Path) -> None:
    zoo.save_transformers("gpt2", tmp_path / "dense")
    which = "transformer.h.0.mlp.c_fc.weight"
    rewrite(tmp_path / "dense", lambda s: {**s, which: s[which].mul(100).to(dtype), f"{which}_scale": torch.ones(1)})
    name = str(dtype).removeprefix("torch.")
    wanted = rf"{which} is quantised \({name}\), and config\.json has no quantization_config"
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: lrsurgery.load_model(tmp_path / "dense"),
        "report": lambda: run("report", tmp_path / "dense"),
        "factorise": lambda: run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half"),
    }
    with pytest.raises(SourceError, match=wanted):
        uses[command]()


@pytest.mark.parametrize(
    ("last", "more", "who"),
    [("qweight", ("qzeros", "g_idx"), "GPTQ or AWQ"), ("weight_packed", ("weight_shape",), "compressed-tensors")],
)
@pytest.mark.parametrize("command", ["factorise", "report", "load", "finetune"])
def test_packed_weights_without_a_config_are_refused(
    last: str, more: tuple[str, ...], who: str, command: str, tmp_path: Path
) -> None:
    folder, which = tiny.save_gpt2(tmp_path / "dense"), "transformer.h.0.mlp.c_fc"
    data, _ = tiny.write_text(tmp_path)

    def pack(state: State) -> State:
        weight = state.pop(f"{which}.weight")
        state[f"{which}.{last}"] = torch.zeros(weight.shape[0] // 8, weight.shape[1], dtype=torch.int32)
        state[f"{which}.scales"] = torch.ones(1, weight.shape[1], dtype=torch.float16)
        return {**state, **{f"{which}.{each}": torch.zeros(1, 4, dtype=torch.int32) for each in more}}

    rewrite(folder, pack)
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: lrsurgery.load_model(folder),
        "report": lambda: run("report", folder),
        "factorise": lambda: run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half"),
        "finetune": lambda: run(
            *("finetune", folder, "--data", data, "--dense", "--steps", "1", "--task", "sequence-classification"),
            *("--new-head", "--output", tmp_path / "half"),
        ),
    }
    if command == "finetune":
        tiny.write_sentences(data := tmp_path / "rows.jsonl")
    wanted = rf"{which}\.{last} is quantised \({who} layout\), .*start from the checkpoint before quantisation"
    with pytest.raises(SourceError, match=wanted):
        uses[command]()
    assert not (tmp_path / "half").exists()


def test_a_tensor_that_does_not_fit_says_what_to_do(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "three.pth")
    state = {**network().state_dict(), "fc.weight": torch.ones(3, 7)}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        SourceError, match=r"fc\.weight has shape \(3, 7\), the model wants .*; name the --architecture"
    ):
        run("factorise", tmp_path / "odd.pth", "--architecture", NETWORK, "--rank", "0.5", "--output", tmp_path / "o")
    folder, key = tiny.save_gpt2(tmp_path / "gpt2"), "transformer.h.0.mlp.c_fc.weight"
    rewrite(folder, lambda s: {**s, key: torch.ones(3, 5)})
    for use in (lrsurgery.load_model, lambda each: run("factorise", each, "--rank", "0.5", "--output", tmp_path / "o")):
        with pytest.raises(
            SourceError, match=r"has shape \(3, 5\), the model wants \(32, 128\); take the config\.json and"
        ):
            use(folder)
    rewrite(folder, lambda s: {name: value for name, value in s.items() if name != key})
    for use in (lrsurgery.load_model, lambda each: run("factorise", each, "--rank", "0.5", "--output", tmp_path / "o")):
        with pytest.raises(
            SourceError, match=r"c_fc\.weight is missing from the checkpoint; take the config\.json and"
        ):
            use(folder)


def test_quantised_weights_of_a_timm_folder_are_refused(tmp_path: Path) -> None:
    tiny.save_timm(tmp_path / "dense")
    rewrite(tmp_path / "dense", lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.int8)})
    for use in (
        lrsurgery.load_model,
        lambda folder: run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "o"),
    ):
        with pytest.raises(SourceError, match=r"fc\.weight is quantised \(int8\)"):
            use(tmp_path / "dense")


def test_integer_buffers_are_no_quantised_weights(tmp_path: Path) -> None:
    """GPT-2's causal masks, which its model does not use, are bytes in old files."""
    zoo.save_transformers("gpt2", tmp_path / "dense")
    mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    rewrite(tmp_path / "dense", lambda state: {**state, "transformer.h.0.attn.bias": mask})
    lrsurgery.load_model(tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_odd_dtypes_pass_through(dtype: torch.dtype, tmp_path: Path) -> None:
    model = zoo.save_transformers("gpt2", tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "model.safetensors").unlink()
    extra = torch.arange(3).to(dtype)
    torch.save({**state, "freqs": extra}, tmp_path / "dense" / "pytorch_model.bin")
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")["freqs"], extra)
    lrsurgery.factorise_(model, rank=0.5, form="pivoted")
    inputs = zoo.TRANSFORMERS["gpt2"].inputs
    assert torch.equal(zoo.outputs(lrsurgery.load_model(tmp_path / "half"), inputs), zoo.outputs(model, inputs))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(3).to_sparse(), r"freqs is a sparse tensor, which is not supported"),
        (torch.ones(3, dtype=torch.complex128), r"freqs has dtype complex128, which is not supported"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"freqs is quantised \(qint8\)"),
    ],
    ids=["sparse", "complex128", "qint8"],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(value: Tensor, message: str, tmp_path: Path) -> None:
    zoo.save_transformers("gpt2", tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "model.safetensors").unlink()
    torch.save({**state, "freqs": value}, tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=message):
        run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")


# configs


OURS = {"quant_method": "lrsurgery", "format_version": 1}


def edit(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": [1]}, r"quantization_config: input should be an object, not \[1\]"),
        ({"quantization_config": {**OURS}}, r"quantization_config\.layers must map"),
        (
            {"quantization_config": {**OURS, "layers": {"lm_head": {"kind": "linear"}}}},
            r"quantization_config\.layers must map",
        ),
        ({"architectures": "GPT2LMHeadModel"}, r'architectures: input should be a valid (array|list), not "GPT2LMHead'),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantised with awq"),
        ({"text_config": {"quantization_config": 3}}, "quantization_config must be an object, not 3"),
    ],
    ids=["list", "no layers", "no rank", "text", "inner", "inner number"],
)
def test_config_that_is_broken_or_quantised_is_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    zoo.save_transformers("gpt2", tmp_path / "dense")
    edit(tmp_path / "dense", **entries)

    commands = {"factorise": ["--rank", "0.5", "--output", tmp_path / "half"]}
    if "awq" not in message:  # transformers runs that
        tiny.write_text(tmp_path)
        data, output = tmp_path / "train.txt", tmp_path / "out"
        commands |= {"report": [], "bench": [], "evaluate": ["--data", data]}
        commands |= {"finetune": ["--data", data, "--steps", "1", "--output", output]}
    for command, more in commands.items():
        with pytest.raises(SourceError, match=message) as caught:
            run(command, tmp_path / "dense", *more)
        assert "\n" not in str(caught.value)
        assert "config.json: " in str(caught.value) or "awq" in message
    assert {file.name for file in tmp_path.iterdir()} <= {"dense", "train.txt", "valid.txt"}


def test_architectures_of_null_stay_null(tmp_path: Path) -> None:
    dense = tiny.save_gpt2(tmp_path / "dense")
    edit(dense, architectures=None)
    run("factorise", dense, "--rank", "0.5", "--output", tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["architectures"] is None
    head = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert isinstance(head, tf.GPT2LMHeadModel)
    assert factorised_layers(head)


# base models on checkpoints whose heads are factorised


def rt_detr() -> Any:
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = tf.RTDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=6,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=4,
    )
    return tf.RTDetrForObjectDetection(config)


def speech_t5() -> Any:
    config = tf.SpeechT5Config(
        vocab_size=40,
        hidden_size=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        speech_decoder_prenet_units=16,
        speaker_embedding_dim=8,
        speech_decoder_postnet_units=16,
        num_mel_bins=8,
    )
    return tf.SpeechT5ForTextToSpeech(config)


def blip() -> Any:
    text = {**zoo.BERT, "encoder_hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    vision = {**zoo.VIT, "image_size": 32, "patch_size": 8}
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=vision, projection_dim=24))


@pytest.mark.parametrize("build", [rt_detr, speech_t5, blip], ids=["rt-detr", "speecht5", "blip"])
def test_base_model_leaves_out_factorised_layers_of_the_head(build: Callable[[], Any], tmp_path: Path) -> None:
    """As transformers leaves out their dense ones: the same tensors are loaded, and the same are missing."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "dense")
    base, dense = tf.AutoModel.from_pretrained(tmp_path / "dense", output_loading_info=True)
    lrsurgery.factorise_(model, rank=0.5, include=["*"], allow_larger=True)
    heads = set(factorised_layers(model))
    model.save_pretrained(tmp_path / "half")
    low, info = tf.AutoModel.from_pretrained(tmp_path / "half", output_loading_info=True)
    inside = {name for name, _ in base.named_modules()}
    prefix = base.base_model_prefix + "."
    kept = {name for name in heads if name in inside or name.removeprefix(prefix) in inside}
    assert len(factorised_layers(low)) == len(kept) < len(heads)
    dropped = tuple(f"{name}.{part}" for name in factorised_layers(low) for part in ("u.", "v."))
    assert {k for k in info["missing_keys"] if not k.startswith(dropped)} <= dense["missing_keys"]
    assert not {k for k in info["missing_keys"] if k.startswith(dropped)} or dense["missing_keys"]


def test_layer_that_the_checkpoints_own_class_lacks_is_an_error(tmp_path: Path) -> None:
    model: Any = zoo.build_transformers("gpt2")
    lrsurgery.factorise_(model, rank=0.5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["transformer.h.7.mlp.c_fc"] = {"kind": "conv1d", "rank": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"transformer\.h\.7\.mlp\.c_fc: factorised in the checkpoint"):
        tf.GPT2LMHeadModel.from_pretrained(tmp_path)


# weight files in every command


def test_weight_file_in_every_command(tmp_path: Path) -> None:
    """`--architecture` names the timm model, as for factorise."""
    dense = network()
    file = tmp_path / "best.pth"
    torch.save({"state_dict": dense.state_dict()}, file)
    images = tiny.write_images(tmp_path / "images", count=4)
    named = ("--architecture", NETWORK)
    found = run("evaluate", file, *named, "--data", images, "--split", "train")
    assert found["models"][0]["parameters"] == sum(p.numel() for p in dense.parameters())
    assert task_of(resolve(str(file), architecture=NETWORK)) == "image-classification"
    assert run("report", file, *named)["totals"]
    run("factorise", file, *named, "--rank", "0.5", "--output", tmp_path / "half")
    assert run("report", tmp_path / "half", "--against", file, *named)["totals"]
    timed = run("bench", tmp_path / "half", "--against", file, *named, "--batch", 1, "--seconds", 0.05)
    assert timed["against"]["parameters"] == sum(p.numel() for p in dense.parameters())
    trained = run(
        *("finetune", file, *named, "--rank", "0.5", "--data", images, "--steps", 1, "--output", tmp_path / "healed"),
        *("--teacher", file),
    )
    assert trained["steps"] == 1
    assert "architecture: test_resnet" in (tmp_path / "healed" / "recipe.yaml").read_text()
    for command in ("evaluate", "finetune"):
        with pytest.raises(SourceError, match="needs --architecture"):
            run(command, file, "--data", images, *(["--dense"] if command == "finetune" else []))


def test_a_component_of_diffusers_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "sample_size": 8}')
    with pytest.raises(SourceError, match=r"of diffusers \(UNet2DConditionModel\).*factorise_ on it"):
        resolve(str(tmp_path))
