"""Every way to name a model and every way its weights lie in files, against the model that plain libraries load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import zoo
from support.checks import assert_close, assert_same_layers, load, run
from torch import Tensor, nn

import lrsurgery
from lrsurgery.surgery.apply import factorised_layers

BASE, HEAD = transformers.AutoModel, transformers.AutoModelForCausalLM


def read_all(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Another layout of the same weights in one file."""
    state = {key: value.contiguous().clone() for key, value in change(read_all(folder)).items()}
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def saved(name: str, folder: Path, **options: Any) -> Path:
    zoo.build_transformers(name).save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def as_pickles(folder: Path, shards: int = 1) -> None:
    """pytorch_model.bin as transformers 4 wrote it, whole or in shards with their index."""
    state = read_all(folder)
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {key: state[key] for key in sorted(state)[number::shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def assert_faithful(source: object, dense: nn.Module, out: Path, *options: str, inputs: dict[str, Tensor]) -> None:
    """At full rank it is the dense model; at half rank it is the dense model factorised in memory, to the bit."""
    cls = type(dense)
    run("factorise", source, "--rank", "1.0", "--allow-larger", "--output", out / "full", *options)
    full = load(cls, out / "full")
    assert_same_layers(full, dense)
    assert_close(zoo.outputs(full, inputs), zoo.outputs(dense, inputs), 1e-3)
    run("factorise", source, "--rank", "0.5", "--output", out / "half", *options)
    half = load(cls, out / "half")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(dense, inputs))


# --- the hub's cache -------------------------------------------------------------------------------------------------

COMMIT, OLDER = "a" * 40, "b" * 40


def put_in_cache(cache: Path, hub_id: str, commit: str, folder: Path, refs: tuple[str, ...] = ()) -> None:
    """As huggingface_hub lays it out: blobs by hash, snapshots of links to them, refs that name a commit."""
    from huggingface_hub.file_download import repo_folder_name

    home = cache / repo_folder_name(repo_id=hub_id, repo_type="model")
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (home / part).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = home / "blobs" / f"{commit[:4]}{file.name.encode().hex()}"
        shutil.copyfile(file, blob)
        (home / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, home / "snapshots" / commit))
    for ref in refs:
        (home / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.process
def test_hub_id_in_a_real_process(tmp_path: Path) -> None:
    """By id, with the cache where the environment says; sharded, so that links of an index are followed."""
    folder = saved("llama", tmp_path / "llama", max_shard_size="100KB")
    put_in_cache(tmp_path / "hub", "someone/tiny-llama", COMMIT, folder, ("main",))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "lrsurgery", "factorise", "someone/tiny-llama", "--rank", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "tiny-llama-rank-0.5"
    report = json.loads((out / "rank_report.json").read_text())
    assert (report["source"]["reference"], report["source"]["revision"]) == ("someone/tiny-llama", COMMIT)
    assert "base_model: someone/tiny-llama" in (out / "README.md").read_text()
    dense = load(HEAD, folder)
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    inputs = zoo.TRANSFORMERS["llama"].inputs
    assert torch.equal(zoo.outputs(load(HEAD, out), inputs), zoo.outputs(dense, inputs))


def test_revision_of_a_hub_id(cache: Path, tmp_path: Path) -> None:
    """A branch and a commit; without one, main. The three hold different models."""
    for number, (commit, refs) in enumerate({COMMIT: ("main",), OLDER: ("v1",)}.items()):
        folder = saved("gpt2", tmp_path / str(number))
        rewrite(folder, lambda state, n=number: {k: v * (1 + n) for k, v in state.items()})  # type: ignore[misc]
        put_in_cache(cache, "tiny-gpt2", commit, folder, refs)
    for number, options in enumerate([(), ("--revision", "v1"), ("--revision", OLDER), ("--revision", COMMIT)]):
        out = tmp_path / f"out{number}"
        made = run("factorise", "tiny-gpt2", "--rank", "0.5", "--output", out, *options)
        origin = tmp_path / ("1" if number in (1, 2) else "0")
        assert made["source"]["revision"] == (OLDER if number in (1, 2) else COMMIT)
        dense = load(HEAD, origin)
        lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
        inputs = zoo.TRANSFORMERS["gpt2"].inputs
        assert torch.equal(zoo.outputs(load(HEAD, out), inputs), zoo.outputs(dense, inputs))


def test_pickled_weights_from_the_hub(cache: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "gpt2")
    dense = load(HEAD, folder)
    as_pickles(folder)
    put_in_cache(cache, "old/gpt2", COMMIT, folder, ("main",))
    assert_faithful("old/gpt2", dense, tmp_path, inputs=zoo.TRANSFORMERS["gpt2"].inputs)


@pytest.mark.parametrize("way", ["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm:vit_tiny_patch16_224"])
def test_timm_from_the_hub(way: str, cache: Path, tmp_path: Path) -> None:
    """By the hub's id, and by timm's name, whose default weights lie under that id."""
    zoo.save_timm("vit_tiny_patch16_224", tmp_path / "vit")
    put_in_cache(cache, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", COMMIT, tmp_path / "vit", ("main",))
    run("factorise", way, "--rank", "0.5", "--output", tmp_path / "half")
    dense = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    pixels = zoo.images("vit_tiny_patch16_224")
    with torch.no_grad():
        assert torch.equal(lrsurgery.load_model(tmp_path / "half")(pixels), dense(pixels))


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("nobody/nothing", "nobody/nothing: no such folder, and the download from the hub failed"),
        ("timm:resnet50.a1_in1k", "download .*failed"),
        ("timm:resnet5000", "timm .* has no model of this name"),
        ("no such name", "not a hub id"),
        ("./nothing", "no such file or folder"),
        ("weights.safetensors", "no such file or folder"),
    ],
)
def test_model_that_is_nowhere(model: str, wanted: str, cache: Path) -> None:
    with pytest.raises(lrsurgery.errors.SourceError, match=wanted) as caught:
        run("factorise", model, "--rank", "0.5")
    assert len(str(caught.value)) < 400


def test_hub_cache_link_that_leads_out_is_refused(cache: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "gpt2")
    put_in_cache(cache, "sly/gpt2", COMMIT, folder, ("main",))
    link = cache / "models--sly--gpt2/snapshots" / COMMIT / "model.safetensors"
    link.unlink()
    link.symlink_to(folder / "model.safetensors")
    with pytest.raises(lrsurgery.errors.SourceError, match="links to a file outside"):
        run("factorise", "sly/gpt2", "--rank", "0.5", "--output", tmp_path / "out")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded bin", "sharded safetensors", "odd name"])
def test_weight_files(layout: str, tmp_path: Path) -> None:
    sharded = layout == "sharded safetensors"
    folder = saved("llama", tmp_path / "llama", **({"max_shard_size": "60KB"} if sharded else {}))
    dense = load(HEAD, folder)
    if layout.endswith("bin"):
        as_pickles(folder, 3 if layout == "sharded bin" else 1)
    if layout == "odd name":
        (folder / "model.safetensors").rename(folder / "weights-final.safetensors")
    assert_faithful(folder, dense, tmp_path, inputs=zoo.TRANSFORMERS["llama"].inputs)


def test_old_pickle_format(tmp_path: Path) -> None:
    """Of torch before 1.6, which cannot be mapped into memory."""
    folder = saved("gpt2", tmp_path / "gpt2")
    dense = load(HEAD, folder)
    torch.save(read_all(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_faithful(folder, dense, tmp_path, inputs=zoo.TRANSFORMERS["gpt2"].inputs)


def test_output_in_shards(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama")
    one, many = tmp_path / "one", tmp_path / "many"
    run("factorise", folder, "--rank", "0.5", "--output", one)
    run("factorise", folder, "--rank", "0.5", "--output", many, "--shard-size", "60KB")
    files = sorted(many.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(sum(v.numel() * v.element_size() for v in load_file(f).values()) <= 60_000 for f in files)
    whole, parts = read_all(one), read_all(many)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    inputs = zoo.TRANSFORMERS["llama"].inputs
    assert torch.equal(zoo.outputs(load(HEAD, many), inputs), zoo.outputs(load(HEAD, one), inputs))
    run("export", many, "--to", "dense", "--output", tmp_path / "dense", "--shard-size", "60KB")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    assert_close(zoo.outputs(load(HEAD, tmp_path / "dense"), inputs), zoo.outputs(load(HEAD, one), inputs), 1e-4)


WRAPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "vit"},
    "model": lambda state: {"model": state},
    "ema first": lambda state: {
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": state,
    },
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [("plain", ".safetensors"), ("module.", ".safetensors"), *((w, s) for w in WRAPS for s in (".pth", ".bin"))],
)
def test_bare_weight_file(wrap: str, suffix: str, tmp_path: Path) -> None:
    """With as many classes as the file has, which need not be ImageNet's 1000."""
    name = "mobilenetv3_small_100"
    dense = zoo.build_timm(name)
    state = WRAPS[wrap](dense.state_dict())
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    run("factorise", file, "--architecture", name, "--rank", "0.5", "--output", tmp_path / "half")
    half = lrsurgery.load_model(tmp_path / "half")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    with torch.no_grad():
        found, wanted = (m(zoo.images(name)) for m in (half, dense))
    assert found.shape == (2, 7)
    assert torch.equal(found, wanted)


def test_bare_weight_file_without_its_architecture(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(zoo.build_timm("mobilenetv3_small_100").state_dict(), file)
    for options, wanted in {
        (): "needs --architecture",
        ("--architecture", "mobilenetv9"): "has no model of this name",
        ("--architecture", "resnet18"): "has no place in timm's resnet18",
    }.items():
        with pytest.raises(lrsurgery.errors.SourceError, match=wanted):
            run("factorise", file, "--rank", "0.5", *options)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dtype_is_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = zoo.build_transformers(name).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    assert {v.dtype for v in read_all(tmp_path / "half").values() if v.is_floating_point()} == {dtype}
    half = load(type(model), tmp_path / "half")
    assert half.dtype == dtype
    dense = load(type(model), tmp_path / "dense")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    inputs = zoo.TRANSFORMERS[name].inputs
    # in fp64 no rounding hides in which order the products of pivots were summed
    bound = 1e-12 if dtype == torch.float64 else 0.0
    torch.testing.assert_close(zoo.outputs(half, inputs), zoo.outputs(dense, inputs), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    """Factors are computed from the weights as they stand, and rounded once."""
    stored = getattr(torch, dtype)
    model: Any = zoo.build_transformers("llama").to(torch.float64)
    model.save_pretrained(tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--dtype", dtype, "--output", tmp_path / "half")
    half = load(type(model), tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {stored}
    lrsurgery.factorise_(model, rank=0.5, form="pivoted")
    reference = model.state_dict()
    for key, value in half.state_dict().items():
        error = (value.double() - reference[key]).abs().max()
        assert error <= 2 * torch.finfo(stored).eps * reference[key].abs().max(), key


def test_overflow_of_a_dtype_is_told(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama")
    rewrite(folder, lambda state: {k: v * 1e6 if "norm" in k else v for k, v in state.items()})
    with pytest.raises(lrsurgery.errors.WeightError, match=r"norm.*overflows torch\.float16"):
        run("factorise", folder, "--rank", "0.5", "--dtype", "float16", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- from scratch ----------------------------------------------------------------------------------------------------


def test_from_scratch_needs_only_a_config(tmp_path: Path) -> None:
    """The model that transformers initialises under that seed, then factorised."""
    folder = saved("llama", tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    command = ("factorise", folder, "--rank", "0.5", "--from-scratch", "--seed")
    made = run(*command, 3, "--output", tmp_path / "three")
    assert any("must be trained" in note for note in made["notes"])
    torch.manual_seed(3)
    wanted: Any = HEAD.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    lrsurgery.factorise_(wanted, rank=0.5, form="pivoted")
    inputs = zoo.TRANSFORMERS["llama"].inputs
    found = load(HEAD, tmp_path / "three")
    assert torch.equal(zoo.outputs(found, inputs), zoo.outputs(wanted, inputs))
    run(*command, 4, "--output", tmp_path / "four")
    assert not torch.equal(
        read_all(tmp_path / "three")["lm_head.weight"], read_all(tmp_path / "four")["lm_head.weight"]
    )


@pytest.mark.process
@pytest.mark.parametrize("init", ["spectral", "spectral-ones", "he"])
def test_from_scratch_by_timm_name(init: str, tmp_path: Path) -> None:
    """No weights are asked for, so none are fetched; the output loads in lrsurgery and in transformers' wrapper."""
    command = ("factorise", "timm:mobilenetv3_small_100", "--from-scratch", "--rank", "0.5", "--init", init)
    run(*command, "--output", tmp_path / "out")
    torch.manual_seed(0)
    wanted = timm.create_model("mobilenetv3_small_100").eval()
    lrsurgery.factorise_(wanted, rank=0.5, init=init, form="pivoted")
    found = lrsurgery.load_model(tmp_path / "out")
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in found.state_dict().items())
    load(transformers.AutoModelForImageClassification, tmp_path / "out")


# --- quirks of checkpoints on the hub --------------------------------------------------------------------------------


def gpt2_of_the_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """openai-community/gpt2: no prefix, and the causal mask as a buffer of each layer."""
    bare = {key.removeprefix("transformer."): value for key, value in state.items()}
    for layer in (0, 1):
        bare[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return bare


def bert_of_the_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """google-bert/bert-base-uncased: LayerNorm's weight and bias as gamma and beta, a head that is not used."""
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    return {**old, "cls.seq_relationship.weight": torch.ones(2, 48), "cls.seq_relationship.bias": torch.zeros(2)}


def with_second_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


QUIRKS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "gpt2 without prefix": ("gpt2", gpt2_of_the_hub),
    "gpt2 with its head twice": ("gpt2", with_second_head),
    "bert with gamma and beta": ("bert", bert_of_the_hub),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("quirk", QUIRKS)
def test_hub_quirk(quirk: str, shards: int, tmp_path: Path) -> None:
    """Plain transformers loads the same files, and says what the model is. Tied heads are stored once in the output."""
    name, change = QUIRKS[quirk]
    folder = saved(name, tmp_path / "dense")
    rewrite(folder, change)
    if shards > 1:
        as_pickles(folder, shards)
    cls = getattr(transformers, zoo.TRANSFORMERS[name].cls)
    inputs = zoo.TRANSFORMERS[name].inputs
    dense = cls.from_pretrained(folder).eval()
    want = zoo.outputs(zoo.build_transformers(name), inputs)
    assert torch.equal(zoo.outputs(dense, inputs), want)  # the quirk is one that transformers knows

    run("factorise", folder, "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full, info = cls.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_layers(full, dense)
    assert_close(zoo.outputs(full.eval(), inputs), want, 1e-3)
    assert "lm_head.weight" not in read_all(tmp_path / "full")

    run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half")
    half = cls.from_pretrained(tmp_path / "half").eval()
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(dense, inputs))
    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    back = cls.from_pretrained(tmp_path / "back").eval()
    assert not factorised_layers(back)
    assert_close(zoo.outputs(back, inputs), zoo.outputs(half, inputs), 1e-4)


def test_head_without_its_embedding(tmp_path: Path) -> None:
    """Tied, and stored under the head's name alone."""
    folder = saved("gpt2", tmp_path / "dense")
    dense = load(HEAD, folder)
    rewrite(folder, lambda state: {k.replace("transformer.wte.weight", "lm_head.weight"): v for k, v in state.items()})
    inputs = zoo.TRANSFORMERS["gpt2"].inputs
    run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    half = HEAD.from_pretrained(tmp_path / "half").eval()
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(dense, inputs))


@pytest.mark.parametrize("name", ["vit", "swin", "mixtral"])
def test_keys_that_transformers_renames(name: str, tmp_path: Path) -> None:
    """transformers writes these models under older names than its modules have, and our output does as well."""
    folder = saved(name, tmp_path / "dense")
    cls = getattr(transformers, zoo.TRANSFORMERS[name].cls)
    dense = load(cls, folder)
    renamed = set(read_all(folder)) - set(dense.state_dict())
    assert renamed, "no longer renamed: take another model here"
    run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half")
    half = load(cls, tmp_path / "half")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    inputs = zoo.TRANSFORMERS[name].inputs
    assert torch.equal(zoo.outputs(half, inputs), zoo.outputs(dense, inputs))


def test_base_model_of_a_head_checkpoint_and_the_reverse(tmp_path: Path) -> None:
    """AutoModel on a factorised head checkpoint; a head on a factorised base checkpoint, with only the head missing."""
    folder = saved("llama", tmp_path / "dense")
    inputs = zoo.TRANSFORMERS["llama"].inputs
    base = load_some(BASE, folder)
    base.save_pretrained(tmp_path / "dense-base")  # type: ignore[operator]
    lrsurgery.factorise_(base, rank=0.5, form="pivoted")
    with torch.no_grad():
        wanted = base(**inputs).last_hidden_state

    run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "head")
    found = load_some(BASE, tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(found(**inputs).last_hidden_state, wanted)

    run("factorise", tmp_path / "dense-base", "--rank", "0.5", "--output", tmp_path / "base")
    head, info = HEAD.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(head.eval().model(**inputs).last_hidden_state, wanted)
    for number, model in enumerate([found, head]):  # both save as what they now are
        model.save_pretrained(tmp_path / f"again{number}")
        again = load(type(model), tmp_path / f"again{number}")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
        assert factorised_layers(again)


def load_some(cls: Any, folder: Path) -> nn.Module:
    """Of a checkpoint that holds more than the model."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()  # type: ignore[no-any-return]


def test_loaders_options(tmp_path: Path) -> None:
    """`dtype=` and `device_map=`, as for any folder."""
    folder = saved("distilbert", tmp_path / "dense")
    run("factorise", folder, "--rank", "0.5", "--output", tmp_path / "half")
    cls = transformers.AutoModelForSequenceClassification
    inputs = zoo.TRANSFORMERS["distilbert"].inputs
    plain = load(cls, tmp_path / "half")
    mapped = cls.from_pretrained(tmp_path / "half", device_map="auto").eval()
    assert torch.equal(zoo.outputs(mapped, inputs), zoo.outputs(plain, inputs))
    low = cls.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    for key, value in low.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key].to(torch.bfloat16)), key


def test_layers_fused_in_their_file(tmp_path: Path) -> None:
    """DINOv2's giant: some models' files hold as one tensor what the model has as several layers, and the reverse."""
    config = transformers.Dinov2Config(**zoo.VIT, image_size=32, patch_size=8, use_swiglu_ffn=True)
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dense")
    dense = load(transformers.Dinov2Model, tmp_path / "dense")
    pixels = zoo.TRANSFORMERS["vit"].inputs
    run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "half")
    half = load(transformers.Dinov2Model, tmp_path / "half")
    lrsurgery.factorise_(dense, rank=0.5, form="pivoted")
    with torch.no_grad():
        wanted = dense(**pixels).last_hidden_state
        assert torch.equal(half(**pixels).last_hidden_state, wanted)
        half.save_pretrained(tmp_path / "again")  # type: ignore[operator]
        again = load(transformers.Dinov2Model, tmp_path / "again")
        assert torch.equal(again(**pixels).last_hidden_state, wanted)
        run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
        back = load(transformers.Dinov2Model, tmp_path / "back")
        assert not factorised_layers(back)
        assert_close(back(**pixels).last_hidden_state, wanted, 1e-4)
