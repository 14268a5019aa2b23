"""The rows of a plan: a layer to factorise, alone or with others that share its v, and a layer that stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lrsurgery.linalg.pivot import Side
from lrsurgery.linalg.weighted import Metric
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.layers import Kind, Spec
from lrsurgery.surgery.ranks import RankSpec, break_even_rank, multiple_for, rank_within
from lrsurgery.surgery.tables.order import order_metric

MOST_ROWS = 32768  # of a whole moment of output gradients: 4 GB in fp32


@dataclass(frozen=True)
class Joint:
    """A layer's part in a group that shares its inputs and one v."""

    names: tuple[str, ...]  # of the group; the first stores v
    rows: int  # of all its layers together
    # start and number of the layer's pivots among v's outputs; before they are chosen, in proportion to its rows
    pivots: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Replacement:
    """A layer to factorise. `rank` is None until the policy has the singular values."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the dense weight
    rows: int
    columns: int
    rank: int | None
    bias: int  # parameters of the bias, which does not change
    v_per_u: int = 1  # output positions of v per output position of u: the horizontal stride of a conv2d-spatial layer
    predicted_loss: float | None = None  # predicted increase of the loss (nats); None without Fisher statistics
    side: Side | None = None  # of the pivots, if it gets any below full rank
    others: tuple[Replacement, ...] = ()  # the same layer by other convolution schemes, of which one is taken
    joint: Joint | None = None  # None for a layer with its own v
    tied: tuple[tuple[str, str], ...] = ()  # (name, kind) of the layers with the same weight, which become its factors
    groups: int = 1  # of a grouped convolution, each with its own matrix (rows, columns)
    folded: int = 0  # parameters, beside as many as the weight has, that its weight is computed from
    by_order: bool = False  # a table whose frequent tokens come first, as a tokenizer has them
    active: int = 1  # of the matrices of fused experts, how many work on one token

    reason = None

    @property
    def options(self) -> tuple[Replacement, ...]:
        """The layer by each scheme."""
        return (replace(self, others=()), *self.others)

    @property
    def undecided(self) -> bool:
        """Whether singular values decide its rank or its scheme."""
        return self.rank is None or bool(self.others)

    @property
    def watched(self) -> tuple[Replacement, ...]:
        """What calibration collects for the layer: each scheme, and each use of a weight that others have, too."""
        uses = (replace(self, name=name, kind=kind, tied=((self.name, self.kind),)) for name, kind in self.tied)
        return (*self.options, *uses)

    @property
    def prior(self) -> Metric | None:
        """The metric without calibration; None for plain SVD, also where the singular values still decide the rank."""
        return order_metric(self.rows) if self.by_order and self.rank is not None else None

    @property
    def diagonal(self) -> bool:
        """Whether of the moment of its output gradients the diagonal alone is kept: a vocabulary has too many rows."""
        return self.layout.lookup or bool(self.tied) or self.rows > MOST_ROWS

    @property
    def specs(self) -> dict[str, Spec]:
        """What the layer becomes at a known rank, with those that have the same weight."""
        assert self.rank is not None
        others = {name: Spec(kind, self.rank, self.pivots, tied_to=self.name) for name, kind in self.tied}
        return {self.name: self.spec, **others}

    @property
    def layout(self) -> Kind:
        return KINDS[self.kind]

    @property
    def full_rank(self) -> int:
        return min(self.rows if self.joint is None else self.joint.rows, self.columns)

    @property
    def leads(self) -> bool:
        """Whether it stores a v that others share."""
        return self.joint is not None and self.joint.names[0] == self.name

    @property
    def spec(self) -> Spec:
        """What it becomes, at a known rank."""
        return self.spec_with(None if self.joint is None or not self.pivots else self.joint.pivots)

    def with_pivots(self, pivots: tuple[int, int] | None) -> Replacement:
        """The row of a layer that shares its v, with the pivots that were chosen."""
        assert self.joint is not None
        return self if pivots is None else replace(self, joint=replace(self.joint, pivots=pivots))

    def spec_with(self, pivots: tuple[int, int] | None) -> Spec:
        """What it becomes, with these of the pivots of its group."""
        assert self.rank is not None
        v_of = None if self.joint is None or self.leads else self.joint.names[0]
        return Spec(self.kind, self.rank, self.pivots, v_of, pivots, self.groups)

    @property
    def matrices(self) -> int:
        """How many matrices (rows, columns) it has, at one rank: one for each group, or for each of fused experts."""
        return self.shape[0] if self.layout.stacked else self.groups

    @property
    def at_work(self) -> int:
        """How many of its matrices work on one token or output position: those of all groups, of experts some."""
        return self.active if self.layout.stacked else self.groups

    @property
    def parameters(self) -> int:
        return self.matrices * self.rows * self.columns + self.bias + self.folded

    @property
    def factorised_parameters(self) -> int | None:
        return None if self.rank is None else self.cost(self.rank) + self.bias

    def cost(self, rank: int) -> int:
        """Parameters of the factors at a rank; a v that layers share counts for the one that stores it."""
        if self.joint is not None:
            own = self.joint.pivots[1] if self.pivots else 0
            return rank * (self.rows - own + (self.columns if self.leads else 0))
        pivots = self.side is not None and rank < self.full_rank
        return self.matrices * rank * (self.rows + self.columns - (rank if pivots else 0))

    def multiple_of(self, asked: int | None) -> int:
        """What its rank is a multiple of, where one of `asked` is; see `multiple_for`."""
        return multiple_for(asked, self.full_rank, self.layout.multiple_of)

    def rank_by(self, spec: RankSpec, values: Tensor | None = None) -> int:
        """Its rank by the policies of `spec`, which may need its singular values (full rank,)."""
        pivoted, multiple_of = self.side is not None, self.layout.multiple_of
        return spec.rank_of(self.name, self.rows, self.columns, values, pivoted=pivoted, multiple_of=multiple_of)

    def rank_within(self, parameters: int, multiple_of: int = 1) -> int:
        """The largest rank whose factors have at most so many parameters, and fewer than the weight; 0 for none."""
        pivoted = self.side is not None
        most = rank_within(parameters // self.matrices, self.rows + self.columns, 1 if pivoted else 0)
        most = min(most, break_even_rank(self.rows, self.columns, pivoted=pivoted), self.full_rank)
        return most // multiple_of * multiple_of

    @property
    def pivots(self) -> Side | None:
        """The side of its pivots at its rank; None for the balanced form."""
        return self.side if self.rank is not None and self.rank < self.full_rank else None

    @property
    def products(self) -> int:
        """How many layers apply the matrix as a product: of a table that is looked up, the heads tied to it."""
        kinds = (self.layout, *(KINDS[kind] for _, kind in self.tied))
        return sum(not kind.lookup for kind in kinds)

    @property
    def lookups(self) -> int:
        return 1 + len(self.tied) - self.products

    @property
    def flops(self) -> int:
        """FLOPs per token, or per output position of a convolution; a multiply-add counts 2."""
        return 2 * self.at_work * self.products * self.rows * self.columns

    @property
    def factorised_flops(self) -> int | None:
        if self.joint is not None and self.rank is not None:
            return 2 * self.cost(self.rank)
        return None if self.rank is None else self.flops_at(self.rank)

    def flops_at(self, rank: int) -> int:
        """FLOPs at a rank; a lookup has the product with v alone. Where the product is formed they are dense."""
        if self.layout.multiplied:
            return self.flops
        pivots = rank if self.side is not None and rank < self.full_rank else 0
        one = self.rows + self.v_per_u * self.columns - pivots
        return 2 * self.at_work * rank * (self.products * one + self.lookups * (self.columns - pivots))


def whole_of(unit: Sequence[Replacement]) -> Replacement:
    """The stacked layer of a group, under the name of its first; a single layer is its own."""
    if len(unit) == 1:
        return unit[0]
    first, rows = unit[0], sum(row.rows for row in unit)
    side: Side | None = "rows" if first.side is not None else None
    return replace(first, rows=rows, bias=sum(row.bias for row in unit), side=side, joint=None)


def join_rows(unit: Sequence[Replacement], rank: int) -> list[Replacement]:
    """The rows of a group at a rank, with the pivots that each has in proportion to its rows."""
    whole, taken, start, joined = whole_of(unit), 0, 0, []
    for row in unit:
        taken += row.rows
        end = rank * taken // whole.rows
        joint = Joint(tuple(each.name for each in unit), whole.rows, (start, end - start))
        joined.append(replace(row, rank=rank, side=whole.side, joint=joint))
        start = end
    return joined


@dataclass(frozen=True)
class Kept:
    """A layer or bare parameter that stays dense, with the reason."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    reason: str
