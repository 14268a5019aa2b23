"""Convolutions of 1, 2 and 3 dimensions by the channel scheme: the kernel to r channels, then a kernel of 1.

What the spatial scheme has in common with it is here, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.kinds.common import AUTO, CHANNEL, fan_in, on_meta
from lrsurgery.surgery.kinds.subclasses import behaves_as
from lrsurgery.surgery.layers import (
    Dense,
    FactorisedConv,
    FactorisedConv1d,
    FactorisedConv2d,
    FactorisedConv3d,
    FactorisedLayer,
    Kind,
)

PATCHES = 1 << 24  # entries of unfolded patches at a time: 64 MB
GROUP = 16  # outputs that a group has at least
SIDE = 16  # height and width of a convolution's output when it is timed
SIDES = {1: (SIDE * SIDE,), 2: (SIDE, SIDE), 3: (SIDE // 4, SIDE // 2, SIDE // 2)}  # the same number of positions
CONVS: dict[int, tuple[type[Any], type[FactorisedConv]]] = {  # by dimensions
    1: (nn.Conv1d, FactorisedConv1d),
    2: (nn.Conv2d, FactorisedConv2d),
    3: (nn.Conv3d, FactorisedConv3d),
}


def _is_conv1d(module: nn.Module, conv: str) -> bool:
    return behaves_as(module, nn.Conv1d)


def _is_conv2d(module: Dense, conv: str) -> bool:
    if not behaves_as(module, nn.Conv2d):
        return False
    return conv in (AUTO, CHANNEL) or module.kernel_size == (1, 1) or module.groups > 1  # which have no other scheme


def _is_conv3d(module: nn.Module, conv: str) -> bool:
    return behaves_as(module, nn.Conv3d)


def explain_groups(module: Dense) -> str | None:
    if module.groups == 1:
        return None
    if module.groups == module.in_channels:
        return "depthwise convolution"
    outputs = module.out_channels // module.groups
    return f"grouped convolution with {outputs} outputs a group ({GROUP} needed)" if outputs < GROUP else None


def _shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    assert isinstance(layer, FactorisedConv)
    return matrix.reshape(-1, layer.in_channels // layer.groups, *layer.kernel_size)


def _matrices(u: Tensor, v: Tensor) -> Factors:
    rank = u.shape[1]
    factors = Factors(u.flatten(1), v.flatten(1))
    if len(v) == rank:
        return factors
    return Factors(*(factor.reshape(len(v) // rank, -1, factor.shape[1]) for factor in factors))


def _factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    v = factors.v.flatten(0, -2)
    v = v.reshape(len(v), -1, *dense[2:])  # of fewer inputs where some are pivots
    u = factors.u.flatten(0, -2)
    u = u.reshape(*u.shape, *(1 for _ in dense[2:]))
    return u.contiguous(), v.contiguous()


def _build(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    bias, meta, dimensions = layer.bias is not None, on_meta(layer), layer.weight.ndim - 2
    conv, factorised = CONVS[dimensions]
    v = conv(
        layer.in_channels - (rank if side == "columns" else 0),
        rank * layer.groups,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=bias and side == "rows",
        padding_mode=layer.padding_mode,
        **meta,
    )
    more = layer.out_channels - (rank if side == "rows" else 0)
    u = conv(rank * layer.groups, more, 1, groups=layer.groups, bias=bias, **meta)
    return factorised(CHANNEL_KINDS[dimensions], v, u, side)


def _sides(layer: Dense) -> tuple[Side, ...]:
    # pivots among the inputs skip v, so it must not move positions
    if layer.groups > 1:
        return ()
    padded = not isinstance(layer.padding, str) and any(layer.padding)
    moves = any(side != 1 for side in (*layer.kernel_size, *layer.stride)) or padded
    return ("rows",) if moves else ("rows", "columns")


def dense_conv(layer: FactorisedLayer) -> nn.Module:
    assert isinstance(layer, FactorisedConv)
    conv: Any = CONVS[len(layer.kernel_size)][0]
    dense: nn.Module = conv(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        **on_meta(layer.u),
    )
    return dense


def pad_mode(module: Dense) -> str:
    return "constant" if module.padding_mode == "zeros" else str(module.padding_mode)


def patches(x: Tensor, mode: str, padding: Sequence[int], *window: Sequence[int]) -> Iterator[Tensor]:
    """Unfold images x into patches (positions, in * kernel) in fp32, `PATCHES` entries at a time.

    `window` is the kernel size, stride and dilation. x (images, in, *size) or (in, *size), of any number of dimensions.
    """
    kernel = window[0]
    x = x if x.ndim == len(kernel) + 2 else x.unsqueeze(0)
    entries = x.shape[1] * math.prod(kernel)
    at_once = max(1, PATCHES // max(1, x[0, 0].numel() // math.prod(window[1]) * entries))
    for images in torch.split(x, at_once):
        padded = F.pad(images.float(), padding, mode=mode)
        windows = _windows(padded, *window)
        row = windows[0, 0].numel()  # of positions, along the first axis of the output
        for rows in torch.split(windows, max(1, PATCHES // max(1, row * len(images))), 1):
            yield rows.reshape(-1, entries)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view (images, *positions, in, *kernel) of x (images, in, *size)."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return x.movedim(1, len(kernel) + 1)


def _inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    padding = module._reversed_padding_repeated_twice
    return patches(x, pad_mode(module), padding, module.kernel_size, module.stride, module.dilation)


def image_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    g = g if len(shape) == len(module.kernel_size) + 2 else g.unsqueeze(0)
    yield g.float().flatten(2).transpose(1, 2).flatten(0, 1)


def _outputs(output: Tensor, counted: int) -> int:
    return counted


def image_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    # one image of SIDE^2 output positions, and no smaller than the kernel, which may lack padding
    windows = zip(SIDES[len(dense.stride)], dense.stride, dense.dilation, dense.kernel_size, strict=True)
    return (1, dense.in_channels, *(max(n * s, d * (k - 1) + 1) for n, s, d, k in windows))


CONV2D_CHANNEL = Kind(
    name="conv2d-channel",
    since=1,
    matches=_is_conv2d,
    weight_axes=4,
    matrix_shape=_shape,
    to_matrix=_matrix,
    to_weight=_weight,
    to_matrices=_matrices,
    to_weights=_factors,
    build=_build,
    build_pivoted=_build,
    build_dense=dense_conv,
    fan_in=fan_in,
    inputs=_inputs,
    gradients=image_gradients,
    outputs=_outputs,
    sample_input=image_sample,
    sides=_sides,
    takes_tokens=False,
    no_form=explain_groups,
)
CONV1D_CHANNEL = replace(CONV2D_CHANNEL, name="conv1d-channel", matches=_is_conv1d, weight_axes=3, since=2)
CONV3D_CHANNEL = replace(CONV2D_CHANNEL, name="conv3d-channel", matches=_is_conv3d, weight_axes=5, since=2)
CHANNEL_KINDS = {1: CONV1D_CHANNEL, 2: CONV2D_CHANNEL, 3: CONV3D_CHANNEL}  # by dimensions
