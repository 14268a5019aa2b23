"""Fused experts in files: unfused or fused in the source, banks of factors in the output, dense again by export."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import moe
from torch import Tensor, nn

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers

EXPERTS = ["*.experts.*_proj"]
OPTIONS: dict[str, Any] = {"include": EXPERTS, "allow_larger": True}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def in_memory(model: nn.Module, rank: Any = 0.5, **options: Any) -> nn.Module:
    new = copy.deepcopy(model)
    lrsurgery.factorise_(new, rank=rank, **{**OPTIONS, **options})
    return new


def many_experts() -> nn.Module:
    """Twelve experts, so that the order of their numbers is not that of their names."""
    import transformers as tf

    torch.manual_seed(0)
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**moe.FOUR, "num_experts": 12})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 if ".experts." in key else 0)
    return model


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_from_checkpoint_to_checkpoint(family: str, tmp_path: Path) -> None:
    dense: Any = moe.build(family)
    dense.save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, **OPTIONS)
    half: Any = in_memory(dense)
    wanted = moe.logits(half)
    half.save_pretrained(tmp_path / "memory")
    assert torch.equal(moe.logits(lrsurgery.load_model(tmp_path / "memory")), wanted)
    loaded: Any = lrsurgery.load_model(tmp_path / "half")
    assert relative(moe.logits(loaded), wanted) < 1e-6
    config = json.loads((tmp_path / "half" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    specs = config["layers"]
    assert {spec["kind"] for spec in specs.values()} <= {"experts", "experts-transposed"}
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, layer in factorised_layers(loaded).items():
        assert torch.equal(stored[f"{name}.u.weight"], layer.u.weight)
        assert specs[name]["rank"] == layer.rank == stored[f"{name}.v.weight"].shape[1]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(moe.logits(lrsurgery.load_model(tmp_path / "again")), moe.logits(loaded))
    lrsurgery.export_dense(tmp_path / "half", tmp_path / "exported")
    exported = lrsurgery.load_model(tmp_path / "exported")
    assert not factorised_layers(exported)
    assert relative(moe.logits(exported), wanted) < 1e-5


@pytest.mark.parametrize("layout", ["unfused", "fused", "in shards"])
def test_experts_keep_their_numbers(layout: str, tmp_path: Path) -> None:
    dense: Any = many_experts()
    options: dict[str, Any] = {"unfused": {}, "fused": {"save_original_format": False}}.get(
        layout, {"max_shard_size": "200KB"}
    )
    dense.save_pretrained(tmp_path / "dense", **options)
    keys = [key for file in (tmp_path / "dense").glob("*.safetensors") for key in load_file(file)]
    assert any(key.endswith("experts.gate_up_proj") for key in keys) == (layout == "fused")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, check=True, **OPTIONS)
    loaded = lrsurgery.load_model(tmp_path / "half")
    assert relative(moe.logits(loaded), moe.logits(in_memory(dense))) < 1e-6


def test_a_dense_copy_is_saved_with_the_keys_of_the_source(tmp_path: Path) -> None:
    dense: Any = many_experts()
    dense.save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, **OPTIONS)
    model: Any = lrsurgery.load_model(tmp_path / "half")
    lrsurgery.densify_(model)
    model.save_pretrained(tmp_path / "apart")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("dense", "apart")]
    assert stored[0].keys() == stored[1].keys()
    assert relative(moe.logits(lrsurgery.load_model(tmp_path / "apart")), moe.logits(in_memory(dense))) < 1e-5


def test_some_banks_stay_dense(tmp_path: Path) -> None:
    dense: Any = many_experts()
    dense.save_pretrained(tmp_path / "dense")
    include = ["model.layers.0.mlp.experts.gate_up_proj", "*.1.self_attn.q_proj"]
    report = lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "some", rank=0.5, include=include)
    loaded: Any = lrsurgery.load_model(tmp_path / "some")
    assert (
        list(factorised_layers(loaded))
        == [row.name for row in report.factorised]
        == [include[0], "model.layers.1.self_attn.q_proj"]
    )
    wanted = moe.logits(in_memory(dense, include=include, form="pivoted"))
    assert relative(moe.logits(loaded), wanted) < 1e-6
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(moe.logits(lrsurgery.load_model(tmp_path / "again")), moe.logits(loaded))
    lrsurgery.save_model(loaded, tmp_path / "saved")
    assert relative(moe.logits(lrsurgery.load_model(tmp_path / "saved")), wanted) < 1e-6


LOAD = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM, AutoModel
ids = torch.load(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[2])
    torch.save(AutoModel.from_pretrained(sys.argv[1]).eval()(input_ids=ids, use_cache=False)[0], sys.argv[3])
"""


def in_a_second_process(folder: Path, imports: str) -> subprocess.CompletedProcess[str]:
    torch.save(moe.IDS, folder.with_suffix(".ids"))
    places = [str(folder), *(str(folder.with_suffix(suffix)) for suffix in (".logits", ".hidden", ".ids"))]
    command = [sys.executable, "-c", LOAD.format(imports=imports), *places]
    off = {**os.environ, "LRSURGERY_AUTOLOAD": "0"}  # without an import an installed package registers the format
    return subprocess.run(command, env=off, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("family", ["gpt_oss"])  # with biases, and stored transposed
def test_a_second_process_loads_it_only_with_the_import(family: str, tmp_path: Path) -> None:
    dense: Any = moe.build(family)
    dense.save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, **OPTIONS)
    without = in_a_second_process(tmp_path / "half", "")
    assert without.returncode != 0
    assert "size mismatch" in without.stderr or "mismatch" in without.stderr.lower()
    done = in_a_second_process(tmp_path / "half", "import lrsurgery.hf")
    assert done.returncode == 0, done.stderr
    model: Any = in_memory(dense)
    assert relative(torch.load(tmp_path / "half.logits"), moe.logits(model)) < 1e-6
    with torch.no_grad():
        hidden = model.model(input_ids=moe.IDS, use_cache=False)[0]
    assert relative(torch.load(tmp_path / "half.hidden"), hidden) < 1e-6


def test_a_bank_of_another_shape_is_named(tmp_path: Path) -> None:
    dense: Any = moe.build("qwen3_moe")
    dense.save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, **OPTIONS)
    (tmp_path / "half" / "rank_report.json").unlink()  # which knows the digests of the files
    file = tmp_path / "half" / "model.safetensors"
    stored = load_file(file)
    key = "model.layers.0.mlp.experts.down_proj.u.weight"
    stored[key] = stored[key][:3].clone()
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(lrsurgery.SurgeryError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        lrsurgery.load_model(tmp_path / "half")


@pytest.mark.parametrize("layout", ["unfused", "fused"])
def test_experts_are_read_one_at_a_time(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read is larger than the matrix of one expert, nor than the largest other tensor."""
    from lrsurgery.checkpoints.tensors import SafetensorsSource

    dense: Any = many_experts()
    dense.save_pretrained(tmp_path / "dense", save_original_format=layout == "unfused")
    sizes: list[int] = []
    read = SafetensorsSource._bytes

    def watched(self: SafetensorsSource, key: str, begin: int, end: int) -> Tensor:
        sizes.append(end - begin if ".experts." in key else 0)
        return read(self, key, begin, end)

    monkeypatch.setattr(SafetensorsSource, "_bytes", watched)
    options: dict[str, Any] = {"include": EXPERTS, "rank": "energy:0.6", "allow_larger": True}
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", **options)
    assert 0 < max(sizes) <= 4 * 64 * 48
    monkeypatch.undo()
    wanted = moe.logits(in_memory(dense, "energy:0.6"))
    assert relative(moe.logits(lrsurgery.load_model(tmp_path / "half")), wanted) < 1e-6


def test_a_job_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrsurgery.factorise.work.jobs import Decomposer

    dense: Any = many_experts()
    dense.save_pretrained(tmp_path / "dense")
    work, done = Decomposer._alone, []

    def fails_at_the_third(self: Decomposer, job: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.row.name)
        return work(self, job)

    options: dict[str, Any] = {**OPTIONS, "rank": 0.5, "jobs": 1}
    monkeypatch.setattr(Decomposer, "_alone", fails_at_the_third)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", **options)
    first = list(done)
    done.clear()
    done.extend([""] * 3)  # past the failure
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", resume=True, **options)
    assert not set(first) & set(done[3:])
    assert len(first) + len(done[3:]) == 4
    assert relative(moe.logits(lrsurgery.load_model(tmp_path / "half")), moe.logits(in_memory(dense))) < 1e-6


def test_a_weight_of_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    dense: Any = many_experts()
    with torch.no_grad():
        dense.model.layers[1].mlp.experts.down_proj[7, 0, 0] = float("nan")
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(lrsurgery.SurgeryError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"):
        lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "half", rank=0.5, **OPTIONS)
    assert not (tmp_path / "half").exists()
