"""A run's folder: its recipe, its metrics, its notes and its checkpoints, and what a resumed run makes of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrsurgery.errors import RecipeError
from lrsurgery.training.recipe import Recipe, read_recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
NOTES = "notes.jsonl"  # told to the user in the run, and in its report
FACTS = "run.json"  # fingerprints of the model and the data
LAYERS = "layers.json"  # kind and rank of each layer that was factorised within the run
COMPLETE = "complete"  # a file that is written into a checkpoint last
MAY_DIFFER = ("device", "report_to")  # on resuming


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """One line more in the run's metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


def cut_metrics(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines of steps that a resumed run takes again."""
    kept = [record for record in read_metrics(folder) if keep(record)]
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    file = folder / METRICS
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def mark_complete(checkpoint: Path) -> None:
    """Says that all of a checkpoint is on the disk; one without the mark is never resumed from."""
    for file in (f for f in checkpoint.rglob("*") if f.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    (checkpoint / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [c for c in folder.glob("checkpoint-*") if (c / COMPLETE).is_file()]
    return max(found, key=step_of, default=None)


def drop_incomplete(run: Path) -> None:
    """Removes the checkpoints that a kill left half-written."""
    for stale in run.glob("*/checkpoint-*"):
        if not (stale / COMPLETE).is_file():
            shutil.rmtree(stale)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_notes(folder: Path) -> list[str]:
    """What a run has told its user."""
    file = folder / NOTES
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def stages_of(records: list[dict[str, Any]], stage: str) -> dict[str, dict[str, float]]:
    """What was measured at each stage of a run, from its metrics' evaluations in order."""
    dense = [r["eval"] for r in records if r["stage"] == "dense"]
    factorised = [r["eval"] for r in records if r["stage"] == "factorised"]
    if stage == "dense":
        return {"before": dense[0], "trained": dense[-1]} if dense else {}
    found = {"dense": dense[-1]} if dense else {}
    return {**found, "factorised": factorised[0], "healed": factorised[-1]} if factorised else found


def resumed_recipe(folder: Path, asked: Mapping[str, Any]) -> Recipe:
    saved = Recipe().merged(read_recipe(folder / RECIPE))
    wanted = saved.merged(asked)
    for name in asked:
        old, new = getattr(saved, name), getattr(wanted, name)
        if old != new and name not in MAY_DIFFER:
            raise RecipeError(
                f"{folder}: was begun with {name} {old}, now it is {new}; resume with what it was begun with,"
                " or begin anew with --overwrite"
            )
    return replace(saved, **{name: getattr(wanted, name) for name in MAY_DIFFER if name in asked})
