"""Calibration: data through a dense model, to learn which errors of its layers matter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.collector import Collector, frozen
from lrsurgery.errors import CalibrationError
from lrsurgery.lockstep import find_blocks, lockstep
from lrsurgery.moments import Moments, Seen, Statistics, StatisticsWriter, added
from lrsurgery.plan import Plan, Replaced, find_heads, plan_rows
from lrsurgery.ranks import FractionRank, RankSpec
from lrsurgery.steps import Progress, result_of
from lrsurgery.surgery import apply_plan_

METRICS = ("fisher", "activations")
WIDE = 1 << 24  # logits at a time in fp64: 128 MB
TINY = 1e-300

# The model's outputs and the batch -> a loss summed over what it scores, and how many that are.
Loss: TypeAlias = "Callable[[Any, Any], tuple[Tensor, int]]"


class SampledLoss:
    """A loss whose gradients make the Fisher information: the mean of g g^T over the classes that a model predicts.

    For each prediction p one class c is drawn, with probability q_c in proportion to p_c ||p - e_c||, and its gradient
    at the logits, p - e_c, is weighed by sqrt(p_c / q_c) and a random sign, so that those of several tokens add up to
    nothing on average. The mean is that of classes drawn from p, and no single draw comes nearer to it (importance
    sampling): a model that is nearly sure has next to no gradient at its likely class, and the others would hardly ever
    be drawn. Only the gradients mean anything, not the value.

    Taken over the last axis of the logits (batch, ..., classes), wherever the batch has no padding; it needs no labels.
    With labels in the batch that mark some positions as not counted, as masked language modelling does, over the rest.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._doubt, self._scored = 0.0, 0

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        logits = logits_of(outputs)
        counted = _counted(batch, logits.shape[:-1])
        flat = (logits[counted] if counted is not None else logits.flatten(0, -2)).float()
        if not bool(torch.isfinite(flat.detach().logsumexp(-1)).all()):  # -inf rules a class out, which is all right
            raise CalibrationError("the model's logits hold NaN or Inf; check the data or the model")
        if self._generator is None or self._generator.device != flat.device:
            self._generator = torch.Generator(flat.device).manual_seed(self._seed)
        at_a_time = max(1, WIDE // flat.shape[-1])
        slopes = torch.cat([self._slopes(part, self._generator) for part in torch.split(flat.detach(), at_a_time)])
        self._scored += len(flat)
        return (flat * slopes).sum(), len(flat)

    @property
    def doubt(self) -> float:
        """The mean probability, so far, that two classes drawn from one prediction differ: 1 - ||p||^2."""
        return self._doubt / max(1, self._scored)

    def _slopes(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Gradients (n, classes) at these logits, weighed. In fp64: 1 - p is what matters of a p near 1."""
        log_p = logits.double().log_softmax(-1)
        p, rest = log_p.exp(), -log_p.expm1()
        squares = p.square().sum(-1, keepdim=True)
        lengths = (rest.square() + (squares - p.square()).clamp(min=0)).sqrt()
        q = p * lengths
        total = q.sum(-1, keepdim=True)
        self._doubt += float((p * rest).sum())
        drawn = torch.multinomial(q.clamp(min=TINY), 1, generator=generator)
        slopes = p.scatter(-1, drawn, -rest.gather(-1, drawn))
        weights = (total / lengths.gather(-1, drawn).clamp(min=TINY)).sqrt()  # sqrt(p / q)
        signs = 1 - 2 * torch.randint(2, drawn.shape, generator=generator, device=drawn.device)
        return (slopes * weights * signs).to(logits.dtype)


def logits_of(outputs: Any) -> Tensor:
    """The logits (batch, ..., classes) of a model's outputs. Raises CalibrationError where there are none."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise CalibrationError(
            f"the model gives {type(outputs).__name__} without logits; pass a loss, or use the metric activations"
        )
    return found


def _counted(batch: Any, shape: torch.Size) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and bool((labels < 0).any()):
        return labels >= 0
    if isinstance(mask, Tensor) and mask.shape == shape and not bool(mask.all()):
        return mask.bool()
    return None


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: str = "fisher",
    conv: str = "channel",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> Statistics:
    """Runs batches through a model in memory, where it lies, and returns what `factorise_(..., statistics=...)` takes.

    `batches` are dicts of keyword arguments (labels are left out), tensors or tuples. `metric`: "fisher" for second
    moments of inputs and of output gradients, "activations" for the inputs alone. `loss` maps the model's outputs and
    the batch to a loss that is summed, not averaged, and the number of things that it scores; by default the model's
    own log likelihood of classes that are drawn from its logits by `seed`, which needs no labels.

    Raises CalibrationError where there is no batch, for an unknown metric, or naming the layer whose inputs or
    gradients are not finite; PlanError as `plan_rows` does.
    """
    if metric not in METRICS:
        raise CalibrationError(f"unknown metric '{metric}'; known: {', '.join(METRICS)}")
    spec = RankSpec(FractionRank(1.0))
    heads = find_heads(model)
    planned = plan_rows(model, spec, conv=conv, include=include, exclude=exclude, allow_larger=True, heads=heads)
    rows = [row for row in planned if isinstance(row, Replaced)]
    steps = iter_collect(model, list(batches), rows, metric=metric, loss=loss or SampledLoss(seed), store=Memory())
    return result_of(steps)


class Memory:
    """Keeps what was collected in memory, where a `StatisticsWriter` keeps it in a folder."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._moments: dict[str, Moments] = {}

    def add(self, name: str, seen: Seen, moments: Moments) -> None:
        if name in self:  # a block that a model runs more than once
            seen, moments = added((self._seen[name], self._moments[name]), (seen, moments))
        self._seen[name], self._moments[name] = seen, moments

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def finish(self, facts: Mapping[str, Any]) -> Statistics:
        return Statistics(self._seen, facts, self._moments.__getitem__)


Store: TypeAlias = "Memory | StatisticsWriter"


def iter_collect(
    model: nn.Module, batches: Sequence[Any], rows: Sequence[Replaced], *, metric: str, loss: Loss, store: Store,
    facts: Mapping[str, Any] | None = None, limit: int | None = None,
) -> Generator[Progress, None, Statistics]:  # fmt: skip
    """As `collect_statistics`, a step a batch or block. With `limit`, gradients are taken of as many layers at a time
    as have moments of so many bytes, in several passes over the batches."""
    if not batches:
        raise CalibrationError("no calibration batch was given")
    told = {"metric": metric, **(facts or {})}
    if metric == "activations":
        yield from _by_block(model, batches, rows, store)
        return store.finish(told)
    passes = split(rows, limit)
    total = len(passes) * len(batches)
    for number, group in enumerate(passes):
        collector = Collector(model, group, gradients=True)
        with frozen(model), collector.watching():
            for index, batch in enumerate(batches):
                yield Progress("calibration", number * len(batches) + index, total)
                _forward_backward(model, batch, collector, loss)
        for row in group:
            store.add(row.name, *collector.take(row.name))
    return store.finish({**told, "scored": collector.scored})


def _forward_backward(model: nn.Module, batch: Any, collector: Collector, loss: Loss) -> None:
    with torch.enable_grad(), collector.batch(_mask(batch)):
        value, count = loss(call(model, batch), batch)
        collector.scored += count
        if value.requires_grad:  # else none of the watched layers was reached
            with collector.going_back():
                value.backward()  # type: ignore[no-untyped-call]


def split(rows: Sequence[Replaced], limit: int | None) -> list[list[Replaced]]:
    """The layers in groups whose moments, of inputs and gradients, take at most `limit` bytes, or one layer each."""
    groups: list[list[Replaced]] = [[]]
    held = 0
    for row in rows:
        size = moment_bytes(row, gradients=True)
        if groups[-1] and limit is not None and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += size
    return groups


def moment_bytes(row: Replaced, *, gradients: bool) -> int:
    """What the moments of one layer take in memory and in files, in fp32."""
    return 4 * (row.columns**2 + (row.rows**2 if gradients else 0))


def call(model: nn.Module, batch: Any) -> Any:
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


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def iter_collect_sequentially(
    model: nn.Module, batches: Sequence[Any], plan: Plan, gradients_of: Callable[[str], Tensor | None], *, init: str,
    seed: int, store: Store, facts: Mapping[str, Any] | None = None,
) -> Generator[Progress, None, Statistics]:  # fmt: skip
    """The inputs of each block once the blocks before it are replaced as planned; gradients as they are given.

    The model is factorised when it is done.
    """

    def factorise(found: Mapping[str, tuple[Seen, Moments]]) -> None:
        rows = tuple(row for row in plan.replaced if row.name in found)
        metrics = {name: moments.metric(seen) for name, (seen, moments) in found.items() if seen.positions}
        apply_plan_(model, replace(plan, rows=rows), init=init, seed=seed, metric_of=metrics.get)

    yield from _by_block(model, batches, plan.replaced, store, gradients_of, factorise)
    return store.finish(facts or {})


def _by_block(
    model: nn.Module, batches: Sequence[Any], rows: Sequence[Replaced], store: Store,
    gradients_of: Callable[[str], Tensor | None] = lambda name: None,
    factorise: Callable[[Mapping[str, tuple[Seen, Moments]]], None] | None = None,
) -> Generator[Progress, None, None]:  # fmt: skip
    """Moments of the inputs, block by block: one block's are in memory at a time, and its weights if they are on disk.

    With `factorise`, each block is first seen as it is, then its layers are replaced, and then it is run.
    """
    collector = Collector(model, rows, gradients=False)
    blocks = find_blocks(model)
    inside = {block: [row.name for row in rows if row.name.startswith(f"{block}.")] for block in blocks}
    left = {row.name for row in rows} - {name for names in inside.values() for name in names}

    def taken(name: str) -> tuple[Seen, Moments]:
        seen, moments = collector.take(name)
        return seen, replace(moments, gradients=gradients_of(name))

    def run(batch: Any) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad(), collector.batch(_mask(batch)):
                call(model, batch)

        return forward

    yield Progress("calibration", 0, max(1, len(blocks)))
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
            yield Progress(visit.name, min(number + 1, len(blocks)), len(blocks))
    rest = [name for names in inside.values() for name in names if name not in store]  # of blocks that were not reached
    for name in [*rest, *sorted(left)]:
        store.add(name, *taken(name))
