"""Models that were loaded and are saved again, and modules of one's own: as whole as the first folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from support import tiny
from support.warm import program
from torch import Tensor, nn

import lrsurgery
from lrsurgery.checkpoints.pretrained.beside import CHANGED
from lrsurgery.errors import OutputError, PlanError, SourceError
from lrsurgery.files.digests import check_files, verify_folder
from lrsurgery.surgery.apply import factorised_layers, specs_of

TOKENS = torch.arange(2, 34).reshape(2, 16)
CARD = "README.md"
REPORT = "rank_report.json"


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.save_gpt2(folder / "dense", dropout=0.0)
    assert tiny.run("factorise", folder / "dense", "--rank", "0.4", "--output", folder / "low") == 0
    return folder / "low"


@pytest.fixture(scope="module")
def low_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    tiny.save_timm(folder / "dense")
    assert tiny.run("factorise", folder / "dense", "--rank", "0.4", "--output", folder / "low") == 0
    return folder / "low"


def rows(folder: Path) -> Any:
    return {k: v for k, v in json.loads((folder / REPORT).read_text()).items() if k not in ("files", "notes")}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lrsurgery.json"}


def test_save_pretrained_keeps_card_and_report(low: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(low)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_text() == (low / CARD).read_text()
    assert rows(tmp_path / "again") == rows(low)
    assert set(json.loads((tmp_path / "again" / REPORT).read_text())["files"]) == names(tmp_path / "again") - {
        CARD,
        REPORT,
    }
    assert verify_folder(tmp_path / "again").whole
    assert torch.equal(lrsurgery.load_model(tmp_path / "again")(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("which", ["low", "low_timm"])
def test_save_model_writes_all_that_was_there(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first: Path = request.getfixturevalue(which)
    lrsurgery.save_model(lrsurgery.load_model(first), tmp_path / "again")
    assert names(tmp_path / "again") == names(first)
    assert (tmp_path / "again" / CARD).read_text() == (first / CARD).read_text()
    assert rows(tmp_path / "again") == rows(first)
    assert verify_folder(tmp_path / "again").whole
    if which == "low_timm":
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
            (first / "config.json").read_text()
        )


@pytest.mark.parametrize("how", ["a factor", "a dense weight", "the dtype", "another head"])
def test_a_model_that_changed_says_so(low: Path, tmp_path: Path, how: str) -> None:
    cls = tf.AutoModelForSequenceClassification if how == "another head" else tf.AutoModelForCausalLM
    model = cls.from_pretrained(low)
    with torch.no_grad():
        if how == "a factor":
            next(iter(factorised_layers(model).values())).u.weight.data[0, 0] += 1e-3
        elif how == "a dense weight":
            model.transformer.wpe.weight.data[0, 0] += 1e-3
        elif how == "the dtype":
            model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    text, before = ((folder / CARD).read_text() for folder in (tmp_path / "again", low))
    assert text.count(CHANGED) == 1
    assert text.startswith("---\n")
    assert text.replace(f"> {CHANGED}", "").split() == before.split()
    assert not (tmp_path / "again" / REPORT).exists()


def test_a_folder_that_is_saved_over_loads(low: Path, tmp_path: Path) -> None:
    """The digests of its report would say that the new weights are damaged."""
    model = tf.AutoModelForCausalLM.from_pretrained(low)
    model.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        next(iter(factorised_layers(again).values())).u.weight[0, 0] += 1.0
    again.save_pretrained(tmp_path / "again")
    check_files(tmp_path / "again", names(tmp_path / "again"))
    loaded = lrsurgery.load_model(tmp_path / "again")
    assert torch.equal(loaded(TOKENS).logits, again.eval()(TOKENS).logits)
    assert CHANGED in json.loads((tmp_path / "again" / REPORT).read_text())["notes"]


def test_what_is_uploaded_while_it_is_saved(low: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []

    class Hub:
        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(low)
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *_, **__: sent.append(names(Path(folder)))
    )
    model.save_pretrained(tmp_path / "again", push_to_hub=True)
    assert sent == [names(tmp_path / "again")]
    assert {CARD, REPORT} < sent[0]
    assert verify_folder(tmp_path / "again").whole


def test_a_card_that_is_there_is_left_alone(low: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine")
    tf.AutoModelForCausalLM.from_pretrained(low).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_a_dense_model_gets_no_card(low: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(low)
    lrsurgery.densify_(model)
    model.save_pretrained(tmp_path)
    lrsurgery.factorise_(model, rank=2)
    model.save_pretrained(tmp_path / "other")
    assert not {CARD, REPORT} & (names(tmp_path) | names(tmp_path / "other"))


# modules of one's own


class Net(nn.Module):
    """A table tied to a head, a shared layer, a convolution with counters, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16)
        self.again = self.first
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.rand(16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(tokens).mT)).mT * self.scale
        return self.head(self.second(self.again(x).relu()))  # type: ignore[no-any-return]


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def check_same(found: nn.Module, wanted: nn.Module) -> None:
    state = found.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in wanted.state_dict().items())


IDS = torch.arange(30).reshape(3, 10)


@pytest.mark.parametrize("rank", [None, 0.5], ids=["dense", "factorised"])
@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_any_module(tmp_path: Path, form: str, rank: float | None) -> None:
    model = net(0)
    if rank is not None:
        lrsurgery.factorise_(model, rank=rank, form=form, embeddings=True)
        assert {"table", "head", "conv", "first", "second"} <= set(factorised_layers(model))
    lrsurgery.save_model(model, tmp_path / "low", form=form)
    other = net(1)
    other.first.requires_grad_(False)
    lrsurgery.load_into_(other, tmp_path / "low")
    check_same(other, model)
    torch.testing.assert_close(other(IDS), model(IDS))
    assert specs_of(other) == specs_of(model)
    assert other.again is other.first
    assert not any(p.requires_grad for p in other.first.parameters())
    tied: list[Any] = [other.table, other.head]
    weights = [each.weight if rank is None else each.u.weight for each in tied]
    assert weights[0] is weights[1]
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())


def test_into_a_module_without_values(tmp_path: Path) -> None:
    model = net(0).half()
    lrsurgery.factorise_(model, rank=0.5)
    lrsurgery.save_model(model, tmp_path / "low", form="balanced")
    with torch.device("meta"):
        other = Net().eval()
    lrsurgery.load_into_(other, tmp_path / "low")
    assert {p.dtype for p in other.parameters()} == {torch.float16}
    check_same(other, model)


def test_another_process_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(
        "import sys, torch, lrsurgery\n"
        "torch.manual_seed(int(sys.argv[1]))\n"
        "model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 8))\n"
        "if sys.argv[1] == '0':\n"
        "    lrsurgery.factorise_(model, rank=4)\n"
        "    lrsurgery.save_model(model, sys.argv[2])\n"
        "else:\n"
        "    lrsurgery.load_into_(model, sys.argv[2])\n"
        "print(model(torch.ones(1, 20)).tolist())\n"
    )
    answers = [program(sys.executable, script, seed, tmp_path / "low") for seed in ("0", "1")]
    assert [each.returncode for each in answers] == [0, 0], answers
    found, wanted = (torch.tensor(json.loads(each.stdout)) for each in answers)
    torch.testing.assert_close(found, wanted)


def wrong(model: Any, folder: Path) -> None:
    """Everything that does not fit leaves the module as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind = type(model.first) if hasattr(model, "first") else None
    try:
        lrsurgery.load_into_(model, folder)
    finally:
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert kind is None or type(model.first) is kind


def test_what_does_not_fit(tmp_path: Path, low: Path) -> None:
    model = net(0)
    lrsurgery.factorise_(model, rank=0.5)
    lrsurgery.save_model(model, tmp_path / "low")
    with pytest.raises(SourceError, match=r"the weights of a .*Net, .* call lrsurgery.load_into_\(module, '.*low'\)"):
        lrsurgery.load_model(tmp_path / "low")
    assert tiny.run("report", tmp_path / "low") == 2
    with pytest.raises(PlanError, match="already has factorised layers"):
        wrong(model, tmp_path / "low")
    smaller = net(1)
    smaller.first = smaller.again = nn.Linear(16, 23)
    with pytest.raises((SourceError, PlanError), match="first"):
        wrong(smaller, tmp_path / "low")
    other = net(1)
    other.more = nn.Linear(3, 3)
    with pytest.raises(SourceError, match=r"more\.bias is missing"):
        wrong(other, tmp_path / "low")
    with pytest.raises(PlanError, match="this Linear has no such layer"):
        wrong(nn.Linear(3, 3), tmp_path / "low")
    with pytest.raises(SourceError, match=r"use lrsurgery\.load_model"):
        wrong(net(1), low)


class Odd(nn.Linear):
    def get_extra_state(self) -> object:
        return {"a": 1}


def test_a_state_without_a_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"0\._extra_state: its state is a dict"):
        lrsurgery.save_model(nn.Sequential(Odd(3, 3)), tmp_path / "low")
    assert not (tmp_path / "low").exists()


def test_options_that_a_timm_model_would_not_take(low_timm: Path) -> None:
    with pytest.raises(SourceError, match=r"passes num_classes, device_map .* lrsurgery\.timm\.create_model"):
        lrsurgery.load_model(low_timm, num_classes=5, device_map="auto")
    assert isinstance(lrsurgery.load_model(low_timm), timm.models.ResNet)
