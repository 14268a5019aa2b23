"""The program as people run it: a real process, its streams and its exit code."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from markdown_it import MarkdownIt
from safetensors import safe_open
from support import tiny, warm, zoo
from typer.testing import CliRunner

from lrsurgery import __version__
from lrsurgery.cli.app import app
from lrsurgery.cli.console import LiveListener, Screen
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.files.writing import with_name
from lrsurgery.progress import TrainingStep
from lrsurgery.runtime import Processes, import_file, numbers_of_processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    zoo.save_transformers("llama", folder)
    return folder


def program(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrsurgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def in_process(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.process
def test_factorise_report_export_in_real_processes(model: Path, tmp_path: Path) -> None:
    made = program("factorise", model, "--rank", "0.5", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "tiny-llama-rank-0.5"
    assert "Next: lrsurgery report tiny-llama-rank-0.5" in made.stderr
    assert "model.layers.0.mlp.up_proj" in made.stdout
    assert {"config.json", "model.safetensors", "rank_report.json", "README.md"} <= {p.name for p in folder.iterdir()}
    assert "import lrsurgery.hf" in (folder / "README.md").read_text()

    shown = warm.program(*tiny.PROGRAM, "report", folder, "--json")
    written = json.loads((folder / "rank_report.json").read_text())
    assert json.loads(shown.stdout) == {**written, "name": folder.name}

    refused = warm.program(*tiny.PROGRAM, "factorise", model, "--rank", "0.5", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "already exists" in refused.stderr

    exported = warm.program(*tiny.PROGRAM, "export", folder, "--to", "dense", "--output", tmp_path / "dense", "--json")
    assert json.loads(exported.stdout)["output"] == str(tmp_path / "dense")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        f"m, i = A.from_pretrained({str(tmp_path / 'dense')!r}, output_loading_info=True);"
        "assert not i['missing_keys'] and not i['unexpected_keys']; assert 'lrsurgery' not in sys.modules"
    )
    off = {**os.environ, "LRSURGERY_AUTOLOAD": "0"}
    plain = subprocess.run([sys.executable, "-c", code], env=off, capture_output=True, text=True, check=False)
    assert plain.returncode == 0, plain.stderr


@pytest.mark.process
def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from lrsurgery.cli.app import app\n"
        "for words in (['--help'], ['factorise', '--help'], ['report', '--help'], ['export', '--help']):\n"
        "    assert app(words, standalone_mode=False) in (None, 0)\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout


def test_version_and_completion_are_there() -> None:
    assert in_process("--version").stdout == f"lrsurgery {__version__}\n"
    assert "--install-completion" in in_process("--help").stdout


def test_dry_run_reads_no_weights_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    (copy / "config.json").write_bytes((model / "config.json").read_bytes())
    # shapes alone: a file whose data cannot be read would fail any read
    with safe_open(model / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["model.layers.0.mlp.up_proj.weight"][:] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    found = json.loads(in_process("factorise", copy, "--rank", "0.5", "--dry-run", "--json").stdout)
    assert sorted(tmp_path.iterdir()) == before
    rows = {row["name"]: row for row in found["layers"]}
    up = rows["model.layers.0.mlp.up_proj"]
    assert (up["shape"], up["full_rank"], up["rank"]) == ([96, 48], 48, 24)
    assert (up["parameters_before"], up["parameters_after"]) == (96 * 48, 24 * (96 + 48 - 24))
    assert rows["lm_head"]["reason"] == "output head"
    square = rows["model.layers.0.self_attn.q_proj"]
    assert (square["status"], square["form"], square["parameters_after"]) == (
        "factorised",
        "pivoted",
        24 * (48 + 48 - 24),
    )
    found = json.loads(
        in_process("factorise", copy, "--rank", "0.5", "--form", "balanced", "--dry-run", "--json").stdout
    )
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["model.layers.0.mlp.up_proj"]["parameters_after"] == 24 * (96 + 48)
    assert rows["model.layers.0.self_attn.q_proj"]["reason"] == "rank 24 is over break-even (23)"
    assert found["totals"]["parameters_before"] == sum(t.numel() for t in tensors.values())


def test_dry_run_with_energy_agrees_with_the_run(model: Path, tmp_path: Path) -> None:
    arguments = ("factorise", model, "--rank", "energy:0.7", "--rank", "*.up_proj=stable", "--json")
    planned = json.loads(in_process(*arguments, "--dry-run").stdout)
    made = json.loads(in_process(*arguments, "--output", tmp_path / "out").stdout)
    assert [(r["name"], r["rank"]) for r in planned["layers"]] == [(r["name"], r["rank"]) for r in made["layers"]]
    with safe_open(model / "model.safetensors", "pt") as file:
        values = torch.linalg.svdvals(file.get_tensor("model.layers.0.mlp.down_proj.weight").double())
    squares = values.square()
    wanted = int((squares.cumsum(0) / squares.sum() < 0.7).sum()) + 1
    row = next(r for r in made["layers"] if r["name"] == "model.layers.0.mlp.down_proj")
    assert row["rank"] == wanted
    assert row["energy_kept"] == pytest.approx(float(squares[:wanted].sum() / squares.sum()), rel=1e-5)
    assert row["relative_error"] == pytest.approx((1 - row["energy_kept"]) ** 0.5, rel=1e-3)


def test_quiet_says_nothing(model: Path, tmp_path: Path) -> None:
    done = in_process("factorise", model, "--rank", "0.5", "--output", tmp_path / "out", "--quiet")
    assert done.output == ""


@pytest.mark.process
def test_quiet_says_nothing_whatever_libraries_would(tmp_path: Path) -> None:
    """A language model with its tokenizer, so that the loss check reads text; in a process that no test has set up."""
    model = tiny.save_gpt2(tmp_path / "gpt2")
    done = warm.program(*tiny.PROGRAM, "factorise", model, "--rank", "0.4", "--output", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "loss_check" in json.loads((tmp_path / "out" / "rank_report.json").read_text())


@pytest.mark.parametrize("init", ["spectral-ones", "he"])
def test_init_that_gives_up_the_weights_says_so(init: str, model: Path, tmp_path: Path) -> None:
    done = in_process("factorise", model, "--rank", "0.5", "--init", init, "--output", tmp_path / "out")
    assert "must be trained again" in done.output
    again = in_process("factorise", model, "--rank", "0.5", "--init", init, "--output", tmp_path / "again", "--json")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    assert json.loads(again.stdout)["options"]["init"] == init


@pytest.mark.process
def test_progress_bar_on_a_terminal_names_layers(model: Path, tmp_path: Path) -> None:
    """Run under a pseudo-terminal, as a person would."""
    import os
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lrsurgery", "factorise", str(model), "--rank", "0.5", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunks.append(os.read(master, 4096))
        except OSError:  # how Linux says that the other end was closed
            break
    os.close(master)
    text = b"".join(chunks).decode(errors="replace")
    assert process.wait() == 0, text
    assert "factorise" in text
    assert "/14" in text
    assert "Written to" in text


@pytest.mark.process
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_any_encoding_shows_what_it_can(encoding: str, model: Path, tmp_path: Path) -> None:
    """Arrows, block characters and names that are not of the console's alphabet."""
    done = subprocess.run(
        [sys.executable, "-m", "lrsurgery", "factorise", str(model), "--rank", "0.5", "--output", "größe-量"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "->" in out
    assert f"Written to {'gro?e-?' if encoding == 'ascii' else 'größe-?'}" in err
    assert (tmp_path / "größe-量" / "model.safetensors").is_file()


def test_json_has_no_infinity(tmp_path: Path) -> None:
    """A wreck's perplexity is beyond all numbers; other programs read null, and the loss."""
    tiny.write_text(tmp_path)
    folder = tiny.save_gpt2(tmp_path / "gpt2")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1e6
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = in_process("evaluate", folder, "--data", tmp_path / "valid.txt", "--json", "--quiet")

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(done.stdout, parse_constant=refuse)["models"][0]["values"]
    assert values["loss"] > 710
    assert values["perplexity"] is None


def test_a_long_job_in_a_log_says_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Every 30 seconds: how far it is, the loss, the time left at the pace so far."""
    now = [0.0]
    screen = Screen()
    listener = LiveListener(screen, "factorising", lambda: now[0])
    for step in range(1, 101):
        now[0] += 1
        listener.progress(f"layer.{step}", step, 100)
    listener.stage("factorised", 100, 300)
    for step in range(101, 161):
        now[0] += 2
        listener.step(TrainingStep(step=step, total=300, unit="tokens", units_per_step=8, logged={"loss": 3.25}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "/" in line]
    jobs = [line for line in lines if line.startswith("factorising")]
    assert [line.split()[1] for line in jobs] == ["30/100", "60/100", "90/100"]
    assert jobs[0].endswith("layer.30, about 70 s left"), jobs[0]
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 4
    assert "loss 3.2500" in steps[0]
    assert all(" left" in line for line in steps)


def test_quiet_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    listener = LiveListener(Screen(quiet=True), "factorising", lambda: now[0])
    for step in range(1, 101):
        now[0] += 31
        listener.progress(f"layer.{step}", step, 100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.process
def test_without_arguments_there_is_help_and_nothing_else() -> None:
    done = warm.program(sys.executable, "-m", "lrsurgery")
    assert (done.returncode, done.stderr) == (0, "")
    assert "factorise" in done.stdout


@pytest.mark.process
def test_names_are_only_names(model: Path, tmp_path: Path) -> None:
    """Rich's markup, terminal escapes and Markdown in the names of tensors, files and folders."""
    folder = tmp_path / "m[v2]" / "y[" / "red]\x1b[31m`|<b>"
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["\x1b]0;owned\x07[/bold]"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    out = tmp_path / "a[/red]\x1b]0;owned\x07`|<b>"
    for command in (
        ("factorise", folder, "--rank", "0.25", "--output", out),
        ("report", out),
        ("report", out, "--format", "markdown"),
        ("report", out, "--format", "csv"),
        ("report", tmp_path / "none\x1b[31m"),
    ):
        done = warm.program(sys.executable, "-m", "lrsurgery", *command)
        assert done.returncode == (2 if "none" in str(command[1]) else 0), done.stderr
        assert "\x1b" not in done.stdout + done.stderr, command
        assert "\x07" not in done.stdout + done.stderr, command
    assert "m[v2]/y[/red]" in warm.program(sys.executable, "-m", "lrsurgery", "report", out, "--json").stdout
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "\x1b" not in card
    tokens = MarkdownIt().enable("table").parse(card.partition("---\n")[2].partition("---\n")[2])
    assert not [token for token in tokens if token.type == "html_block"]
    assert not [each for token in tokens for each in token.children or () if each.type == "html_inline"]
    (code,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    loaded = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert ast.literal_eval(loaded.args[0]) == out.name


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "x"}, "environment variable WORLD_SIZE is 'x', not a number"),
        ({"RANK": "\u00b2"}, "environment variable RANK is"),
        ({"LOCAL_RANK": "-1"}, "environment variable LOCAL_RANK is '-1', not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "9" * 5000}, "environment variable WORLD_SIZE is"),
    ],
)
def test_an_environment_of_no_torchrun_is_refused(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SurgeryError, match=words):
        numbers_of_processes()
    with pytest.raises(SurgeryError, match=words):
        Processes.of_environment()


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "exit()", "1 / 0", "def", "import nothing_of_this_name"])
def test_an_import_that_ends_the_program_is_an_error(code: str, tmp_path: Path) -> None:
    file = tmp_path / "own_models.py"
    file.write_text(code)
    with pytest.raises(SourceError, match=r"own_models\.py: "):
        import_file(file)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from --output=~/x, which no shell expands: nothing named ~ may stand here in the end."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    text, _ = tiny.write_text(here)
    dense = tiny.save_gpt2(here / "gpt2")
    calibration = ["--calibration", text, "--samples", "2", "--block-size", "16", "--save-statistics", "~/kept"]
    assert tiny.run("factorise", dense, "--rank", "0.25", "--output", "~/x/low", *calibration, "--quiet") == 0
    assert tiny.run("factorise", dense, "--rank", "0.25", "--statistics", "~/kept", "--output", "~/less", "-q") == 0
    assert tiny.run("report", "~/x/low", "--output", "~/low.html", "--plots", "~/drawn", "--quiet") == 0
    assert tiny.run("export", "~/x/low", "--to", "dense", "--output", "~/dense", "--quiet") == 0
    training = ["--data", text, "--steps", "1", "--block-size", "16", "--device", "cpu", "--quiet"]
    assert tiny.run("finetune", "~/x/low", *training, "--output", "~/healed") == 0
    assert tiny.run("finetune", "--recipe", "~/healed/recipe.yaml", "--output", "~/again", "--quiet") == 0
    written = {"x", "less", "kept", "drawn", "dense", "healed", "again", "low.html"}
    assert {place.name for place in home.iterdir()} >= written
    assert (home / "x" / "low" / "model.safetensors").is_file()
    assert sorted(place.name for place in here.iterdir()) == ["gpt2", "train.txt", "valid.txt"]


def test_the_home_of_an_unknown_user_is_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("report", "~nobody-of-this-name/x") == 2
    assert capsys.readouterr().err == "lrsurgery: ~nobody-of-this-name/x: no such file or folder\n"


def test_an_output_of_the_library_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_name(Path("~/x")) == tmp_path / "x"
    assert with_name(Path("a/~")) == Path("a/~")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU's memory is used up; lower"),
        (MemoryError(), "the machine's memory is used up; lower --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "the machine's mem",
        ),
    ],
)
def test_memory_that_is_used_up_is_no_bug(
    error: Exception, says: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("lrsurgery.report.read.read_report", fail)
    assert tiny.run("report", model) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lrsurgery: {says}")
    assert said.count("\n") == 1
