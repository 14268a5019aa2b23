"""Transposed convolutions of 1 and 2 dimensions: a kernel of 1 to r channels, then the transposed kernel.

The matrix (out * kernel, in) is applied at each position of the input, and its outputs are added up where they meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side, take
from lrsurgery.surgery.kinds.common import on_meta
from lrsurgery.surgery.kinds.convolution import SIDES, patches
from lrsurgery.surgery.kinds.subclasses import behaves_as
from lrsurgery.surgery.layers import Dense, FactorisedConv, FactorisedLayer, Kind


class FactorisedConvTranspose(FactorisedConv):
    """A factorised transposed convolution: `v` is a convolution of kernel 1, `u` the transposed one."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.order is None:
            inner = self.v(x)
        else:
            kept, others = take(x, self.order.long(), self.axis).tensor_split([self.rank], self.axis)
            inner = kept + self.v(others)
        return self.u(inner) if output_size is None else self.u(inner, output_size)  # type: ignore[no-any-return]

    @property
    def output_padding(self) -> tuple[int, ...]:
        return tuple(self.u.output_padding)


class FactorisedConvTranspose1d(FactorisedConvTranspose):
    """A factorised `nn.ConvTranspose1d`; see `FactorisedConvTranspose`."""

    axis = -2


class FactorisedConvTranspose2d(FactorisedConvTranspose):
    """A factorised `nn.ConvTranspose2d`; see `FactorisedConvTranspose`."""

    axis = -3


CLASSES: dict[int, tuple[Any, Any, type[FactorisedConvTranspose]]] = {  # by dimensions
    1: (nn.Conv1d, nn.ConvTranspose1d, FactorisedConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, FactorisedConvTranspose2d),
}


def _is_1d(module: nn.Module, conv: str) -> bool:
    return behaves_as(module, nn.ConvTranspose1d)


def _is_2d(module: nn.Module, conv: str) -> bool:
    return behaves_as(module, nn.ConvTranspose2d)


def _explain_groups(module: Dense) -> str | None:
    if module.groups == 1:
        return None
    return f"{'depthwise' if module.groups == module.in_channels else 'grouped'} transposed convolution"


def _shape(shape: torch.Size) -> tuple[int, int]:
    return shape[1:].numel(), shape[0]


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).T


def _weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    assert isinstance(layer, FactorisedConvTranspose)
    return matrix.T.reshape(layer.in_channels, -1, *layer.kernel_size)


def _matrices(u: Tensor, v: Tensor) -> Factors:
    return Factors(u.flatten(1).T, v.flatten(1))


def _factors(factors: Factors, dense: torch.Size) -> tuple[Tensor, Tensor]:
    u, v = factors.u.T.reshape(-1, *dense[1:]), factors.v
    return u.contiguous(), v.reshape(*v.shape, *(1 for _ in dense[2:])).contiguous()


def _build(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    dimensions, meta = layer.weight.ndim - 2, on_meta(layer)
    conv, transposed, factorised = CLASSES[dimensions]
    v = conv(layer.in_channels - (rank if side else 0), rank, 1, bias=False, **meta)
    u = transposed(rank, layer.out_channels, bias=layer.bias is not None, **_settings(layer), **meta)
    return factorised(TRANSPOSED_KINDS[dimensions], v, u, side)


def _build_dense(layer: FactorisedLayer) -> nn.Module:
    assert isinstance(layer, FactorisedConvTranspose)
    transposed = CLASSES[len(layer.kernel_size)][1]
    settings, bias = _settings(layer), layer.bias is not None
    dense: nn.Module = transposed(layer.in_channels, layer.out_channels, bias=bias, **settings, **on_meta(layer.u))
    return dense


def _settings(layer: Dense) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _sides(layer: Dense) -> tuple[Side, ...]:
    return ("columns",)  # an output is a sum of several rows


def _fan_in(shape: torch.Size) -> int:
    return shape[0] * shape[2:].numel()  # at stride 1


def _inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    x = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
    yield x.float().flatten(2).transpose(1, 2).flatten(0, 1)


def _gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The gradients (positions of the input, out * kernel) at the summands of the outputs."""
    g = g if len(shape) == len(module.kernel_size) + 2 else g.unsqueeze(0)
    padding: list[int] = []
    settings = zip(module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    sizes = zip(shape[-len(module.kernel_size) :], g.shape[2:], strict=True)
    for (k, s, p, d), (positions, outputs) in zip(settings, sizes, strict=True):
        reached = (positions - 1) * s + d * (k - 1) + 1  # of the outputs before they are cropped or padded
        padding = [p, reached - outputs - p, *padding]  # of the last axis first
    return patches(g, "constant", padding, module.kernel_size, module.stride, module.dilation)


def _outputs(output: Tensor, counted: int) -> int:
    return counted


def _sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (1, dense.in_channels, *SIDES[len(dense.kernel_size)])


CONV_TRANSPOSE2D = Kind(
    name="conv-transpose2d-channel",
    matches=_is_2d,
    weight_axes=4,
    matrix_shape=_shape,
    to_matrix=_matrix,
    to_weight=_weight,
    to_matrices=_matrices,
    to_weights=_factors,
    build=_build,
    build_pivoted=_build,
    build_dense=_build_dense,
    fan_in=_fan_in,
    inputs=_inputs,
    gradients=_gradients,
    outputs=_outputs,
    sample_input=_sample,
    sides=_sides,
    takes_tokens=False,
    no_form=_explain_groups,
    u_turned=True,
)
CONV_TRANSPOSE1D = replace(CONV_TRANSPOSE2D, name="conv-transpose1d-channel", matches=_is_1d, weight_axes=3)
TRANSPOSED_KINDS = {1: CONV_TRANSPOSE1D, 2: CONV_TRANSPOSE2D}  # by dimensions
