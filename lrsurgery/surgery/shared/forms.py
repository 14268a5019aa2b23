"""The tensors of a group of layers that share one `v`, in either form: made from factors, filled in, changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import Factors, balance
from lrsurgery.linalg.pivot import inverse_of, pivot_together
from lrsurgery.linalg.weighted import Metric, WeightedFactors, joint_factors
from lrsurgery.modules import Unfilled
from lrsurgery.surgery.layers import Kind
from lrsurgery.surgery.shared.modules import SharedLinear


class Part(NamedTuple):
    """The tensors of one layer of a group but its bias; `v` (rank, columns) is that of all."""

    u: Tensor
    v: Tensor
    order: Tensor | None = None
    pivots: tuple[int, int] | None = None  # start and number, as in `Spec`


def decompose_together(
    names: Sequence[str], kind: Kind, weights: Sequence[Tensor], rank: int, metrics: Sequence[Metric]
) -> WeightedFactors:
    """The stacked factors of dense weights of one kind; see `joint_factors`. Raises SurgeryError that names them."""
    try:
        return joint_factors([kind.to_matrix(weight) for weight in weights], rank, metrics)
    except SurgeryError as e:
        raise type(e)(f"{', '.join(names)}: {e}") from e


def store_together(factors: Factors, sizes: Sequence[int], like: Tensor, *, pivoted: bool) -> list[Part]:
    """The tensors that store stacked factors u (sum of sizes, r), v (r, columns), in the dtype and place of `like`.

    Where that is the meta device they stay on that of the factors. Pivots are chosen and computed in fp64.
    """
    device = factors.u.device if like.is_meta else like.device

    def stored(tensor: Tensor) -> Tensor:
        return tensor.to(device, like.dtype).contiguous()

    if not pivoted:
        v = stored(factors.v)
        return [Part(stored(u), v) for u in torch.split(factors.u, list(sizes))]
    kept, slices = pivot_together(Factors(factors.u.double(), factors.v.double()), sizes)
    v = stored(kept)
    return [
        Part(stored(each.mixing), v, each.order.to(device, torch.int32), (each.start, each.number)) for each in slices
    ]


def product_of(part: Part) -> Factors:
    """Matrices u (rows, rank), v (rank, columns) of the product that a part stores."""
    if part.order is None or part.pivots is None:
        return Factors(part.u, part.v)
    start, count = part.pivots
    one = torch.eye(len(part.v), dtype=part.u.dtype, device=part.u.device)[start : start + count]
    return Factors(torch.cat([one, part.u])[inverse_of(part.order)], part.v)


def split_biases(biases: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor | None, list[Tensor]]:
    """The bias of v, None in the balanced form, and those of the u's that give dense biases (rows,), in their dtype."""
    if parts[0].order is None:
        return None, list(biases)
    own, others = [], []
    for bias, part in zip(biases, parts, strict=True):
        assert part.order is not None
        assert part.pivots is not None
        first, rest = bias.detach()[part.order.to(bias.device).long()].tensor_split([part.pivots[1]])
        own.append(first)
        others.append(rest)
    shared = torch.cat([first.to(own[0]) for first in own])
    return shared, [
        (rest.double() - part.u.to(rest.device).double() @ shared.to(rest.device).double()).to(rest.dtype)
        for rest, part in zip(others, parts, strict=True)
    ]


def fill_group_(
    group: Sequence[SharedLinear], parts: Sequence[Part], biases: Sequence[Tensor | None], trained: Sequence[bool]
) -> None:
    """Give the layers of a group on the meta device their tensors; see `surgery.apply.fill_`."""
    leader = group[0]
    leader.v.weight = nn.Parameter(parts[0].v, requires_grad=any(trained))
    given = [bias for bias in biases if bias is not None]
    assert len(given) in (0, len(group))
    shared, own = split_biases(given, parts) if given else (None, [])
    if shared is not None:
        leader.v.bias = nn.Parameter(shared, requires_grad=any(trained))
    for number, (layer, part) in enumerate(zip(group, parts, strict=True)):
        layer.u.weight = nn.Parameter(part.u, requires_grad=trained[number])
        layer.set_pivots(part.pivots, part.order)
        if own:
            bias = own[number]
            layer.u.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, trained[number])


def can_pivot(group: Sequence[SharedLinear]) -> bool:
    """Whether the rank of a group is below its full rank."""
    return group[0].rank < min(sum(layer.out_features for layer in group), group[0].in_features)


@torch.no_grad()
def reform_group_(group: Sequence[SharedLinear], biases: Sequence[Tensor | None], *, pivoted: bool) -> None:
    """Give a group another form in place; `biases` are the dense ones. Works in fp64 and rounds once."""
    leader = group[0]
    us = [layer.factors.u.double() for layer in group]
    wide = Factors(torch.cat(us), leader.v.weight.double())
    held = [layer.u.weight for layer in group]
    parts = store_together(wide if pivoted else balance(wide), [len(u) for u in us], held[0], pivoted=pivoted)
    has_bias, dtype = biases[0] is not None, held[0].dtype
    with Unfilled():
        for layer, part in zip(group, parts, strict=True):
            layer.u = nn.Linear(leader.rank, len(part.u), bias=has_bias, device="meta", dtype=dtype)
        new_v = nn.Linear(leader.in_features, leader.rank, bias=has_bias and pivoted, device="meta", dtype=dtype)
    leader._modules["v"] = new_v
    fill_group_(group, parts, biases, [weight.requires_grad for weight in held])
    for layer in group:
        layer.train(layer.training)
