"""A run's folder, OUTPUT.run: recipe, metrics, notes, checkpoints, and what a resumed run reads of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.forms import check_layers
from lrsurgery.data.datasets import digest_of
from lrsurgery.errors import OutputError, RecipeError
from lrsurgery.files.digests import fingerprint
from lrsurgery.files.json import json_text, read_as, read_lines
from lrsurgery.report.runs import METRICS, RECIPE, Record, read_metrics
from lrsurgery.runtime import versions
from lrsurgery.training.recipe import Recipe, read_recipe, write_recipe

NOTES = "notes.jsonl"  # what the user was told in the run, for its report
FACTS = "run.json"
LAYERS = "layers.json"  # kind and rank of each layer that was factorised within the run
COMPLETE = "complete"  # a file that is written into a checkpoint last
MAY_DIFFER = ("device", "report_to")  # on resuming


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run is begun with: fingerprints of the model and the data, the number of processes."""

    model: str
    data: str
    eval_data: str
    world_size: int
    label_map: str = ""  # which runs of older versions did not keep

    @staticmethod
    def of(recipe: Recipe, source: Source, world_size: int) -> Facts:
        """Fingerprints of the files that a recipe names, as they are now."""
        files = [*source.files, *([source.folder / "config.json"] if source.folder else [])]
        return Facts(
            model=fingerprint(files, source.reference if not files else ""),
            data=digest_of(recipe.data, recipe.split, recipe.subset),
            eval_data=digest_of(recipe.eval_data, recipe.eval_split, recipe.subset),
            world_size=world_size,
            label_map=fingerprint([Path(recipe.label_map)], "") if recipe.label_map else "",
        )


class RunFolder:
    """OUTPUT.run on the disk. Of several processes, only the one that leads writes to it."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.run")

    @property
    def is_unfinished(self) -> bool:
        """Whether there is a run to resume."""
        return (self.path / FACTS).is_file()

    def begin(self, recipe: Recipe, facts: Facts, notes: Sequence[str]) -> None:
        """Write a new run in place of what was there. Raises OutputError."""
        self.remove()
        try:
            self.path.mkdir(parents=True)
            write_recipe(recipe, self.path / RECIPE, versions())
            (self.path / NOTES).touch()
            for note in notes:
                self.append_note(note)
            (self.path / FACTS).write_text(json_text(asdict(facts)), encoding="utf-8")
        except OSError as e:
            raise OutputError(f"{self.path}: cannot be written ({e.strerror})") from e

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working on the run; the lock of a process that died is free.

        Raises OutputError that names the process that holds it.
        """
        from filelock import FileLock, Timeout

        file = self.path.with_name(f"{self.path.name}.lock")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            lock.acquire(blocking=False)
        except Timeout:
            holder = file.read_text(encoding="utf-8").strip()
            raise OutputError(
                f"{self.path}: {holder or 'another process'} is working on this run; wait for it, stop it, or give"
                " another --output"
            ) from None
        except OSError as e:
            raise OutputError(f"{file}: cannot be written ({e.strerror})") from e
        try:
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            file.unlink(missing_ok=True)
            lock.release()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def resumed_recipe(self, asked: Mapping[str, object]) -> Recipe:
        """The recipe of the unfinished run. Raises RecipeError for a setting that was another when it was begun."""
        saved = Recipe().merged(read_recipe(self.path / RECIPE))
        wanted = saved.merged(asked)
        for name in asked:
            old, new = getattr(saved, name), getattr(wanted, name)
            if old != new and name not in MAY_DIFFER:
                raise RecipeError(
                    f"{self.path}: was begun with {name} {old}, now it is {new}; resume with what it was begun with,"
                    " or start over with --overwrite"
                )
        return replace(saved, **{name: getattr(wanted, name) for name in MAY_DIFFER if name in asked})

    def check_facts(self, facts: Facts, recipe: Recipe) -> str | None:
        """A note about what keeps a resumed run from going on exactly; None where nothing does.

        Raises RecipeError: the model or the data has changed.
        """
        former = read_as(Facts, self.path / FACTS, "a run's facts", RecipeError)
        for name in ("model", "data", "eval_data", "label_map"):
            if getattr(former, name) != getattr(facts, name):
                raise RecipeError(
                    f"{getattr(recipe, name)}: has changed since the run in {self.path} was begun;"
                    " start over with --overwrite, or put back what was there"
                )
        if former.world_size != facts.world_size:
            return f"the run was begun with {former.world_size} processes, so it does not go on exactly"
        return None

    # notes and metrics

    def append_note(self, note: str) -> None:
        with (self.path / NOTES).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(note) + "\n")

    def read_notes(self) -> list[str]:
        return read_lines(str, self.path / NOTES, "a note", RecipeError)

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """One line more in metrics.jsonl, without figures that are not finite, such as the perplexity of a wreck."""
        if isinstance(found := record.get("eval"), Mapping):
            record = {**record, "eval": {name: value for name, value in found.items() if math.isfinite(value)}}
        with (self.path / METRICS).open("a", encoding="utf-8") as handle:
            handle.write(json_text(record, indent=None))

    def cut_metrics(self, stage: str, step: int) -> None:
        """Drop the lines of steps that a run takes again when it is resumed in `stage` after `step` steps."""
        kept = [
            r for r in read_metrics(self.path) if (r["step"] <= step if r["stage"] == stage else r["stage"] == "dense")
        ]
        (self.path / METRICS).write_text("".join(json_text(record, indent=None) for record in kept), encoding="utf-8")

    def evaluations(self) -> list[Record]:
        """The records of metrics.jsonl that hold an evaluation."""
        return [record for record in read_metrics(self.path) if "eval" in record]

    # layers

    def write_layers(self, layers: Mapping[str, tuple[str, int]]) -> None:
        """Keep (kind, rank) of each layer that was factorised within the run."""
        (self.path / LAYERS).write_text(json_text(layers), encoding="utf-8")

    def read_layers(self) -> dict[str, tuple[str, int]]:
        """What `write_layers` kept. Raises RecipeError for a damaged file."""
        found = read_as(dict[str, tuple[str, int]], self.path / LAYERS, "a run's layers", RecipeError)
        specs = {name: {"kind": kind, "rank": rank} for name, (kind, rank) in found.items()}
        check_layers(specs, str(self.path / LAYERS), RecipeError)
        return found

    # checkpoints

    def last_good(self) -> Path | None:
        """The newest complete checkpoint."""
        return last_checkpoint(self.path / "factorised") or last_checkpoint(self.path / "dense")

    def drop_incomplete(self) -> None:
        """Remove the checkpoints that a kill left half-written."""
        for stale in self.path.glob("*/checkpoint-*"):
            if not (stale / COMPLETE).is_file():
                shutil.rmtree(stale)


def last_checkpoint(stage: Path) -> Path | None:
    """The newest complete checkpoint of a stage."""
    found = [c for c in stage.glob("checkpoint-*") if (c / COMPLETE).is_file()]
    return max(found, key=step_of, default=None)


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint that is on the disk in full; one without the mark is never resumed from."""
    for file in (f for f in checkpoint.rglob("*") if f.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    (checkpoint / COMPLETE).touch()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
