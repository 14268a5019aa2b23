"""Moments of weights that a recurrent or attention module reads itself, against steps written out and autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lrsurgery
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.errors import CalibrationError
from lrsurgery.surgery.apply import factorised_layers

Seen = dict[str, list[tuple[Tensor, Tensor]]]  # weight -> inputs and outputs of its product, step by step

MODULES: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(5, 6, batch_first=True),
    "lstm of two layers, both ways": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True),
    "lstm with a projection": lambda: nn.LSTM(5, 6, proj_size=4, batch_first=True),
    "gru": lambda: nn.GRU(5, 6, batch_first=True),
    "gru of two layers, both ways, no bias": lambda: nn.GRU(5, 6, num_layers=2, bidirectional=True, bias=False),
    "tanh": lambda: nn.RNN(5, 6, batch_first=True),
    "relu, both ways": lambda: nn.RNN(5, 6, nonlinearity="relu", bidirectional=True),
}


def squares(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    """A loss whose gradients are the outputs themselves, so that no position has the gradient of another."""
    found = outputs if isinstance(outputs, Tensor) else outputs[0]
    return found.square().sum() / 2, found.shape[0]


def seen_product(weight: Tensor, x: Tensor, name: str, seen: Seen) -> Tensor:
    output = x @ weight.T
    output.retain_grad()
    seen.setdefault(name, []).append((x.detach(), output))
    return output


def step(module: Any, suffix: str, x: Tensor, state: tuple[Tensor, Tensor], seen: Seen) -> tuple[Tensor, Tensor]:
    """One step (batch, ...) from (h, c), by the formulas of torch's documentation."""
    h, c = state
    biases = [getattr(module, f"bias_{part}{suffix}", torch.zeros(())) for part in ("ih", "hh")]
    of_x = seen_product(getattr(module, f"weight_ih{suffix}"), x, f"weight_ih{suffix}", seen) + biases[0]
    of_h = seen_product(getattr(module, f"weight_hh{suffix}"), h, f"weight_hh{suffix}", seen) + biases[1]
    if module.mode == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if not module.proj_size else h @ getattr(module, f"weight_hr{suffix}").T), c
    if module.mode == "GRU":
        (ir, iz, in_), (hr, hz, hn) = of_x.chunk(3, -1), of_h.chunk(3, -1)
        z = torch.sigmoid(iz + hz)
        return (1 - z) * torch.tanh(in_ + torch.sigmoid(ir + hr) * hn) + z * h, c
    return (torch.tanh if module.mode == "RNN_TANH" else torch.relu)(of_x + of_h), c


def by_hand(module: Any, x: Tensor, seen: Seen) -> Tensor:
    """The outputs (batch, positions, ...) of inputs (batch, positions, ...), from states of zeros."""
    for layer in range(module.num_layers):
        both = []
        for reverse in (False, True)[: 2 if module.bidirectional else 1]:
            suffix = f"_l{layer}" + ("_reverse" if reverse else "")
            size = getattr(module, "proj_size", 0) or module.hidden_size
            h, c = x.new_zeros(len(x), size), x.new_zeros(len(x), module.hidden_size)
            steps: list[Tensor] = []
            for t in range(x.shape[1])[:: -1 if reverse else 1]:
                h, c = step(module, suffix, x[:, t], (h, c), seen)
                steps.append(h)
            both.append(torch.stack(steps[:: -1 if reverse else 1], 1))
        x = torch.cat(both, -1)
    return x


def assert_moments(found: Statistics, seen: Seen, scored: int, prefix: str = "") -> None:
    assert {f"{prefix}{name}" for name in seen} == set(found.uses)
    for name, pairs in seen.items():
        x, g = (torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1].grad for pair in pairs]))  # type: ignore[misc]
        moments, use = found.moments(f"{prefix}{name}"), found.uses[f"{prefix}{name}"]
        assert use.positions == use.outputs == len(x), name
        assert moments.gradients is not None
        torch.testing.assert_close(moments.inputs, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.gradients, g.T @ g / scored, rtol=1e-4, atol=1e-6)


class Wrapped(nn.Module):
    """A recurrent module behind a layer that learns, so that gradients go on through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(5, 5), module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self.first(x))[0]
        return found


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_moments_are_those_of_every_step(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Wrapped(make()).eval()
    before = {name: id(p) for name, p in model.named_parameters()}
    batches = [torch.randn(3, 7, 5), torch.randn(2, 4, 5)]
    if not model.body.batch_first:
        batches = [x.transpose(0, 1) for x in batches]
    wanted, outputs = [model(x).detach() for x in batches], []

    def loss(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        outputs.append(output.detach())
        return squares(output, batch)

    found = lrsurgery.collect_statistics(model, batches, loss=loss, include=["body.*"])
    for one, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    own: Any = model.body
    assert all(isinstance(weight, nn.Parameter) for weight in own._flat_weights)
    seen: Seen = {}
    for x in batches:
        inner = model.first(x if model.body.batch_first else x.transpose(0, 1))
        squares(by_hand(model.body, inner, seen), None)[0].backward()  # type: ignore[no-untyped-call]
    assert_moments(found, seen, sum(len(x) for x in batches), "body.")
    alone = lrsurgery.collect_statistics(model, batches, importance="activations", include=["body.*"])
    for name in found.uses:
        assert alone.moments(name).gradients is None
        torch.testing.assert_close(alone.moments(name).inputs, found.moments(name).inputs)
    for x, other in zip(batches, wanted, strict=True):
        assert torch.equal(model(x), other), "the module does not compute as before"


class Packed(nn.Module):
    def __init__(self, module: nn.Module, lengths: list[int], states: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.body, self.lengths, self.states = module, lengths, states

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)
        output, _ = self.body(packed, self.states if len(self.states) > 1 else self.states[0])
        return pad_packed_sequence(output, batch_first=True)[0]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_sequences_of_several_lengths_from_given_states(cls: Any) -> None:
    torch.manual_seed(0)
    module = cls(5, 6, bidirectional=True, batch_first=True)
    states = tuple(torch.randn(2, 3, 6) for _ in range(2 if cls is nn.LSTM else 1))
    x, lengths = torch.randn(3, 7, 5), [4, 7, 2]
    found = lrsurgery.collect_statistics(Packed(module, lengths, states), [x], loss=squares)
    seen: Seen = {}
    for number, length in enumerate(lengths):
        for reverse, suffix in enumerate(("_l0", "_l0_reverse")):
            h, c = states[0][reverse, number : number + 1], states[-1][reverse, number : number + 1]
            total = torch.zeros(())
            for t in range(length)[:: -1 if reverse else 1]:
                h, c = step(module, suffix, x[number : number + 1, t], (h, c), seen)
                total = total + h.square().sum() / 2
            total.backward()  # type: ignore[no-untyped-call]
    assert_moments(found, seen, 3, "body.")


def test_padded_positions_do_not_count() -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(9, 5), nn.LSTM(5, 6)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            output: Tensor = self.body(self.table(input_ids).transpose(0, 1))[0]
            return output.transpose(0, 1)

    model, mask = Tagger(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": mask}
    found = lrsurgery.collect_statistics(model, [batch], importance="activations", include=["body.*"])
    x = model.table(batch["input_ids"])[mask.bool()].detach()
    assert found.uses["body.weight_ih_l0"].positions == 6
    torch.testing.assert_close(found.moments("body.weight_ih_l0").inputs, x.T @ x / 6)


class Attends(nn.Module):
    """Attention from one input to another, or to itself; the second may be the first."""

    def __init__(self, *, alone: bool, **options: Any) -> None:
        super().__init__()
        self.alone = alone
        self.body = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = (self.body(x, x, x) if self.alone else self.body(x, y, y))[0]
        return found


def attend_by_hand(model: Attends, x: Tensor, y: Tensor, seen: Seen) -> Tensor:
    """By the formula, of inputs (batch, positions, width); a product that has all rows for every input."""
    body: Any = model.body

    def project(inputs: Tensor) -> list[Tensor]:
        if body.in_proj_weight is not None:
            return list(
                (seen_product(body.in_proj_weight, inputs, "in_proj_weight", seen) + body.in_proj_bias).chunk(3, -1)
            )
        keys = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        taken = keys[:1] if inputs is x else keys[1:]
        biases = dict(zip(keys, body.in_proj_bias.chunk(3), strict=True))
        found = [seen_product(getattr(body, key), inputs, key, seen) + biases[key] for key in taken]
        return found if inputs is x else [found[0], *found]

    of_x = project(x)
    of_y = of_x if model.alone else project(y)
    q, k, v = (part.reshape(*part.shape[:2], 2, 4).transpose(1, 2) for part in (of_x[0], *of_y[1:]))
    attended = torch.softmax(q @ k.mT / 2, -1) @ v
    return F.linear(attended.transpose(1, 2).flatten(2), body.out_proj.weight, body.out_proj.bias)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "positions first"])
@pytest.mark.parametrize(
    ("alone", "options"),
    [(True, {}), (False, {}), (False, {"kdim": 6, "vdim": 6})],
    ids=["to itself", "to another", "with projections apart"],
)
def test_moments_of_attention(alone: bool, options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Attends(alone=alone, batch_first=batch_first, **options).eval()
    x, y = torch.randn(3, 7, 8), torch.randn(3, 5, options.get("kdim", 8))
    given = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    wanted, outputs = model(*given).detach(), []

    def loss(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        outputs.append(output.detach())
        return output.square().sum() / 2, 3

    found = lrsurgery.collect_statistics(model, [given], loss=loss)
    torch.testing.assert_close(outputs[0], wanted, rtol=1e-5, atol=1e-6)
    seen: Seen = {}
    by_formula = attend_by_hand(model, x, y, seen)
    torch.testing.assert_close(by_formula, wanted if batch_first else wanted.transpose(0, 1), rtol=1e-5, atol=1e-6)
    (by_formula.square().sum() / 2).backward()  # type: ignore[no-untyped-call]
    flat = {name: [(a.flatten(0, 1), b) for a, b in pairs] for name, pairs in seen.items()}
    for pairs in flat.values():
        for number, (a, b) in enumerate(pairs):
            assert b.grad is not None
            rows = b.detach().flatten(0, 1)
            rows.grad = b.grad.flatten(0, 1)
            pairs[number] = (a, rows)
    assert_moments(found, flat, 3, "body.")


@pytest.mark.parametrize("importance", ["fisher", "activations"])
def test_factors_are_the_best_in_the_metric(importance: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(nn.LSTM(5, 6, batch_first=True)).eval()
    statistics = lrsurgery.collect_statistics(model, [torch.randn(8, 9, 5)], importance=importance, loss=squares)
    low = copy.deepcopy(model)
    lrsurgery.factorise_(low, rank=2, include=["body.*"], statistics=statistics)
    layers = factorised_layers(low)
    assert set(layers) == {"body.weight_ih_l0", "body.weight_hh_l0"}
    for name, layer in layers.items():
        c, g = statistics.metric(name, layer.kind)  # type: ignore[misc]
        weight = model.get_parameter(name).detach().double()
        root = torch.linalg.cholesky(c)  # type: ignore[arg-type]
        left = torch.eye(len(weight), dtype=torch.float64) if g is None else torch.linalg.cholesky(g).mT  # type: ignore[arg-type]
        lost = left @ (weight - (layer.u.weight @ layer.v.weight).detach().double()) @ root
        values = torch.linalg.svdvals(left @ weight @ root)
        assert float(lost.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3)


def test_a_use_of_a_weight_that_is_not_followed_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.relu(self.body.in_proj_weight).T

    with pytest.raises(CalibrationError, match=r"MultiheadAttention works on its weights by relu.*exclude"):
        lrsurgery.collect_statistics(Odd(), [torch.randn(3, 8)], loss=squares)
