"""Convolutions by the spatial scheme: kh x 1 to r channels, then 1 x kw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.kinds.common import AUTO, SPATIAL, fan_in, on_meta
from lrsurgery.surgery.kinds.convolution import (
    dense_conv,
    explain_groups,
    image_gradients,
    image_sample,
    pad_mode,
    patches,
)
from lrsurgery.surgery.kinds.subclasses import behaves_as
from lrsurgery.surgery.layers import Dense, FactorisedConv2d, FactorisedLayer, Kind


def _is_spatial(module: Dense, conv: str) -> bool:
    splits = conv in (AUTO, SPATIAL) and behaves_as(module, nn.Conv2d)
    return splits and module.groups == 1 and module.kernel_size != (1, 1)


# the matrix of the spatial scheme: (out kw, in kh), rows (o, w), columns (i, h); a bare reshape would mix the axes


def _spatial_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0] * shape[3], shape[1] * shape[2]


def _spatial_matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _spatial_weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    u, v = layer.u.weight, layer.v.weight
    return matrix.reshape(u.shape[0], u.shape[3], v.shape[1], v.shape[2]).permute(0, 2, 3, 1)


def _spatial_matrices(u: Tensor, v: Tensor) -> Factors:
    return Factors(u.squeeze(2).permute(0, 2, 1).flatten(0, 1), v.flatten(1))


def _spatial_factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    out, channels, kh, kw = dense
    rank = factors.v.shape[0]
    u = factors.u.reshape(out, kw, rank).permute(0, 2, 1).unsqueeze(2)
    return u.contiguous(), factors.v.reshape(rank, channels, kh, 1).contiguous()


def _build_spatial(layer: Dense, rank: int) -> FactorisedLayer:
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    # the string "same" pads each axis by its own kernel, so both layers take it
    down, across = (
        (layer.padding,) * 2 if isinstance(layer.padding, str) else ((layer.padding[0], 0), (0, layer.padding[1]))
    )
    common: dict[str, Any] = {"padding_mode": layer.padding_mode, **on_meta(layer)}
    v = nn.Conv2d(layer.in_channels, rank, (kh, 1), (sh, 1), down, (dh, 1), bias=False, **common)
    u = nn.Conv2d(rank, layer.out_channels, (1, kw), (1, sw), across, (1, dw), bias=layer.bias is not None, **common)
    return FactorisedConv2d(CONV2D_SPATIAL, v, u)


def _horizontal_stride(module: Dense) -> int:
    # in a factorised layer, u has the horizontal stride
    u: Dense = module.u if isinstance(module, FactorisedLayer) else module
    return int(u.stride[1])


def _spatial_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    # v is a kh x 1 convolution: no horizontal window, stride or padding
    _, _, top, bottom = module._reversed_padding_repeated_twice
    window = ((side[0], 1) for side in (module.kernel_size, module.stride, module.dilation))
    return patches(x, pad_mode(module), (0, 0, top, bottom), *window)


def _spatial_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    return image_gradients(module, shape, _spread(module, shape, g.float()), mask)


def _spread(module: Dense, shape: torch.Size, g: Tensor) -> Tensor:
    """Gradients (images, out kw, height, width in) at the summands of a spatial layer's outputs.

    The layer's matrix maps (in, kh) to (out, kw) at each position of a row; an output is the sum of kw such values.
    That sum is a convolution with ones, whose backward pass distributes the output gradients over the summands.
    """
    (kw, sw, dw), out = (module.kernel_size[1], module.stride[1], module.dilation[1]), g.shape[1]
    left, right = module._reversed_padding_repeated_twice[:2]
    ones = torch.eye(kw, device=g.device).reshape(1, kw, 1, kw).repeat(out, 1, 1, 1)
    with torch.enable_grad():
        parts = torch.zeros(len(g), out * kw, g.shape[2], shape[-1], device=g.device, requires_grad=True)
        padded = F.pad(parts, (left, right, 0, 0), mode=pad_mode(module))
        sums = F.conv2d(padded, ones, stride=(1, sw), dilation=(1, dw), groups=out)
    return torch.autograd.grad(sums, parts, g)[0]


def _outputs(output: Tensor, counted: int) -> int:
    return output.numel() // output.shape[-3]


CONV2D_SPATIAL = Kind(
    name="conv2d-spatial",
    since=1,
    matches=_is_spatial,
    weight_axes=4,
    matrix_shape=_spatial_shape,
    to_matrix=_spatial_matrix,
    to_weight=_spatial_weight,
    to_matrices=_spatial_matrices,
    to_weights=_spatial_factors,
    build=_build_spatial,
    build_dense=dense_conv,
    fan_in=fan_in,
    inputs=_spatial_inputs,
    gradients=_spatial_gradients,
    outputs=_outputs,
    sample_input=image_sample,
    v_per_u=_horizontal_stride,
    takes_tokens=False,
    no_form=explain_groups,
)
