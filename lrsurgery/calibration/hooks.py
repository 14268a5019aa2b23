"""Hooks that accumulate second moments of layer inputs and output gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.calibration.statistics import LayerUse, Moments
from lrsurgery.errors import CalibrationError
from lrsurgery.surgery.experts.watched import See, watch_products
from lrsurgery.surgery.parameters.watched import watch_matrices
from lrsurgery.surgery.rows import Replacement

NEEDS_NONE = "--importance activations needs none"


@dataclass
class _Sums:
    """Sums over the batches for one layer, in fp32 on the layer's device; of experts, for each."""

    inputs: Tensor
    gradients: Tensor | None
    positions: int = 0
    outputs: int = 0
    counts: Tensor | None = None  # of experts, the positions of each
    firsts: set[str] = field(default_factory=set)  # the layers that were first to receive the inputs of this one


@dataclass
class _Input:
    """An input with its Gram matrix, and the layer that was the first to receive it."""

    x: Tensor
    version: int
    kind: str
    gram: Tensor
    count: int
    first: str


class Collector:
    """Accumulator of x x^T over the inputs and, with `gradients`, of g g^T over the output gradients of layers.

    A layer may be watched as several kinds, one row each.

    The loss must be a sum, not a mean, over scored items; `scored` counts them.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Replacement], *, gradients: bool) -> None:
        self.scored = 0
        modules = dict(model.named_modules())
        self._watched = [(row, modules[row.name]) for row in rows if row.name in modules]
        self._held: dict[str, list[Replacement]] = {}  # layers that are parameters, by the module that reads them
        for row in rows:
            if row.layout.parameter:
                self._held.setdefault(row.name.rpartition(".")[0], []).append(row)
        self._holders = {name: modules[name] for name in self._held}
        self._gradients = gradients
        self._sums: dict[tuple[str, str], _Sums] = {}  # by name and kind
        self._last: _Input | None = None  # for reuse: query, key and value have the same
        self._batch = threading.local()  # in a block-by-block pass each batch has its own thread
        self._recomputing = False

    @contextmanager
    def batch(self, mask: Tensor | None, *more: Tensor | None) -> Iterator[None]:
        """Process a batch whose positions count if mask (batch, positions) is not 0; without a mask all count.

        Each of `more` is a mask of other positions, such as those of a decoder, and of another shape.
        """
        self._batch.mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._batch.more = tuple(each.bool() for each in more if each is not None)
        try:
            yield
        finally:
            self._batch.mask, self._batch.more = None, ()

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Mark a backward pass, so that inputs which gradient checkpointing recomputes are not counted twice.

        So is any other run whose inputs do not count.
        """
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    @contextmanager
    def watch(self, names: Collection[str] | None = None) -> Iterator[None]:
        """Accumulate within this context, for these layers or for all."""
        handles = [
            module.register_forward_hook(self._hook(row))
            for row, module in self._watched
            if names is None or row.name in names
        ]
        with ExitStack() as held:
            for name, rows in self._held.items():
                own = {row.name.rpartition(".")[2]: row for row in rows if names is None or row.name in names}
                experts = {key: self._see(row) for key, row in own.items() if row.layout.stacked}
                matrices = {key: self._see_matrix(row) for key, row in own.items() if not row.layout.stacked}
                if experts:
                    held.enter_context(
                        watch_products(self._holders[name], experts, lambda: getattr(self._batch, "mask", None))
                    )
                if matrices:
                    held.enter_context(watch_matrices(self._holders[name], matrices))
            try:
                yield
            finally:
                self._last = None
                for handle in handles:
                    handle.remove()

    def take(self, row: Replacement) -> tuple[LayerUse, Moments]:
        """Return the moments of a layer and free its sums; zeros if the layer received no input."""
        sums = self._sums.pop((row.name, row.kind), None) or self._new(row, torch.device("cpu"))
        first = next(iter(sums.firsts)) if len(sums.firsts) == 1 else row.name
        same = None if first == row.name else first
        use = LayerUse(row.kind, row.rows, row.columns, sums.positions, sums.outputs, same, row.groups)
        per = self.scored if self._gradients else sums.positions
        gradients = None if sums.gradients is None else sums.gradients / max(1, per)
        if sums.counts is not None:
            use = replace(use, unseen=int((sums.counts == 0).sum()))
            return use, Moments(sums.inputs / sums.counts.clamp(min=1)[:, None, None], gradients, sums.counts)
        return use, Moments(sums.inputs / max(1, sums.positions), gradients)

    def _new(self, row: Replacement, device: torch.device) -> _Sums:
        stacked = row.layout.stacked
        lead = (row.matrices,) if stacked or row.groups > 1 else ()
        of_rows = (row.rows,) if row.diagonal else (row.rows, row.rows)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*lead, *size, device=device)

        gradients = zeros(*of_rows) if self._gradients or row.layout.lookup else None
        return _Sums(zeros(row.columns, row.columns), gradients, counts=zeros() if stacked else None)

    def _see(self, row: Replacement) -> See:
        def see(expert: int, x: Tensor, output: Tensor) -> Tensor:
            leaf = self._gradients and torch.is_grad_enabled() and not output.requires_grad
            if leaf:  # as in `_hook`
                output.requires_grad_()
            if not self._recomputing:
                self._add_expert(row, expert, x, output)
            return output.clone() if leaf else output

        return see

    def _see_matrix(self, row: Replacement) -> Callable[[Tensor, Tensor], Tensor]:
        hook, holder = self._hook(row), self._holders[row.name.rpartition(".")[0]]

        def see(x: Tensor, output: Tensor) -> Tensor:
            found: Tensor | None = hook(holder, (x,), output)
            return output if found is None else found

        return see

    def _add_expert(self, row: Replacement, expert: int, x: Tensor, output: Tensor) -> None:
        """Add the inputs (positions, columns) of one expert, and the gradients of its outputs once they are known."""
        key = row.name, row.kind
        sums = self._sums.get(key) or self._sums.setdefault(key, self._new(row, x.device))
        assert sums.counts is not None
        used = (x != 0).any(-1)  # some families give every expert all tokens, as zeros where it is not chosen
        part, count = x.detach()[used].float(), int(used.sum())
        sums.inputs[expert].addmm_(part.T, part)
        if not bool(torch.isfinite(sums.inputs[expert].diagonal()).all()):
            raise CalibrationError(f"{row.name}: its inputs hold NaN or Inf; check the data or the model")
        sums.counts[expert] += count
        sums.positions += count
        sums.outputs += count
        if sums.gradients is not None and output.requires_grad:
            moment = sums.gradients[expert]

            def at_gradient(g: Tensor) -> None:
                own = g.detach()[used].float()
                _add_products_(moment, own)
                if not bool(torch.isfinite(_diagonal(moment)).all()):
                    raise CalibrationError(f"{row.name}: its gradients hold NaN or Inf; {NEEDS_NONE}")

            output.register_hook(at_gradient)  # type: ignore[no-untyped-call]

    def _hook(self, row: Replacement) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0]
            leaf = self._gradients and torch.is_grad_enabled() and not output.requires_grad
            if leaf:  # parameters are frozen, so the graph starts at the first hooked layer
                output.requires_grad_()
            if not self._recomputing:
                self._accumulate(row, module, x, output)
            return output.clone() if leaf else None  # an in-place activation would fail on a leaf

        return hook

    def _accumulate(self, row: Replacement, module: nn.Module, x: Tensor, output: Tensor) -> None:
        key = row.name, row.kind
        sums = self._sums.get(key) or self._sums.setdefault(key, self._new(row, x.device))
        mask = self._mask(x, row)
        add = self._add_lookups if row.layout.lookup else self._add_inputs
        count = add(sums, row, module, x, mask)
        sums.outputs += row.layout.outputs(output, count)
        if self._gradients and output.requires_grad:

            def at_gradient(g: Tensor) -> None:
                self._add_gradients(sums, row, module, x.shape, g.detach(), mask)

            output.register_hook(at_gradient)  # type: ignore[no-untyped-call]

    def _mask(self, x: Tensor, row: Replacement) -> Tensor | None:
        """The mask of the layer's positions, if the batch is padded and the input has the layout of the mask."""
        if not row.layout.takes_tokens:
            return None
        positions = x.shape if row.layout.lookup else x.shape[:-1]
        masks: list[Tensor | None] = [getattr(self._batch, "mask", None), *getattr(self._batch, "more", ())]
        for mask in masks:
            if mask is not None and positions == mask.shape:
                return mask.to(x.device)
            if mask is not None and positions == (mask.numel(),):
                return mask.to(x.device).flatten()
        return None

    def _add_lookups(self, sums: _Sums, row: Replacement, module: nn.Module, x: Tensor, mask: Tensor | None) -> int:
        count = 0
        assert sums.gradients is not None
        for tokens in row.layout.inputs(module, x.detach(), mask):
            sums.gradients += torch.bincount(tokens.flatten(), minlength=row.rows)
            count += tokens.numel()
        sums.positions += count
        if not self._gradients:  # nothing tells columns apart
            sums.inputs.diagonal().add_(count)
        return count

    def _add_inputs(self, sums: _Sums, row: Replacement, module: nn.Module, x: Tensor, mask: Tensor | None) -> int:
        last = self._last
        if (
            last is None
            or last.x is not x
            or last.version != x._version
            or last.kind != row.kind
            or not row.layout.shares_v
        ):
            gram, count = torch.zeros_like(sums.inputs), 0
            for part in row.layout.inputs(module, x.detach(), mask):
                _add_products_(gram, part)
                count += len(part)
            if not bool(torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all()):
                raise CalibrationError(f"{row.name}: its inputs hold NaN or Inf; check the data or the model")
            last = self._last = _Input(x, x._version, row.kind, gram, count, row.name)
        sums.firsts.add(last.first)
        gram, count = last.gram, last.count
        sums.inputs += gram
        sums.positions += count
        return count

    def _add_gradients(
        self, sums: _Sums, row: Replacement, module: nn.Module, shape: torch.Size, g: Tensor, mask: Tensor | None
    ) -> None:
        # of a table, the errors of a row go with the gradients at its outputs in the place of inputs
        moment = sums.inputs if row.layout.lookup else sums.gradients
        assert moment is not None
        for part in row.layout.gradients(module, shape, g, mask):
            _add_products_(moment, part)
        if not bool(torch.isfinite(_diagonal(moment)).all()):
            raise CalibrationError(f"{row.name}: its gradients hold NaN or Inf; {NEEDS_NONE}")


def _diagonal(moment: Tensor) -> Tensor:
    """That of a moment, of which the diagonal alone may be kept; of several moments each."""
    return moment if moment.ndim == 1 else moment.diagonal(dim1=-2, dim2=-1)


def _add_products_(gram: Tensor, x: Tensor) -> None:
    """Add x x^T of x (positions, n) to gram (n, n) or its diagonal (n,), or of each group to gram (groups, n, n)."""
    if gram.ndim == 1:
        gram += x.square().sum(0)
        return
    if gram.ndim == 2:
        gram.addmm_(x.T, x)
        return
    parts = x.reshape(len(x), *gram.shape[:2]).transpose(0, 1)
    gram.baddbmm_(parts.mT, parts)


@contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters within this context, so that a backward pass computes gradients of activations only."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))
