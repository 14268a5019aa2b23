"""Bad input, full disks, signals: one clear line, exit code 2, nothing half-written, nothing executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny, warm, zoo

import lrsurgery.checkpoints.quantizer.method
from lrsurgery.files.marks import write_mark

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Llama."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    zoo.build_transformers("llama").save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
    assert len(shards(folder)) > 1
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "llama"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


def set_tensor(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    file = shard_of(folder, key)
    tensors = load_file(file)
    tensors.pop(key)
    save_file(tensors if tensor is None else {**tensors, key: tensor}, file, metadata={"format": "pt"})


def spoil(key: str, value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensor = load_file(shard_of(folder, key))[key]
        tensor.view(-1)[7] = value
        set_tensor(folder, key, tensor)

    return damage


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return damage


def point_shard_at(name: str) -> Callable[[Path], None]:
    return edit_json("model.safetensors.index.json", lambda index: index["weight_map"].update({UP: name}))


def truncate(folder: Path) -> None:
    file = shard_of(folder, UP)
    file.write_bytes(file.read_bytes()[:-100])


def wrong_header(folder: Path) -> None:
    """The header promises another length than the data has."""
    file = shard_of(folder, UP)
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[UP]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def link_out(folder: Path) -> None:
    file = shard_of(folder, UP)
    outside = folder.parent / "elsewhere.safetensors"
    file.rename(outside)
    file.symlink_to(outside)


class Bomb:
    """Runs when a pickle with it is loaded without weights_only."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def pickle_with_code(folder: Path) -> None:
    state: dict[str, Any] = {}
    for file in shards(folder):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save({**state, "extra": Bomb(folder / "executed")}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    code = f"from pathlib import Path\nPath({str(folder / 'executed')!r}).touch()\n"
    for name in ("modeling_x.py", "configuration_x.py"):
        (folder / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    edit_json("config.json", lambda c: c.update(model_type="x", architectures=["XModel"], auto_map=auto))(folder)


def only_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


def set_config(**values: object) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config.update(values))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shard_of(f, UP).unlink(), r"model-0000\d.*the shard is missing"),
    "truncated shard": (truncate, r"model-0000\d.*not a whole safetensors file"),
    "wrong header": (wrong_header, r"model-0000\d.*not a whole safetensors file"),
    "empty shard": (lambda f: shard_of(f, UP).write_bytes(b""), r"model-0000\d.*not a whole safetensors file"),
    "index names ../x": (point_shard_at("../x.safetensors"), r"index\.json: names '\.\./x\.safetensors'"),
    "index names an absolute path": (point_shard_at("/etc/hostname"), r"index\.json: names '/etc/hostname'"),
    "index names no string": (point_shard_at(3), r"index\.json: (names 3|not an index)"),  # type: ignore[arg-type]
    "index that is not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not an index"),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not an index"),
    "symlink out": (link_out, "links to a file outside"),
    "index lists what its shard lacks": (lambda f: set_tensor(f, UP, None), f"lists {UP} .* does not hold it"),
    "missing tensor": (
        lambda f: (
            set_tensor(f, NORM, None),
            edit_json("model.safetensors.index.json", lambda index: index["weight_map"].pop(NORM))(f),
        ),
        f"{NORM} is missing from the checkpoint",
    ),
    "wrong shape": (
        lambda f: set_tensor(f, UP, torch.ones(3, 5)),
        rf"{UP} has shape \(3, 5\), the model wants \(96, 48",
    ),
    "NaN in a layer": (spoil(UP, float("nan")), f"{UP} holds NaN or Inf"),
    "Inf in a layer": (spoil(UP, float("inf")), f"{UP} holds NaN or Inf"),
    "NaN in what passes through": (spoil(NORM, float("nan")), f"{NORM} holds NaN or Inf"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "config that is not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not a JSON object"),
    "config that is not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json: not a JSON object",
    ),
    "config of no model": (lambda f: (f / "config.json").write_text('{"a": 1}'), r"config\.json: not a model's"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: not a JSON object"),
    "unknown model type": (set_config(model_type="nosuch"), "model type 'nosuch' is not in transformers"),
    "unknown class": (set_config(architectures=["NoSuchModel"]), "NoSuchModel is not a model class"),
    "config of no possible model": (set_config(num_attention_heads=0), "cannot build this model"),
    "unknown timm name": (set_config(architecture="nosuch_50"), "nosuch_50"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no weights"),
    "already quantised": (set_config(quantization_config={"quant_method": "gptq"}), "quantised with gptq"),
    "pickle with code": (pickle_with_code, "holds more than weights"),
    "remote code": (remote_code, "--trust-remote-code"),
    "LoRA adapter": (only_adapter, "a LoRA adapter"),
}

RANKS = (
    "0 1.5 -1 abc nan inf energy:0 energy:1.1 energy:x params:0 params:2 params:nan"
    " *.up_proj=0 *.up_proj= =0.5 0x10 10000000 stable:2"
)
REFUSED: dict[str, tuple[list[str], str]] = {
    **{f"rank {rank}": (["--rank", rank], "rank") for rank in (*RANKS.split(), "")},
    "rank glob that matches nothing": (["--rank", "0.5", "--rank", "*.nosuch=0.5"], r"\*\.nosuch"),
    "include that matches nothing": (["--rank", "0.5", "--include", "nosuch*"], r"nosuch\*"),
    "exclude that matches nothing": (["--rank", "0.5", "--exclude", "nosuch*"], r"nosuch\*"),
    "nothing left": (["--rank", "0.5", "--exclude", "*"], "nothing"),
    "every layer over break-even": (["--rank", "1.0"], "nothing to factorise"),
    "no rank": ([], "--rank"),
    "multiple-of 0": (["--rank", "0.5", "--multiple-of", "0"], "multiple"),
    "unknown init": (["--rank", "0.5", "--init", "xavier"], "xavier.*spectral-ones"),
    "unknown conv": (["--rank", "0.5", "--conv", "depth"], "depth.*spatial"),
    "unknown dtype": (["--rank", "0.5", "--dtype", "int8"], "int8.*bfloat16"),
    "unknown device": (["--rank", "0.5", "--device", "tpu"], "tpu"),
    "device that is not there": (["--rank", "0.5", "--device", "cuda:99"], "CUDA devices"),
    "unknown shard size": (["--rank", "0.5", "--shard-size", "big"], "shard size 'big'"),
    "negative seed": (["--rank", "0.5", "--seed", "-1"], "seed"),
    "unknown flag": (["--rank", "0.5", "--nosuch"], "--nosuch"),
    "no number": (["--rank", "0.5", "--multiple-of", "x"], "--multiple-of"),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): b"" if p.is_dir() else p.read_bytes() for p in folder.rglob("*") if p.exists()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the program and returns its one line of error."""
    capsys.readouterr()
    code = tiny.run(*arguments)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("lrsurgery: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_model(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, wanted = DAMAGED[case]
    damage(model)
    before = tree(tmp_path)
    line = refusal(capsys, "factorise", model, "--rank", "0.5", "--output", tmp_path / "new" / "out")
    assert re.search(wanted, line), line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", REFUSED)
def test_refused_argument(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, wanted = REFUSED[case]
    before = tree(tmp_path)
    line = refusal(capsys, "factorise", model, "--output", tmp_path / "out", *arguments)
    assert re.search(wanted, line), line
    assert tree(tmp_path) == before


def test_json_error_is_one_object(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("factorise", model, "--rank", "2.5", "--json") == 2
    out, err = capsys.readouterr()
    assert f"lrsurgery: {json.loads(out)['error']}\n" == err


@pytest.mark.process
def test_debug_shows_the_traceback(model: Path) -> None:
    done = program(f"factorise {model} --rank 2.5 --debug")
    assert "Traceback" in done.stderr
    assert "RankError" in done.stderr


def test_output_that_is_in_the_way(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused as it stands; with --overwrite, only what this program wrote gives way, and nothing beside it."""
    command = ("factorise", model, "--rank", "0.5")
    names = ("ours", "theirs", "files", "file", "link", "dangling", "added", "within", "empty")
    places = {name: tmp_path / name for name in names}
    assert tiny.run(*command, "--output", places["ours"]) == 0
    shutil.copytree(model, places["theirs"])
    places["files"].mkdir()
    (places["files"] / "thesis.txt").write_text("years of work")
    places["file"].write_text("x")
    places["link"].symlink_to(places["ours"])
    places["dangling"].symlink_to(tmp_path / "nowhere")
    for name, stranger in (("added", "thesis.txt"), ("within", "runs/thesis.txt")):
        shutil.copytree(places["ours"], places[name])
        (places[name] / stranger).parent.mkdir(exist_ok=True)
        (places[name] / stranger).write_text("years of work")
    places["empty"].mkdir()
    before = tree(tmp_path)
    wanted = {
        "theirs": "is no model that this version of lrsurgery wrote",
        "files": "is no model that this version of lrsurgery wrote",
        "file": "is no folder",
        "link": "is a link",
        "dangling": "is a link",
        "added": "holds thesis.txt, which lrsurgery did not write",
        "within": "holds runs",
    }
    for name, place in places.items():
        assert "already exists" in refusal(capsys, *command, "--output", place)
        if name in wanted:
            assert wanted[name] in refusal(capsys, *command, "--output", place, "--overwrite")
    assert "cannot be written" in refusal(capsys, *command, "--output", places["file"] / "below")
    assert tree(tmp_path) == before

    for name in ("ours", "empty"):
        assert tiny.run(*command, "--overwrite", "--output", places[name]) == 0
        whole(places[name])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_no_command_replaces_a_model_that_it_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever name it is read and written, even if this program made it."""
    tiny.save_timm(tmp_path / "holder" / "timm")
    mine = tmp_path / "holder"
    assert tiny.run("factorise", model, "--rank", "0.5", "--output", mine / "half") == 0
    (tmp_path / "link").symlink_to(mine / "half")
    (tmp_path / "file.safetensors").symlink_to(mine / "timm" / "model.safetensors")
    write_mark(mine, "model", [])  # as if all of it were ours
    write_mark(mine / "timm", "model", ["config.json", "model.safetensors"])
    text, _ = tiny.write_text(tmp_path / "text")
    before = tree(tmp_path)
    timm = ("--architecture", "test_resnet", "--rank", "0.25")
    train = ("--data", text, "--block-size", 16, "--steps", 1)
    dense = tiny.save_gpt2(tmp_path / "dense")
    before = tree(tmp_path)
    cases: list[tuple[object, ...]] = [
        ("factorise", mine / "timm" / "model.safetensors", *timm, "--output", mine / "timm"),
        ("factorise", tmp_path / "file.safetensors", *timm, "--output", mine / "timm"),
        ("factorise", mine / "timm", "--rank", 0.25, "--output", mine),
        ("factorise", mine / "timm", "--rank", 0.25, "--output", mine / "half" / ".." / "timm"),
        ("export", mine / "half", "--output", mine / "half"),
        ("export", tmp_path / "link", "--output", mine / "half"),
        ("finetune", mine / "half", *train, "--output", mine / "half"),
        ("finetune", dense, "--dense", *train, "--teacher", mine / "half", "--output", mine / "half"),
        ("finetune", dense, "--rank", 0.5, *train, "--against", tmp_path / "link", "--output", mine / "half"),
    ]
    for case in cases:
        assert "is or holds the model that is being read" in refusal(capsys, *case, "--overwrite"), case
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_beside_the_output_are_the_users_unless_marked(
    overwrite: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder and the work folder have names that a user's own may have."""
    model, (text, _) = tiny.save_gpt2(tmp_path / "model"), tiny.write_text(tmp_path / "text")
    train = ("--data", text, "--block-size", 16, "--steps", 1)
    more = ("--overwrite",) if overwrite else ()
    for name in ("a.run", ".b.factorising", ".b.elsewhere.1.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / "c.run").symlink_to(tmp_path / "a.run")
    before = tree(tmp_path)
    for name in ("a", "c"):
        for way in (more, ("--resume",)):
            line = refusal(capsys, "finetune", model, "--dense", *train, "--output", tmp_path / name, *way)
            assert re.search(r"was not made by lrsurgery as a run folder|is in the way", line), line
    line = refusal(capsys, "factorise", model, "--rank", 0.5, "--output", tmp_path / "b", *more)
    assert "was not made by lrsurgery as a work folder" in line
    assert tree(tmp_path) == before


def test_what_a_user_put_beside_a_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (text, _) = tiny.save_gpt2(tmp_path / "model"), tiny.write_text(tmp_path / "text")
    train = ("--dense", "--data", text, "--block-size", 16, "--steps", 2, "--save-steps", 1)
    command = ("finetune", model, *train, "--output", tmp_path / "out")
    assert tiny.run(*command, "--keep-checkpoints") == 0
    for place in (tmp_path / "out.run", tmp_path / "out.run" / "dense"):
        (place / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert tiny.run(*command, "--overwrite") == 0
    assert "thesis.txt: stays" in capsys.readouterr().err
    left = {str(p.relative_to(tmp_path / "out.run")) for p in (tmp_path / "out.run").rglob("*") if p.is_file()}
    assert left == {"thesis.txt", "dense/thesis.txt", ".lrsurgery.json"}


def test_second_surgery_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("factorise", model, "--rank", "0.5", "--output", tmp_path / "out") == 0
    assert "already factorised" in refusal(capsys, "factorise", tmp_path / "out", "--rank", "0.5")
    assert "is a dense model" in refusal(capsys, "report", model, "--against", tmp_path / "out")
    assert "not a factorised" in refusal(capsys, "export", model, "--output", tmp_path / "dense")
    assert "onnx" in refusal(capsys, "export", tmp_path / "out", "--to", "onnx", "--output", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_damaged_output_is_noticed(model: Path, tmp_path: Path) -> None:
    """By the layer's name, for a tensor that is gone and for a rank that the config contradicts."""
    out = tmp_path / "out"
    assert tiny.run("factorise", model, "--rank", "0.5", "--output", out) == 0
    (out / "rank_report.json").unlink()  # whose digests would tell before
    tensors = load_file(out / "model.safetensors")
    key = UP.replace(".weight", ".u.weight")
    save_file({k: v for k, v in tensors.items() if k != key}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lrsurgery.errors.SourceError, match=re.escape(key)):
        lrsurgery.load_model(out)
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lrsurgery.errors.SourceError, match=re.escape(key)):
        lrsurgery.load_model(out)


@pytest.mark.process
def test_transformers_alone_refuses_the_output(model: Path, tmp_path: Path) -> None:
    """In a process that knows nothing of this package, as an installed one can be told to."""
    out = tmp_path / "out"
    assert tiny.run("factorise", model, "--rank", "0.5", "--output", out) == 0
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    code = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as e:
        assert "mismatch" in str(e), e
    else:
        raise AssertionError(f"{folder} was loaded")
assert "lrsurgery" not in sys.modules
"""
    words = [sys.executable, "-c", code, out, tmp_path / "again"]
    off = {**os.environ, "LRSURGERY_AUTOLOAD": "0"}
    done = subprocess.run(words, env=off, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What the program does at a chosen moment, and how it is brought there: {act} runs at the Nth call of {place}.
RIGGED = """
import os, resource, signal, sys
import lrsurgery.files.writing, lrsurgery.checkpoints.tensors
import lrsurgery.factorise.checkpoint, lrsurgery.factorise.work.rewrite
from pathlib import Path
from lrsurgery.cli.app import main
calls = 0
def rig(owner, name):
    real = getattr(owner, name)
    def rigged(*args, **kwargs):
        global calls
        calls += 1
        if calls == {nth}:
            {act}
        return real(*args, **kwargs)
    setattr(owner, name, rigged)
rig({place})
main()
"""
MOMENTS = {
    "before the first layer": ("lrsurgery.factorise.work.rewrite, 'choose_names'", 1),
    "first tensor": ("lrsurgery.checkpoints.output.ShardWriter, 'add'", 1),
    "halfway": ("lrsurgery.checkpoints.output.ShardWriter, 'add'", 12),
    "closing a shard": ("os, 'fsync'", 1),
    "writing the config": ("lrsurgery.factorise.checkpoint, 'write_text'", 1),
    "writing the card": ("lrsurgery.factorise.checkpoint, 'write_text'", 3),
    "moving the old folder away": ("Path, 'rename'", 2),
    "moving the new folder in": ("Path, 'rename'", 3),
    "after the move": ("lrsurgery.files.writing, '_sync_folder'", 2),
}


def program(arguments: str, moment: str | None = None, act: str = "pass") -> subprocess.CompletedProcess[str]:
    place, nth = MOMENTS[moment] if moment else ("os, 'fsync'", -1)
    code = RIGGED.format(place=place, nth=nth, act=act)
    return warm.program(sys.executable, "-c", code, *arguments.split())


def whole(folder: Path) -> None:
    """A folder that has all its parts and loads."""
    report = json.loads((folder / "rank_report.json").read_text())
    model: Any = lrsurgery.load_model(folder)
    assert model.num_parameters() == report["totals"]["parameters_after"]
    assert (folder / "README.md").read_text().endswith("\n")


@pytest.mark.process
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(moment: str, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over an older model: afterwards there is the old one, the new one or none, and the next run clears up."""
    out = tmp_path / "out"
    command = ("factorise", pristine, "--output", out, "--rank")
    assert tiny.run(*command, 8) == 0
    old = tree(out)
    killed = program(
        " ".join(map(str, (*command, "0.5", "--overwrite"))), moment, "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if moment == "after the move":
        whole(out)
    elif moment == "moving the new folder in":
        assert not out.exists()
        assert "already exists" in refusal(capsys, *command, "0.5")  # the old one is back
        assert tree(out) == old
    else:
        assert tree(out) == old
    assert tiny.run(*command, "0.5", "--overwrite") == 0
    whole(out)
    assert tree(out) != old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.process
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["first tensor", "halfway", "writing the card"])
def test_interrupted(moment: str, number: str, pristine: Path, tmp_path: Path) -> None:
    """What is finished is kept, hidden, and the same command with --resume continues to the same bytes."""
    command = f"factorise {pristine} --rank 0.5 --output {tmp_path / 'new' / 'out'}"
    done = program(command, moment, f"os.kill(os.getpid(), signal.{number})")
    assert done.returncode == 130
    assert done.stdout == ""
    assert re.fullmatch(
        r"lrsurgery: interrupted; \d+ of \d+ layers are kept; run the same command with --resume to continue\n",
        done.stderr,
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".out.factorising"]
    assert tiny.run(*command.split(), "--resume", "--quiet") == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    whole(tmp_path / "new" / "out")


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_before_anything_was_done(number: str, code: int, pristine: Path, tmp_path: Path) -> None:
    done = program(
        f"factorise {pristine} --rank 0.5 --output {tmp_path / 'new' / 'out'}",
        "before the first layer",
        f"os.kill(os.getpid(), signal.{number})",
    )
    assert done.returncode == code
    assert done.stderr == ("lrsurgery: interrupted; nothing was written\n" if number == "SIGINT" else "")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.parametrize("command", ["factorise", "export"])
def test_full_disk(command: str, pristine: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the middle of a tensor."""
    arguments = f"factorise {pristine} --rank 0.5"
    if command == "export":
        assert tiny.run(*arguments.split(), "--output", tmp_path / "half") == 0
        arguments = f"export {tmp_path / 'half'}"
    before = tree(tmp_path)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    done = program(f"{arguments} --output {tmp_path / 'out'}", "first tensor", limit)
    assert done.returncode == 2, done.stderr
    kept = r"\d+ of 14 layers are kept; once it can be written, run the same command with --resume"
    end = kept if command == "factorise" else "nothing is written"
    assert re.fullmatch(rf"lrsurgery: .*out: cannot be written \(File too large\); {end}\n", done.stderr)
    if command == "factorise":
        assert tiny.run(*arguments.split(), "--output", tmp_path / "out", "--resume") == 0
        whole(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path) == before


def test_space_is_looked_at_first(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "0.00 GB are free" in refusal(capsys, "factorise", pristine, "--rank", "0.5", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_target_that_cannot_be_written(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")  # which stops root too
    line = refusal(capsys, "factorise", pristine, "--rank", "0.5", "--output", tmp_path / "taken" / "out")
    assert "cannot be written (Not a directory)" in line
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
