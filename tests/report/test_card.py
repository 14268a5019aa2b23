"""Model cards, read back as the hub reads them, and run as people copy them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from support import tiny, zoo
from support.checks import run
from support.hub import COMMIT, cache, put_in_cache
from support.installed import environment, python
from support.warm import program

import lrsurgery
from lrsurgery.report.hub import head_of
from lrsurgery.training.finetune import finetune

pytestmark = pytest.mark.process  # each trains or reads a model: seconds a test

__all__ = ["cache"]  # a fixture

LICENCE = "license: other\nlicense_name: llama\nlicense_link: USE_POLICY.md\n"
LLAMA = f"{LICENCE}language:\n- en\n- no\ndatasets: someone/text\n"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gpt2(tmp_path_factory.mktemp("cards") / "gpt2", dropout=0.0)


def with_card(folder: Path, target: Path, front: str, text: str = "# A model\n") -> Path:
    """A copy of a model folder, under a card with this front matter."""
    shutil.copytree(folder, target)
    (target / "README.md").write_text(f"---\n{front}---\n{text}", encoding="utf-8")
    return target


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return found


def body(folder: Path) -> str:
    return str(ModelCard.load(folder / "README.md").text)


def half(source: object, output: Path, *options: object) -> Path:
    run("factorise", source, "--rank", "0.5", "--output", output, *options)
    return output


def train(model: object, data: Path, output: Path, **more: Any) -> Path:
    tiny.write_text(data)
    given = {"data": str(data / "train.txt"), "eval_data": str(data / "valid.txt"), "steps": 2, "batch_size": 2}
    return finetune({**given, "model": str(model), **more}, output).output


def snippets(folder: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", body(folder), re.DOTALL)


def run_as_copied(code: str, folder: Path, more: str = "") -> str:
    """In a process of its own, from the folder beside the model's, where lrsurgery is installed."""
    variables = environment(folder.parent / f"python of {folder.name}")
    done = python(variables, "-c", f"{code}\n{more}", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- metadata


def test_of_a_hub_model(gpt2: Path, cache: Path, tmp_path: Path) -> None:
    front = f"base_model: someone/older\npipeline_tag: translation\n{LLAMA}"
    put_in_cache(cache, "someone/tiny-gpt2", COMMIT, with_card(gpt2, tmp_path / "dense", front), ("main",))
    assert metadata(half("someone/tiny-gpt2", tmp_path / "half")) == {
        "base_model": "someone/tiny-gpt2",
        "datasets": "someone/text",
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "llama",
        "license_link": f"https://huggingface.co/someone/tiny-gpt2/blob/{COMMIT}/USE_POLICY.md",
        "pipeline_tag": "text-generation",
        "tags": ["lrsurgery", "low-rank"],
    }
    assert "[someone/tiny-gpt2](https://huggingface.co/someone/tiny-gpt2)" in body(tmp_path / "half")


def test_the_base_model_goes_from_folder_to_folder(gpt2: Path, cache: Path, tmp_path: Path) -> None:
    """Factorised, healed, exported: the hub's model stays the base; once healed it is a finetune of it."""
    put_in_cache(cache, "someone/tiny-gpt2", COMMIT, with_card(gpt2, tmp_path / "dense", LLAMA), ("main",))
    half("someone/tiny-gpt2", tmp_path / "half")
    healed = train(tmp_path / "half", tmp_path / "text", tmp_path / "healed")
    run("export", healed, "--to", "dense", "--output", tmp_path / "back")
    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "unhealed")
    wanted = {"half": None, "healed": "finetune", "back": "finetune", "unhealed": None}
    for name, relation in wanted.items():
        found = metadata(tmp_path / name)
        assert (found["base_model"], found.get("base_model_relation")) == ("someone/tiny-gpt2", relation), name
        assert (found["license"], found["license_name"], found["language"]) == ("other", "llama", ["en", "no"]), name
        assert found["datasets"] == "someone/text"


def test_a_folder_is_no_hub_id(gpt2: Path, tmp_path: Path) -> None:
    assert "base_model" not in metadata(half(gpt2, tmp_path / "half"))
    named = with_card(gpt2, tmp_path / "named", "base_model: openai-community/gpt2\nlicense: mit\n")
    found = metadata(half(named, tmp_path / "of-named"))
    assert (found["base_model"], found["license"]) == ("openai-community/gpt2", "mit")
    assert "That of the base model: mit." in body(tmp_path / "of-named")


def test_what_is_made_from_scratch_has_no_base_model(gpt2: Path, tmp_path: Path) -> None:
    """No weight of it is left, and nothing of what it learned from; the licence of its files holds all the same."""
    named = with_card(gpt2, tmp_path / "named", f"base_model: openai-community/gpt2\n{LLAMA}")
    half(named, tmp_path / "fresh", "--from-scratch")
    trained = train(named, tmp_path / "text", tmp_path / "trained", from_scratch=True, rank=["0.5"])
    for folder in (tmp_path / "fresh", trained):
        found = metadata(folder)
        assert not {"base_model", "base_model_relation", "datasets", "language"} & set(found)
        assert found["license"] == "other"


def test_timm(tmp_path: Path) -> None:
    """Its licence stands in its config where there is no card."""
    dense = tiny.save_timm(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "Apache-2.0"
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "README.md").unlink(missing_ok=True)
    half(dense, tmp_path / "half")
    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    for name in ("half", "back"):
        found = metadata(tmp_path / name)
        assert (found["library_name"], found["pipeline_tag"]) == ("timm", "image-classification")
        assert found["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "readme",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\n- license: mit\n---\n",
        b"---\nlicense: !!python/object/apply:os.mkdir [made]\n---\n",
        b"---\nlicense: mit\nbase_model: \xff\xfe\n---\n",
        b"---\nlicense: {a: 1}\nbase_model: 7\nlanguage: [1, [2]]\ndatasets:\n1: 2\npipeline_tag: [a]\n---\n",
        b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
        b"---\nlicense: " + b"x" * 5000 + b"\n---\n",
        b"license: mit\n",
        b"",
    ],
    ids=["not yaml", "a list", "python object", "not utf-8", "wrong types", "deep", "long", "no front matter", "empty"],
)
def test_malformed_source_cards(readme: bytes, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = with_card(gpt2, tmp_path / "dense", "")
    (dense / "README.md").write_bytes(readme)
    monkeypatch.chdir(tmp_path)
    half(dense, tmp_path / "half")
    assert metadata(tmp_path / "half") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lrsurgery", "low-rank"],
    }
    assert "names none" in body(tmp_path / "half")
    assert not (tmp_path / "made").exists()


def test_a_card_that_links_out_of_its_folder_is_not_read(gpt2: Path, tmp_path: Path) -> None:
    dense = with_card(gpt2, tmp_path / "dense", "")
    (tmp_path / "elsewhere.md").write_text("---\nlicense: mit\n---\n")
    (dense / "README.md").unlink()
    (dense / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert "license" not in metadata(half(dense, tmp_path / "half"))


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
def test_auto_class(name: str) -> None:
    """What the card names builds the very class."""
    model: Any = zoo.build_transformers(name)
    auto, task = head_of({"architectures": [type(model).__name__]})
    assert type(getattr(transformers, auto).from_config(model.config)) is type(model)
    causal = name in ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen3", "falcon", "phi3", "mixtral", "mamba")
    assert (task == "text-generation") == (causal or name == "gemma3")


def test_other_tasks() -> None:
    assert head_of({"architectures": ["BertForMaskedLM"]}) == ("AutoModelForMaskedLM", "fill-mask")
    found = head_of({"architectures": ["WhisperForConditionalGeneration"]})
    assert found == ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition")
    assert head_of({"architectures": ["T5ForConditionalGeneration"]}) == ("AutoModelForSeq2SeqLM", None)
    assert head_of({"architectures": ["BertModel"]}) == head_of({}) == ("AutoModel", None)
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.TheirLM"}
    assert head_of({"architectures": ["TheirLM"], "auto_map": own}) == ("AutoModelForCausalLM", "text-generation")


# --- what it says


@pytest.mark.process
def test_the_loading_code_runs(gpt2: Path, tmp_path: Path) -> None:
    half(gpt2, tmp_path / "half")
    (code,) = snippets(tmp_path / "half")
    said = run_as_copied(code, tmp_path / "half", "print(type(model).__name__, model.num_parameters())")
    report = lrsurgery.Report.read(tmp_path / "half")
    assert said.split() == ["GPT2LMHeadModel", str(report.parameters_after)]
    export = next(code for code in snippets(tmp_path / "half", "bash") if " export " in code)
    done = program(sys.executable, "-m", *export.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (code,) = snippets(tmp_path / "half-dense")
    assert "lrsurgery" not in code
    said = run_as_copied(code, tmp_path / "half-dense", "print(type(model).__name__, model.num_parameters())")
    assert said.split() == ["GPT2LMHeadModel", str(report.parameters_before)]


@pytest.mark.process
def test_the_loading_code_of_timm_runs(tmp_path: Path) -> None:
    half(tiny.save_timm(tmp_path / "dense"), tmp_path / "half")
    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    report = lrsurgery.Report.read(tmp_path / "half")
    count = "print(sum(p.numel() for p in model.parameters()))\n"
    for name, wanted in (("half", report.parameters_after), ("back", report.parameters_before)):
        code = snippets(tmp_path / name)
        assert len(code) == 2
        assert ("lrsurgery" in "".join(code)) == (name == "half")
        assert run_as_copied(f"\n{count}".join(code), tmp_path / name, count).split() == [str(wanted)] * 2


def test_sizes_layers_and_reasons(gpt2: Path, tmp_path: Path) -> None:
    half(gpt2, tmp_path / "half", "--exclude", "*.1.*")
    report, text = lrsurgery.Report.read(tmp_path / "half"), body(tmp_path / "half")
    for before, after in (
        (report.parameters_before, report.parameters_after),
        (report.bytes_before, report.bytes_after),
    ):
        assert before is not None
        assert after is not None
        assert f"| {before:,} | {after:,} | {after / before:.1%} |" in text
    assert f"{len(report.factorised)} are low rank, {len(report.dense)} stayed dense." in text
    for row in report.factorised:
        assert row.relative_error is not None
        assert re.search(rf"\| `{row.name}` \| {row.kind} \| {row.rank} \|.*\| {row.relative_error:.2%} \|", text)
    excluded = [row for row in report.dense if row.reason == "excluded"]
    parameters = sum(row.parameters_before for row in excluded)
    assert f"| excluded | {len(excluded)} | {parameters:,} | `{excluded[0].name}` |" in text
    assert "2209.13569" in text


def test_what_was_measured(gpt2: Path, tmp_path: Path) -> None:
    """Of a run: each stage, also in the export. What healing no longer knows makes no empty column."""
    half(gpt2, tmp_path / "half")
    healed = train(tmp_path / "half", tmp_path / "text", tmp_path / "healed", teacher=str(gpt2))
    run("export", healed, "--to", "dense", "--output", tmp_path / "back")
    records = [json.loads(line) for line in (healed / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r["eval"]["perplexity"] for r in records if "eval" in r]
    for folder in (healed, tmp_path / "back"):
        for perplexity in (evaluated[0], evaluated[-1]):
            assert f"| {perplexity:.4f} |" in body(folder)
    assert "teacher `gpt2`" in body(healed)
    assert "| layer | kind | rank | full rank | parameters | kept |\n" in body(healed)
    assert "energy kept" in body(tmp_path / "half")
    assert "|  |" not in body(healed)


def test_nothing_of_the_disk_but_the_command(gpt2: Path, tmp_path: Path) -> None:
    lrsurgery.factorise_checkpoint(gpt2, tmp_path / "half", rank=0.5)
    healed = train(tmp_path / "half", tmp_path / "text", tmp_path / "healed", teacher=str(gpt2))
    lrsurgery.export_dense(healed, tmp_path / "back")
    for folder in (tmp_path / "half", healed, tmp_path / "back"):
        assert str(tmp_path) not in (folder / "README.md").read_text()
        assert str(gpt2.parent) not in (folder / "README.md").read_text()


def test_the_same_bytes_again(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same command, and one that says --resume."""
    cards = []
    for name, more in (("a", []), ("b", []), ("c", ["--resume"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert tiny.run("factorise", gpt2, "--rank", "0.5", "--output", "half", *more) == 0
        cards.append(Path("half/README.md").read_bytes())
    assert f"lrsurgery factorise {gpt2} --rank 0.5 --output half\n".encode() in cards[0]
    assert cards[0] == cards[1] == cards[2]


def test_a_report_that_is_not_ours_does_no_harm(gpt2: Path, tmp_path: Path) -> None:
    half(gpt2, tmp_path / "half")
    file = tmp_path / "half" / "rank_report.json"
    found = json.loads(file.read_text())
    found["command"], found["totals"]["parameters_after"] = "lrsurgery 'factorise", None
    file.write_text(json.dumps(found))
    (tmp_path / "half" / "metrics.jsonl").write_text('{"no": "stage"}\n')
    run("export", tmp_path / "half", "--to", "dense", "--output", tmp_path / "back")
    assert "lrsurgery 'factorise\n" in body(tmp_path / "back")
