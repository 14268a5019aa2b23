"""The kinds of matrices that a module holds: weights of recurrent modules, and stacked projections of attention."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.kinds.common import (
    fan_in,
    keep,
    keep_factors,
    keep_matrix,
    on_meta,
    shape_of_matrix,
    token_gradients,
    token_inputs,
    token_outputs,
)
from lrsurgery.surgery.layers import Dense, FactorisedLayer, Kind
from lrsurgery.surgery.parameters.matrix import DenseMatrix, FactorisedMatrix, MatrixWeight


def _is_recurrent(module: nn.Module, conv: str) -> bool:
    return isinstance(module, DenseMatrix) and module.recurrent


def _is_projection(module: nn.Module, conv: str) -> bool:
    return isinstance(module, DenseMatrix) and not module.recurrent


def _both_sides(layer: Dense) -> tuple[Side, ...]:
    return ("rows", "columns")


def _build(layer: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    kind = RECURRENT if layer.recurrent else IN_PROJ
    (rows, columns), meta = layer.weight.shape, on_meta(layer)
    v = MatrixWeight(rank, columns - (rank if side == "columns" else 0), **meta)
    u = MatrixWeight(rows - (rank if side == "rows" else 0), rank, **meta)
    return FactorisedMatrix(kind, v, u, side)


def _build_dense(layer: FactorisedLayer) -> nn.Module:
    whole = MatrixWeight(*layer.matrix_shape, **on_meta(layer.u))
    return DenseMatrix(whole.weight, recurrent=layer.kind == RECURRENT.name)


def _sample(dense: Dense, positions: int) -> tuple[int, ...]:
    return (positions, dense.weight.shape[1])


RECURRENT = Kind(
    name="recurrent",
    matches=_is_recurrent,
    weight_axes=2,
    matrix_shape=shape_of_matrix,
    to_matrix=keep,
    to_weight=keep_matrix,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build,
    build_pivoted=_build,
    build_dense=_build_dense,
    fan_in=fan_in,
    inputs=token_inputs,
    gradients=token_gradients,
    outputs=token_outputs,
    sample_input=_sample,
    sides=_both_sides,
    parameter=True,
    multiplied=True,
)
IN_PROJ = replace(RECURRENT, name="in-proj", matches=_is_projection)
