"""A trained model into an output folder: the source's files, the weights in their own dtype, report and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrsurgery.checkpoints.mapping import Checkpoint, output_config
from lrsurgery.checkpoints.quantizer import attach_, with_tripwire
from lrsurgery.checkpoints.tensors import DictSource, ShardWriter, in_write_order, parse_size, write_text
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import SourceError, TrainingError
from lrsurgery.factorise.checkpoint import versions
from lrsurgery.files import copy_companions, staged
from lrsurgery.report.card import model_card, training_lines
from lrsurgery.report.rows import rank_report
from lrsurgery.report.schema import FILE_NAME, Report
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.training.recipe import Recipe, write_recipe
from lrsurgery.training.run_folder import METRICS, RECIPE

SHARD_SIZE = "5GB"


@torch.no_grad()
def round_to_stored_(subject: Subject) -> None:
    """Rounds the weights to the checkpoint's dtype, in which they will be written: what is measured is what is shipped.

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


def publish(
    subject: Subject, output: Path, run: Path, recipe: Recipe, facts: dict[str, Any], steps: int,
    stages: Mapping[str, Mapping[str, float]], overwrite: bool,
) -> Report:  # fmt: skip
    """The output folder of a run, whole or not at all: the model, its recipe, the run's metrics and trackers' logs."""
    with staged(output, overwrite=overwrite) as stage:
        report = save_subject(subject, stage, output.name, facts, training_lines(recipe, steps, stages))
        write_recipe(recipe, stage / RECIPE, versions())
        if (run / METRICS).is_file():
            shutil.copyfile(run / METRICS, stage / METRICS)
        for logs in run.glob("*/runs"):  # TensorBoard's
            shutil.copytree(logs, stage / "runs" / logs.parent.name)
    return report


def save_subject(subject: Subject, stage: Path, name: str, facts: dict[str, Any], training: Sequence[str]) -> Report:
    """Writes the model into `stage` as a folder that transformers or timm loads, and tells what it is.

    `facts` are fields of the report (source, command, options, versions, notes); `training` the card's lines about it.
    """
    source, body = subject.source, subject.body
    copy_companions(source, stage)
    body.to(subject.stored)
    if source.library == "timm":
        _save_timm(subject, stage)
    else:
        transformers_model: Any = body
        if factorised_layers(body):
            attach_(transformers_model)
        transformers_model.save_pretrained(stage)
    files = sorted(stage.glob("*.safetensors"))
    report = replace(
        _with_former(rank_report(body), source.folder), bytes_after=sum(file.stat().st_size for file in files), **facts
    )
    write_text(stage / FILE_NAME, report.to_json())
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    write_text(stage / "README.md", model_card(report, source, name, config, training))
    return report


def _save_timm(subject: Subject, stage: Path) -> None:
    source, body = subject.source, subject.body
    layers = {name: {"kind": layer.kind, "rank": layer.rank} for name, layer in factorised_layers(body).items()}
    config = output_config(Checkpoint(source, body, DictSource({})), layers, None)
    if source.config.get("pretrained_cfg"):  # with what training changed in it: classes, image size
        config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), **source.config["pretrained_cfg"]}
    state = with_tripwire(body, body.state_dict())
    writer = ShardWriter(stage, shard_size=parse_size(SHARD_SIZE))
    try:
        for key in in_write_order([(tensor.dtype, key) for key, tensor in state.items()]):
            writer.add(key, state[key].detach().cpu().contiguous())
        writer.finish()
    finally:
        writer.close()
    write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")


def _with_former(report: Report, folder: Path | None) -> Report:
    """With what the source's own report knows: of the dense weights their spectra, why layers stayed dense."""
    try:
        former = Report.read(folder) if folder is not None else None
    except SourceError:
        former = None
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
