"""Both models of a refinement, and what they run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.loss import Batch
from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.interfaces.wrapped import ImageClassifier, Wrapped
from lrsurgery.data.options import NO_TASK
from lrsurgery.data.tasks import is_for
from lrsurgery.data.unlabelled.columns import find_feed
from lrsurgery.data.unlabelled.inputs import unlabelled_examples
from lrsurgery.data.unlabelled.models import load_bare, open_unlabelled, task_or_none
from lrsurgery.errors import CalibrationError, SourceError
from lrsurgery.factorise.opening import IMAGES, load_offloaded_subject, prepare
from lrsurgery.factorise.options import Calibration
from lrsurgery.refine.reconstruction import HELD_OUT
from lrsurgery.refine.walk import ALONE
from lrsurgery.runtime import Processes, free_memory
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.parameters.views import dense_layers


@dataclass(frozen=True)
class Compute:
    """Where models run, and whether their own code may."""

    device: torch.device
    trust_remote_code: bool = False
    processes: Processes = ALONE


@dataclass(frozen=True)
class Opened:
    """Both models, in fp32, and what they run on."""

    dense: nn.Module
    compressed: nn.Module
    batches: Sequence[Batch]
    notes: tuple[str, ...]
    on_disk: bool = False  # the blocks of the compressed model


def room_of(how: Compute) -> int:
    """The bytes that each of the two models, and the activations between them, may take."""
    return free_memory(how.device) // 4


def open_both(source: Source, dense: Source, calibration: Calibration, seed: int, folder: Path, how: Compute) -> Opened:
    """Open a factorised source, its dense one and the samples; blocks of models above `room_of` stay on disk.

    Raises SurgeryError, also for a dense model that is not the one which was factorised.
    """
    without = calibration.how.task == NO_TASK or (calibration.how.task is None and task_or_none(dense) == NO_TASK)
    opened = (_open_without_task if without else _open)(source, dense, calibration, seed, folder, how)
    _check_alike(opened.dense, opened.compressed, dense.reference)
    return opened


def _open(source: Source, dense: Source, calibration: Calibration, seed: int, folder: Path, how: Compute) -> Opened:
    # no head is needed: only what blocks are given and return counts
    headless = replace(calibration, importance="activations", save=None)
    setup = prepare(
        dense,
        headless,
        seed,
        how.device,
        how.trust_remote_code,
        folder / "dense",
        by_block=False,
        room=room_of(how),
        least=2 * HELD_OUT * how.processes.size,
    )
    task = setup.subject.task
    own = setup.bare or dense.library == "timm" or is_for(dense, task)
    first = setup.subject.model if own else _load(dense, how)  # a task's new head may have given it another class
    place = folder / "factorised"
    offloaded = load_offloaded_subject(source, task, how.device, how.trust_remote_code, place, room_of(how))
    second = _load(source, how) if offloaded is None else offloaded.model
    if isinstance(first, Wrapped) and not isinstance(second, Wrapped):
        first = first.body.to(how.device)
    return Opened(first, second, setup.batches, setup.subject.notes, offloaded is not None)


def _open_without_task(
    source: Source, dense: Source, calibration: Calibration, seed: int, folder: Path, how: Compute
) -> Opened:
    """Models for no task, or for none that is asked for, fed with whatever the data has for their arguments."""
    assert calibration.data is not None
    options, trust = replace(calibration.how, task=None), how.trust_remote_code
    rows = open_unlabelled(calibration.data, options, split=calibration.split)
    subjects = [load_bare(each, rows, options, trust_remote_code=trust) for each in (dense, source)]
    subject = subjects[0]
    feed = find_feed(subject.body, rows, options)
    examples = unlabelled_examples(subject, rows, feed, options, trust_remote_code=trust)
    order = torch.randperm(len(examples.dataset), generator=torch.Generator().manual_seed(seed))
    chosen = sorted(order[: calibration.samples].tolist())
    size = min(IMAGES, max(1, len(chosen) // (2 * HELD_OUT * how.processes.size)))
    batches = [
        dict(examples.collate([examples.dataset[i] for i in chosen[at : at + size]]))
        for at in range(0, len(chosen), size)
    ]
    first, second = (each.model.to(how.device) for each in subjects)
    return Opened(first, second, batches, examples.notes)


def share_of(batches: Sequence[Batch], processes: Processes) -> Sequence[Batch]:
    """The batches of this process, as many as each other has. Raises CalibrationError if there are too few."""
    each = len(batches) // processes.size
    if not each:
        raise CalibrationError(f"{len(batches)} batches for {processes.size} processes; add --samples, or start fewer")
    return batches[processes.rank :: processes.size][:each]


def _load(source: Source, how: Compute) -> nn.Module:
    model = load_source(source, dtype=torch.float32, trust_remote_code=how.trust_remote_code)
    return (ImageClassifier(model).eval() if source.library == "timm" else model).to(how.device)


def _check_alike(dense: nn.Module, compressed: nn.Module, against: str) -> None:
    """Raise SourceError unless the dense model has every layer that is factorised, in its shape."""
    layers, blocks = dense_layers(dense), find_blocks(dense)
    for name, layer in factorised_layers(compressed).items():
        shape = tuple(getattr(getattr(layers.get(name), "weight", None), "shape", ()))
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if inside and shape != tuple(layer.weight.shape):
            raise SourceError(
                f"{against}: has no layer {name} of shape {tuple(layer.weight.shape)}; name the dense model that was"
                " factorised"
            )
