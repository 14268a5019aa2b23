"""The table of kinds. No module outside this folder distinguishes kinds.

To add a kind, write its functions in a file of its family and add it to `KINDS`; the first that matches a module wins.
"""

from __future__ import annotations

from torch import nn

from lrsurgery.errors import PlanError
from lrsurgery.surgery.experts.kind import EXPERTS, TRANSPOSED
from lrsurgery.surgery.kinds.common import AUTO, CHANNEL, CONV_SCHEMES, SPATIAL
from lrsurgery.surgery.kinds.convolution import CONV1D_CHANNEL, CONV2D_CHANNEL, CONV3D_CHANNEL
from lrsurgery.surgery.kinds.folds import BASES, explain_fold, plain_of
from lrsurgery.surgery.kinds.linear import CONV1D, LINEAR
from lrsurgery.surgery.kinds.spatial import CONV2D_SPATIAL
from lrsurgery.surgery.kinds.subclasses import explain_subclass
from lrsurgery.surgery.kinds.transposed import CONV_TRANSPOSE1D, CONV_TRANSPOSE2D
from lrsurgery.surgery.layers import Kind
from lrsurgery.surgery.parameters.kind import IN_PROJ, RECURRENT
from lrsurgery.surgery.tables.embedding import EMBEDDING

__all__ = [
    "AUTO",
    "CHANNEL",
    "CONV_SCHEMES",
    "KINDS",
    "SPATIAL",
    "check_conv",
    "explain_no_kind",
    "kind_of",
    "kinds_of",
]

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(LINEAR, CONV1D, EMBEDDING),
        *(CONV1D_CHANNEL, CONV2D_CHANNEL, CONV2D_SPATIAL, CONV3D_CHANNEL),
        *(CONV_TRANSPOSE1D, CONV_TRANSPOSE2D),
        *(EXPERTS, TRANSPOSED),
        *(RECURRENT, IN_PROJ),
    )
}


def kinds_of(module: nn.Module, conv: str) -> tuple[Kind, ...]:
    """The kinds that a dense module may become by convolution scheme `conv`, several by "auto"."""
    plain = plain_of(module)
    return tuple(kind for kind in KINDS.values() if kind.matches(plain, conv))


def kind_of(module: nn.Module, conv: str = CHANNEL) -> Kind | None:
    """The first of `kinds_of`; None if the module has no factorised form."""
    return next(iter(kinds_of(module, conv)), None)


def check_conv(conv: str) -> None:
    """Raise PlanError that lists the schemes, unless `conv` is one."""
    if conv not in CONV_SCHEMES:
        raise PlanError(f"unknown conv scheme '{conv}'; known: {', '.join(CONV_SCHEMES)}")


def explain_no_kind(module: nn.Module) -> str:
    """Why a module with a weight is of no kind."""
    if (reason := explain_fold(module)) is not None:
        return reason
    for base in BASES:
        if isinstance(module, base):
            return explain_subclass(module, base)
    return f"no factorised form for {type(module).__name__}"
