"""The figures of the arena: texts, their perplexity, the accuracy of tasks, and what is kept of them."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of --precision, as lm_eval has them


@dataclass(frozen=True)
class HubText:
    """Where a text of the protocol lies on the hub: arguments of `datasets.load_dataset`, and its first rows."""

    repo: str
    test: dict[str, Any]
    train: dict[str, Any]
    rows: int | None = None  # None: all
    lines: bool = False  # a file of plain text holds one row a line, as WikiText's own files do


_PART = {"verification_mode": "no_checks"}
HUB = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        test={"name": "wikitext-2-raw-v1", "split": "test"},
        train={"name": "wikitext-2-raw-v1", "split": "train"},
        lines=True,
    ),
    # as SVD-LLM takes it: 2,000 documents of a first shard, whose size is not that of the whole
    "c4": HubText(
        "allenai/c4",
        test={"data_files": {"test": "en/c4-validation.00000-of-00008.json.gz"}, "split": "test", **_PART},
        train={"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", **_PART},
        rows=2000,
    ),
}


@dataclass(frozen=True)
class Text:
    """A text and the name of its kind."""

    name: str
    text: str

    @cached_property
    def digest(self) -> str:
        return digest_of(self.text)


@dataclass
class Log:
    """Lines for people on stderr, and the parts that were left out."""

    left_out: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def leave_out(self, what: str, reason: str, remedy: str) -> None:
        """Say in one line what is not in the table, why, and what to do; each such line once."""
        line = f"{what}: left out, {' '.join(reason.split())[:200]}; {remedy}"
        if line not in self.left_out:
            self.left_out.append(line)
            self.say(line)


def refuse(line: str) -> NoReturn:
    """End with one line and exit code 2: the command cannot be followed."""
    print(line, file=sys.stderr)
    sys.exit(2)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def state_of(folder: Path) -> str:
    """A digest of the names, sizes and times of a folder's files."""
    found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return digest_of(json.dumps(found))


def kept(file: Path, of: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read the values of `file` if they are of the same things, else find them and write them, whole or not at all."""
    if file.is_file() and (body := json.loads(file.read_text(encoding="utf-8")))["of"] == of:
        values: dict[str, Any] = body["values"]
        return values
    values = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(json.dumps({"of": of, "values": values}, indent=2) + "\n", encoding="utf-8")
    half.replace(file)
    return values


def lrsurgery(*arguments: object) -> dict[str, Any]:
    """Run the program and return its JSON output. Raises CalledProcessError."""
    command = [sys.executable, "-m", "lrsurgery", *map(str, arguments), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def read_text(asked: str, side: str) -> Text:
    """Read NAME=FILE, or NAME of a text of the protocol from the hub; `side` is "test" or "train". Raises Exception."""
    import datasets

    name, _, file = asked.partition("=")
    hub = HUB.get(name, HubText("", {}, {}))
    if file and Path(file).suffix == ".txt":
        text = Path(file).read_bytes().decode("utf-8")
        rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)] if hub.lines else [text]
    else:
        form = "parquet" if file.endswith(".parquet") else "json"
        there = {"data_files": {"train": file}, "split": "train"} if file else getattr(hub, side)
        rows = list(datasets.load_dataset(form if file else hub.repo, **there)["text"][: hub.rows])
    return Text(name, "\n\n".join(rows))


def read_texts(asked: Sequence[str], side: str, log: Log) -> list[Text]:
    """Read the texts that are there, and say which are not."""
    found = []
    for each in asked:
        name, _, file = each.partition("=")
        remedy = f"give {name}=FILE (.txt, .jsonl or .parquet)"
        if not file and name not in HUB:
            refuse(f"{each}: write NAME=FILE, or one of {', '.join(HUB)} for the hub's")
        try:
            found.append(read_text(each, side))
        except Exception as e:  # `datasets` and the network raise anything
            log.leave_out(f"{name}, {side} text", f"{type(e).__name__}: {e}", remedy)
    return found


def measure_text(folder: Path, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a text with `lrsurgery evaluate`, in blocks of tokens that are cut here.

    Raises ValueError for a text of less than a block, CalledProcessError.
    """
    from transformers import AutoTokenizer

    size = args.block_size
    ids = AutoTokenizer.from_pretrained(folder)(text.text, verbose=False)["input_ids"]
    blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: args.limit]
    if not blocks:
        raise ValueError(f"its {len(ids):,} tokens are fewer than one block of {size:,}")
    with TemporaryDirectory(dir=args.output) as there:
        file = Path(there) / f"{text.name}.jsonl"
        # rows with labels of their own are measured as they are: no token is added, and none are joined
        lines = (json.dumps({"input_ids": block, "labels": block}) for block in blocks)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = lrsurgery(
            *("evaluate", folder, "--data", file, "--batch-size", args.batch_size),
            *("--precision", args.precision, "--device", args.device, "--quiet"),
        )["models"][0]
    values = {name: found["values"][name] for name in ("perplexity", "loss", "scored")}
    return {**values, "blocks": len(blocks), "bytes": found["bytes"], "parameters": found["parameters"]}


class TaskMissing(Exception):
    """A task of lm_eval that does not load, or whose data is not there."""


@cache
def tasks_of(folder: Path | None) -> Any:
    """The tasks that lm_eval knows, with those of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


@cache
def missing(task: str, folder: Path | None) -> str | None:
    """Tell why a task and its data do not load; None if they do."""
    from lm_eval.tasks import get_task_dict

    try:
        get_task_dict([task], tasks_of(folder))
    except Exception as e:  # lm_eval, `datasets` and the network raise anything
        return f"{type(e).__name__}: {e}"
    return None


class Harness:
    """lm_eval over one model, which is loaded for the first task that is not kept."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._folder, self._args = folder, args

    @cached_property
    def _model(self) -> Any:
        import torch
        from lm_eval.models.huggingface import HFLM

        import lrsurgery.hf  # noqa: F401

        device = self._args.device if self._args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[self._args.precision]
        return HFLM(pretrained=str(self._folder), device=device, dtype=dtype, batch_size=self._args.batch_size)

    def accuracy(self, task: str) -> dict[str, Any]:
        """Measure a task without examples in the prompt: `acc`, and `acc_norm` if it has that. Raises TaskMissing."""
        import lm_eval

        if reason := missing(task, self._args.task_folder):
            raise TaskMissing(reason)
        found = lm_eval.simple_evaluate(
            model=self._model,
            tasks=[task],
            num_fewshot=0,
            task_manager=tasks_of(self._args.task_folder),
            limit=self._args.limit,
            bootstrap_iters=0,
        )["results"][task]
        return {name: found[f"{name},none"] for name in ("acc", "acc_norm") if f"{name},none" in found}

    def close(self) -> None:
        """Free the model's memory for the next."""
        if self.__dict__.pop("_model", None) is not None:
            import torch

            gc.collect()
            torch.cuda.empty_cache()
