"""Linear layers, and transformers' Conv1D, whose weight is (in, out)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.kinds.common import (
    fan_in,
    is_one_of,
    keep,
    keep_factors,
    keep_matrix,
    on_meta,
    shape_of_matrix,
    token_gradients,
    token_inputs,
    token_outputs,
)
from lrsurgery.surgery.kinds.subclasses import behaves_as
from lrsurgery.surgery.layers import Dense, FactorisedLayer, FactorisedLinear, Kind, outline

CONV1D_CLASSES = {("transformers.pytorch_utils", "Conv1D")}  # by name, so that the library is not imported


def _is_linear(module: nn.Module, conv: str) -> bool:
    return behaves_as(module, nn.Linear)


def _explain_linear(module: Dense) -> str | None:
    if type(module) is NonDynamicallyQuantizableLinear:
        return "output of nn.MultiheadAttention, which reads its weight and never calls it"
    return None


def _is_conv1d(module: nn.Module, conv: str) -> bool:
    return is_one_of(module, CONV1D_CLASSES)


def _conv1d_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[1], shape[0]


def _transpose(weight: Tensor) -> Tensor:
    return weight.T


def _conv1d_weight(matrix: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrix.T


def _two_linears(kind: Kind, layer: Dense, rank: int, side: Side | None) -> FactorisedLayer:
    out_features, in_features = kind.matrix_shape(layer.weight.shape)
    bias, meta = layer.bias is not None, on_meta(layer)
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
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **on_meta(layer.u))


def _dense_conv1d(layer: FactorisedLayer) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    assert isinstance(layer, FactorisedLinear)
    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features).to(outline(layer.u.weight).dtype)  # type: ignore[no-any-return]


def _conv1d_fan_in(shape: torch.Size) -> int:
    return shape[0]


def _linear_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (positions, shape_of_matrix(dense.weight.shape)[1])


def _conv1d_sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (positions, _conv1d_shape(dense.weight.shape)[1])


LINEAR = Kind(
    name="linear",
    since=1,
    matches=_is_linear,
    weight_axes=2,
    matrix_shape=shape_of_matrix,
    to_matrix=keep,
    to_weight=keep_matrix,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build_linear,
    build_pivoted=_build_linear,
    build_dense=_dense_linear,
    fan_in=fan_in,
    inputs=token_inputs,
    gradients=token_gradients,
    outputs=token_outputs,
    sample_input=_linear_sample,
    sides=_both_sides,
    shares_v=True,
    no_form=_explain_linear,
    plain_product=True,
)
CONV1D = Kind(
    name="conv1d",
    since=1,
    matches=_is_conv1d,
    weight_axes=2,
    matrix_shape=_conv1d_shape,
    to_matrix=_transpose,
    to_weight=_conv1d_weight,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build_conv1d,
    build_pivoted=_build_conv1d,
    build_dense=_dense_conv1d,
    fan_in=_conv1d_fan_in,
    inputs=token_inputs,
    gradients=token_gradients,
    outputs=token_outputs,
    sample_input=_conv1d_sample,
    sides=_both_sides,
    shares_v=True,
)
