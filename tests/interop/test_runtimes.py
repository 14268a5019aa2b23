"""`export --to onnx|openvino|executorch`: graphs run by their own runtimes, against the factorised model in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support import tiny
from support.checks import run
from support.interop import need
from torch import Tensor

import lrsurgery

Run = Callable[[Path, dict[str, Tensor]], Tensor]


def run_onnx(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = need("onnxruntime").InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["logits"]
    assert {each.name for each in session.get_inputs()} == set(inputs)
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])


def run_openvino(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    core = need("openvino").Core()
    model = core.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model({name: value.numpy() for name, value in inputs.items()})["logits"].copy())


def run_executorch(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    program = need("executorch.runtime").Runtime.get().load_program(folder / "model.pte")
    (logits,) = program.load_method("forward").execute(list(inputs.values()))
    return logits.clone()  # type: ignore[no-any-return]


RUNTIMES: dict[str, tuple[Run, float, tuple[str, ...]]] = {
    "onnx": (run_onnx, 1e-5, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (run_openvino, 1e-4, ("openvino",)),
    "executorch": (run_executorch, 1e-4, ("executorch",)),
}


def needs(target: str, model: str) -> None:
    for package in RUNTIMES[target][2]:
        # ExecuTorch brings along more than the interop job has time for: a dated row in the guide
        pytest.importorskip(package) if target == "executorch" else need(package)
    if model != "timm":
        pytest.importorskip("transformers.exporters", reason="transformers 5.24 has the exporters")


# all with tables of positions, biases and both sides of pivots among them
MODELS: dict[str, Callable[[Path], Path]] = {
    "gpt2": lambda folder: tiny.save_gpt2(folder, blocks=1),
    "bert": tiny.save_biased_bert,
    "llama": tiny.save_alike,
    "vit": tiny.save_vit,
    "timm": tiny.save_timm,
}


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a factorised model by its name, made once."""
    root: Path = tmp_path_factory.mktemp("low")

    def make(name: str) -> Path:
        if not (root / name).exists():
            MODELS[name](root / f"{name}-dense")
            source = root / f"{name}-dense"
            lrsurgery.factorise_checkpoint(source, root / name, rank=0.5, conv="channel", loss_check=False)
        return root / name

    return make


def fresh(name: str, batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    if name in ("vit", "timm"):
        edge = 16 if name == "vit" else 160
        return {"pixel_values": torch.randn(batch, 3, edge, edge, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[1, 3:] = 0
    inputs = {"input_ids": torch.randint(2, 90, (batch, length), generator=generator), "attention_mask": mask}
    types = torch.randint(0, 2, (batch, length), generator=generator)
    return {**inputs, **({"token_type_ids": types} if name == "bert" else {})}


def in_torch(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    model: Any = lrsurgery.load_model(folder)
    with torch.no_grad():
        if not isinstance(model, transformers.PreTrainedModel):
            return model(*inputs.values())  # type: ignore[no-any-return]
        return model(**inputs).logits  # type: ignore[no-any-return]


CASES = [
    *(("onnx", name) for name in MODELS),
    *(("openvino", name) for name in ("gpt2", "bert", "timm")),
    ("executorch", "gpt2"),
    ("executorch", "timm"),
]


@pytest.mark.process
@pytest.mark.parametrize(("target", "name"), CASES, ids=[f"{target} of {name}" for target, name in CASES])
def test_the_runtime_computes_what_the_model_does(
    target: str, name: str, low: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(target, name)
    call, tolerance, _ = RUNTIMES[target]
    folder = low(name)
    run("export", folder, "--to", target, "--output", tmp_path / "out")
    for batch, length in ((1, 5), (4, 13)):
        if target == "executorch" and batch > 1:
            continue
        inputs = fresh(name, batch, length)
        wanted, found = in_torch(folder, inputs), call(tmp_path / "out", inputs)
        assert found.shape == wanted.shape
        if wanted.ndim == 3:  # of each token: what is computed at padding is nobody's business
            real = inputs["attention_mask"].bool()
            wanted, found = wanted[real], found[real]
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    kept = {each.name for each in folder.iterdir()} & {"tokenizer.json", "preprocessor_config.json"}
    assert kept <= {each.name for each in (tmp_path / "out").iterdir()}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for file in (tmp_path / "out").iterdir():  # no stack traces: they name folders of the machine
        assert file.name == "README.md" or b"site-packages" not in file.read_bytes(), file.name


@pytest.mark.process
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_weights_are_as_many_as_the_factors(target: str, low: Callable[[str], Path], tmp_path: Path) -> None:
    needs(target, "gpt2")
    folder = low("gpt2")
    run("export", folder, "--to", target, "--output", tmp_path / "out")
    graph = "model.onnx.data" if target == "onnx" else "openvino_model.bin"
    size = (tmp_path / "out" / graph).stat().st_size
    with safe_open(folder / "model.safetensors", "pt") as stored:
        factors = sum(stored.get_tensor(key).numel() * 4 for key in stored.keys())  # noqa: SIM118
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(folder.with_name("gpt2-dense"))
    assert size < sum(p.numel() * 4 for p in dense.parameters())
    assert abs(size - factors) < 0.2 * factors  # orders, masks and alignment


@pytest.mark.process
def test_what_the_exporter_cannot_do_is_one_line(
    low: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx", "gpt2")

    def fails(self: object, x: Tensor) -> Tensor:
        return x * float(x.sum())  # depends on the values of an input, which no graph does

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward", fails)
    assert tiny.run("export", low("gpt2"), "--to", "onnx", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "GPT2LMHeadModel cannot be exported to ONNX" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_graph_that_computes_something_else_is_not_written(
    low: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx", "timm")
    onnxruntime = need("onnxruntime")
    former = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *given: [1.01 * array for array in former(*given)])
    assert tiny.run("export", low("timm"), "--to", "onnx", "--output", tmp_path / "out") == 2
    assert "ONNX computes another output than the model (relative error 1.0e-02" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
