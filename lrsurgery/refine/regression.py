"""Anchored regression: the factors of a layer in closed form, by the dense layer's outputs and the compressed inputs.

With x the inputs of the dense layer, x' those that the layer gets behind compressed ones, W the dense weight and M the
cut one, the B of least E ||W x - B x'||^2 + rho ||B - M||_F^2 is (W E[x x'^T] + rho M) (E[x' x'^T] + rho I)^-1, and its
best approximation of a rank in the metric E[x' x'^T] + rho I is what the layer becomes (reduced-rank regression;
AdaSVD, arXiv 2502.01403, alternates towards the same optimum). Where the second moment G of the loss's gradients at the
outputs is known, errors count by it: the best approximation is that of G^(1/2) B. Where a layer has a bias, moments are
centred, and the bias takes the means.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.calibration.statistics import damping_share
from lrsurgery.linalg.weighted import Metric, weighted_factors
from lrsurgery.modules import Unfilled, run_until
from lrsurgery.refine.activations import Cache, Masks, fitting, run
from lrsurgery.runtime import Processes
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.fill import dense_bias, fill_
from lrsurgery.surgery.layers import FactorisedLayer, build_dense, factor_weights
from lrsurgery.surgery.shared.modules import SharedLinear

# layer of the block, its kind, rows of its matrix -> second moment of the gradients at its outputs, or None
Weights: TypeAlias = Callable[[str, str, int], "Tensor | None"]

ROWS = 1024  # of a sum that are added to at a time


@dataclass
class _Sums:
    """Sums over positions, in fp64."""

    gram: Tensor  # of x' x'^T, (columns, columns)
    cross: Tensor  # of x x'^T, (columns, columns)
    first: Tensor  # of x, (columns,)
    second: Tensor  # of x', (columns,)
    count: int = 0


@dataclass
class _Group:
    """Layers that are given the same tensor."""

    names: list[str] = field(default_factory=list)


def regress_(
    dense: nn.Module,
    block: nn.Module,
    given: tuple[Cache, Cache],
    numbers: Sequence[int],
    masks: Sequence[Masks],
    processes: Processes,
    weights: Weights = lambda name, kind, rows: None,
) -> list[str]:
    """Fit the layers of a block in the order in which they run, and return their names.

    `given` are the arguments of the dense and of the compressed block in each call, `numbers` the calls to go by. Fits
    layers of one matrix that run once, and leaves out those that share a v, are tied, or see other positions than the
    dense layer.
    """
    layers = {name: layer for name, layer in factorised_layers(block).items() if _is_plain(layer)}
    fitted: list[str] = []
    for group in _groups(block, layers, given[1], numbers):
        sums = _collect(dense, block, {name: layers[name] for name in group.names}, given, numbers, masks)
        if processes.any(sums is None):
            continue
        if sums is not None:
            sums.count = int(processes.sum_(torch.tensor(sums.count)))
            for each in (sums.gram, sums.cross, sums.first, sums.second):
                processes.sum_(each)
        if sums is not None and sums.count:
            _fit_group_(dense, {name: layers[name] for name in group.names}, sums, weights)
            fitted += group.names
    return fitted


def _is_plain(layer: FactorisedLayer) -> bool:
    layout = layer.layout
    odd = layout.lookup or layout.stacked or layout.parameter or layer.groups > 1
    return not (odd or layer.tied or layer.folded or isinstance(layer, SharedLinear))


def _groups(
    block: nn.Module, layers: dict[str, FactorisedLayer], given: Cache, numbers: Sequence[int]
) -> Iterator[_Group]:
    """The layers that run once in each call, in order, together where the first call gives them the same tensor."""
    groups: dict[tuple[int, str], _Group] = {}
    often: set[str] = set()
    first: list[tuple[str, Tensor]] = []  # holds the tensors, so that no other takes their place
    for number in numbers:
        seen = _seen(block, layers, given[number])
        first = first or seen
        often |= {name for name, count in Counter(name for name, _ in seen).items() if count > 1}
    for name, x in first:
        if name not in often:
            groups.setdefault((id(x), layers[name].kind), _Group()).names.append(name)
    yield from groups.values()


def _seen(block: nn.Module, layers: dict[str, FactorisedLayer], call: Any) -> list[tuple[str, Tensor]]:
    """Each run of a layer in a call of the block, with its input."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            run(block, call)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _collect(
    dense: nn.Module,
    block: nn.Module,
    layers: dict[str, FactorisedLayer],
    given: tuple[Cache, Cache],
    numbers: Sequence[int],
    masks: Sequence[Masks],
) -> _Sums | None:
    """The sums over these calls of layers with the same inputs; None where both blocks see other positions."""
    name, layer = next(iter(layers.items()))
    original: Any = dense.get_submodule(name) if name else dense
    layout = layer.layout
    sums: _Sums | None = None
    for number in numbers:
        pair = [_input_of(each, name, cache[number]) for each, cache in zip((dense, block), given, strict=True)]
        x, moved = pair
        if x is None or moved is None or x.shape != moved.shape:
            return None
        mask = fitting(masks[number], x.shape[:-1]) if layout.takes_tokens else None
        for one, other in zip(layout.inputs(original, x, mask), layout.inputs(original, moved, mask), strict=True):
            if sums is None:
                size = one.shape[1]
                zeros = torch.zeros(size, size, dtype=torch.float64, device=one.device)
                sums = _Sums(zeros, zeros.clone(), zeros[0].clone(), zeros[0].clone())
            _add_product_(sums.gram, other, other)
            _add_product_(sums.cross, one, other)
            sums.first += one.sum(0)
            sums.second += other.sum(0)
            sums.count += len(one)
    return sums


def _add_product_(sums: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one^T other, some rows at a time: the sums of a wide layer are the largest tensors of a refinement."""
    for some, part in zip(torch.split(sums, ROWS), torch.split(one.T, ROWS), strict=True):
        some.add_(part @ other)


def _input_of(block: nn.Module, name: str, call: Any) -> Tensor | None:
    """The first input of a layer in a call of its block; None if the call does not come to it."""
    with torch.no_grad():
        found = run_until(block.get_submodule(name) if name else block, lambda: run(block, call), before=True)
    return found[0][0].detach() if found else None


@torch.no_grad()
def _fit_group_(dense: nn.Module, layers: dict[str, FactorisedLayer], sums: _Sums, weights: Weights) -> None:
    """Fit layers with the same inputs. Takes the sums apart as it goes: at 11,008 columns each has a GB."""
    originals: dict[str, Any] = {name: dense.get_submodule(name) if name else dense for name in layers}
    products = {}
    for name, layer in layers.items():
        weight = layer.layout.matrix_of(originals[name].weight.detach()).double()
        products[name] = (weight @ sums.cross).div_(sums.count), weight @ sums.first / sums.count
    del sums.cross
    gram, second = sums.gram.div_(sums.count), sums.second / sums.count
    for left, (name, layer) in zip(reversed(range(len(layers))), layers.items(), strict=True):
        moments = _Moments(*products.pop(name), gram.clone() if left else gram, second, sums.count)
        _fit_(layer, originals[name], moments, functools.partial(weights, name))


class _Moments(NamedTuple):
    """Means over positions, in fp64, of the inputs x' of a layer and of the dense layer's outputs W x."""

    cross: Tensor  # of W x x'^T, (rows, columns); overwritten
    outputs: Tensor  # of W x, (rows,)
    gram: Tensor  # of x' x'^T, (columns, columns); overwritten
    inputs: Tensor  # of x', (columns,)
    positions: int


def _fit_(
    layer: FactorisedLayer, original: Any, moments: _Moments, weights: Callable[[str, int], Tensor | None]
) -> None:
    layout, (cross, outputs, gram, inputs, positions) = layer.layout, moments
    bias = dense_bias(layer)
    centred = bias is not None and original.bias is not None and len(cross) == bias.numel()
    if centred:
        gram.addr_(inputs, inputs, alpha=-1)
        cross.addr_(outputs, inputs, alpha=-1)
    share = damping_share("inputs", len(gram), positions)
    ridge = share * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    cross.add_(ridge * layer.wide_matrix().double())
    target = torch.linalg.solve(gram, cross, left=False)
    found = weights(layer.kind, len(target))
    factors = weighted_factors(target, layer.rank, Metric(gram, None if found is None else found.to(gram))).factors
    new = bias
    if centred:
        means = outputs + original.bias.detach().double() - factors.u @ (factors.v @ inputs)
        new = means.to(layer.u.weight.dtype)
    with Unfilled():
        empty = build_dense(layer)
    dtype = layer.u.weight.dtype
    stored = factor_weights(layout, empty.weight.to(dtype), factors, layer.side)  # type: ignore[operator, arg-type]
    fill_(layer, stored, new, layer.u.weight.requires_grad)
