"""What `export --to` refuses before it writes anything: no runtime is needed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support import tiny

import lrsurgery
from lrsurgery.export.graphs import write as graphs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("gpt2")
    lrsurgery.factorise_checkpoint(tiny.save_gpt2(root / "dense"), root / "low", rank=0.5, loss_check=False)
    return root / "low"


def refused(folder: Path, to: str, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert tiny.run("export", folder, "--to", to, "--output", output) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert list(output.parent.iterdir()) == []
    return said


def lacks(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    def find(name: str) -> Any:
        return None if name in packages else importlib.util.find_spec("torch")

    monkeypatch.setattr(graphs, "find_spec", find)


@pytest.mark.parametrize(
    ("to", "package"), [("onnx", "onnxscript"), ("openvino", "openvino"), ("executorch", "executorch")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    folder: Path,
    to: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacks(monkeypatch, package)
    said = refused(folder, to, tmp_path / "out", capsys)
    assert f"--to {to} needs {package}: pip install 'lrsurgery[{to}]'" in said


def test_a_transformers_without_exporters_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks(monkeypatch, "transformers.exporters")
    assert "needs transformers 5.24 or newer" in refused(folder, "onnx", tmp_path / "out", capsys)


def test_gguf_says_which_commands_make_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(folder, "gguf", tmp_path / "out.gguf", capsys)
    assert f"lrsurgery export {folder} --to dense --output" in said
    assert "python convert_hf_to_gguf.py" in said


def test_a_dense_model_has_nothing_to_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a factorised checkpoint" in refused(folder.with_name("dense"), "onnx", tmp_path / "out", capsys)


def test_a_model_of_sound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Wav2Vec2Config(**sizes, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), vocab_size=9)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "dense")
    lrsurgery.factorise_checkpoint(tmp_path / "dense", tmp_path / "low", rank=0.5, loss_check=False)
    lacks(monkeypatch)
    with pytest.raises(lrsurgery.SurgeryError, match=r"takes input_values; models of tokens or of images alone"):
        lrsurgery.export_graph(tmp_path / "low", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
