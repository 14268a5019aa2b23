"""A run's folder, OUTPUT.run: recipe, metrics, notes, checkpoints, and what a resumed run reads of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.forms import check_layers, layers_entry, specs_from
from lrsurgery.data.datasets import digest_of
from lrsurgery.errors import OutputError, RecipeError
from lrsurgery.files.digests import fingerprint, folder_fingerprint
from lrsurgery.files.json import Json, json_text, read_as, read_json, read_lines
from lrsurgery.files.marks import check_ours, remove, remove_entries, write_mark
from lrsurgery.files.writing import replace_file
from lrsurgery.report.runs import DENSE_TRAINED, METRICS, RECIPE, Record, read_metrics
from lrsurgery.report.schema import FILE_NAME
from lrsurgery.runtime import versions
from lrsurgery.surgery.layers import Spec
from lrsurgery.training.checkpoints import COMPLETE, damage_of, marked_checkpoints, read_mark, step_of
from lrsurgery.training.recipe import AUTO, PERMISSIONS, Recipe, read_recipe, without_permissions, write_recipe

NOTES = "notes.jsonl"  # what the user was told in the run, for its report
FACTS = "run.json"
FORMAT_VERSION = 1  # of FACTS, in which older versions named none
LAYERS = "layers.json"  # kind and rank of each layer that was factorised within the run
RUN = "run"  # what a run folder's mark says
BLENDED = "blended"  # of factorised training with dense weights beside the factors
STAGES = ("dense", BLENDED, "factorised", DENSE_TRAINED.replace(" ", "-"))  # folders of checkpoints
ENTRIES = (NOTES, METRICS, LAYERS, RECIPE)  # beside FACTS, without which there is nothing to resume
IN_STAGES = ("checkpoint-*", "partial-*", "damaged-*", "runs")  # the last is TensorBoard's
MAY_DIFFER = ("device", "report_to")  # on resuming


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run is begun with: fingerprints of the model and the data, the number of processes."""

    model: str
    data: str
    eval_data: str
    world_size: int
    label_map: str = ""  # which runs of older versions did not keep
    trust_remote_code: bool = False  # whether it was begun with the flag, which it then needs again: no permission
    published: str = ""  # fingerprint of the output, once that is whole
    found_lr: float | None = None  # of `lr: auto`, once it is known
    format_version: int = FORMAT_VERSION

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
            trust_remote_code=recipe.trust_remote_code,
        )


class RunFolder:
    """OUTPUT.run on the disk. Of several processes, only the one that leads writes to it."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.run")

    @property
    def is_unfinished(self) -> bool:
        """Whether there is a run to resume."""
        return (self.path / FACTS).is_file()

    def check(self) -> None:
        """Raise OutputError if what stands in the folder's place was not made by this program."""
        check_ours(self.path, RUN)

    def begin(self, recipe: Recipe, facts: Facts, notes: Sequence[str]) -> None:
        """Write a new run in place of a former one. Raises OutputError, also if the folder is not ours."""
        self.check()
        self.remove()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_mark(self.path, RUN)
            write_recipe(recipe, self.path / RECIPE, versions())
            replace_file(self.path / NOTES, "".join(json.dumps(note) + "\n" for note in notes))
            self._write_facts(facts)
        except OSError as e:
            raise OutputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def _write_facts(self, facts: Facts) -> None:
        replace_file(self.path / FACTS, json_text(asdict(facts)))

    def _read_facts(self) -> Facts:
        file = self.path / FACTS
        return read_as(Facts, file, "a run's facts", RecipeError, newest=FORMAT_VERSION, unnamed=1)

    def remove(self) -> list[Path]:
        """Remove what runs write, and the folder once it is empty. Returns what stays, which is not ours."""
        remove(self.path / FACTS)
        return self.close()

    def close(self) -> list[Path]:
        """As `remove`, for the run of a published output: its facts go last, by which a kill in between is known."""
        rest: list[Path] = []
        for stage in STAGES:
            rest += remove_entries(self.path / stage, IN_STAGES)
        return [*rest, *remove_entries(self.path, ENTRIES, FACTS)]

    def set_lr(self, recipe: Recipe) -> None:
        """Note the learning rate of a recipe that was found, in the facts and in the recipe's file."""
        self._write_facts(replace(self._read_facts(), found_lr=recipe.peak_lr))
        write_recipe(recipe, self.path / RECIPE, versions())

    # the end

    def set_published(self, stage: Path) -> None:
        """Note the output, which is about to be moved into its place."""
        self._write_facts(replace(self._read_facts(), published=folder_fingerprint(stage)))

    def is_published(self, output: Path) -> bool:
        """Whether the run is finished, and `output` is what it wrote: a kill left nothing but the run's folder."""
        if not self.is_unfinished or not (output / FILE_NAME).is_file():
            return False
        return self._read_facts().published == folder_fingerprint(output)

    def resumed_recipe(self, asked: Mapping[str, object]) -> Recipe:
        """The recipe of the unfinished run. Raises RecipeError for a setting that was another when it was begun."""
        body = read_recipe(self.path / RECIPE)
        if body.get("rank"):  # an older version, which knew no forms, made its layers balanced
            body.setdefault("form", "balanced")
        saved = Recipe().merged(body)
        if self.is_unfinished and (found := self._read_facts().found_lr) is not None:
            saved = replace(saved, lr=found)
            asked = {name: value for name, value in asked.items() if (name, value) != ("lr", AUTO)}
        wanted = saved.merged(asked)
        in_file = without_permissions(wanted)
        for name in asked:
            old, new = getattr(saved, name), getattr(in_file, name)
            if old != new and name not in MAY_DIFFER:
                raise RecipeError(
                    f"{self.path}: was begun with {name} {old}, now it is {new}; resume with what it was begun with,"
                    " or start over with --overwrite"
                )
        return replace(saved, **{name: getattr(wanted, name) for name in (*MAY_DIFFER, *PERMISSIONS) if name in asked})

    def check_facts(self, facts: Facts, recipe: Recipe) -> str | None:
        """A note about what keeps a resumed run from going on exactly; None where nothing does.

        Raises RecipeError: the model or the data has changed, or --trust-remote-code is needed again.
        """
        former = self._read_facts()
        if former.trust_remote_code != facts.trust_remote_code:
            raise RecipeError(
                f"{self.path}: was begun {'with' if former.trust_remote_code else 'without'} --trust-remote-code;"
                f" {'pass it again, since no file can turn it on' if former.trust_remote_code else 'leave it out'}"
            )
        for name in ("model", "data", "eval_data", "label_map"):
            if getattr(former, name) != getattr(facts, name):
                place, remedy = getattr(recipe, name), "start over with --overwrite, or put back what was there"
                if place is None:  # the facts or the recipe were edited
                    raise RecipeError(
                        f"{self.path / FACTS}: its {name} is not that of {RECIPE} beside it, which names none; {remedy}"
                    )
                raise RecipeError(f"{place}: has changed since the run in {self.path} was begun; {remedy}")
        if former.world_size != facts.world_size:
            return f"the run was begun with {former.world_size} processes, so it does not go on exactly"
        return None

    # notes and metrics

    def append_note(self, note: str) -> None:
        notes = [*self.read_notes(), note]
        replace_file(self.path / NOTES, "".join(json.dumps(each) + "\n" for each in notes))

    def read_notes(self) -> list[str]:
        return read_lines(str, self.path / NOTES, "a note", RecipeError)

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """One line more in metrics.jsonl, without figures that are not finite, such as the perplexity of a wreck."""
        if isinstance(found := record.get("eval"), Mapping):
            record = {**record, "eval": {name: value for name, value in found.items() if math.isfinite(value)}}
        with (self.path / METRICS).open("a", encoding="utf-8") as handle:
            handle.write(json_text(record, indent=None))

    def cut_metrics(self, checkpoint: Path | None) -> None:
        """Drop the lines of what a run does again when it is resumed after `checkpoint`, or from the beginning."""
        file = self.path / METRICS
        if checkpoint is None:
            file.unlink(missing_ok=True)
        elif (mark := read_mark(checkpoint)) is not None:
            lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
            replace_file(file, b"".join(lines[: mark.records]))
        else:  # an older version's
            stage, step = checkpoint.parent.name, step_of(checkpoint)
            kept = [
                r
                for r in read_metrics(self.path)
                if (r["step"] <= step if r["stage"] == stage else r["stage"] == "dense")
            ]
            replace_file(file, "".join(json_text(record, indent=None) for record in kept))

    def evaluations(self) -> list[Record]:
        """The records of metrics.jsonl that hold an evaluation."""
        return [record for record in read_metrics(self.path) if "eval" in record]

    # layers

    def write_layers(self, layers: Mapping[str, Spec]) -> None:
        """Keep what each layer became that was factorised within the run."""
        replace_file(self.path / LAYERS, json_text(layers_entry(layers)["layers"]))

    def read_layers(self) -> dict[str, Spec]:
        """What `write_layers` kept. Raises RecipeError for a damaged file."""
        file = self.path / LAYERS
        found: Json = read_json(file, "a run's layers", RecipeError)
        for name, old in found.items():  # of version 0.1.0: [kind, rank]
            if isinstance(old, list) and len(old) == 2:
                found[name] = {"kind": old[0], "rank": old[1]}
        return specs_from(check_layers(found, str(file), RecipeError))

    # checkpoints

    def last_good(self) -> Path | None:
        """The newest complete checkpoint, damaged or not; see `set_damaged_aside`."""
        return next(iter(self._marked()), None)

    def _marked(self) -> list[Path]:
        return [c for stage in ("factorised", BLENDED, "dense") for c in marked_checkpoints(self.path / stage)]

    def can_resume(self, output: Path) -> bool:
        """Whether something of the run would be used again: its output or a checkpoint."""
        try:
            return self.is_published(output) or any(damage_of(checkpoint) is None for checkpoint in self._marked())
        except RecipeError:
            return False

    def set_damaged_aside(self, note: Callable[[str], None]) -> None:
        """Rename damaged checkpoints that are newer than the newest good one, and say so.

        Raises RecipeError if there are checkpoints and none is good.
        """
        damaged: list[tuple[Path, str]] = []
        for checkpoint in self._marked():
            fault = damage_of(checkpoint)
            if fault is None:
                break
            damaged.append((checkpoint, fault))
        else:
            if damaged:
                raise RecipeError(
                    f"{damaged[0][1]}; no other checkpoint is left to go on from; put the file back, or start over with"
                    " --overwrite"
                )
        for checkpoint, fault in damaged:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            remove(aside)
            checkpoint.rename(aside)
            note(f"{fault}; the checkpoint before it is used")

    def drop_incomplete(self) -> None:
        """Remove the checkpoints that a kill left half-written."""
        for stale in self.path.glob("*/checkpoint-*"):
            if not (stale / COMPLETE).is_file():
                remove(stale)
