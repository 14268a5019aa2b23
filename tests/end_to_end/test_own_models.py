"""Models of one's own: a file that registers them, through the command line and back; what they may lack."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import save_file
from support import tiny, warm

import lrsurgery
from lrsurgery.errors import SourceError
from lrsurgery.runtime import import_file

FILE = Path(__file__).parents[2] / "examples" / "wide_resnet.py"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    import_file(FILE)


def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return warm.program(*tiny.PROGRAM, *arguments)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    # Zagoruyko & Komodakis (2016), table 4 and 5: 36.5 M, 2.8 M (with 100 classes), 0.7 M
    [("wide_resnet28_10", 100, 36.5e6), ("wide_resnet16_4", 100, 2.8e6), ("wide_resnet16_2", 10, 0.7e6)],
)
def test_the_networks_are_of_the_papers_size(name: str, classes: int, parameters: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, classes)


@pytest.mark.process
def test_a_model_of_ones_own_is_factorised_by_the_program(tmp_path: Path) -> None:
    made = warm.program(
        sys.executable, FILE, "--name", "wide_resnet16_2", "--classes", "7", "--output", tmp_path / "wrn"
    )
    assert made.returncode == 0, made.stderr
    command = ("factorise", tmp_path / "wrn", "--from-scratch", "--rank", "0.25")
    done = program("--import", FILE, *command, "--output", tmp_path / "low", "--quiet")
    assert done.returncode == 0, done.stderr
    model = lrsurgery.load_model(tmp_path / "low")
    report = lrsurgery.rank_report(model)
    assert [row.name for row in report.dense] == ["fc"]
    assert len(report.factorised) == 16
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    timed = program("--import", FILE, "bench", tmp_path / "low", "--batch", 1, "--seconds", 0.1, "--json")
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout)["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    without = program(*command, "--output", tmp_path / "other")
    assert without.returncode == 2
    assert without.stderr.count("\n") == 1
    assert "wide_resnet16_2" in without.stderr


def test_a_file_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.py: no such Python file"):
        import_file(tmp_path / "none.py")
    (tmp_path / "bad_model.py").write_text("1 / 0\n")
    with pytest.raises(SourceError, match=r"bad_model\.py: ZeroDivisionError: division by zero"):
        import_file(tmp_path / "bad_model.py")
    assert "bad_model" not in sys.modules


OWN = """
import torch, transformers as tf
from torch import nn

class OwnConfig(tf.PreTrainedConfig):
    model_type = "own-net"
    def __init__(self, width=32, vocab_size=300, **rest):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**rest)

class OwnNet(tf.PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.up, self.down = nn.Linear(config.width, 64), nn.Linear(64, config.width)
        self.predict = nn.Linear(config.width, config.vocab_size, bias=False)
        POST
    def get_output_embeddings(self):
        return self.predict
    def forward(self, ARGUMENTS):
        hidden = self.words(input_ids)
        logits = self.predict(hidden + self.down(self.up(hidden).relu()))
        RETURN

tf.AutoConfig.register("own-net", OwnConfig)
tf.AutoModelForCausalLM.register(OwnConfig, OwnNet)
"""
WHOLE = {
    "POST": "self.post_init()",
    "ARGUMENTS": "input_ids, attention_mask=None, labels=None",
    "RETURN": """loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return tf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)""",
}


def own_folder(place: Path, changes: dict[str, str]) -> list[object]:
    """A folder and the file that registers its class; the words of a program that runs this file first."""
    tiny.write_text(place)
    gpt2 = tiny.save_gpt2(place / "gpt2")
    size = tf.AutoConfig.from_pretrained(gpt2).vocab_size
    text = OWN.replace("vocab_size=300", f"vocab_size={size}")
    for name, what in {**WHOLE, **changes}.items():
        text = text.replace(name, what)
    (place / "own.py").write_text(text)
    shutil.copytree(gpt2, place / "own", ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    made = {"model_type": "own-net", "architectures": ["OwnNet"], "vocab_size": size, "dtype": "float32"}
    (place / "own" / "config.json").write_text(json.dumps(made))
    shapes = {"words.weight": (size, 32), "up.weight": (64, 32), "up.bias": (64,), "down.weight": (32, 64)}
    shapes |= {"down.bias": (32,), "predict.weight": (size, 32)}
    state = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    save_file(state, place / "own" / "model.safetensors", {"format": "pt"})
    return [*tiny.PROGRAM, "--import", place / "own.py"]


@pytest.mark.process
def test_a_transformers_model_of_ones_own_goes_all_the_way(tmp_path: Path) -> None:
    start = own_folder(tmp_path, {})
    data, half = ["--data", tmp_path / "train.txt", "--block-size", "16"], tmp_path / "half"
    made = warm.program(*start, "factorise", tmp_path / "own", "--rank", "4", "--output", half, "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert {row["name"]: row["status"] for row in report["layers"]}["predict"] == "dense"
    assert not [note for note in report["notes"] if "OwnNet" in note]
    healed = warm.program(*start, "finetune", half, *data, "--steps", "2", "--output", tmp_path / "healed")
    assert healed.returncode == 0, healed.stderr
    for folder in ("own", "healed"):
        done = warm.program(*start, "evaluate", tmp_path / folder, *data, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["models"][0]["values"]["scored"] > 100


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "factorises", "message"),
    [
        ({"POST": "pass"}, False, "OwnNet does not call self.post_init() at the end of its __init__"),
        ({"ARGUMENTS": "input_ids, labels=None"}, True, "OwnNet: its forward does not take attention_mask"),
        ({"RETURN": "return logits"}, True, "OwnNet: its forward returns a Tensor without logits"),
        ({"RETURN": "raise NotImplementedError('later')"}, True, "OwnNet: its forward fails on input_ids (later)"),
        ({"RETURN": "return logits + other"}, True, "OwnNet: its forward fails on input_ids (name 'other' is not"),
    ],
    ids=["post_init", "arguments", "tensor", "not written", "error"],
)
def test_what_a_model_of_ones_own_lacks_is_one_line(
    tmp_path: Path, changes: dict[str, str], factorises: bool, message: str
) -> None:
    start = own_folder(tmp_path, changes)
    tried = warm.program(*start, "factorise", tmp_path / "own", "--rank", "4", "--dry-run", "--json")
    if factorises:
        notes = [each for each in json.loads(tried.stdout)["notes"] if "OwnNet" in each]
        if "NotImplemented" not in str(changes):  # which an operation says too that only the meta device lacks
            (note,) = notes
            assert note.startswith("OwnNet can be factorised, but not trained and measured: its forward")
    else:
        assert tried.returncode == 2
        assert message in tried.stderr
    done = warm.program(*start, "evaluate", tmp_path / "own", "--data", tmp_path / "valid.txt")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"lrsurgery: {tmp_path / 'own'}: {message}")
