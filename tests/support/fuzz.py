"""Damaged and hostile inputs for whole commands, and the property that each has to keep.

A case is one command of the program over small artefacts of which one or two things were changed: JSON, YAML and
safetensors headers by their structure, any file by its bytes, pickles, names, links, flags.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from support import tiny, warm

MEMORY = 16 << 30  # bytes of address space that a command may take
SECONDS = 90  # after which it hangs
PWNED = "PWNED"  # a file that code in a checkpoint would make
EXIT_CODES = (0, 2, 130, 143)
LONG = re.compile(r"(steps|epochs) = '\d{7,}")  # a change by which a job is asked to run for longer than that

NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 7, 2**31, 2**63, 10**9, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-320)
NASTY: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, float("nan"), float("inf"), "", "x", "1", "true", "null"),
    *(
        "\x1b]0;owned\x07\x1b[31m",
        "\u202egnp",
        "[/red][bold]",
        "a" * 5000,
        "../../x",
        "/etc/passwd",
        "\x00",
        "\n",
        "$x$",
    ),
    *([], [[]], [1], [None], ["a"], {}, {"a": 1}, {"": None}, [[[[[[[[[[1]]]]]]]]]]),
)
TEXTS = (b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe\x00", b"{", b"hello", b"[" * 20000, b'{"a":' * 20000)
FLAGS = (
    "",
    "-1",
    "0",
    "1",
    "3",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "abc",
    "x" * 300,
    "\x1b[31m",
    "../x",
    "[",
    "a=b",
    "*=0.5",
)
FLAGS += ("none", "auto", "params:0.5", "energy:2", "5GB", "None", "٣", "²", "0x10", "1_0", " ", "{", "a:\n- b")
NAMES = (
    "m[v2]",
    "y[/red]",
    "\x1b[31mred",
    " ",
    "-x",
    "a" * 200,
    "ü 模",
    "a\nb",
    "*?[",
    "$HOME",
    "'\"",
    "%s{0}",
    ".hidden",
    "a.run",
)


class Evil:
    """A pickle of it runs code as it is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {PWNED}",)


@dataclass(frozen=True)
class Command:
    """A command over artefacts, named as in the workshop's folder; `files` are those that a change may be made to."""

    words: tuple[str, ...]
    files: tuple[str, ...]
    writes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.words[0]


OUT = ("--output", "o")
CALIBRATION = ("--calibration", "train.txt", "--samples", "2", "--block-size", "16")
TRAIN = ("--data", "train.txt", "--eval-data", "valid.txt", "--block-size", "16", "--batch-size", "2", "--steps", "1")
COMMANDS = (
    Command(("factorise", "gpt2", "--rank", "0.25", "--no-loss-check", *OUT), ("gpt2",), ("o",)),
    Command(("factorise", "bin", "--rank", "0.25", "--no-loss-check", *OUT), ("bin",), ("o",)),
    Command(("factorise", "shards", "--rank", "energy:0.9", "--no-loss-check", *OUT), ("shards",), ("o",)),
    Command(("factorise", "timm", "--rank", "0.25", *OUT), ("timm",), ("o",)),
    Command(("factorise", "gpt2", "--budget", "0.6", *CALIBRATION, *OUT), ("gpt2", "train.txt"), ("o",)),
    Command(("factorise", "gpt2", "--budget", "0.8", "--budget-of", "model", *CALIBRATION, *OUT), ("gpt2",), ("o",)),
    Command(("factorise", "gpt2", "--rank", "0.25", "--include-embeddings", *OUT), ("gpt2",), ("o",)),
    Command(("report", "gpt2", "--reach"), ("gpt2",)),
    Command(("evaluate", "half", "--data", "valid.txt", "--block-size", "16"), ("half", "valid.txt")),
    Command(("evaluate", "half", "--data", "rows.jsonl", "--block-size", "16"), ("half", "rows.jsonl")),
    Command(("finetune", "half", *TRAIN, *OUT), ("half", "train.txt"), ("o", "o.run")),
    Command(("finetune", "--recipe", "recipe.yaml", *OUT), ("recipe.yaml", "half"), ("o", "o.run")),
    Command(("finetune", "--resume", "--output", "r"), ("r.run",), ("r", "r.run")),
    Command(("report", "half"), ("half",)),
    Command(("report", "healed"), ("healed",)),
    Command(("report", "healed", "--format", "html"), ("healed",)),
    Command(("report", "gpt2", "--rank", "0.5"), ("gpt2",)),
    Command(("report", "half", "--against", "gpt2"), ("half", "gpt2")),
    Command(("export", "half", "--to", "dense", *OUT), ("half",), ("o",)),
    Command(("bench", "half", "--batch", "1", "--length", "4", "--new-tokens", "1", "--seconds", "0.05"), ("half",)),
    Command(("study", "study.yaml", "--output", "s"), ("study.yaml",), ("s",)),
)


def make(folder: Path) -> Path:
    """The artefacts, by the program itself."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_text(folder)
    tiny.save_gpt2(folder / "gpt2", blocks=1)
    shutil.copytree(folder / "gpt2", folder / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    shutil.copytree(folder / "gpt2", folder / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    tiny.save_timm(folder / "timm")
    rows = [{"input_ids": [5 + (i * j) % 300 for j in range(1, 20)]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = ("--quiet",)
    train = (*TRAIN[:-1], "4", "--eval-steps", "2", "--save-steps", "2")
    asked = {"data": "train.txt", "eval_data": "valid.txt", "block_size": 16, "batch_size": 2, "steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": "half", **asked}))
    settings = {**asked, "model": "gpt2", "from_scratch": True, "rank": 0.25}
    study = {"name": "s", "settings": settings, "grid": {"decay": ["none"]}, "table": {"rows": ["decay"]}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    here = Path.cwd()
    os.chdir(folder)
    try:
        for words in (
            ("factorise", "gpt2", "--rank", "0.25", "--no-loss-check", "--output", "half"),
            ("finetune", "half", *train, "--output", "healed"),
            ("finetune", "half", *train, "--output", "r", "--keep-checkpoints"),
            ("bench", "healed", "--batch", "1", "--length", "4", "--new-tokens", "1", "--seconds", "0.05", "--save"),
        ):
            assert tiny.run(*words, *quiet) == 0, words
    finally:
        os.chdir(here)
    shutil.rmtree(folder / "r")
    shutil.rmtree(folder / "r.run" / "factorised" / "checkpoint-4")
    return folder


@dataclass
class Case:
    """One command over changed copies of its artefacts."""

    folder: Path
    command: Command
    words: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return f"lrsurgery {' '.join(map(repr, self.words))}\n  after: {'; '.join(self.changes)}\n  in {self.folder}"


def draw(rng: random.Random, artefacts: Path, folder: Path, name: str | None = None) -> Case:
    """A case, its files in `folder`; of one command if it is named."""
    command = rng.choice([each for each in COMMANDS if name in (None, each.name)])
    folder.mkdir(parents=True)
    for each in {"gpt2", "half", "train.txt", "valid.txt", *command.files}:
        copy = shutil.copytree if (artefacts / each).is_dir() else shutil.copyfile
        copy(artefacts / each, folder / each)
    case = Case(folder, command, list(command.words))
    for _ in range(rng.choice((1, 1, 1, 2))):
        rng.choice((_change_file, _change_file, _change_file, _change_structure, _change_flag, _change_name))(rng, case)
    return case


# changes


def _files(case: Case) -> list[Path]:
    found: list[Path] = []
    for name in case.command.files:
        top = case.folder / name
        found += sorted(file for file in top.rglob("*") if file.is_file()) if top.is_dir() else [top]
    return [file for file in found if file.is_file()]


def _change_file(rng: random.Random, case: Case) -> None:
    """What is in a file: by its structure where it has one, else by its bytes."""
    files = _files(case)
    if not files:
        return
    kinds = sorted({file.suffix for file in files})
    kind = rng.choice(kinds)  # a folder of many text files and one of weights: each kind as often
    file = rng.choice([each for each in files if each.suffix == kind])
    structured = {".json": _json, ".jsonl": _jsonl, ".yaml": _yaml, ".safetensors": _header, ".bin": _pickle}
    structured |= {".pt": _pickle, ".pth": _pickle}
    way = rng.choice((structured.get(file.suffix, _bytes), structured.get(file.suffix, _bytes), _bytes))
    said = way(rng, file)
    case.changes.append(f"{file.relative_to(case.folder)}: {said}")


def _places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in list(inner)[:60]:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _mutated(rng: random.Random, body: Any) -> tuple[Any, str]:
    """Another value somewhere, a key less or more."""
    places = list(_places(body))
    if not places:
        return rng.choice(NASTY), "another whole"
    # near the top as often as deep inside
    depth = rng.choice(sorted({len(place) for place in places}))
    *way, key = rng.choice([place for place in places if len(place) == depth])
    holder = body
    for step in way:
        holder = holder[step]
    where = ".".join(map(str, [*way, key]))
    act = rng.randrange(8)
    if act == 0:
        del holder[key]
        return body, f"{where} left out"
    if act == 1 and isinstance(holder, dict):
        holder[str(rng.choice(NASTY))[:300]] = holder[key]
        return body, f"a key beside {where}"
    value = rng.choice(NASTY)
    if act == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        value = holder[key] * rng.choice((-1, 0, 2, 0.5, 10**6))
    holder[key] = value
    return body, f"{where} = {str(value)[:40]!r}"


def _json(rng: random.Random, file: Path) -> str:
    try:
        body, said = _mutated(rng, json.loads(file.read_text(encoding="utf-8")))
    except ValueError:
        return _bytes(rng, file)
    file.write_text(json.dumps(body), encoding="utf-8")
    return said


def _jsonl(rng: random.Random, file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines:
        return _bytes(rng, file)
    number = rng.randrange(len(lines))
    try:
        body, said = _mutated(rng, json.loads(lines[number]))
    except ValueError:
        return _bytes(rng, file)
    lines[number] = json.dumps(body)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {number + 1}: {said}"


def _yaml(rng: random.Random, file: Path) -> str:
    try:
        body, said = _mutated(rng, yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError):
        return _bytes(rng, file)
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return said


def _header(rng: random.Random, file: Path) -> str:
    """The JSON at the head of a safetensors file; its length stays right."""
    content = file.read_bytes()
    try:
        length = struct.unpack("<Q", content[:8])[0]
        body, said = _mutated(rng, json.loads(content[8 : 8 + length]))
    except (ValueError, struct.error):
        return _bytes(rng, file)
    head = json.dumps(body).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
    return f"header: {said}"


def _pickle(rng: random.Random, file: Path) -> str:
    objects = [Evil(), [], {}, {"a": 1}, {"state_dict": {"x": Evil()}}, {"model": {"a": [1]}}, None, 1, "x"]
    objects += [{"transformer.wte.weight": torch.zeros(0)}, {1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}]
    found = rng.choice(objects)
    if rng.random() < 0.3:
        file.write_bytes(pickle.dumps(found if not isinstance(found, dict) else Evil()))
    else:
        torch.save(found, file)
    return f"a pickle of {str(found)[:40]}"


def _bytes(rng: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    act = rng.randrange(6)
    if act == 0 or not content:
        content = bytearray(rng.choice(TEXTS))
        said = f"is {bytes(content[:20])!r}"
    elif act == 1:
        del content[rng.randrange(len(content)) :]
        said = f"cut after {len(content)} bytes"
    elif act == 2:
        said = "more bytes at its end"
        content += rng.randbytes(rng.choice((1, 8, 4096)))
    else:
        for _ in range(rng.choice((1, 1, 20))):
            at = rng.randrange(len(content)) if act == 3 else rng.randrange(min(len(content), 300))
            content[at] = rng.randrange(256) if act != 5 else content[at] ^ (1 << rng.randrange(8))
        said = "other bytes in it"
    file.write_bytes(content)
    return said


def _change_structure(rng: random.Random, case: Case) -> None:
    """What a file is: gone, a folder, a link to nowhere, to itself or out of its folder."""
    files = _files(case)
    if not files:
        return
    file = rng.choice(files)
    act = rng.choice(
        ("gone", "a folder", "a link to itself", "a link to nothing", "a link outside", "beside a stranger")
    )
    if act == "beside a stranger":
        stranger = file.parent / rng.choice(NAMES)
        stranger.parent.mkdir(exist_ok=True)  # one of the names has a slash
        stranger.write_text("precious")
    else:
        content = file.read_bytes()
        file.unlink()
        if act == "a folder":
            file.mkdir()
        elif act.startswith("a link"):
            outside = case.folder / "outside"
            outside.write_bytes(content)
            file.symlink_to({"a link to itself": file, "a link to nothing": "nothing"}.get(act, outside))
    case.changes.append(f"{file.relative_to(case.folder)}: {act}")


def _options() -> dict[str, list[tuple[str, bool]]]:
    """Command -> its options and whether they are mere flags."""
    import typer

    from lrsurgery.cli.app import app

    commands: Any = typer.main.get_command(app)
    return {
        name: [
            (each.opts[0], bool(each.is_flag))
            for each in command.params
            if each.opts[0].startswith("--") and each.opts[0] not in ("--help", "--debug", "--device", "--output")
        ]
        for name, command in commands.commands.items()
    }


def _change_flag(rng: random.Random, case: Case) -> None:
    option, is_flag = rng.choice(_options()[case.command.name])
    case.words.append(option)
    if not is_flag:
        case.words.append(rng.choice((*FLAGS, "gpt2", "half", "train.txt", "rows.jsonl")))
    case.changes.append(f"{option} given")


def _change_name(rng: random.Random, case: Case) -> None:
    """An artefact or the output has an odd name."""
    name = rng.choice(NAMES)
    old = rng.choice([word for word in case.words if word in (*case.command.files, *case.command.writes)] or [""])
    if not old or (case.folder / name).exists():
        return
    if (case.folder / old).exists():
        (case.folder / name).parent.mkdir(exist_ok=True)  # one of the names has a slash
        (case.folder / old).rename(case.folder / name)
        files = tuple(name if each == old else each for each in case.command.files)
        case.command = Command(case.command.words, files, case.command.writes)
    else:
        writes = tuple(each.replace(old, name, 1) if each.startswith(old) else each for each in case.command.writes)
        case.command = Command(case.command.words, case.command.files, writes)
    case.words = [name if word == old else word for word in case.words]
    case.changes.append(f"{old} is named {name[:40]!r}")


# the property

PROGRAM = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
sys.argv[0] = "lrsurgery"
from lrsurgery.cli.app import main
main()
"""


def contents(folder: Path) -> dict[str, str]:
    """Every path in a folder, with the digest of a file or the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def check(case: Case) -> tuple[str, int | None]:
    """Run a case. Returns its command and exit code; raises AssertionError where it breaks the property.

    The code is None for a job that is at work on as many steps as it was asked for, and is stopped here.
    """
    before = contents(case.folder)
    try:
        done = warm.program(sys.executable, "-c", PROGRAM, *case.words, cwd=case.folder, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        if any(map(LONG.search, case.changes)):
            return case.command.name, None
        raise
    said = f"{case.describe()}\n  exit {done.returncode}: {done.stderr[-1500:]}"
    assert done.returncode in EXIT_CODES, said
    assert "Traceback" not in done.stderr, said
    assert "(a bug" not in done.stderr, said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", done.stdout + done.stderr), said
    lines = [line for line in done.stderr.splitlines() if line.startswith("lrsurgery: ")]
    if done.returncode == 2:
        assert len(lines) == 1, said
        assert done.stderr.splitlines()[-1] == lines[0], said
        assert len(lines[0]) > len("lrsurgery: ..."), said
    after = contents(case.folder)
    assert not any(Path(name).name == PWNED for name in after), said
    mine = [*case.command.writes, *(("half/bench.json", "half") if "--save" in case.words else ())]
    changed = sorted(name for name in before if after.get(name) != before[name] and not _within(name, mine))
    assert not changed, f"{said}\n  changed: {changed}"
    new = sorted({name.split("/")[0] for name in after if name not in before})
    if done.returncode == 2:
        left = [name for name in new if not _resumable(case.folder / name)]
        assert not left, f"{said}\n  left behind: {left}"
    elif done.returncode == 0:
        assert not [name for name in new if name.startswith(".") and name not in case.command.writes], (
            f"{said}\n  {new}"
        )
        for name in case.command.writes[:1]:
            if (case.folder / name / "config.json").exists():
                kept = [file.suffix for file in (case.folder / name).iterdir()]
                assert ".safetensors" in kept, f"{said}\n  {kept}"
                assert ".md" in kept, f"{said}\n  {kept}"
    return case.command.name, done.returncode


def _within(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}/") for top in tops)


def _resumable(path: Path) -> bool:
    """A run with a whole checkpoint, or a study with runs, is kept to go on with."""
    return any(path.glob("*/checkpoint-*/complete")) or (path / "runs").is_dir()


Change = Callable[[random.Random, Case], None]
