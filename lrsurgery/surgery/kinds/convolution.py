"""Convolutions by the channel scheme: kh x kw to r channels, then 1 x 1; and what the spatial scheme has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.kinds.common import AUTO, CHANNEL, fan_in, on_meta
from lrsurgery.surgery.layers import Dense, FactorisedConv2d, FactorisedLayer, Kind

PATCHES = 1 << 24  # entries of unfolded patches at a time: 64 MB
SIDE = 16  # height and width of a convolution's output when it is timed


def _is_channel(module: nn.Module, conv: str) -> bool:
    return type(module) is nn.Conv2d and (conv in (AUTO, CHANNEL) or module.kernel_size == (1, 1))


def explain_groups(module: Dense) -> str | None:
    if module.groups == 1:
        return None
    return "depthwise convolution" if module.groups == module.in_channels else "grouped convolution"


def _channel_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _channel_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _channel_weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    assert isinstance(layer, FactorisedConv2d)
    return matrix.reshape(-1, layer.in_channels, *layer.kernel_size)


def _channel_matrices(u: Tensor, v: Tensor) -> Factors:
    return Factors(u.flatten(1), v.flatten(1))


def _channel_factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    v = factors.v.reshape(len(factors.v), -1, *dense[2:])  # of fewer inputs where some are pivots
    return factors.u[:, :, None, None].contiguous(), v.contiguous()


def _build_channel(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    bias, meta = layer.bias is not None, on_meta(layer)
    v = nn.Conv2d(
        layer.in_channels - (rank if side == "columns" else 0),
        rank,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=bias and side == "rows",
        padding_mode=layer.padding_mode,
        **meta,
    )
    u = nn.Conv2d(rank, layer.out_channels - (rank if side == "rows" else 0), 1, bias=bias, **meta)
    return FactorisedConv2d(CONV2D_CHANNEL, v, u, side)


def _channel_sides(layer: Dense) -> tuple[Side, ...]:
    # pivots among the inputs skip v, so it must not move positions
    padded = layer.padding not in ((0, 0), "valid", "same") if layer.kernel_size == (1, 1) else True
    return ("rows",) if padded or layer.stride != (1, 1) else ("rows", "columns")


def dense_conv2d(layer: FactorisedLayer, stride: tuple[int, int], padding: Any, dilation: tuple[int, int]) -> nn.Module:
    assert isinstance(layer, FactorisedConv2d)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride,
        padding,
        dilation,
        bias=layer.bias is not None,
        padding_mode=layer.v.padding_mode,  # type: ignore[arg-type]
        **on_meta(layer.u),
    )


def _dense_channel(layer: FactorisedLayer) -> nn.Module:
    v: Dense = layer.v
    return dense_conv2d(layer, v.stride, v.padding, v.dilation)


def pad_mode(module: Dense) -> str:
    return "constant" if module.padding_mode == "zeros" else str(module.padding_mode)


def patches(x: Tensor, mode: str, padding: tuple[int, ...], *window: tuple[int, int]) -> Iterator[Tensor]:
    """Unfold images x into patches (positions, in kh kw) in fp32, some images at a time.

    `window` is the kernel size, stride and dilation.
    """
    kernel, stride, dilation = window
    per_image = x[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1])
    for images in torch.split(x, max(1, PATCHES // max(1, per_image))):
        padded = F.pad(images.float(), padding, mode=mode)
        yield F.unfold(padded, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def _channel_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    padding = module._reversed_padding_repeated_twice
    return patches(x, pad_mode(module), padding, module.kernel_size, module.stride, module.dilation)


def image_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield g.float().flatten(2).transpose(1, 2).flatten(0, 1)


def image_outputs(output: Tensor, counted: int) -> int:
    return output.numel() // output.shape[1]


def image_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    # one image of about SIDE x SIDE output positions, and no smaller than the kernel, which may lack padding
    windows = zip(dense.stride, dense.dilation, dense.kernel_size, strict=True)
    return (1, dense.in_channels, *(max(SIDE * s, d * (k - 1) + 1) for s, d, k in windows))


CONV2D_CHANNEL = Kind(
    name="conv2d-channel",
    matches=_is_channel,
    weight_axes=4,
    matrix_shape=_channel_shape,
    to_matrix=_channel_matrix,
    to_weight=_channel_weight,
    to_matrices=_channel_matrices,
    to_weights=_channel_factors,
    build=_build_channel,
    build_pivoted=_build_channel,
    build_dense=_dense_channel,
    fan_in=fan_in,
    inputs=_channel_inputs,
    gradients=image_gradients,
    outputs=image_outputs,
    sample_input=image_sample,
    sides=_channel_sides,
    takes_tokens=False,
    no_form=explain_groups,
)
