"""One factorised layer as a server runs it: its tensors as the checkpoint has them, and the product with inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsurgery.errors import SourceError
from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import Pivoted, inverse_of, unpivot
from lrsurgery.surgery.layers import Spec

KINDS = ("linear", "conv1d")  # that servers have as linear layers


@dataclass
class Part:
    """A layer (rows, columns), or one of those that a server merges into one. `spec` None: it is dense."""

    name: str
    rows: int
    columns: int
    spec: Spec | None
    tensors: dict[str, Tensor] = field(default_factory=dict)  # weight, u.weight, v.weight, u.bias, v.bias, order
    places: Tensor | None = None  # int64: of each output among (kept, mixed) for rows, of each input for columns

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor in the files; None where the layer has none of that name."""
        if self.spec is None:
            return (self.rows, self.columns) if name == "weight" else None
        rank, side = self.spec.rank, self.spec.side
        mixed = self.rows - (rank if side == "rows" else 0)
        order = {"rows": self.rows, "columns": self.columns}.get(side or "")
        shapes = {
            "u.weight": (mixed, rank),
            "v.weight": (rank, self.columns - (rank if side == "columns" else 0)),
            "u.bias": (mixed,),
            "v.bias": (rank,) if side == "rows" else None,
            "order": None if order is None else (order,),
        }
        return shapes.get(name)

    def load(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the files. Raises SourceError for one of another shape."""
        if name == "weight" and self.spec is not None and tensor.shape == (0,):
            return  # what stops readers that do not know the format
        wanted = self.shape_of(name)
        if self.spec is not None and self.spec.kind == "conv1d" and name.endswith(".weight"):
            tensor = tensor.t()  # a server's GPT-2 turns all weights of transformers' Conv1D, which factors are not
        if tensor.shape != wanted:
            raise SourceError(f"{self.name}.{name} has shape {tuple(tensor.shape)}, its config says {wanted}")
        self.tensors[name] = tensor.detach().clone()

    def check(self) -> None:
        """Raise SourceError that names a tensor which was not in the files."""
        wanted = ["weight"] if self.spec is None else ["u.weight", "v.weight", *(["order"] if self.spec.side else [])]
        for name in wanted:
            if name not in self.tensors:
                raise SourceError(f"{self.name}.{name} is missing in the weight files")

    def dense_bias(self) -> Tensor | None:
        """The bias (rows,) of the whole layer, in the dense order; None if it has none."""
        bias = self.tensors.get("u.bias")
        if bias is None or self.spec is None or self.spec.side != "rows":
            return bias
        kept = self.tensors["v.bias"]
        return torch.cat([kept, bias + self.tensors["u.weight"] @ kept])[inverse_of(self.tensors["order"])]

    def factors(self) -> Factors:
        """Matrices u (rows, rank), v (rank, columns) of the product, in the balanced form."""
        assert self.spec is not None
        u, v = self.tensors["u.weight"], self.tensors["v.weight"]
        if self.spec.side is None:
            return Factors(u, v)
        kept, mixing = (v, u) if self.spec.side == "rows" else (u, v)
        return unpivot(Pivoted(self.spec.side, self.tensors["order"], kept, mixing))

    def slice_(self, rows: slice | Tensor, columns: slice) -> None:
        """Keep the rows and columns that one process of tensor parallelism has; a pivoted layer gets balanced.

        `rows` are places (int64) where they do not stand together.
        """
        whole = isinstance(rows, slice) and (rows, columns) == (slice(0, self.rows), slice(0, self.columns))
        if self.spec is None:
            self.tensors["weight"] = self.tensors["weight"][rows, columns].contiguous()
        elif not whole:
            u, v = self.factors()
            self.tensors = {"u.weight": u[rows].contiguous(), "v.weight": v[:, columns].contiguous()}
            self.spec = self.spec._replace(side=None)
        elif self.spec.side is not None:
            order = self.tensors.pop("order")
            self.places = inverse_of(order) if self.spec.side == "rows" else order.long()
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not name.endswith("bias")}

    def apply(self, x: Tensor) -> Tensor:
        """The product of inputs (..., columns) with the layer, without its bias."""
        if self.spec is None:
            return linear(x, self.tensors["weight"])
        u, v = self.tensors["u.weight"], self.tensors["v.weight"]
        if self.places is None:
            return linear(linear(x, v), u)
        if self.spec.side == "rows":
            kept = linear(x, v)
            return torch.cat([kept, linear(kept, u)], -1).index_select(-1, self.places)
        kept, others = x.index_select(-1, self.places).tensor_split([self.spec.rank], -1)
        return linear(kept + linear(others, v), u)


def rows_of(sizes: Sequence[int], rank: int, count: int) -> Tensor:
    """The rows (int64) that a process of tensor parallelism has of blocks of these sizes that stand one below another.

    Of queries, keys and values in one matrix, it has its share of each.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat(
        [torch.arange(size // count) + start + size // count * rank for start, size in zip(starts, sizes, strict=True)]
    )
