"""Lookup tables of tokens: u (vocabulary, r) is looked up, and v (r, d) makes rows of d out of its rows of r.

A head that is tied to such a table has the same tensors: as a linear layer, v maps d inputs to r and u maps those to
the vocabulary. Pivots are columns: r of the d columns are looked up in u as they are, and v mixes the others of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Side, put
from lrsurgery.surgery.kinds.common import (
    copy_as,
    fan_in,
    keep,
    keep_factors,
    keep_matrix,
    on_meta,
    shape_of_matrix,
    token_gradients,
    token_outputs,
)
from lrsurgery.surgery.layers import Dense, FactorisedLayer, Kind


class Projection(nn.Module):
    """x @ weight, weight (r, d): the reverse of the linear layer that the v of a tied head is."""

    def __init__(self, rank: int, columns: int, *, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, columns, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class FactorisedEmbedding(FactorisedLayer):
    """A factorised `nn.Embedding`, or a subclass whose rows are multiples of those of its weight: `u`, then `v`.

    `u` is of the class of the dense layer and does what that does beside the lookup, such as scaling.
    """

    if TYPE_CHECKING:
        u: nn.Embedding  # type: ignore[assignment]
        v: Projection  # type: ignore[assignment]
    axis = -1

    def forward(self, x: Tensor) -> Tensor:
        kept = self.u(x)
        if self.order is None:
            return self.v(kept)  # type: ignore[no-any-return]
        return put(torch.cat([kept, self.v(kept)], -1), self.order, -1)

    @property
    def bias(self) -> None:
        return None

    @property
    def num_embeddings(self) -> int:
        return self.u.num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, count: int) -> None:
        # transformers sets it after `resize_token_embeddings`
        self.u.num_embeddings = count

    @property
    def embedding_dim(self) -> int:
        return self.v.weight.shape[1] + (self.rank if self.side is not None else 0)

    @property
    def padding_idx(self) -> int | None:
        return self.u.padding_idx

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{self._form_repr()}"


def with_rows(table: nn.Embedding, rows: Tensor) -> nn.Embedding:
    """A table of the same class and settings with another weight (vocabulary, any length)."""
    made: nn.Embedding = copy_as(table, type(table), {"weight": nn.Parameter(rows)})
    del made._parameters["bias"]
    made.num_embeddings, made.embedding_dim = rows.shape
    made._buffers, made._non_persistent_buffers_set = dict(table._buffers), set(table._non_persistent_buffers_set)
    return made


def _is_table(module: nn.Module, conv: str) -> bool:
    if not isinstance(module, nn.Embedding) or len(module._parameters) > 1 or module._modules:
        return False
    return type(module) is nn.Embedding or _is_linear_in_rows(module)


def _is_linear_in_rows(table: nn.Embedding) -> bool:
    """Whether what a subclass gives for W Q is what it gives for W, times Q: then u may be looked up in W's place."""
    generator = torch.Generator().manual_seed(0)
    weight, turn = (torch.randn(shape, generator=generator) for shape in ((7, 3), (3, 2)))
    tokens = torch.tensor([[0, 3, 6]])
    try:
        with torch.no_grad():
            one, other = (_on_cpu(with_rows(table, rows)) for rows in (weight, weight @ turn))
            expected, found = one(tokens) @ turn, other(tokens)
        return found.shape == expected.shape and bool(torch.allclose(found, expected, atol=1e-5))
    except Exception:  # the code of a class of another library raises anything on other inputs than its own
        return False


def _on_cpu(table: nn.Embedding) -> nn.Embedding:
    table.padding_idx = None
    for name, buffer in table._buffers.items():
        if buffer is not None and buffer.is_meta:
            table._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype)
    return table.eval()


def _explain(table: Dense) -> str | None:
    return "embedding that renormalises its rows (max_norm)" if table.max_norm is not None else None


def _build(table: Dense, rank: int, side: Side | None = None) -> FactorisedLayer:
    (rows, columns), meta = table.weight.shape, on_meta(table)
    u = with_rows(table, torch.empty(rows, rank, **meta))
    v = Projection(rank, columns - (rank if side is not None else 0), **meta)
    return FactorisedEmbedding(EMBEDDING, v, u, side)


def _sides(table: Dense) -> tuple[Side, ...]:
    return ("columns",)  # pivots among the rows would be tokens whose rows are of another length


def _build_dense(layer: FactorisedLayer) -> nn.Module:
    assert isinstance(layer, FactorisedEmbedding)
    return with_rows(layer.u, torch.empty(layer.num_embeddings, layer.embedding_dim, **on_meta(layer.u)))


def _tokens(module: Dense, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    yield x[mask] if mask is not None else x.reshape(-1)


def _sample(table: Dense, positions: int) -> tuple[int, ...]:
    return (positions,)


EMBEDDING = Kind(
    name="embedding",
    matches=_is_table,
    weight_axes=2,
    matrix_shape=shape_of_matrix,
    to_matrix=keep,
    to_weight=keep_matrix,
    to_matrices=Factors,
    to_weights=keep_factors,
    build=_build,
    build_pivoted=_build,
    sides=_sides,
    build_dense=_build_dense,
    fan_in=fan_in,
    inputs=_tokens,
    gradients=token_gradients,
    outputs=token_outputs,
    sample_input=_sample,
    no_form=_explain,
    lookup=True,
)
