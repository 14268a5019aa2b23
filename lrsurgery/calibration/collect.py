"""Collection of calibration statistics: runs batches through a dense model, whole or block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.blockwise import malloc_trim, visit_blocks
from lrsurgery.calibration.hooks import Collector, freeze
from lrsurgery.calibration.loss import (
    IMPORTANCES,
    TEMPERATURE,
    Batch,
    Loss,
    Outputs,
    SampledLoss,
    check_importance,
    check_temperature,
)
from lrsurgery.calibration.statistics import LayerUse, Moments, Statistics, StatisticsWriter, key_of, merge
from lrsurgery.checkpoints.mapping import tied_weights
from lrsurgery.errors import CalibrationError
from lrsurgery.files.json import Json
from lrsurgery.heads import SplitHead, find_head
from lrsurgery.modules import for_model, tensors_of
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.surgery.plan import SurgeryOptions, find_heads, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec
from lrsurgery.surgery.rows import Replacement


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    importance: str = "fisher",
    conv: str = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
    loss: Loss | None = None,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    listener: Listener = USUAL,
) -> Statistics:
    """Run batches through a model in memory and return the statistics for `factorise_(..., statistics=...)`.

    `batches` are dicts of keyword arguments (labels are not passed), tensors or tuples. `importance`: "fisher" collects
    second moments of inputs and output gradients, "activations" those of inputs only. Tables of tokens are among the
    layers, output heads and classifiers with `heads`. `loss` maps the model's outputs and the batch to a loss that is
    summed, not averaged, and the number of scored items. By default it is the log likelihood of classes sampled from
    the model's logits / `temperature` with `seed` (`SampledLoss`), which needs no labels.

    Raises CalibrationError without batches, for an unknown importance, or for inputs or gradients of a layer that are
    not finite; PlanError as `plan_rows` does.
    """
    check_importance(importance)
    check_temperature(temperature)
    facts: Json = {"temperature": temperature} if loss is None and IMPORTANCES[importance] else {}
    whole = SurgeryOptions(
        target=RankSpec(FractionRank(1.0)),
        conv=conv,
        include=include,
        exclude=exclude,
        allow_larger=True,
        embeddings=True,
        heads=heads,
    )
    planned = plan_rows(model, whole, heads=find_heads(model), tied=tied_weights(model))
    rows = [each for row in planned if isinstance(row, Replacement) for each in row.watched]
    return collect(
        model,
        list(batches),
        rows,
        importance=importance,
        loss=loss or SampledLoss(seed, temperature),
        store=MemoryStore(),
        facts=facts,
        listener=listener,
    )


class MemoryStore:
    """Store of statistics in memory; `StatisticsWriter` is its counterpart on disk."""

    def __init__(self) -> None:
        self._uses: dict[str, LayerUse] = {}
        self._moments: dict[str, Moments] = {}

    def add(self, name: str, use: LayerUse, moments: Moments) -> None:
        """Keep the moments of one layer as a kind, merged with those added before."""
        name = self._key(name, use.kind)
        if name in self._uses:  # a block that the model runs more than once
            use, moments = merge((self._uses[name], self._moments[name]), (use, moments))
        self._uses[name], self._moments[name] = use, moments

    def __contains__(self, row: Replacement) -> bool:
        return self._key(row.name, row.kind) in self._uses

    def _key(self, name: str, kind: str) -> str:
        return name if name not in self._uses or self._uses[name].kind == kind else key_of(name, kind)

    def finish(self, facts: Json) -> Statistics:
        """Return the statistics."""
        return Statistics(self._uses, facts, self._moments.__getitem__)


Store: TypeAlias = MemoryStore | StatisticsWriter


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
    """Collect statistics of these layers into `store`; see `collect_statistics`.

    `limit` bounds the moments in memory, in bytes: with gradients, layers are then split over several passes.
    """
    if not batches:
        raise CalibrationError("no calibration batch was given; pass at least one")
    recorded = {"metric": importance, **(facts or {})}
    if not IMPORTANCES[importance]:
        _by_block(model, batches, rows, store, listener=listener)
        return store.finish(recorded)
    passes = split(rows, limit)
    head = find_head(model) if type(loss) is SampledLoss else None
    trim = malloc_trim()
    total = len(passes) * len(batches)
    for number, group in enumerate(passes):
        collector = Collector(model, group, gradients=True)
        with freeze(model), collector.watch():
            for index, batch in enumerate(batches):
                listener.progress("calibration", number * len(batches) + index, total)
                _forward_backward(model, batch, collector, loss, head)
                trim(0)  # what glibc keeps of a graph would stand beside the next one
        for row in group:
            store.add(row.name, *collector.take(row))
    return store.finish({**recorded, "scored": collector.scored})


def _forward_backward(model: nn.Module, batch: Batch, collector: Collector, loss: Loss, head: SplitHead | None) -> None:
    with torch.enable_grad(), collector.batch(*padding_masks(batch)):
        if head is not None and isinstance(loss, SampledLoss):
            parts = head.run(lambda: call(model, batch), collector.backward_pass)
            if parts is not None:
                collector.scored += loss.backward(parts, batch, collector.backward_pass)
                return
        value, count = loss(call(model, batch), batch)
        collector.scored += count
        if value.requires_grad:  # otherwise the batch reached no hooked layer
            with collector.backward_pass():
                value.backward()  # type: ignore[no-untyped-call]


def split(rows: Sequence[Replacement], limit: int | None) -> list[list[Replacement]]:
    """Split layers into groups whose moments take at most `limit` bytes, with at least one layer each."""
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
    """Size of the moments of one layer in bytes, in fp32."""
    of_rows = row.rows if row.diagonal else row.rows**2
    return 4 * row.matrices * (row.columns**2 + (of_rows if gradients or row.layout.lookup else 0))


class Look(NamedTuple):
    """What a forward on the first batch shows of a pass of `collect`."""

    seconds: float  # of all batches, estimated
    graph: int  # bytes that the graph of a batch holds, estimated


def look_ahead(model: nn.Module, batches: Sequence[Batch], rows: Sequence[Replacement], *, gradients: bool) -> Look:
    """Estimate time and memory of one pass of `collect`, from a forward on the first batch.

    A backward pass down to the activations costs as much as a forward; second moments of a layer (m, n) cost
    n^2 + m^2 operations a position where the forward costs m n. The head and the loss of a language model are timed
    themselves. A graph holds about twice what the layers return, since what is computed between them is as much.
    """
    head, loss, batch = find_head(model) if gradients else None, SampledLoss(0), batches[0]
    behind, returned = 0.0, 0

    def see(_: nn.Module, __: object, output: object) -> None:
        nonlocal returned
        returned += sum(tensor.nbytes for tensor in tensors_of(output))

    handles = [m.register_forward_hook(see) for m in model.modules() if next(m.children(), None) is None]
    start = time.perf_counter()
    try:
        with torch.no_grad():
            parts = None if head is None else head.run(lambda: call(model, batch))
            if parts is None:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    forward = time.perf_counter() - start
    if parts is not None:
        start = time.perf_counter()
        with freeze(model), torch.enable_grad():
            loss.backward(parts, batch, nullcontext)
        behind = time.perf_counter() - start
    products = sum(row.at_work * row.rows * row.columns for row in rows)
    moments = sum(row.at_work * moment_bytes(row, gradients=gradients) // (4 * row.matrices) for row in rows)
    seconds = len(batches) * (behind + forward * ((2 if gradients else 1) + moments / max(1, products)))
    return Look(seconds, 2 * returned)


def call(model: nn.Module, batch: Batch) -> Outputs:
    """Run the model on a batch, on the device of its parameters; labels are not passed, and the KV cache is off."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        taken = for_model(model, batch)
        arguments = {name: value.to(device) for name, value in taken.items() if name != "labels"}
        if getattr(getattr(model, "config", None), "use_cache", False):
            arguments["use_cache"] = False
        return model(**arguments)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(*(part.to(device) if isinstance(part, Tensor) else part for part in batch))


def padding_masks(batch: Batch) -> tuple[Tensor | None, ...]:
    """The mask of a batch, 0 at padding, and that of its decoder where it has a label for each of those tokens."""
    if not isinstance(batch, Mapping):
        return (None,)
    mask, labels, decoded = (batch.get(name) for name in ("attention_mask", "labels", "decoder_input_ids"))
    own = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(labels, Tensor) and isinstance(decoded, Tensor) and labels.shape == decoded.shape:
        return own, labels >= 0
    return (own,)


def _by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    rows: Sequence[Replacement],
    store: Store,
    listener: Listener = SILENT,
) -> None:
    """Collect moments of the inputs block by block, with one block's moments and offloaded weights in memory."""
    collector = Collector(model, rows, gradients=False)
    blocks = find_blocks(model)
    inside = {block: [row for row in rows if row.name.startswith(f"{block}.")] for block in blocks}
    outside = {row.name for row in rows} - {row.name for each in inside.values() for row in each}

    def run(batch: Batch) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad(), collector.batch(*padding_masks(batch)):
                call(model, batch)

        return forward

    listener.progress("calibration", 0, max(1, len(blocks)))
    with ExitStack() as held:
        held.enter_context(collector.watch(outside))
        visits = held.enter_context(closing(visit_blocks(model, blocks, [run(batch) for batch in batches])))
        for number, visit in enumerate(visits):
            own = inside[visit.name]
            with collector.watch({row.name for row in own}):
                visit.run()
            for row in own:
                store.add(row.name, *collector.take(row))
            listener.progress(visit.name, min(number + 1, len(blocks)), len(blocks))
    rest = [row for own in inside.values() for row in own if row not in store]  # in blocks that never ran
    for row in [*rest, *sorted((row for row in rows if row.name in outside), key=lambda row: row.name)]:
        store.add(row.name, *collector.take(row))
