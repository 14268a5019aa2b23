"""The protocol of LowRankArena over any language model, and over any folder of lrsurgery.

    python examples/arena/arena.py MODEL_OR_FOLDER [MORE ...] [--output DIR] [--keep 0.8 0.6]
        [--calibration NAME[=FILE]] [--second-calibration NAME[=FILE]] [--texts NAME[=FILE] ...]
        [--tasks TASK ... | --no-tasks] [--block-size 2048] [--limit N] [--json]

A dense model is measured, and so is what `lrsurgery factorise` makes of it at each kept share: by plain SVD, by a
calibrated budget, and by that with `--refine`. A folder that lrsurgery wrote is only measured. The figures are
perplexities of texts of the calibration's kind and of another, and accuracies of multiple-choice tasks in lm_eval.

Perplexity is read as SVD-LLM reads it: the rows of a text are joined by an empty line and tokenised once, with the
special tokens that the tokenizer adds, so a BOS token stands at the head of the first block alone. Blocks do not
overlap, the last one is left out if it is short, and the mean is over all tokens but the first of each block.

Each figure is kept in DIR as soon as it is known. The same command goes on after a kill, and measures again only what
changed: models are known by sizes and times of their files, texts by their content.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import figures
from figures import HUB, Harness, Log, Text, digest_of, kept, read_texts, refuse, state_of

TASKS = ("openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a model that is there, or how it is made of another."""

    model: str
    source: Path  # the folder that `model` names
    method: str
    keep: float | None = None
    calibration: Text | None = None
    words: tuple[str, ...] = ()  # of `lrsurgery factorise`; without any, `source` is measured as it is

    @property
    def slug(self) -> str:
        """A name for files, another for each row."""
        calibrated = self.calibration.name if self.calibration else ""
        words = (Path(self.model).name, self.method, "" if self.keep is None else f"{self.keep:g}", calibrated)
        name = re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")
        return f"{name}-{digest_of(str(self.source.absolute()))[:6]}"

    @property
    def label(self) -> str:
        keep = "" if self.keep is None else f" {self.keep:g}"
        calibrated = f", calibrated on {self.calibration.name}" if self.calibration else ""
        return f"{self.model}: {self.method}{keep}{calibrated}"


@dataclass(kw_only=True)
class Found:
    """A row with its figures, as far as they are there."""

    row: Row
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def of_weights(self, name: str) -> int | None:
        return next((values[name] for values in self.texts.values()), None)

    def accuracy(self, task: str) -> float | None:
        """The accuracy by length-normalised likelihood, as LowRankArena takes it, if the task has that; else `acc`."""
        values = self.tasks.get(task, {})
        return values.get("acc_norm", values.get("acc"))


def maximum_positions(folder: Path) -> int | None:
    """The longest sequence the model was made for, by the names that transformers' configurations use."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def rows_of(model: str, calibrations: Sequence[Text], args: argparse.Namespace) -> Iterator[Row]:
    """List the rows of a model. Exits with one line for a model that is not there or has too few positions."""
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.errors import SurgeryError

    try:
        source = SourceOptions().resolve(model)
    except SurgeryError as e:
        refuse(str(e))
    folder = source.folder
    if folder is None or source.library != "transformers":
        refuse(f"{model}: no folder of transformers; the protocol is for language models")
    limit = maximum_positions(folder)
    if limit is not None and limit < args.block_size:
        bound = f"has {limit:,} positions, fewer than blocks of {args.block_size:,}"
        refuse(f"{model}: {bound}; give --block-size {limit} or less")
    if source.is_factorised:
        report = json.loads((folder / "rank_report.json").read_text(encoding="utf-8"))
        layers = [layer for layer in report["layers"] if layer["full_rank"]]
        before, after = (sum(layer[f"parameters_{side}"] for layer in layers) for side in ("before", "after"))
        yield Row(model=model, source=folder, method="as given", keep=round(after / before, 3))
        return
    yield Row(model=model, source=folder, method="dense")
    for keep in args.keep:
        words: tuple[str, ...] = ("--rank", f"params:{keep:g}")
        yield Row(model=model, source=folder, method="plain SVD", keep=keep, words=words)
        for text in calibrations:
            words = ("--budget", f"{keep:g}", "--samples", str(args.samples), "--block-size", str(args.block_size))
            row = Row(model=model, source=folder, method="budget", keep=keep, calibration=text, words=words)
            yield row
            yield Row(**{**vars(row), "method": "budget, refined", "words": (*words, "--refine")})


def make(row: Row, args: argparse.Namespace, log: Log) -> Path:
    """Make the model of a row, unless it is there, and return its folder. Raises CalledProcessError."""
    if not row.words:
        return row.source
    words, digest = list(row.words), row.calibration.digest if row.calibration else None
    folder, note = args.output / "models" / row.slug, args.output / "models" / f"{row.slug}.json"

    def find() -> dict[str, Any]:
        log.say(f"{row.label}: is made")
        data: list[object] = []
        if row.calibration is not None:
            file = args.output / "texts" / f"{row.calibration.name}-train.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row.calibration.text.encode())
            data = ["--calibration", file]
        options = ("--no-loss-check", "--device", args.device, "--output", folder, "--overwrite")
        figures.lrsurgery("factorise", row.source, *words, *data, *options)
        return {"state": state_of(folder)}

    of = {"words": words, "calibration": digest, "source": state_of(row.source), "lrsurgery": version("lrsurgery")}
    if not folder.is_dir() or (note.is_file() and json.loads(note.read_text())["values"]["state"] != state_of(folder)):
        note.unlink(missing_ok=True)
    kept(note, of, find)
    return Path(folder)


def measure(row: Row, texts: Sequence[Text], tasks: Sequence[str], args: argparse.Namespace, log: Log) -> Found:
    """Make the model of a row and measure it; what is kept of it is read. Raises CalledProcessError."""
    folder = make(row, args, log)
    found, there = Found(row=row), args.output / "measured" / row.slug
    of: dict[str, Any] = {"model": state_of(folder), "limit": args.limit, "precision": args.precision}
    for text in texts:
        about = {**of, "text": text.digest, "block_size": args.block_size}
        try:
            find = partial(figures.measure_text, folder, text, args)
            found.texts[text.name] = kept(there / f"text-{text.name}.json", about, find)
            log.say(f"{row.label}: {text.name} {found.texts[text.name]['perplexity']:.3f}")
        except ValueError as e:
            log.leave_out(f"{row.label}, {text.name}", str(e), "give a longer text or a smaller --block-size")
    harness = Harness(folder, args)
    for task in tasks:
        about = {**of, "lm_eval": version("lm_eval"), "folder": args.task_folder and state_of(args.task_folder)}
        try:
            found.tasks[task] = kept(there / f"task-{task}.json", about, partial(harness.accuracy, task))
            log.say(f"{row.label}: {task} {found.accuracy(task):.4f}")
        except figures.TaskMissing as e:
            log.leave_out(task, str(e), f"give --task-folder DIR with a {task}.yaml of lm_eval over local files")
    harness.close()
    return found


def cells_of(found: Found, texts: Sequence[Text], tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """The cells of a row under their titles; `kinds` are the texts that calibration may be of."""
    row = found.row
    calibration = row.calibration.name if row.calibration else ""
    cells = {"model": row.model, "method": row.method, "keep": "" if row.keep is None else f"{row.keep:g}"}
    cells["calibration"] = calibration
    for text in texts:
        value = found.texts.get(text.name, {}).get("perplexity")
        shown = "-" if value is None else f"{value:,.2f}"
        # the title tells what a text is to calibration of one kind, and each cell if there are two
        if len(kinds) == 1:
            cells[f"{text.name}, {_domain(text.name, kinds[0])}"] = shown
        else:
            cells[text.name] = f"{shown} ({_domain(text.name, calibration)})" if calibration else shown
    for task in tasks:
        accuracy = found.accuracy(task)
        cells[task] = "-" if accuracy is None else f"{accuracy:.1%}"
    return cells


def _domain(text: str, calibration: str) -> str:
    return "in domain" if text == calibration else "out of domain"


def tables(all_found: Sequence[Found], texts: Sequence[Text], tasks: Sequence[str], kinds: Sequence[str]) -> str:
    """One Markdown table. The mean is over the tasks that every row has."""
    whole = [task for task in tasks if all(task in found.tasks for found in all_found)]
    rows = []
    for found in all_found:
        cells = cells_of(found, texts, tasks, kinds)
        if whole:
            mean = sum(found.accuracy(task) or 0.0 for task in whole) / len(whole)
            cells["mean" if len(whole) == len(tasks) else f"mean of {len(whole)}"] = f"{mean:.1%}"
        size, count = found.of_weights("bytes"), found.of_weights("parameters")
        cells["MB"] = "-" if size is None else f"{size / 1e6:,.1f}"
        cells["parameters"] = "-" if count is None else f"{count:,}"
        rows.append(cells)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def versions() -> dict[str, str]:
    found = {}
    for name in ("lrsurgery", "torch", "transformers", "datasets", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def as_json(found: Found) -> dict[str, Any]:
    row, calibration = found.row, found.row.calibration.name if found.row.calibration else None
    about = {"model": row.model, "method": row.method, "keep": row.keep, "calibration": calibration}
    return {**about, "texts": found.texts, "tasks": found.tasks}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    about = (
        "The protocol of LowRankArena: perplexity and accuracy of models at 80% and 60% of their layers' parameters."
    )
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL_OR_FOLDER", help="folder or hub id; one of lrsurgery is only measured")
    add("--output", type=Path, default=Path("arena"), metavar="DIR", help="models and figures (default: %(default)s)")
    add("--keep", type=float, nargs="+", default=[0.8, 0.6], metavar="SHARE", help="shares (default: 0.8 0.6)")
    text = "NAME[=FILE]"
    add("--calibration", default="wikitext2", metavar=text, help="its train text (default: the hub's wikitext2)")
    add("--second-calibration", metavar=text, help="another, for rows of their own")
    add(
        "--texts", nargs="+", default=list(HUB), metavar=text, help="texts to measure (default: the hub's wikitext2 c4)"
    )
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of lm_eval (default: {' '.join(TASKS)})")
    add("--no-tasks", action="store_true", help="texts alone")
    add("--task-folder", type=Path, metavar="DIR", help="lm_eval's YAML of further tasks")
    add("--block-size", type=int, default=2048, metavar="N", help="tokens of a block (default: %(default)s)")
    add("--samples", type=int, default=256, metavar="N", help="blocks to calibrate on (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="at most N blocks of a text and N examples of a task: a trial")
    add("--batch-size", type=int, default=8, metavar="N", help="examples of a batch (default: %(default)s)")
    add("--precision", choices=list(figures.DTYPES), default="fp32", help="arithmetic (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args(words)
    for name in ("block_size", "samples", "limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: write 1 or more")
    for keep in args.keep:
        if not 0 < keep < 1:
            parser.error(f"--keep {keep:g}: write a share between 0 and 1, such as 0.8")
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    args, log = parse(words), Log()
    # the models first: one that the protocol does not fit ends the run before anything is read or measured
    makes = any(len(list(rows_of(model, [], args))) > 1 for model in args.models)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = read_texts(args.texts, "test", log)
    asked = [text for text in (args.calibration, args.second_calibration) if text is not None]
    calibrations = read_texts(asked, "train", log) if makes else []
    for name in HUB:
        if name not in {text.partition("=")[0] for text in args.texts}:
            log.leave_out(f"{name}, test text", "--texts does not name it", f"add {name} (of the hub) or {name}=FILE")
    tasks = [] if args.no_tasks else args.tasks
    if args.no_tasks:
        log.leave_out("tasks", "--no-tasks", "run without it")
    elif "lm_eval" not in versions():
        tasks = []
        log.leave_out("tasks", "lm_eval is not installed", "pip install 'lm_eval>=0.4.13'")
    if not texts and not tasks:
        refuse("nothing is left to measure; see the lines above")
    all_found, failed = [], False
    for row in [row for model in args.models for row in rows_of(model, calibrations, args)]:
        try:
            all_found.append(measure(row, texts, tasks, args, log))
        except subprocess.CalledProcessError as e:
            failed = True
            log.leave_out(row.label, f"lrsurgery ended with {e.returncode}", "see its message above")
    body = {"versions": versions(), "limit": args.limit, "block_size": args.block_size, "left_out": log.left_out}
    if args.json:
        print(json.dumps({**body, "rows": [as_json(found) for found in all_found]}, indent=2))
    elif all_found:
        print(tables(all_found, texts, tasks, [text.partition("=")[0] for text in asked]))
        print(f"\nBlocks of {args.block_size:,} tokens; {', '.join(f'{k} {v}' for k, v in versions().items())}")
        for line in log.left_out:
            print(f"- {line}")
        if args.limit is not None:
            print(f"- a trial on {args.limit} blocks or examples: not the protocol's figures")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
