"""A trained model into an output folder: the source's files, the weights in their own dtype, report and card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lrsurgery.checkpoints.loading.check import load_problem
from lrsurgery.checkpoints.mapping import source_digest
from lrsurgery.checkpoints.output import copy_companions, output_config, write_timm, write_transformers
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import SourceError, TrainingError
from lrsurgery.files.digests import file_digests
from lrsurgery.files.json import Json, read_json
from lrsurgery.files.writing import staged, write_text
from lrsurgery.report.card import model_card, public_name, quality_lines
from lrsurgery.report.rows import rank_report
from lrsurgery.report.runs import METRICS, RECIPE, read_metrics, stages_of, untrained_dense
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.runtime import versions
from lrsurgery.surgery.apply import factorised_layers, specs_of
from lrsurgery.text import code
from lrsurgery.training.loop.dynamics import whole
from lrsurgery.training.loop.trainer import LowRankTrainer, release_
from lrsurgery.training.recipe import Recipe, write_recipe
from lrsurgery.training.run_folder import RunFolder
from lrsurgery.training.switch import give_structure_, materialise_


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    output: Path
    report: Report
    stages: dict[str, dict[str, float]]  # "dense", "factorised", "healed" (or "trained"): what was measured at each
    steps: int
    seconds: float = 0.0  # that this process spent on training steps, without evaluations, saving and imports

    def to_dict(self) -> Json:
        """The run as JSON, with its report."""
        return {
            "output": str(self.output),
            "steps": self.steps,
            "seconds": self.seconds,
            "stages": self.stages,
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What the report and the card of a trained model say of its training."""

    recipe: Recipe
    command: str | None
    notes: tuple[str, ...]
    steps: int
    stages: Mapping[str, Mapping[str, float]]  # figures at each


def outcome_of(output: Path) -> Outcome:
    """The outcome of a finished run, read back from what it wrote. Raises SourceError."""
    report = Report.read(output)
    records = read_metrics(output)
    stages = stages_of([r for r in records if "eval" in r], "factorised" if report.factorised else "dense")
    return Outcome(output, report, stages, max((record["step"] for record in records), default=0))


def gather(trainer: LowRankTrainer, subject: Subject, build: Callable[[], Subject]) -> Subject:
    """The trained subject, with whole weights on the CPU where FSDP holds shards of them; `build` makes its like."""
    if not trainer.is_fsdp_enabled:
        release_(trainer)
        return subject
    state = {key: whole(value).cpu() for key, value in trainer.model.state_dict().items()}
    twin = build()
    if not subject.is_factorised:
        give_structure_(twin, specs_of(subject.body))
        materialise_(twin)
    twin.model.load_state_dict(state)
    return replace(twin, stored=subject.stored, notes=subject.notes)


@torch.no_grad()
def round_to_stored_(subject: Subject) -> None:
    """Round the weights to the checkpoint's dtype, in which they are written: what is measured is what is shipped.

    Raises TrainingError for a weight that overflows it.
    """
    if subject.stored == torch.float32:
        return
    for name, tensor in subject.body.state_dict().items():
        if tensor.is_floating_point():
            rounded = tensor.to(subject.stored)
            if not bool(torch.isfinite(rounded).all()):
                raise TrainingError(f"{name}: overflows {subject.stored}, the checkpoint's dtype, after training")
            tensor.copy_(rounded)


def publish(subject: Subject, output: Path, folder: RunFolder, run: FinishedRun, *, overwrite: bool) -> Report:
    """Write a run's output, whole or not at all: the model, its recipe, the metrics and trackers' logs in `folder`."""
    with staged(output, overwrite=overwrite) as stage:
        report = save_subject(subject, stage, output.name, run)
        if run.recipe.rank and (problem := load_problem(stage, trust_remote_code=run.recipe.trust_remote_code)):
            # the training is not thrown away for it
            report = replace(report, notes=(*report.notes, f"the output does not load as it is: {problem}"))
        write_recipe(run.recipe, stage / RECIPE, versions())
        if (folder.path / METRICS).is_file():
            shutil.copyfile(folder.path / METRICS, stage / METRICS)
        for logs in folder.path.glob("*/runs"):  # TensorBoard's
            shutil.copytree(logs, stage / "runs" / logs.parent.name)
        report = replace(report, files=file_digests(stage))
        write_text(stage / FILE_NAME, report.to_json())
        folder.set_published(stage)
    return report


def save_subject(subject: Subject, stage: Path, name: str, run: FinishedRun) -> Report:
    """Write the model into `stage` as a folder that transformers or timm loads; `name` is the card's title."""
    source, body = subject.source, subject.body
    copy_companions(source, stage)
    body.to(subject.stored)
    if source.library == "timm":
        _write_timm(subject, stage)
    else:
        write_transformers(body, stage)
    files = sorted(stage.glob("*.safetensors"))
    report = replace(
        _with_former(rank_report(body), source.folder),
        bytes_after=sum(file.stat().st_size for file in files),
        source=_origin(subject, run.recipe),
        command=run.command,
        options=run.recipe.to_dict(),
        versions=versions(),
        notes=run.notes,
    )
    config = read_json(stage / "config.json")
    lines = training_lines(run.recipe, run.steps, run.stages)
    write_text(stage / "README.md", model_card(report, source, name, config, lines))
    return report


def _write_timm(subject: Subject, stage: Path) -> None:
    source, body = subject.source, subject.body
    config = output_config(source, body, specs_of(body))
    if source.pretrained_cfg:  # with what training changed in it: classes, image size
        config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), **source.pretrained_cfg}
    write_timm(body, config, stage)


def training_lines(recipe: Recipe, steps: int, stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The card's lines about a run: its settings in one sentence, and what was measured at each stage."""
    decay = f"{recipe.decay} decay of strength {recipe.decay_strength:g}" if recipe.decay != "none" else "no decay"
    teacher = f", teacher {code(public_name(recipe.teacher))}" if recipe.teacher else ""
    lines = [
        f"Trained for {steps} steps on {code(public_name(recipe.data or ''))} with {recipe.optimizer}, learning rate"
        f" {recipe.peak_lr:g} ({recipe.schedule}), {decay} on the factors{teacher}; `recipe.yaml` has every setting,"
        " `metrics.jsonl` the course of the run.",
    ]
    table = quality_lines(stages)
    if not table:
        return lines
    split = f", split {code(recipe.eval_split)}" if recipe.eval_split else ""
    flattered = untrained_dense(stages, recipe.dense_steps)
    said = ["", f"{flattered[0].upper()}{flattered[1:]}."] if flattered else []
    return [
        *lines,
        "",
        f"Measured on {code(public_name(recipe.eval_data or recipe.data or ''))}{split}:",
        "",
        *table,
        *said,
    ]


def _origin(subject: Subject, recipe: Recipe) -> Json:
    """Where the model comes from, and the digest of the dense model that it was factorised from, however long ago."""
    source, layers = subject.source, factorised_layers(subject.body)
    facts: Json = {"reference": source.reference, "hub_id": source.hub_id, "revision": source.revision}
    if source.is_factorised:
        former = _former(source.folder)
        return {**facts, "dense": former.dense_source} if former is not None and former.dense_source else facts
    if not layers or recipe.from_scratch:
        return facts
    options = SourceOptions(architecture=recipe.architecture, trust_remote_code=recipe.trust_remote_code)
    return {**facts, "digest": source_digest(source, options, layers)}


def _former(folder: Path | None) -> Report | None:
    try:
        return Report.read(folder) if folder is not None else None
    except SourceError:
        return None


def _with_former(report: Report, folder: Path | None) -> Report:
    """The report with what the source's own knows of its dense weights: their spectra, and why layers stayed dense."""
    former = _former(folder)
    if former is None:
        return report
    known = {row.name: row for row in former.rows}
    rows = [
        replace(
            row,
            before=known[row.name].before,
            spectrum_before=known[row.name].spectrum_before,
            reason=known[row.name].reason,
        )
        if row.name in known and known[row.name].status == row.status
        else row
        for row in report.rows
    ]
    return replace(report, rows=tuple(rows), bytes_before=former.bytes_before)
