"""The kinds of layers that can be factorised.

The file is long because it is one table: a kind is one entry, and its functions stand beside it. No other module
distinguishes kinds. To add a kind, write its functions and add an entry to `KINDS`; the first entry that matches a
module wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.errors import PlanError
from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.layers import Dense, FactorisedConv2d, FactorisedLayer, FactorisedLinear, Kind

PATCHES = 1 << 24  # entries of unfolded patches at a time: 64 MB
SIDE = 16  # height and width of a convolution's output when it is timed
CONV_SCHEMES = ("auto", "channel", "spatial")
AUTO, CHANNEL, SPATIAL = CONV_SCHEMES

# classes identified by name, so that neither library is imported
LINEAR_CLASSES = {
    ("timm.layers.linear", "Linear"),  # overrides forward for torchscript only
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),  # x @ W.T, then + b
}
CONV1D_CLASSES = {("transformers.pytorch_utils", "Conv1D")}


def _on_meta(layer: Dense) -> dict[str, Any]:
    return {"device": "meta", "dtype": layer.weight.dtype}


def _is_one_of(module: nn.Module, classes: set[tuple[str, str]]) -> bool:
    return (type(module).__module__, type(module).__qualname__) in classes


# linear layers, and transformers' Conv1D, whose weight is (in, out)


def _is_linear(module: nn.Module, conv: str) -> bool:
    # a subclass may override forward
    return type(module) is nn.Linear or _is_one_of(module, LINEAR_CLASSES)


def _is_conv1d(module: nn.Module, conv: str) -> bool:
    return _is_one_of(module, CONV1D_CLASSES)


def _linear_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1]


def _conv1d_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[1], shape[0]


def _keep(weight: Tensor) -> Tensor:
    return weight


def _transpose(weight: Tensor) -> Tensor:
    return weight.T


def _linear_weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrix


def _conv1d_weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrix.T


def _linear_factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    return factors.u.contiguous(), factors.v.contiguous()


def _two_linears(kind: Kind, layer: Dense, rank: int, side: Side | None) -> FactorisedLayer:
    out_features, in_features = kind.matrix_shape(layer.weight.shape)
    bias, meta = layer.bias is not None, _on_meta(layer)
    more = in_features - (rank if side == "columns" else 0)
    v = nn.Linear(more, rank, bias=bias and side == "rows", **meta)
    u = nn.Linear(rank, out_features - (rank if side == "rows" else 0), bias=bias, **meta)
    return FactorisedLinear(kind, v, u, side)


def _build_linear(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    return _two_linears(LINEAR, layer, rank, side)


def _build_conv1d(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    return _two_linears(CONV1D, layer, rank, side)


def _both_sides(layer: Dense) -> tuple[Side, ...]:
    return ("rows", "columns")


def _dense_linear(layer: FactorisedLayer) -> nn.Module:
    assert isinstance(layer, FactorisedLinear)
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **_on_meta(layer.u))


def _dense_conv1d(layer: FactorisedLayer) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    assert isinstance(layer, FactorisedLinear)
    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features).to(layer.u.weight.dtype)  # type: ignore[no-any-return]


def _linear_fan_in(shape: torch.Size) -> int:
    return shape[1:].numel()


def _conv1d_fan_in(shape: torch.Size) -> int:
    return shape[0]


def _token_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield (x[mask] if mask is not None else x.reshape(-1, x.shape[-1])).float()


def _token_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield (g[mask] if mask is not None else g.reshape(-1, g.shape[-1])).float()


def _token_outputs(output: Tensor, counted: int) -> int:
    return counted


def _linear_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (positions, _linear_shape(dense.weight.shape)[1])


def _conv1d_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (positions, _conv1d_shape(dense.weight.shape)[1])


# convolutions


def _is_channel(module: nn.Module, conv: str) -> bool:
    return type(module) is nn.Conv2d and (conv in (AUTO, CHANNEL) or module.kernel_size == (1, 1))


def _is_spatial(module: nn.Module, conv: str) -> bool:
    return type(module) is nn.Conv2d and conv in (AUTO, SPATIAL) and module.kernel_size != (1, 1)


def _explain_groups(module: Dense) -> str | None:
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
    bias, meta = layer.bias is not None, _on_meta(layer)
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


def _dense_conv2d(
    layer: FactorisedLayer, stride: tuple[int, int], padding: Any, dilation: tuple[int, int]
) -> nn.Module:
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
        **_on_meta(layer.u),
    )


def _dense_channel(layer: FactorisedLayer) -> nn.Module:
    v: Dense = layer.v
    return _dense_conv2d(layer, v.stride, v.padding, v.dilation)


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
    common: dict[str, Any] = {"padding_mode": layer.padding_mode, **_on_meta(layer)}
    v = nn.Conv2d(layer.in_channels, rank, (kh, 1), (sh, 1), down, (dh, 1), bias=False, **common)
    u = nn.Conv2d(rank, layer.out_channels, (1, kw), (1, sw), across, (1, dw), bias=layer.bias is not None, **common)
    return FactorisedConv2d(CONV2D_SPATIAL, v, u)


def _dense_spatial(layer: FactorisedLayer) -> nn.Module:
    u: Dense = layer.u
    v: Dense = layer.v
    padding = v.padding if isinstance(v.padding, str) else (v.padding[0], u.padding[1])
    return _dense_conv2d(layer, (v.stride[0], u.stride[1]), padding, (v.dilation[0], u.dilation[1]))


def _horizontal_stride(module: Dense) -> int:
    # in a factorised layer, u has the horizontal stride
    u: Dense = module.u if isinstance(module, FactorisedLayer) else module
    return int(u.stride[1])


def _pad_mode(module: Dense) -> str:
    return "constant" if module.padding_mode == "zeros" else str(module.padding_mode)


def _patches(x: Tensor, mode: str, padding: tuple[int, ...], *window: tuple[int, int]) -> Iterator[Tensor]:
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
    return _patches(x, _pad_mode(module), padding, module.kernel_size, module.stride, module.dilation)


def _spatial_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    # v is a kh x 1 convolution: no horizontal window, stride or padding
    _, _, top, bottom = module._reversed_padding_repeated_twice
    window = ((side[0], 1) for side in (module.kernel_size, module.stride, module.dilation))
    return _patches(x, _pad_mode(module), (0, 0, top, bottom), *window)


def _image_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield g.float().flatten(2).transpose(1, 2).flatten(0, 1)


def _spatial_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    return _image_gradients(module, shape, _spread(module, shape, g.float()), mask)


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
        padded = F.pad(parts, (left, right, 0, 0), mode=_pad_mode(module))
        sums = F.conv2d(padded, ones, stride=(1, sw), dilation=(1, dw), groups=out)
    return torch.autograd.grad(sums, parts, g)[0]


def _image_outputs(output: Tensor, counted: int) -> int:
    return output.numel() // output.shape[1]


def _image_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    # one image of about SIDE x SIDE output positions, and no smaller than the kernel, which may lack padding
    windows = zip(dense.stride, dense.dilation, dense.kernel_size, strict=True)
    return (1, dense.in_channels, *(max(SIDE * s, d * (k - 1) + 1) for s, d, k in windows))


LINEAR = Kind(
    name="linear",
    matches=_is_linear,
    weight_axes=2,
    matrix_shape=_linear_shape,
    to_matrix=_keep,
    to_weight=_linear_weight,
    to_matrices=Factors,
    to_weights=_linear_factors,
    build=_build_linear,
    build_pivoted=_build_linear,
    build_dense=_dense_linear,
    fan_in=_linear_fan_in,
    inputs=_token_inputs,
    gradients=_token_gradients,
    outputs=_token_outputs,
    sample_input=_linear_sample,
    sides=_both_sides,
    shares_v=True,
    plain_product=True,
)
CONV1D = Kind(
    name="conv1d",
    matches=_is_conv1d,
    weight_axes=2,
    matrix_shape=_conv1d_shape,
    to_matrix=_transpose,
    to_weight=_conv1d_weight,
    to_matrices=Factors,
    to_weights=_linear_factors,
    build=_build_conv1d,
    build_pivoted=_build_conv1d,
    build_dense=_dense_conv1d,
    fan_in=_conv1d_fan_in,
    inputs=_token_inputs,
    gradients=_token_gradients,
    outputs=_token_outputs,
    sample_input=_conv1d_sample,
    sides=_both_sides,
    shares_v=True,
)
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
    fan_in=_linear_fan_in,
    inputs=_channel_inputs,
    gradients=_image_gradients,
    outputs=_image_outputs,
    sample_input=_image_sample,
    sides=_channel_sides,
    takes_tokens=False,
    no_form=_explain_groups,
)
CONV2D_SPATIAL = Kind(
    name="conv2d-spatial",
    matches=_is_spatial,
    weight_axes=4,
    matrix_shape=_spatial_shape,
    to_matrix=_spatial_matrix,
    to_weight=_spatial_weight,
    to_matrices=_spatial_matrices,
    to_weights=_spatial_factors,
    build=_build_spatial,
    build_dense=_dense_spatial,
    fan_in=_linear_fan_in,
    inputs=_spatial_inputs,
    gradients=_spatial_gradients,
    outputs=_image_outputs,
    sample_input=_image_sample,
    v_per_u=_horizontal_stride,
    takes_tokens=False,
    no_form=_explain_groups,
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in (LINEAR, CONV1D, CONV2D_CHANNEL, CONV2D_SPATIAL)}


def kinds_of(module: nn.Module, conv: str) -> tuple[Kind, ...]:
    """The kinds that a dense module may become by convolution scheme `conv`, several by "auto"."""
    return tuple(kind for kind in KINDS.values() if kind.matches(module, conv))


def kind_of(module: nn.Module, conv: str = CHANNEL) -> Kind | None:
    """The first of `kinds_of`; None if the module has no factorised form."""
    return next(iter(kinds_of(module, conv)), None)


def check_conv(conv: str) -> None:
    """Raise PlanError that lists the schemes, unless `conv` is one."""
    if conv not in CONV_SCHEMES:
        raise PlanError(f"unknown conv scheme '{conv}'; known: {', '.join(CONV_SCHEMES)}")


def explain_no_kind(module: nn.Module) -> str:
    """Why a module with a weight is of no kind."""
    name = type(module).__name__
    for base in (nn.Linear, nn.Conv2d):
        if isinstance(module, base):
            return f"unknown subclass {name} of {base.__name__}"
    return f"no factorised form for {name}"
