"""A call of torch's recurrent functions layer by layer, with the products of each layer's weights in the open.

The product with the inputs is computed here, and the function gets it as its inputs with an identity as weight. What
stands for the product with the hidden states is a tensor of zeros that is added to it: where W h is added to W x, the
gradients of both are the same, so those at the zeros are those at W h, and no step is taken in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Weight: TypeAlias = Any  # a tensor, or what stands before it
Look: TypeAlias = Callable[[Weight, Tensor, Tensor], Tensor]  # weight, inputs, outputs -> outputs to go on with
Plain: TypeAlias = Callable[[Weight], "Tensor | None"]


@dataclass(frozen=True)
class _Call:
    """What is the same for all layers of a call."""

    func: Any  # lstm, gru, rnn_tanh or rnn_relu of torch
    has_bias: bool
    training: bool
    directions: int
    batch_first: bool
    batch_sizes: Tensor | None  # of a packed sequence

    @property
    def time(self) -> int:
        return 1 if self.batch_first and self.batch_sizes is None else 0

    def by_batch(self, x: Tensor) -> Tensor:
        """(batch, positions, ...) of inputs or outputs, or the reverse; (all positions, ...) of a packed sequence."""
        return x if self.batch_sizes is not None or self.batch_first else x.transpose(0, 1)

    def run(self, products: Sequence[Tensor], states: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]) -> Any:
        """One layer on its products with the inputs, one for each direction: (output, final states...)."""
        x = torch.cat(list(products), -1)
        flat: list[Tensor] = []
        for number, (own, product) in enumerate(zip(weights, products, strict=True)):
            identity = x.new_zeros(product.shape[-1], x.shape[-1])
            identity[:, number * len(identity) : (number + 1) * len(identity)].fill_diagonal_(1)
            flat += [identity, *own[1:]]
        hx = tuple(states) if self.func.__name__ == "lstm" else states[0]
        head = (x, hx) if self.batch_sizes is None else (x, self.batch_sizes, hx)
        tail = (self.batch_first,) if self.batch_sizes is None else ()
        # cuDNN has no gradients in evaluation, and rounds the product with the identity
        with torch.backends.cudnn.flags(enabled=False):
            return self.func(*head, flat, self.has_bias, 1, 0.0, self.training, self.directions == 2, *tail)

    def before(self, output: Tensor, first: Tensor, *, reverse: bool) -> Tensor:
        """The hidden states that a step starts from, in the layout of `output`, which holds those it ends with."""
        if self.batch_sizes is None:
            steps, first = output.shape[self.time], first.unsqueeze(self.time)
            kept = output.narrow(self.time, 1 if reverse else 0, steps - 1)
            return torch.cat([kept, first] if reverse else [first, kept], self.time)
        padded, lengths = pad_packed_sequence(PackedSequence(output, self.batch_sizes))
        if reverse:
            last = torch.arange(len(padded), device=output.device)[:, None] == lengths.to(output.device) - 1
            moved = torch.where(last[..., None], first, torch.cat([padded[1:], padded[:1]]))
        else:
            moved = torch.cat([first[None], padded[:-1]])
        return pack_padded_sequence(moved, lengths).data


def run_step_by_layer(func: Any, args: Any, plain: Plain, look: Look) -> Any:
    """As `func(*args)`, with each product of a weight shown to `look`, which may return another tensor for it."""
    packed = isinstance(args[3], list | tuple)  # the weights follow sizes and states, not the states alone
    x, sizes, hx, flat, has_bias, layers, dropout, training, bidirectional, *first = (
        args if packed else (args[0], None, *args[1:])
    )
    call = _Call(func, has_bias, training, 2 if bidirectional else 1, bool(first and first[0]), sizes)
    states = hx if isinstance(hx, tuple | list) else (hx,)
    each = len(flat) // (layers * call.directions)
    ends = []
    for layer in range(layers):
        own = slice(layer * call.directions, (layer + 1) * call.directions)
        if layer and dropout:
            x = F.dropout(x, dropout, training)
        held = [flat[number * each : (number + 1) * each] for number in range(own.start, own.stop)]
        x, *end = _run_layer(call, x, [state[own] for state in states], held, plain, look)
        ends.append(end)
    return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))


def _run_layer(
    call: _Call, x: Tensor, states: Sequence[Tensor], held: Sequence[Sequence[Weight]], plain: Plain, look: Look
) -> Any:
    weights: Any = [[plain(weight) for weight in own] for own in held]
    rows = call.by_batch(x)
    products = [
        call.by_batch(look(own[0], rows, F.linear(rows, dense[0]))) for own, dense in zip(held, weights, strict=True)
    ]
    with torch.no_grad():
        output, *_ = call.run(products, states, weights)
    outputs = output.chunk(call.directions, -1)
    for number, (own, dense, product) in enumerate(zip(held, weights, products, strict=True)):
        before = call.before(outputs[number], states[0][number], reverse=number == 1)
        zeros = call.by_batch(look(own[1], call.by_batch(before), call.by_batch(torch.zeros_like(product))))
        products[number] = product + zeros * _share(call, product.detach(), before, dense)
    return call.run(products, states, weights)


def _share(call: _Call, product: Tensor, before: Tensor, weights: Sequence[Tensor]) -> Tensor | float:
    """What the product with the hidden states is multiplied by where it meets that with the inputs: 1, or a GRU's gate.

    A GRU has r * (W h + b) in the last third of its rows.
    """
    if call.func.__name__ != "gru":
        return 1.0
    with torch.no_grad():
        size = product.shape[-1] // 3
        biases = [bias[:size] for bias in weights[2:4]] if call.has_bias else [0.0, 0.0]
        reset = torch.sigmoid(product[..., :size] + biases[0] + F.linear(before, weights[1][:size]) + biases[1])
        return torch.cat([torch.ones_like(product[..., : 2 * size]), reset], -1)
