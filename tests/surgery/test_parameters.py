"""Weights that a recurrent or attention module reads itself: factors in the place of the parameter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import lrsurgery
from lrsurgery.errors import PlanError
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.budget import parse_budget
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.parameters.matrix import FactorisedMatrix
from lrsurgery.surgery.plan import SurgeryOptions, make_plan, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec, parse_rank
from lrsurgery.surgery.rows import Kept, Replacement

FORMS = ["balanced", "pivoted"]


class First(nn.Module):
    """A recurrent module, of which the output alone is returned."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)[0]
        return found


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(12, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        other = x[:, :4, : self.body.kdim] if self.body.kdim != 12 else x
        found: Tensor = self.body(x, other, other)[0]
        return found


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lstm of two layers, both ways": (
        lambda: First(nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True)),
        8,
    ),
    "lstm with a projection": (lambda: First(nn.LSTM(12, 10, proj_size=6)), 2),
    "gru": (lambda: First(nn.GRU(12, 10, batch_first=True)), 2),
    "tanh without a bias": (lambda: First(nn.RNN(12, 10, bias=False)), 2),
    "attention to itself": (lambda: Attends(batch_first=True), 1),
    "attention with projections apart": (lambda: Attends(kdim=8, vdim=8, batch_first=True), 3),
    "transformer": (encoder, 2),
}
X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


def include(model: nn.Module) -> dict[str, Any]:
    """The parameters of these modules alone."""
    names = [row.name for row in rows_of(model) if row.kind in ("recurrent", "in-proj")]
    return {"include": names, "allow_larger": True}


def rows_of(model: nn.Module) -> list[Replacement | Kept]:
    return plan_rows(model, SurgeryOptions(target=RankSpec(FractionRank(1.0)), allow_larger=True))


def factorised(model: nn.Module, rank: Any, **options: Any) -> nn.Module:
    new = copy.deepcopy(model)
    lrsurgery.factorise_(new, rank=rank, **include(model), **options)
    return new


def product_of(layer: Any) -> Tensor:
    """The matrix of a layer by the words of the format."""
    u, v = layer.u.weight, layer.v.weight
    if layer.order is None:
        return u @ v  # type: ignore[no-any-return]
    order = layer.order.long()
    parts = torch.cat([v, u @ v]) if layer.side == "rows" else torch.cat([u, u @ v], 1)
    whole = torch.zeros(layer.matrix_shape, dtype=u.dtype)
    return whole.index_copy(0 if layer.side == "rows" else 1, order, parts)


def multiplied_out(dense: nn.Module, layers: dict[str, Any]) -> nn.Module:
    new = copy.deepcopy(dense)
    for name, layer in layers.items():
        new.get_parameter(name).data = product_of(layer).detach()
    return new


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_modules_compute_what_their_products_do(name: str, form: str) -> None:
    dense = build(name)
    full, half = factorised(dense, 1.0, form=form), factorised(dense, 0.5, form=form)
    layers = factorised_layers(half)
    assert len(layers) == MODELS[name][1]
    assert all(isinstance(layer, FactorisedMatrix) and layer.form == form for layer in layers.values())
    wanted, product = dense(X), multiplied_out(dense, layers)
    assert relative(full(X), wanted) < 1e-5
    assert relative(half(X), product(X)) < 1e-5
    assert relative(half(X), wanted) > 0.005, "half of the rank changes nothing, so the test would show nothing"
    with torch.no_grad():  # attention has a fast path then, which takes dense weights
        assert relative(half(X), product(X)) < 1e-5
        assert relative(half.train()(X), product.train()(X)) < 1e-5 or name == "transformer"  # which has dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gru", "attention to itself"])
def test_full_rank_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    dense = build(name).to(dtype)
    full = factorised(dense, 1.0)
    for key, layer in factorised_layers(full).items():
        weight = dense.get_parameter(key).detach().double()
        assert layer.u.weight.dtype == layer.v.weight.dtype == layer.weight.dtype == dtype
        assert (layer.weight.detach().double() - weight).norm() <= 10 * torch.finfo(dtype).eps * weight.norm()
    with torch.no_grad():
        assert full(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_products(name: str, form: str) -> None:
    dense = build(name)
    model = factorised(dense, 0.5, form=form)
    layers = factorised_layers(model)
    model(X).square().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters()}
    copied = {key: copy.deepcopy(layer) for key, layer in layers.items()}
    weights = {key: product_of(layer) for key, layer in copied.items()}
    values = {**{k: p for k, p in dense.named_parameters() if k not in weights}, **weights}
    torch.func.functional_call(dense, values, (X,)).square().sum().backward()
    for key, layer in copied.items():
        for part in ("u", "v"):
            grad = found[f"{key}.{part}.weight"]
            assert grad is not None
            assert relative(grad, getattr(layer, part).weight.grad) < 1e-4, (key, part)
    for key, parameter in dense.named_parameters():
        if key not in weights:
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_states_are_the_same_model(name: str) -> None:
    model = factorised(build(name), 0.5, form="pivoted")
    wanted = model(X)
    assert torch.equal(copy.deepcopy(model)(X), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), wanted)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in factorised_layers(model):
        assert {f"{key}.{part}" for part in ("u.weight", "v.weight", "order")} <= state.keys()
        assert key not in state
    other = build(name)
    swap_(other, specs_of(model))
    other.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(other.eval()(X), wanted)
    for parameter in copy.deepcopy(model).parameters():
        parameter.data.zero_()
    assert torch.equal(model(X), wanted), "a copy has the model's own factors"


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_seen_at_the_next_call(name: str) -> None:
    model = factorised(build(name), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FrobeniusDecay(model, 0.1).attach(optimizer)
    before = model(X)
    before.square().mean().backward()
    optimizer.step()
    assert relative(model(X), before) > 1e-4
    double = copy.deepcopy(model).double()
    assert relative(double(X.double()).float(), model(X)) < 1e-4
    assert {p.dtype for p in double.parameters()} == {torch.float64}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_dense_again_and_from_form_to_form(name: str, form: str) -> None:
    dense = build(name)
    model = factorised(dense, 0.5, form=form)
    wanted = model(X)
    for change in (lrsurgery.balance_, lrsurgery.pivot_):
        change(model)
        assert relative(model(X), wanted) < 1e-5
    lrsurgery.densify_(model)
    assert relative(model(X), wanted) < 1e-5
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    assert not factorised_layers(model)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(X), dense(X)), "a weight in a list of the module is another than its parameter"


def test_packed_sequences_and_states() -> None:
    torch.manual_seed(0)
    dense = nn.ModuleList([nn.LSTM(12, 10, bidirectional=True, batch_first=True)])
    half = factorised(dense, 0.5)
    product: Any = multiplied_out(dense, factorised_layers(half))
    packed = pack_padded_sequence(X, torch.tensor([3, 7, 5]), batch_first=True, enforce_sorted=False)
    states = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
    (found, ends), (wanted, other) = half[0](packed, states), product[0](packed, states)  # type: ignore[operator, index]
    assert relative(found.data, wanted.data) < 1e-5
    assert relative(ends[1], other[1]) < 1e-5


def test_attention_to_another_input_with_masks() -> None:
    torch.manual_seed(0)
    dense = nn.ModuleList([nn.MultiheadAttention(12, 2, add_bias_kv=True, add_zero_attn=True)])
    half = factorised(dense, 0.5)
    product: Any = multiplied_out(dense, factorised_layers(half))
    q, kv = torch.randn(5, 2, 12), torch.randn(6, 2, 12)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    found, wanted = (m[0](q, kv, kv, key_padding_mask=mask) for m in (half, product))  # type: ignore[operator, index]
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-5
    unbatched = [m[0](q[:, 0], kv[:, 0], kv[:, 0])[0] for m in (half, product)]  # type: ignore[operator, index]
    assert relative(*unbatched) < 1e-5


def test_code_that_reads_the_weight_gets_the_product() -> None:
    model = factorised(build("attention to itself"), 0.5)
    layer: Any = factorised_layers(model)["body.in_proj_weight"]
    weight, x = product_of(layer), X[0]
    assert layer.shape == weight.shape
    assert (layer.dtype, layer.device, layer.dim(), len(layer)) == (weight.dtype, weight.device, 2, 36)
    assert layer.requires_grad
    for found, wanted in (
        (layer[:12], weight[:12]),
        (layer.chunk(3)[1], weight.chunk(3)[1]),
        (layer.t(), weight.T),
        (x @ layer.T, x @ weight.T),
        (layer @ x.T, weight @ x.T),
        (nn.functional.linear(x, layer), x @ weight.T),
        (torch.cat([layer, layer]), torch.cat([weight, weight])),
    ):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(AttributeError, match="missing"):
        layer.missing  # noqa: B018


class Own(nn.LSTM):
    def forward(self, x: Any, states: Any = None) -> Any:
        return super().forward(2 * x, states)


class Renamed(nn.MultiheadAttention):
    """A subclass that changes nothing."""


def test_what_stays_dense_says_why() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(16, 16),
            "projected": nn.LSTM(16, 16, proj_size=8),
            "cell": nn.GRUCell(16, 16),
            "own": Own(16, 16),
            "renamed": Renamed(16, 2, add_bias_kv=True),
            "normed": parametrizations.weight_norm(nn.LSTM(16, 16), "weight_hh_l0"),
            "hooked": torch.nn.utils.weight_norm(nn.GRU(16, 16), "weight_ih_l0"),
        }
    )
    rows = make_plan(model, SurgeryOptions(target=parse_rank("0.5"))).rows
    taken = {row.name: row.kind for row in rows if isinstance(row, Replacement)}
    assert taken == {
        "lstm.weight_ih_l0": "recurrent",
        "lstm.weight_hh_l0": "recurrent",
        "projected.weight_ih_l0": "recurrent",
        "projected.weight_hh_l0": "recurrent",
        "renamed.in_proj_weight": "in-proj",
        "normed.weight_ih_l0": "recurrent",
        "hooked.weight_hh_l0": "recurrent",
    }
    cell, own = "GRUCell, a single step, at each of which a product of factors would be formed", "subclass Own of LSTM"
    parametrised = "part of a weight of {} that is parametrised"
    assert {row.name: row.reason for row in rows if isinstance(row, Kept)} == {
        "projected.weight_hr_l0": "projection of the hidden states of an LSTM (proj_size)",
        "cell.weight_ih": cell,
        "cell.weight_hh": cell,
        "own.weight_ih_l0": f"{own} with a forward of its own",
        "own.weight_hh_l0": f"{own} with a forward of its own",
        "renamed.bias_k": "a bare parameter, not a layer",
        "renamed.bias_v": "a bare parameter, not a layer",
        "renamed.out_proj": "output of nn.MultiheadAttention, which reads its weight and never calls it",
        "normed.parametrizations.weight_hh_l0.original0": parametrised.format("LSTM"),
        "normed.parametrizations.weight_hh_l0.original1": parametrised.format("LSTM"),
        "hooked.weight_ih_l0_g": parametrised.format("GRU"),
        "hooked.weight_ih_l0_v": parametrised.format("GRU"),
    }


def test_modules_with_another_weight_normed_compute_their_products() -> None:
    torch.manual_seed(0)
    for norm in (parametrizations.weight_norm, torch.nn.utils.weight_norm):
        half = First(norm(nn.LSTM(12, 10, batch_first=True), "weight_ih_l0")).eval()
        lstm: Any = nn.LSTM(12, 10, batch_first=True)
        for key in lstm._flat_weights_names:
            getattr(lstm, key).data = getattr(half.body, key).detach()
        lrsurgery.factorise_(half, rank=0.5, include=["body.weight_hh_l0"])
        lstm.weight_hh_l0.data = product_of(factorised_layers(half)["body.weight_hh_l0"]).detach()
        assert relative(half(X), lstm(X)[0]) < 1e-5


def test_no_flops_are_claimed_and_a_budget_of_them_leaves_them_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 16), First(nn.LSTM(16, 16)), nn.Linear(16, 16), nn.Linear(16, 2))
    rows = make_plan(model, SurgeryOptions(target=parse_rank("0.5"))).rows
    found = {row.name: row for row in rows if isinstance(row, Replacement)}
    recurrent = found["1.body.weight_ih_l0"]
    assert recurrent.flops == recurrent.factorised_flops == 2 * 64 * 16
    assert recurrent.factorised_parameters == 8 * (64 + 16)
    options = SurgeryOptions(target=parse_budget("flops:0.5"))
    reasons = {row.name: row.reason for row in plan_rows(model, options) if isinstance(row, Kept)}
    assert reasons["1.body.weight_hh_l0"] == "its product is formed on every call, so it has no FLOPs to save"
    lrsurgery.factorise_(model, budget=0.5)
    assert {"1.body.weight_ih_l0", "1.body.weight_hh_l0"} & factorised_layers(model).keys()


def test_a_layer_of_a_config_must_be_one_of_its_kind() -> None:
    for name, spec in (("0.weight_ih_l0", Spec("linear", 2)), ("1", Spec("recurrent", 2))):
        with pytest.raises(PlanError, match=f"{name}: a .* cannot become a {spec.kind} layer"):
            swap_(nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), {name: spec})
    with pytest.raises(PlanError, match=r"has no such layer"):
        swap_(nn.Sequential(nn.LSTM(4, 4)), {"0.weight_ih_l9": Spec("recurrent", 2)})


def test_the_report_compares_with_the_dense_model() -> None:
    dense = build("lstm of two layers, both ways")
    half = factorised(dense, 0.5, form="pivoted")
    rows = {row.name: row for row in lrsurgery.rank_report(half, against=dense).rows}
    for name, layer in factorised_layers(half).items():
        weight = dense.get_parameter(name)
        lost = (product_of(layer) - weight).norm() / weight.norm()
        assert rows[name].relative_error == pytest.approx(float(lost.detach()), rel=1e-3)
        assert rows[name].kind == "recurrent"
        assert rows[name].flops_after == rows[name].flops_before


@pytest.mark.parametrize("name", ["gru", "attention to itself", "transformer"])
def test_compiled_and_traced_modules(name: str) -> None:
    model = factorised(build(name), 0.5, form="pivoted")
    wanted = model(X)
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, (X,), check_trace=False)  # type: ignore[no-untyped-call]
        assert relative(traced(X), wanted) < 1e-5
        compiled: Any = torch.compile(model, backend="eager")
        assert relative(compiled(X), wanted) < 1e-5
