"""The head of a language model apart from its body, so that logits need never be whole.

At 262,144 tokens of vocabulary, the logits of 4,096 positions take 4.3 GB in fp32, and a loss several times that. Here
the body runs once, and the head on as many positions at a time as the caller likes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lrsurgery.modules import run_until

TOLERANCE = 1e-3  # of the largest logit; what the shape of a product may change


class Split:
    """One forward of a model up to its head: the hidden states of its body, and the logits of any of them."""

    def __init__(self, body: nn.Module, forward: Callable[[], Any], output: Any) -> None:
        self._body, self._forward, self._output = body, forward, output
        self.hidden: Tensor = output[0] if isinstance(output, tuple | Mapping) else output  # (batch, positions, width)
        self.classes = 0  # known after the first logits
        self.calls = 0  # of the body, in the last forward that gave logits

    def slices(self, count: int, most: int) -> Iterator[slice]:
        """Slices of `count` positions, each with at most so many logits as `most`, or one position."""
        size = max(1, most // self.classes)
        return (slice(begun, begun + size) for begun in range(0, count, size))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, classes) of hidden states (n, width), by the model's own forward behind its body."""
        states = hidden[None]
        output: Any
        if isinstance(self._output, tuple):
            output = (states, *self._output[1:])
        else:
            output = dataclasses.replace(self._output, last_hidden_state=states)
        self.calls = 0

        def body(*_: Any, **__: Any) -> Any:
            self.calls += 1
            return output

        with _returning(self._body, body):
            found = self._forward()
        return (found["logits"] if isinstance(found, Mapping) else found[0])[0]  # type: ignore[no-any-return]


@dataclasses.dataclass
class _Known:
    """What forwards have shown of a model's head."""

    classes: int | None = None  # logits of a position; 0 if the head needs all positions at once
    passed: int = 0  # bodies that the model does not call


# the models themselves are not held
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


class SplitHead:
    """A model whose head works position by position on what its body returns."""

    def __init__(self, bodies: Sequence[nn.Module], known: _Known) -> None:
        self._bodies, self._known = bodies, known  # the first that the model calls is its body

    def run(
        self, forward: Callable[[], Any], aside: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Split | None:
        """Run `forward`, a call of the model, up to its head; None if the head needs all positions at once.

        The first time, the head is tried on a few positions within a context `aside`, in which hooks should not count.
        """
        known = self._known
        while known.classes != 0 and known.passed < len(self._bodies):
            body = self._bodies[known.passed]
            found = run_until(body, forward)
            if not found:
                known.passed += 1
                continue
            split = Split(body, forward, found[0])
            if known.classes is None:
                with aside():
                    known.classes = _classes(split)
            split.classes = known.classes
            return split if known.classes else None
        return None


def find_head(model: object) -> SplitHead | None:
    """The head of a transformers model for text; None for any other, for encoder-decoders, and for wrapped models."""
    wrapped = hasattr(model, "_orig_mod")  # a compiled model, whose attributes are those of its original
    body, find = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) and not wrapped else None
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(body, nn.Module) or body is model or not isinstance(output, nn.Module) or decodes:
        return None
    if any(module is output for module in body.modules()):
        return None
    decoder = getattr(body, "decoder", None)
    bodies = [body, decoder] if isinstance(decoder, nn.Module) else [body]
    return SplitHead(bodies, _KNOWN.setdefault(body, _Known()))


@torch.no_grad()
def _classes(split: Split) -> int:
    """How many logits a position has; 0 unless those of some positions together are those of each of them alone."""
    if not isinstance(split.hidden, Tensor) or split.hidden.ndim != 3:
        return 0
    states = split.hidden.detach().flatten(0, 1)[:3]
    try:
        together, apart = split.logits(states), torch.cat([split.logits(state[None]) for state in states])
    except (RuntimeError, ValueError, TypeError, IndexError):  # whatever a forward makes of another number of them
        return 0
    if together.shape != apart.shape or together.ndim != 2 or split.calls != 1:
        return 0
    finite = torch.isfinite(together) & torch.isfinite(apart)
    together, apart = together.float().where(finite, 0), apart.float().where(finite, 0)
    return together.shape[-1] if bool((together - apart).abs().max() <= TOLERANCE * apart.abs().max()) else 0


@contextmanager
def _returning(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a module return what `call` does, past its hooks, within this context."""
    before = module.__dict__.get("_call_impl")
    module.__dict__["_call_impl"] = call
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["_call_impl"]
        else:
            module.__dict__["_call_impl"] = before
