"""Calibration: batches through a dense model, which tell which errors of its layers matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.blockwise import lockstep
from lrsurgery.calibration.hooks import Collector, frozen
from lrsurgery.calibration.loss import IMPORTANCES, Batch, Loss, Outputs, SampledLoss, check_importance
from lrsurgery.calibration.statistics import LayerUse, Moments, Statistics, StatisticsWriter, added
from lrsurgery.errors import CalibrationError
from lrsurgery.files import Json
from lrsurgery.progress import SILENT, Listener
from lrsurgery.surgery.apply import apply_plan_
from lrsurgery.surgery.plan import Plan, Replacement, SurgeryOptions, find_heads, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    importance: str = "fisher",
    conv: str = "channel",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> Statistics:
    """Run batches through a model in memory, where it lies, and returns what `factorise_(..., statistics=...)` takes.

    `batches` are dicts of keyword arguments (labels are left out), tensors or tuples. `importance`: "fisher" for second
    moments of inputs and of output gradients, "activations" for the inputs alone. `loss` maps the model's outputs and
    the batch to a loss that is summed, not averaged, and the number of things that it scores; by default the model's
    own log likelihood of classes that are drawn from its logits by `seed`, which needs no labels.

    Raises CalibrationError where there is no batch, for an unknown importance, or naming the layer whose inputs or
    gradients are not finite; PlanError as `plan_rows` does.
    """
    check_importance(importance)
    whole = SurgeryOptions(
        target=RankSpec(FractionRank(1.0)), conv=conv, include=include, exclude=exclude, allow_larger=True
    )
    rows = [row for row in plan_rows(model, whole, heads=find_heads(model)) if isinstance(row, Replacement)]
    return collect(model, list(batches), rows, importance=importance, loss=loss or SampledLoss(seed), store=Memory())


class Memory:
    """Keeps what was collected in memory, where a `StatisticsWriter` keeps it in a folder."""

    def __init__(self) -> None:
        self._seen: dict[str, LayerUse] = {}
        self._moments: dict[str, Moments] = {}

    def add(self, name: str, seen: LayerUse, moments: Moments) -> None:
        if name in self:  # a block that a model runs more than once
            seen, moments = added((self._seen[name], self._moments[name]), (seen, moments))
        self._seen[name], self._moments[name] = seen, moments

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def finish(self, facts: Json) -> Statistics:
        return Statistics(self._seen, facts, self._moments.__getitem__)


Store: TypeAlias = Memory | StatisticsWriter


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    rows: Sequence[Replacement],
    *,
    importance: str,
    loss: Loss,
    store: Store,
    facts: Json | None = None,
    limit: int | None = None,
    listener: Listener = SILENT,
) -> Statistics:
    """As `collect_statistics`, of these layers and into `store`.

    With `limit`, gradients are taken of as many layers at a time as have moments of so many bytes, in several passes
    over the batches.
    """
    if not batches:
        raise CalibrationError("no calibration batch was given")
    told = {"metric": importance, **(facts or {})}
    if not IMPORTANCES[importance]:
        _by_block(model, batches, rows, store, listener=listener)
        return store.finish(told)
    passes = split(rows, limit)
    total = len(passes) * len(batches)
    for number, group in enumerate(passes):
        collector = Collector(model, group, gradients=True)
        with frozen(model), collector.watching():
            for index, batch in enumerate(batches):
                listener.progress("calibration", number * len(batches) + index, total)
                _forward_backward(model, batch, collector, loss)
        for row in group:
            store.add(row.name, *collector.take(row.name))
    return store.finish({**told, "scored": collector.scored})


def _forward_backward(model: nn.Module, batch: Batch, collector: Collector, loss: Loss) -> None:
    with torch.enable_grad(), collector.batch(_mask(batch)):
        value, count = loss(call(model, batch), batch)
        collector.scored += count
        if value.requires_grad:  # else none of the watched layers was reached
            with collector.going_back():
                value.backward()  # type: ignore[no-untyped-call]


def split(rows: Sequence[Replacement], limit: int | None) -> list[list[Replacement]]:
    """The layers in groups whose moments, of inputs and gradients, take at most `limit` bytes, or one layer each."""
    groups: list[list[Replacement]] = [[]]
    held = 0
    for row in rows:
        size = moment_bytes(row, gradients=True)
        if groups[-1] and limit is not None and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += size
    return groups


def moment_bytes(row: Replacement, *, gradients: bool) -> int:
    """What the moments of one layer take in memory and in files, in fp32."""
    return 4 * (row.columns**2 + (row.rows**2 if gradients else 0))


def call(model: nn.Module, batch: Batch) -> Outputs:
    """The model's outputs for a batch, on the device of its parameters."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        given = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        if getattr(getattr(model, "config", None), "use_cache", False):
            given["use_cache"] = False
        return model(**given)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(*(part.to(device) if isinstance(part, Tensor) else part for part in batch))


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def collect_sequentially(
    model: nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    gradients_of: Callable[[str], Tensor | None],
    *,
    init: str,
    seed: int,
    store: Store,
    facts: Json | None = None,
    listener: Listener = SILENT,
) -> Statistics:
    """The inputs of each block once the blocks before it are replaced as planned; gradients as they are given.

    The model is factorised when it is done.
    """

    def factorise(found: Mapping[str, tuple[LayerUse, Moments]]) -> None:
        rows = tuple(row for row in plan.replacements if row.name in found)
        metrics = {name: moments.metric(use) for name, (use, moments) in found.items() if use.positions}
        apply_plan_(model, replace(plan, rows=rows), init=init, seed=seed, metric_of=metrics.get)

    _by_block(model, batches, plan.replacements, store, gradients_of, factorise, listener)
    return store.finish(facts or {})


def _no_gradients(name: str) -> Tensor | None:
    return None


def _by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    rows: Sequence[Replacement],
    store: Store,
    gradients_of: Callable[[str], Tensor | None] = _no_gradients,
    factorise: Callable[[Mapping[str, tuple[LayerUse, Moments]]], None] | None = None,
    listener: Listener = SILENT,
) -> None:
    """Moments of the inputs, block by block: one block's are in memory at a time, and its weights if they are on disk.

    With `factorise`, each block is first run as it is, then its layers are replaced, and then it is run again.
    """
    collector = Collector(model, rows, gradients=False)
    blocks = find_blocks(model)
    inside = {block: [row.name for row in rows if row.name.startswith(f"{block}.")] for block in blocks}
    left = {row.name for row in rows} - {name for names in inside.values() for name in names}

    def taken(name: str) -> tuple[LayerUse, Moments]:
        seen, moments = collector.take(name)
        return seen, replace(moments, gradients=gradients_of(name))

    def run(batch: Batch) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad(), collector.batch(_mask(batch)):
                call(model, batch)

        return forward

    listener.progress("calibration", 0, max(1, len(blocks)))
    with ExitStack() as held:
        held.enter_context(collector.watching(left))
        visits = held.enter_context(closing(lockstep(model, blocks, [run(batch) for batch in batches])))
        for number, visit in enumerate(visits):
            names = inside[visit.name]
            with collector.watching(names):
                visit.run() if factorise is None else visit.replay()
            found = {name: taken(name) for name in names}
            for name, (seen, moments) in found.items():
                store.add(name, seen, moments)
            if factorise is not None:
                factorise(found)
                visit.run()
            listener.progress(visit.name, min(number + 1, len(blocks)), len(blocks))
    rest = [name for names in inside.values() for name in names if name not in store]  # of blocks that were not reached
    for name in [*rest, *sorted(left)]:
        store.add(name, *taken(name))
