"""The products of dense weights that a recurrent or attention module reads itself, seen while a model runs.

An object in the place of the parameter answers the function of torch that the module calls with its weights. It
computes the products of these weights by itself, so that they can be seen, and hands on what the function would have
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from lrsurgery.errors import CalibrationError
from lrsurgery.surgery.parameters.recurrence import run_step_by_layer
from lrsurgery.surgery.parameters.shadow import Shadow, in_front

# inputs (batch, positions, columns), outputs of the product (batch, positions, rows) -> the outputs to go on with
See: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def watch_matrices(holder: nn.Module, seen: Mapping[str, See]) -> Iterator[None]:
    """Show every product of these parameters of a recurrent or attention module within this context."""
    try:
        with in_front(holder, {key: WatchedMatrix(holder, key, see) for key, see in seen.items()}):
            yield
    finally:
        if isinstance(holder, nn.RNNBase):
            holder._init_flat_weights()  # it keeps a list of its weights


class WatchedMatrix(Shadow):
    """What stands before a parameter (rows, columns) in the code of its module."""

    def __init__(self, holder: nn.Module, key: str, see: See) -> None:
        super().__init__(holder, key)
        self.see = see

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.weight, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is F.multi_head_attention_forward and isinstance(args[5], WatchedMatrix):
            return _attend(args, kwargs)
        if func is F.linear and isinstance(args[1], WatchedMatrix):
            return _project(*args, **kwargs)
        if name in RECURRENCES:
            return run_step_by_layer(func, args, _plain, _look)
        raise CalibrationError(
            f"a {type(cls._first(args)._holder).__name__} works on its weights by {name}, which calibration does not"
            " follow; exclude it"
        )

    @classmethod
    def _first(cls, args: Any) -> WatchedMatrix:
        return next(each for each in args if isinstance(each, WatchedMatrix))


RECURRENCES = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _plain(weight: Tensor | WatchedMatrix | None) -> Tensor | None:
    return weight.weight if isinstance(weight, WatchedMatrix) else weight


def _look(weight: Tensor | WatchedMatrix, x: Tensor, output: Tensor) -> Tensor:
    return weight.see(x, output) if isinstance(weight, WatchedMatrix) else output


def _by_batch(x: Tensor) -> Tensor:
    """(positions, batch, ...) -> (batch, positions, ...), or the reverse; without a batch as it is."""
    return x.transpose(0, 1) if x.ndim > 2 else x


def _project(x: Tensor, matrix: WatchedMatrix, bias: Tensor | None = None) -> Tensor:
    """The product with one of the separate projections of attention, of x (positions, batch, columns)."""
    x = _by_batch(x)
    output = _by_batch(matrix.see(x, F.linear(x, matrix.weight))).contiguous()
    return output if bias is None else output + bias


def _attend(args: Any, kwargs: Any) -> Any:
    """As `F.multi_head_attention_forward`, with the product of the stacked projections seen.

    Queries, keys and values that are the same tensor go through one product with all rows that they need. The rows
    that an input does not go through have gradients of 0 in the product that is seen.
    """
    matrix: WatchedMatrix = args[5]
    inputs = {id(x): x for x in args[:3]}
    outputs = {}
    for key, x in inputs.items():
        rows = _by_batch(x)
        outputs[key] = _by_batch(matrix.see(rows, F.linear(rows, matrix.weight))).chunk(3, -1)
    made = [_Made(outputs[id(x)][part], x.shape[-1]) for part, x in enumerate(args[:3])]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    others: Any = {**kwargs, "use_separate_proj_weight": True, **dict(zip(names, made, strict=True))}
    given: Any = (*args[:5], None, *args[6:])
    return F.multi_head_attention_forward(*given, **others)


class _Made:
    """A weight whose product with the one input that it is applied to is known."""

    def __init__(self, output: Tensor, columns: int) -> None:
        self._output = output
        self.shape = (output.shape[-1], columns)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        assert func is F.linear, func
        x, made, bias = (*args, (kwargs or {}).get("bias"))[:3]
        output: Tensor = made._output.reshape(*x.shape[:-1], -1).contiguous()
        return output if bias is None else output + bias
