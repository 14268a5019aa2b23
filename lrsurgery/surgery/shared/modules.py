"""Linear layers with the same input that share one `v`: y_i = u_i(v(x)), v computed once.

The first of a group stores `v`; the others have it as a property, so state dicts hold it once. A group is pivoted on
the side of the rows: `v` gives r of the outputs of all its layers, and u_i makes the others of layer i from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.factors import Factors, working_dtype
from lrsurgery.linalg.pivot import Pivoted, inverse_of, put
from lrsurgery.surgery.layers import Dense, FactorisedLayer, FactorisedLinear, Kind, Spec, outline, plain


class SharedLinear(FactorisedLinear):
    """A layer of a group; see `FactorisedLayer`.

    Attributes: `group`, the layers of the group, of which the first stores `v`; `start` and `own`, the pivots among
    v's outputs that are outputs of this layer: y[order] = cat(h[start : start + own], u(h)), h = v(x).
    """

    group: tuple[SharedLinear, ...]
    _last: _Call | None = None

    def __init__(self, layout: Kind, u: nn.Module, pivots: tuple[int, int] | None, rank: int) -> None:
        nn.Module.__init__(self)
        self.layout, self.rank, self.group = layout, rank, (self,)
        self.u = u  # type: ignore[assignment]
        self.set_pivots(pivots, None)
        if pivots is not None:
            self.order = torch.empty(self.out_features, dtype=torch.int32, device=self.u.weight.device)

    def set_pivots(self, pivots: tuple[int, int] | None, order: Tensor | None) -> None:
        """Tell which of v's outputs are the layer's own, and its order; None for the balanced form."""
        self.side = None if pivots is None else "rows"
        self.start, self._own = pivots or (0, 0)
        self.register_buffer("order", order)

    @property
    def v(self) -> nn.Linear:  # type: ignore[override]
        return self.leader._modules["v"]  # type: ignore[return-value]

    @property
    def leader(self) -> SharedLinear:
        """The layer of the group that stores `v`."""
        return self.group[0]

    @property
    def own(self) -> int:
        return self._own

    @property
    def spec(self) -> Spec:
        """As of any layer; `surgery.apply.specs_of` adds the name of the leader."""
        return Spec(self.kind, self.rank, self.side, pivots=None if self.side is None else (self.start, self.own))

    def forward(self, x: Tensor) -> Tensor:
        kept = self._apply_v(x)
        if self.order is None:
            return self.u(kept)  # type: ignore[no-any-return]
        return put(torch.cat([kept[..., self.start : self.start + self.own], self.u(kept)], -1), self.order, -1)

    def _apply_v(self, x: Tensor) -> Tensor:
        """v(x), computed once for the layers of the group that are called with this x one after the other."""
        leader = self.group[0]
        state = _state_of(leader.v, x)
        if state is None:
            return leader.v(x)  # type: ignore[no-any-return]
        last = leader._last
        if last is not None and last.serves(self, x, state):
            if not last.waiting:
                leader.__dict__["_last"] = None
            return last.output
        output: Tensor = leader.v(x)
        others = {id(layer) for layer in self.group if layer is not self}
        leader.__dict__["_last"] = _Call(leader, x, output, state, others)
        return output

    @property
    def factors(self) -> Factors:
        u, v = self.layout.to_matrices(plain(self.u.weight), plain(self.v.weight))
        if self.order is None:
            return Factors(u, v)
        one = torch.eye(self.rank, dtype=u.dtype, device=u.device)[self.start : self.start + self.own]
        return Factors(torch.cat([one, u])[inverse_of(self.order)], v)

    @property
    def pivoted(self) -> Pivoted:
        raise AttributeError("the pivots of a group are of all its layers together")

    @property
    def matrix(self) -> Tensor:
        u, v = self.factors
        return u @ v

    def wide_matrix(self) -> Tensor:
        wide = working_dtype(outline(self.u.weight).dtype)
        u, v = (factor.detach().to(wide) for factor in self.factors)
        return u @ v

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, v of {len(self.group)} layers"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a call belongs to no copy

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise SurgeryError("nn.DataParallel cannot replicate layers that share one v; use DistributedDataParallel")


class _Call:
    """A call of v: a weak reference to its input, its output, and the layers of the group that have not used it."""

    def __init__(self, leader: SharedLinear, x: Tensor, output: Tensor, state: _State, waiting: set[int]) -> None:
        owner = weakref.ref(leader)

        def forget(gone: object) -> None:  # an output nobody will ask for would keep its graph alive
            layer = owner()
            if layer is not None and layer._last is not None and layer._last.x is gone:
                layer.__dict__["_last"] = None

        self.x = weakref.ref(x, forget)
        self.output, self.version = output, _version(output)
        self.state, self.waiting = state, waiting

    def serves(self, layer: SharedLinear, x: Tensor, state: _State) -> bool:
        """Whether a layer that is called with x may use the output; once only, as its own call would be another."""
        if id(layer) not in self.waiting or self.x() is not x or self.output._version != self.version:
            return False
        if state[0] != self.state[0] or any(a is not b for a, b in zip(state[1], self.state[1], strict=True)):
            return False
        self.waiting.discard(id(layer))
        return True


# numbers that an output depends on; v and its parameters
_State = tuple[tuple[object, ...], tuple[object, ...]]


def _state_of(v: nn.Module, x: Tensor) -> _State | None:
    """What the output of v depends on besides the values of x; None where it may not be used again.

    Inference tensors have no versions, so a change in place could not be seen.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or torch.is_inference_mode_enabled():
        return None
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    # by name where they are known: walking the modules takes most of the time of all this
    parameters = (v.weight, v.bias)[: 1 if v.bias is None else 2] if type(v) is nn.Linear else tuple(v.parameters())
    if x.is_inference() or any(p.is_inference() for p in parameters):
        return None
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    versions = (x._version, *(p._version for p in parameters))
    return (torch.is_grad_enabled(), autocast, v.training, len(parameters), *versions), (v, *parameters)


def _version(output: Tensor) -> int:
    return 0 if output.is_inference() else output._version


def build_shared(kind: Kind, dense: Dense, spec: Spec, *, leads: bool) -> SharedLinear:
    """Build a layer of a group for a dense one, on the meta device; `join` makes the group."""
    rows, columns = kind.matrix_shape(dense.weight.shape)
    has_bias, meta = dense.bias is not None, {"device": "meta", "dtype": dense.weight.dtype}
    own = 0 if spec.pivots is None else spec.pivots[1]
    u = nn.Linear(spec.rank, rows - own, bias=has_bias, **meta)
    layer = SharedLinear(kind, u, spec.pivots, spec.rank)
    if leads:
        layer._modules["v"] = nn.Linear(columns, spec.rank, bias=has_bias and spec.pivots is not None, **meta)
    return layer


def join(layers: Sequence[SharedLinear]) -> None:
    """Make a group of layers, of which the first stores `v`."""
    group = tuple(layers)
    for layer in group:
        layer.group = group


def groups_of(model: nn.Module) -> Iterator[tuple[SharedLinear, ...]]:
    """The groups of a model, in its order."""
    for module in model.modules():
        if isinstance(module, SharedLinear) and module.leader is module:
            yield module.group


def is_led(layer: FactorisedLayer) -> bool:
    """Whether another layer stores the v of this one."""
    return isinstance(layer, SharedLinear) and layer.leader is not layer
