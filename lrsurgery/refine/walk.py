"""Refinement of a model: its blocks one after another, each fitted to its dense block.

Both models run on all batches, one block at a time: the dense stream gives a block its targets, the compressed stream
its inputs, which hold the errors of the blocks before it. One block of each model and the activations at it are in
memory.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.collect import call, padding_masks
from lrsurgery.calibration.loss import Batch
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.errors import CalibrationError
from lrsurgery.modules import tensors_of
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.refine.activations import Cache
from lrsurgery.refine.norms import refresh_norms_
from lrsurgery.refine.options import Refinement
from lrsurgery.refine.reconstruction import HELD_OUT, Fit, Samples, fit_, held_out
from lrsurgery.refine.regression import Weights, regress_
from lrsurgery.refine.streams import Pair, visit_pairs
from lrsurgery.runtime import Processes
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.change import reform_
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.units import duration_text

ALONE = Processes()
LEAST_GAIN = 1e-4  # of the error; below it a change of form and back may be all that happened
LEAST = 1e-12  # relative error below which there is nothing to fit


class Store(Protocol):
    """Where the tensors of finished blocks are kept, by their names in the model."""

    def read(self, name: str) -> tuple[dict[str, Tensor], Fit] | None:
        """Those of a block that an earlier part of the job finished; None for any other."""

    def write(self, pair: Pair, tensors: Mapping[str, Tensor], fit: Fit) -> None:
        """Keep those of a block."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a refinement goes by."""

    dense: nn.Module
    compressed: nn.Module  # in fp32; refined in place
    batches: Sequence[Batch]  # each a call; labels are not used
    options: Refinement
    per_call: int  # samples of a batch
    stored: torch.dtype = torch.float32  # of the written weights, to which a finished block is rounded
    statistics: Statistics | None = None  # of the dense model's layers, by their names in it
    outer: str = ""  # what the models that run have in front of those names
    writable: Collection[str] | None = None  # names of what may change; None: all
    frees: bool = False  # the compressed model's blocks lie on disk, and need not stay in memory once they are done
    processes: Processes = ALONE  # each with as many batches of its own; all get the same weights
    folder: Path | None = None  # for activations that do not fit into `room`
    room: int = 1 << 62  # bytes


def refine_(
    module: nn.Module,
    against: nn.Module,
    batches: Sequence[Batch],
    *,
    refinement: Refinement | None = None,
    statistics: Statistics | None = None,
    listener: Listener = USUAL,
) -> list[Fit]:
    """Fit the blocks of a factorised model in memory to those of the dense model, without labels, in place.

    `batches` are dicts of keyword arguments, tensors or tuples, of the same number of samples but for the last; one of
    eight is held out, so give eight or more: of fewer a larger share is. `statistics` are those that `module` was
    factorised with, if any: their gradients weigh the closed form; see `Refinement`. Returns what it did to each block,
    in the order in which they run. Raises CalibrationError as `refine_blocks_` does.
    """
    importance = None if statistics is None else "fisher" if statistics.has_gradients else "activations"
    options = (refinement or Refinement()).after(importance)
    _check_count(batches)
    if (count := len(batches)) < HELD_OUT:
        kept = held_out(count)
        listener.note(
            f"refinement: {kept} of {count} batches held out; {HELD_OUT} or more, smaller, leave more to fit to"
        )
    first = next(tensors_of(batches[0]))
    was = module.training, against.training
    try:
        walk = Walk(
            dense=against.eval(),
            compressed=module.eval(),
            batches=batches,
            options=options,
            per_call=len(first),
            statistics=statistics,
        )
        return refine_blocks_(walk, None, listener)
    finally:
        module.train(was[0])
        against.train(was[1])


def refine_blocks_(walk: Walk, store: Store | None = None, listener: Listener = SILENT) -> list[Fit]:
    """Fit each block of the compressed model to the same block of the dense one, and say what it did to the errors.

    A block whose outputs on held-out samples do not come nearer stays as it was. Blocks that run more than once in a
    forward stay, too. Raises CalibrationError for models without blocks, or whose blocks differ, and for fewer than
    two batches.
    """
    _check_count(walk.batches)
    look = _look(walk)
    blocks = look.blocks
    again = [name for name, count in blocks.items() if count != 1]
    listener.note(_announcement(walk, len(blocks) - len(again), look))
    if again:
        listener.note(f"{len(again)} blocks do not run once ({again[0]}, ...) and are left as they are")
    shared = _shared_parameters(walk.compressed, list(blocks))
    fits: list[Fit] = []
    pairs = visit_pairs(walk.dense, walk.compressed, list(blocks), walk.batches)
    try:
        for pair in pairs:
            if pair.name in again or not _has_factors(pair.compressed):
                pair.run_dense(None)
                pair.run_compressed()
                continue
            kept = None if store is None else store.read(pair.name)
            if kept is None:
                fit, tensors = _refine_block_(walk, pair, shared, seed=len(fits))
                if store is not None:
                    store.write(pair, tensors, fit)
            else:
                tensors, fit = kept
                pair.run_dense(None)
                pair.compressed.load_state_dict(tensors)
            pair.run_compressed()
            if walk.frees:
                pair.compressed.to("meta")
            fits.append(fit)
            listener.progress(pair.name, len(fits), len(blocks) - len(again))
    finally:
        pairs.close()
    return fits


def _check_count(batches: Sequence[Batch]) -> None:
    if len(batches) < 2:
        raise CalibrationError(
            f"too few batches to refine on: {len(batches)} in a process, and one is held out of at least 2; add samples"
        )


class _Look(NamedTuple):
    """What one forward of the dense model shows."""

    blocks: dict[str, int]  # how often each runs
    seconds: float
    bytes: int  # of the activations of a call at a block: what it is given and returns


def _look(walk: Walk) -> _Look:
    blocks = find_blocks(walk.dense)
    if not blocks:
        raise CalibrationError(
            "no repeated blocks were found in the model, so there is nothing to refine block by block"
        )
    counts: Counter[str] = Counter()
    sizes: list[int] = []

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            counts.update([name])
            sizes.append(sum(tensor.nbytes for tensor in tensors_of([args, kwargs, output])))

        return hook

    handles = [walk.dense.get_submodule(name).register_forward_hook(see(name), with_kwargs=True) for name in blocks]
    start = time.perf_counter()
    try:
        with torch.no_grad():
            call(walk.dense, walk.batches[0])
    finally:
        for handle in handles:
            handle.remove()
    return _Look({name: counts[name] for name in blocks}, time.perf_counter() - start, max(sizes, default=0))


def _announcement(walk: Walk, blocks: int, look: _Look) -> str:
    """What is about to be done, how long it takes (a step costs three forwards of its calls), what goes to disk."""
    options, calls, processes = walk.options, len(walk.batches), walk.processes.size
    per_step = max(1, round(options.batch / (walk.per_call * processes)))
    forwards = 3 * options.steps * per_step + (12 * calls if options.anchored else 0) + 4 * calls
    closed = "the closed form and " if options.anchored else ""
    held = 2 * look.bytes * calls  # beside those of the streams themselves
    disk = f", {held / 1e9:.1f} GB of activations on disk" if walk.folder is not None and held > walk.room else ""
    return (
        f"refinement: {blocks} blocks on {calls * walk.per_call * processes:,} samples, {closed}up to {options.steps}"
        f" steps each; at most about {duration_text(forwards * look.seconds)}{disk}"
    )


def _shared_parameters(model: nn.Module, blocks: Sequence[str]) -> set[str]:
    """Names of parameters that stand in several blocks, or in one and outside of it: those stay."""
    places: dict[int, set[str]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = next((each for each in blocks if name.startswith(f"{each}.")), "")
        places.setdefault(id(parameter), set()).add(block)
        names.setdefault(id(parameter), []).append(name)
    return {name for key, of in places.items() if len(of) > 1 for name in names[key]}


def _has_factors(block: nn.Module) -> bool:
    return bool(factorised_layers(block))


@contextmanager
def _balanced(block: nn.Module) -> Iterator[None]:
    """Balance the pivoted layers of a block within this context, where that is no larger than dense; see design.

    Layers that share a v stay: the config says where their pivots are.
    """
    sides = {}
    for name, layer in factorised_layers(block).items():
        rows, columns = layer.matrix_shape
        if (
            layer.side is not None
            and not isinstance(layer, SharedLinear)
            and layer.rank * (rows + columns) <= rows * columns
        ):
            sides[name] = layer.side
            reform_(layer, None)
    try:
        yield
    finally:
        layers = factorised_layers(block)
        for name, side in sides.items():
            reform_(layers[name], side)


def _refine_block_(walk: Walk, pair: Pair, shared: set[str], *, seed: int) -> tuple[Fit, dict[str, Tensor]]:
    """Fit one block; the dense stream is past it afterwards, the compressed one before it."""
    options, block, processes = walk.options, pair.compressed, walk.processes
    given, dense_given, targets = (_cache(walk, name) for name in ("given", "dense", "targets"))
    masks = [padding_masks(batch) for batch in walk.batches]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    try:
        pair.given(given)
        if options.anchored:
            pair.given(dense_given, dense=True)
        pair.run_dense(targets)
        samples = Samples(given, targets, masks, processes)
        out = held_out(len(given))
        training, held = range(len(given) - out), range(len(given) - out, len(given))
        first = samples.error(block, held)
        if not math.isfinite(first):
            raise CalibrationError(f"{pair.name}: what it returns holds NaN or Inf; check both models and the data")
        if first < LEAST:
            return Fit(pair.name, first, first, 0), before
        with _balanced(block):
            if options.anchored:
                _keep_if_better_(
                    block,
                    samples,
                    held,
                    lambda: regress_(
                        pair.dense, block, (dense_given, given), training, masks, processes, _weights(walk, pair.name)
                    ),
                )
                dense_given.clear()
            _keep_if_better_(block, samples, held, lambda: refresh_norms_(block, given, training, processes))
            parameters = [
                parameter
                for name, parameter in block.named_parameters()
                if parameter.is_floating_point() and _may_change(walk, f"{pair.name}.{name}", shared)
            ]
            steps = fit_(block, parameters, samples, options, per_call=walk.per_call, seed=options.seed + seed)
            _keep_if_better_(block, samples, held, lambda: refresh_norms_(block, given, training, processes))
        _round_(block, walk.stored)
        last = samples.error(block, held)
        if not last < (1 - LEAST_GAIN) * first:
            _restore_(block, before)
            return Fit(pair.name, first, first, 0), before
        return Fit(pair.name, first, last, steps), dict(block.state_dict())
    finally:
        for cache in (given, dense_given, targets):
            cache.clear()


def _weights(walk: Walk, block: str) -> Weights:
    def find(name: str, kind: str, rows: int) -> Tensor | None:
        full = f"{block}.{name}".rstrip(".").removeprefix(walk.outer)
        return None if walk.statistics is None else walk.statistics.gradients(full, kind, rows)

    return find


def _may_change(walk: Walk, name: str, shared: set[str]) -> bool:
    return name not in shared and (walk.writable is None or name in walk.writable)


def _cache(walk: Walk, name: str) -> Cache:
    return Cache(None if walk.folder is None else walk.folder / name, walk.room // 3)


def _keep_if_better_(block: nn.Module, samples: Samples, held: Sequence[int], change: Any) -> None:
    """Make a change, and undo it unless the error on held-out samples falls."""
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    error = samples.error(block, held)
    if change() and not samples.error(block, held) < error:
        _restore_(block, before)


@torch.no_grad()
def _restore_(block: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in block.state_dict().items():
        tensor.copy_(state[name])


@torch.no_grad()
def _round_(block: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to the dtype that they are written in: what later blocks are fitted to is what is shipped."""
    for tensor in block.state_dict().values():
        if tensor.is_floating_point() and dtype != torch.float32:
            tensor.copy_(tensor.to(dtype))
