"""The tensors of one layer: filled in, and its dense bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrsurgery.surgery.layers import (
    FactorisedLayer,
    Stored,
    plain,
    split_bias,
)


def fill_(layer: FactorisedLayer, stored: Stored, bias: Tensor | None, trained: bool) -> None:
    """Give a layer on the meta device its tensors; `bias` is the dense one, which a balanced layer takes as it is."""
    layer.u.weight = nn.Parameter(stored.u, requires_grad=trained)
    layer.v.weight = nn.Parameter(stored.v, requires_grad=trained)
    layer.order = stored.order
    if bias is None:
        return
    parts = split_bias(layer.layout, bias.detach(), stored, layer.side)
    for module, part in zip((layer.v, layer.u), parts, strict=True):
        if part is not None:
            is_itself = isinstance(bias, nn.Parameter) and part.data_ptr() == bias.data_ptr()
            module.bias = bias if is_itself else nn.Parameter(part, requires_grad=trained)


@torch.no_grad()
def dense_bias(layer: FactorisedLayer) -> Tensor | None:
    """The dense bias (rows,): u's own, or where v has a part of it a new tensor, computed in fp64 and rounded once."""
    if layer.side != "rows" or layer.u.bias is None:
        return layer.bias
    assert layer.v.bias is not None
    assert layer.order is not None
    mixing = layer.layout.to_matrices(plain(layer.u.weight), plain(layer.v.weight)).u
    first, rest = layer.v.bias.double(), layer.u.bias.double()
    bias = torch.empty(len(layer.order), dtype=layer.u.bias.dtype, device=rest.device)
    own = first[layer.start : layer.start + layer.own]
    bias[layer.order.long()] = torch.cat([own, rest + mixing.double() @ first]).to(bias.dtype)
    return bias
