"""The kinds of banks: weights (experts, out, in), and transposed ones (experts, in, out)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.experts.banks import BankWeight, DenseBank, FactorisedBank
from lrsurgery.surgery.kinds.common import keep, keep_factors, keep_matrix, on_meta, token_outputs
from lrsurgery.surgery.layers import Dense, FactorisedLayer, Kind

MULTIPLE = 8  # of a rank: grouped products take strides of 16 bytes


def _is_bank(module: nn.Module, conv: str) -> bool:
    return isinstance(module, DenseBank) and not module.transposed


def _is_transposed_bank(module: nn.Module, conv: str) -> bool:
    return isinstance(module, DenseBank) and module.transposed


def _shape(shape: torch.Size) -> tuple[int, int]:
    return shape[1], shape[2]


def _transposed_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[2], shape[1]


def _transpose(weight: Tensor) -> Tensor:
    return weight.mT


def _transposed_weight(matrices: Tensor, layer: FactorisedLayer) -> Tensor:
    return matrices.mT


def _build(layer: Dense, rank: int) -> FactorisedLayer:
    kind = TRANSPOSED if layer.transposed else EXPERTS
    experts, (rows, columns) = len(layer.weight), kind.matrix_shape(layer.weight.shape)
    v, u = (BankWeight(*shape, **on_meta(layer)) for shape in ((experts, rank, columns), (experts, rows, rank)))
    return FactorisedBank(kind, v, u, transposed=layer.transposed, active=layer.active)


def _build_dense(layer: FactorisedLayer) -> nn.Module:
    assert isinstance(layer, FactorisedBank)
    weight = nn.Parameter(torch.empty(layer.shape, device="meta", dtype=layer.dtype))
    return DenseBank(weight, transposed=layer.transposed, active=layer.active)


def _fan_in(shape: torch.Size) -> int:
    return shape[2]


def _transposed_fan_in(shape: torch.Size) -> int:
    return shape[1]


def _token_inputs(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    raise AssertionError("experts are watched product by product")


def _token_gradients(module: Dense, shape: torch.Size, g: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    raise AssertionError("experts are watched product by product")


def _sample(dense: Dense, positions: int) -> tuple[int, ...]:
    experts, columns = len(dense.weight), dense.weight.shape[1 if dense.transposed else 2]
    return (experts, max(1, positions * dense.active // experts), columns)


def _active(module: Dense) -> int:
    return int(module.active)


EXPERTS = Kind(
    name="experts",
    matches=_is_bank,
    weight_axes=3,
    matrix_shape=_shape,
    to_matrix=keep,
    to_weight=keep_matrix,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build,
    build_dense=_build_dense,
    fan_in=_fan_in,
    inputs=_token_inputs,
    gradients=_token_gradients,
    outputs=token_outputs,
    sample_input=_sample,
    parameter=True,
    stacked=True,
    active=_active,
    multiple_of=MULTIPLE,
)
TRANSPOSED = Kind(
    name="experts-transposed",
    matches=_is_transposed_bank,
    weight_axes=3,
    matrix_shape=_transposed_shape,
    to_matrix=_transpose,
    to_weight=_transposed_weight,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build,
    build_dense=_build_dense,
    fan_in=_transposed_fan_in,
    inputs=_token_inputs,
    gradients=_token_gradients,
    outputs=token_outputs,
    sample_input=_sample,
    parameter=True,
    stacked=True,
    active=_active,
    multiple_of=MULTIPLE,
)
