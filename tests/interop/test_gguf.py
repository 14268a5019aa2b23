"""GGUF files of llama.cpp as sources, against transformers' own load of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import tiny
from support.checks import run
from support.interop import need
from torch import Tensor

import lrsurgery
from lrsurgery.checkpoints.mapping import open_checkpoint
from lrsurgery.checkpoints.quantised.dense import weight_bytes
from lrsurgery.checkpoints.source import SourceOptions, resolve
from lrsurgery.errors import SourceError

gguf = need("gguf")

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny.BLOCK,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# what the file is written in -> the dtype that is read
DTYPES = {"Q8_0": torch.bfloat16, "Q4_0": torch.bfloat16, "F16": torch.float16, "BF16": torch.bfloat16}


def write_tokenizer(writer: Any) -> None:
    body = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(body["vocab"], key=body["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def permute(weight: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp has the queries and keys of Llama."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_llama(
    file: Path, kind: str, *, tied: bool = False, more: Callable[[Any], None] = lambda writer: None
) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    state = tf.LlamaForCausalLM(config).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(tiny.BLOCK)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tiny.VOCABULARY)
    write_tokenizer(writer)
    more(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, weight in state.items():
        if tied and key == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        stored = weight if heads is None else permute(weight, heads)
        name = f"{names.get_name(key.removesuffix('.weight'))}.weight"
        if weight.ndim == 1:
            writer.add_tensor(name, stored.numpy())
            continue
        as_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(stored.numpy(), as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_mixture(file: Path, width: int = 768) -> None:
    """Qwen3-MoE, whose banks of gates and ups are two tensors of the file and one of the model.

    transformers reads no width of experts from the file, and takes 768.
    """
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width, "head_dim": 16}
    state = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **experts)).state_dict()
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_name("mixture")
    writer.add_context_length(tiny.BLOCK)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(width)
    writer.add_vocab_size(tiny.VOCABULARY)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    as_type = gguf.GGMLQuantizationType.Q8_0
    for key, weight in state.items():
        stored = {f"{names.get_name(key.removesuffix('.weight'))}.weight": weight}
        if ".experts." in key:
            block = f"blk.{key.split('.')[2]}"
            gate, up = weight.chunk(2, 1) if "gate_up" in key else (None, None)
            stored = {f"{block}.ffn_down_exps.weight": weight}
            if gate is not None:
                stored = {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        for name, part in stored.items():
            if part.ndim == 1:
                writer.add_tensor(name, part.numpy())
            else:
                values = gguf.quants.quantize(part.contiguous().numpy(), as_type)
                writer.add_tensor(name, values, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_experts_are_read_one_at_a_time(tmp_path: Path) -> None:
    write_mixture(tmp_path / "mixture.gguf")
    wanted = theirs(tmp_path / "mixture.gguf", torch.bfloat16)
    ours = lrsurgery.load_model(tmp_path / "mixture.gguf").state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in wanted.state_dict().items())
    tensors = open_checkpoint(resolve(str(tmp_path / "mixture.gguf")), SourceOptions()).tensors
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        for number in range(4):
            assert torch.equal(tensors.part(key, number), ours[key][number])
    wanted.save_pretrained(tmp_path / "dense")
    for name in ("mixture.gguf", "dense"):
        lrsurgery.factorise_checkpoint(tmp_path / name, tmp_path / f"half-{name}", rank=0.5, allow_larger=True)
    halves = [load_file(tmp_path / f"half-{name}" / "model.safetensors") for name in ("mixture.gguf", "dense")]
    assert any(".experts." in key for key in halves[0])
    assert halves[0].keys() == halves[1].keys()
    assert all(torch.equal(halves[0][key], halves[1][key]) for key in halves[0])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_llama(tmp_path / "made" / "tiny.gguf", "Q8_0")
    return tmp_path / "made" / "tiny.gguf"


def theirs(file: Path, dtype: torch.dtype) -> Any:
    how = tf.GgufConfig(dequantize=True) if hasattr(tf, "GgufConfig") else None
    options = {} if how is None else {"quantization_config": how}
    return tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("kind", DTYPES)
def test_models_load_as_transformers_loads_them(kind: str, tied: bool, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_llama(file, kind, tied=tied)
    ours: Any = lrsurgery.load_model(file)
    wanted = theirs(file, DTYPES[kind])
    assert type(ours) is type(wanted)
    assert ours.config.tie_word_embeddings == tied
    assert ours.state_dict().keys() == wanted.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert tensor.dtype == DTYPES[kind]
        assert torch.equal(tensor, wanted.state_dict()[key]), key
    assert not hasattr(ours.config, "quantization_config")


def test_output_is_that_of_the_dense_folder(file: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    theirs(file, torch.bfloat16).save_pretrained(dense)
    tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(dense)
    _, valid = tiny.write_text(tmp_path)
    found = {}
    for name, place in (("file", file), ("folder", file.parent), ("dense", dense)):
        output = tmp_path / f"half-{name}"
        run("factorise", place, "--budget", "0.7", "--calibration", valid, "--block-size", "32", "--output", output)
        found[name] = (output / "model.safetensors").read_bytes()
        values = [run("evaluate", each, "--data", valid)["models"][0]["values"] for each in (place, output)]
        assert values == [run("evaluate", each, "--data", valid)["models"][0]["values"] for each in (dense, output)]
    assert found["file"] == found["folder"] == found["dense"]
    half = tmp_path / "half-file"
    assert tf.AutoTokenizer.from_pretrained(half)("import this").input_ids == tiny.tokenizer()("import this").input_ids
    config = json.loads((half / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "lrsurgery"
    notes = json.loads((half / "rank_report.json").read_text())["notes"]
    assert any("GGUF tensors are dequantised to bfloat16 on reading" in note for note in notes)
    assert weight_bytes(resolve(str(file))) == sum(
        weight.nbytes for weight in load_file(dense / "model.safetensors").values()
    )
    assert {each.name for each in file.parent.iterdir()} == {file.name}


def test_healing_with_a_file_as_the_teacher(file: Path, tmp_path: Path) -> None:
    train, _ = tiny.write_text(tmp_path)
    options = ["--data", train, "--steps", "1", "--block-size", "32", "--output", tmp_path / "healed"]
    run("finetune", file, "--rank", "0.5", "--teacher", file, *options)
    assert type(lrsurgery.load_model(tmp_path / "healed")).__name__ == "LlamaForCausalLM"


def refused(place: Path, message: str, tmp_path: Path) -> None:
    for command in (["factorise", place, "--rank", "0.5", "--output", tmp_path / "half"], ["report", place]):
        with pytest.raises(SourceError) as found:
            run(*command)
        assert message in str(found.value)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_file_that_is_cut_off(share: float, file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file, "not a whole GGUF file", tmp_path)


def test_damaged_block_is_named(file: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(file)
    tensor = next(each for each in reader.tensors if each.name == "blk.0.ffn_up.weight")
    content = bytearray(file.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7c"  # infinity in fp16, the scale of a block
    file.write_bytes(bytes(content))
    refused(file, "model.layers.0.mlp.up_proj.weight holds NaN or Inf", tmp_path)


def test_several_files_have_to_be_named(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, file.with_name("other.gguf"))
    refused(file.parent, "has 2 GGUF files; name one of them", tmp_path)


def test_part_of_a_split_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", "F16", more=lambda writer: writer.add_uint16("split.count", 3))
    refused(tmp_path / "tiny.gguf", "one of 3 parts; join them first", tmp_path)


def test_size_that_transformers_does_not_read(tmp_path: Path) -> None:
    write_mixture(tmp_path / "narrow.gguf", 32)
    message = "blk.0.ffn_gate_exps.weight and blk.0.ffn_up_exps.weight hold 16,384 numbers"
    refused(tmp_path / "narrow.gguf", message, tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "abacus")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "new.gguf", "architecture 'abacus' is not read from GGUF", tmp_path)
