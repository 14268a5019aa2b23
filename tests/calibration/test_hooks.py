"""Second moments against what autograd, convolutions and sums by hand say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import lrsurgery
from lrsurgery.calibration.collect import MemoryStore, collect, split
from lrsurgery.calibration.loss import IndependentLoss, ProjectionLoss, SampledLoss
from lrsurgery.calibration.statistics import LayerUse, Moments, StatisticsWriter
from lrsurgery.checkpoints.upstream.transformers import checkpoint_blocks_
from lrsurgery.errors import BudgetError, CalibrationError
from lrsurgery.linalg.weighted import Metric, weighted_norm
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.plan import SurgeryOptions, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec
from lrsurgery.surgery.rows import Replacement

CONVS: dict[str, dict[str, Any]] = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
    "dilated": {"kernel_size": 3, "dilation": (1, 2), "stride": 2, "padding": 2},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1, "stride": 2},
}
SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
}


def rows_of(model: nn.Module, conv: str = "channel") -> list[Replacement]:
    rows = plan_rows(model, SurgeryOptions(target=RankSpec(FractionRank(1.0)), conv=conv, allow_larger=True))
    return [row for row in rows if isinstance(row, Replacement)]


def squares(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    """A loss whose gradients are the outputs themselves."""
    return outputs.square().sum() / 2, len(outputs)


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_convolution_is_the_matrix_of_its_scheme(scheme: str, options: dict[str, Any]) -> None:
    """The metric of the inputs is the error of the (first) convolution, that of the gradients what autograd says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, **options), nn.ReLU(inplace=True))
    x, other = torch.randn(4, 3, 9, 8), torch.randn(3, 3, 7, 8)
    statistics = lrsurgery.collect_statistics(model, [x, (other,)], conv=scheme, loss=squares)
    seen, moments = statistics.uses["0"], statistics.moments("0")

    factorised = nn.Sequential(nn.Conv2d(3, 5, **options))
    factorised.load_state_dict(model.state_dict())
    lrsurgery.factorise_(factorised, rank=1.0, conv=scheme, allow_larger=True)
    layer = factorised_layers(factorised)["0"]
    u, v = layer.factors
    middles = []
    for images in (x, other):
        middle = layer.v(images).detach().requires_grad_()
        F.relu(layer.u(middle)).square().sum().div(2).backward()
        middles.append(middle)
    inner = sum(float(m.detach().double().square().sum()) for m in middles)
    assert seen.positions == sum(m[:, 0].numel() for m in middles)
    assert weighted_norm(v.detach(), Metric(moments.inputs)) ** 2 * seen.positions == pytest.approx(inner, rel=1e-4)
    # by the chain rule the first half's gradients are those of the whole matrix's outputs, times U
    grads = torch.cat([m.grad.transpose(0, 1).flatten(1) for m in middles], dim=1)  # type: ignore[union-attr]
    assert moments.gradients is not None
    wanted = grads @ grads.T / (len(x) + len(other))
    torch.testing.assert_close(u.detach().T @ moments.gradients @ u.detach(), wanted, rtol=1e-3, atol=1e-3)


OTHER_CONVS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "1-d": (nn.Conv1d, (11,), {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}),
    "1-d, circular": (nn.Conv1d, (11,), {"kernel_size": 4, "padding": 2, "padding_mode": "circular"}),
    "3-d": (nn.Conv3d, (5, 6, 7), {"kernel_size": (2, 3, 1), "stride": (1, 2, 2), "padding": (1, 0, 2)}),
    "3-d, same": (nn.Conv3d, (5, 6, 7), {"kernel_size": (2, 3, 1), "padding": "same", "dilation": (1, 2, 1)}),
}


@pytest.mark.parametrize("most", [1, 100, 1 << 24], ids=["a row at a time", "some", "all at once"])
@pytest.mark.parametrize("name", OTHER_CONVS)
def test_convolutions_of_other_dimensions(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram matrix of the inputs is the Jacobian of the outputs in the weight, that of the gradients autograd's."""
    monkeypatch.setattr("lrsurgery.surgery.kinds.convolution.PATCHES", most)
    torch.manual_seed(0)
    conv, size, options = OTHER_CONVS[name]
    model = nn.Sequential(conv(2, 4, **options))
    x, alone = torch.randn(3, 2, *size), torch.randn(2, *size)
    statistics = lrsurgery.collect_statistics(model, [x, alone], loss=lambda out, _: (out.square().sum() / 2, 1))
    moments, use = statistics.moments("0"), statistics.uses["0"]

    one = conv(2, 1, bias=False, **options)  # the outputs of one channel are the patches times its weight
    patches = []
    for images in (x, alone[None]):
        jacobian = torch.autograd.functional.jacobian(
            lambda weight, images=images: torch.func.functional_call(one, {"weight": weight}, images).flatten(),
            one.weight.detach(),
        )
        patches.append(jacobian.flatten(1))
    inputs = torch.cat(patches)
    outputs = [model(images).detach().transpose(0, 1).flatten(1) for images in (x, alone[None])]
    whole = torch.cat(outputs, 1)
    assert (use.positions, use.outputs) == (len(inputs), whole.shape[1])
    torch.testing.assert_close(moments.inputs, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)
    assert moments.gradients is not None
    torch.testing.assert_close(moments.gradients, whole @ whole.T / 2, rtol=1e-4, atol=1e-4)


def test_a_linear_layer_is_sums_of_outer_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    x = torch.randn(5, 7, 6)
    statistics = lrsurgery.collect_statistics(model, [x[:2], x[2:]], loss=squares)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    hidden = model[0](x).detach().requires_grad_()
    inner = torch.tanh(hidden).detach().requires_grad_()
    model[2](torch.tanh(hidden)).square().sum().div(2).backward()
    flat = hidden.grad.flatten(0, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(statistics.moments("0").inputs, x.flatten(0, 1).T @ x.flatten(0, 1) / 35)
    torch.testing.assert_close(statistics.moments("0").gradients, flat.T @ flat / 5)
    torch.testing.assert_close(statistics.moments("2").inputs, inner.flatten(0, 1).T @ inner.flatten(0, 1) / 35)


class Mixed(nn.Module):
    """Two predictions of each input, whose gradients meet in the one layer below them."""

    def __init__(self, surer: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)
        self.surer = surer

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return torch.stack([h[:, :3], h[:, 3:] + h[:, :3]], dim=1) + torch.tensor([self.surer, 0.0, 0.0])


@pytest.mark.parametrize(
    ("surer", "temperature"),
    [(0.0, 1.0), (10.0, 1.0), (10.0, 2.0), (1.0, 4.0)],
    ids=["unsure", "nearly sure", "nearly sure, softened", "softened"],
)
def test_classes_drawn_from_the_model_give_its_fisher_information(surer: float, temperature: float) -> None:
    """The mean over all classes, by autograd; the nearly sure one has 2 in 20,000 draws of an unlikely class.

    Softened by T, it is T^2 times the Fisher information of the logits / T.
    """
    torch.manual_seed(0)
    model, x = Mixed(surer), 0.3 * torch.randn(20_000, 4)
    statistics = lrsurgery.collect_statistics(model, [x], temperature=temperature)
    assert statistics.temperature == temperature
    hidden = model.layer(x).detach().requires_grad_()
    halves = hidden[:, :3], hidden[:, 3:] + hidden[:, :3]
    wanted = torch.zeros(6, 6)
    for half in halves:
        log_p = ((half + torch.tensor([surer, 0.0, 0.0])) / temperature).log_softmax(-1)
        for c in range(3):
            g = temperature * torch.autograd.grad(log_p[:, c].sum(), hidden, retain_graph=True)[0]
            wanted += (g * log_p[:, c : c + 1].exp().detach()).T @ g / (2 * len(x))
    found = statistics.moments("layer").gradients
    assert found is not None
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


class Encoder(nn.Module):
    """Hidden states without a head, as transformers' encoders return them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.layer(x).tanh())


def test_random_projections_of_the_pooled_output_are_its_gauss_newton_matrix() -> None:
    """Against the Jacobian of the pooled output, of unit length, by autograd, over all that is not padding."""
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(4, 5, 4)
    mask = torch.ones(4, 5)
    mask[0, 3:] = mask[2, 1:] = 0
    batch = {"x": x.repeat(2000, 1, 1), "attention_mask": mask.repeat(2000, 1)}
    statistics = lrsurgery.collect_statistics(model, [batch], loss=ProjectionLoss(0))

    def pooled(y: Tensor) -> Tensor:
        mean = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(y.tanh(), mask, strict=True)])
        return mean / mean.norm(dim=1, keepdim=True)

    jacobian = torch.autograd.functional.jacobian(pooled, model.layer(x).detach()).sum(2)  # (n, out, positions, 3)
    wanted = torch.einsum("nopi,nopj->ij", jacobian, jacobian) / 4
    found = statistics.moments("layer").gradients
    assert found is not None
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_padding_does_not_count() -> None:
    """A batch of unlike lengths, filled up, says what its rows say one at a time."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL_LLAMA)).eval()
    ids = torch.randint(0, 30, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

    def certain(outputs: Any, batch: Any) -> tuple[Tensor, int]:  # nothing drawn, so that both can be compared
        counted = batch["attention_mask"].bool()
        return outputs.logits[counted].square().sum(), int(counted.sum())

    whole = {"input_ids": ids, "attention_mask": mask}
    alone = [{"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in ((0, 6), (1, 3))]
    for metric in ("fisher", "activations"):
        together = lrsurgery.collect_statistics(model, [whole], importance=metric, loss=certain)
        apart = lrsurgery.collect_statistics(model, alone, importance=metric, loss=certain)
        for name, seen in together.uses.items():
            assert seen == apart.uses[name]
            assert seen.positions == 9
            ours, theirs = together.moments(name), apart.moments(name)
            torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=1e-4, atol=1e-5)
            if metric == "fisher":
                torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-3, atol=1e-4)


def test_a_shared_layer_adds_up_and_an_unused_one_says_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(self.layer(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(8, 4)
    statistics = lrsurgery.collect_statistics(model, [x], importance="activations")
    again = model.layer(x).detach()
    torch.testing.assert_close(statistics.moments("layer").inputs, (x.T @ x + again.T @ again) / 16)
    assert statistics.unused_layers() == ["unused"]
    assert statistics.metric("unused") is None
    before = model.unused.weight.detach().clone()
    lrsurgery.factorise_(model, rank=2, statistics=statistics, allow_larger=True)
    u, _, _ = torch.linalg.svd(before)
    best = before - u[:, :2] @ u[:, :2].T @ before
    assert float((before - model.unused.weight.detach()).norm()) == pytest.approx(float(best.norm()), rel=1e-4)


def test_inputs_that_are_not_finite_name_the_first_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    for metric in ("activations", "fisher"):
        with pytest.raises(CalibrationError, match=r"^1: its inputs hold NaN or Inf"):
            lrsurgery.collect_statistics(model, [torch.randn(3, 4)], importance=metric)
    assert all(p.requires_grad for p in model.parameters())


def test_several_passes_and_running_blocks_again_change_nothing() -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SMALL_LLAMA, attention_dropout=0.5)
    model = tf.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 30, (2, 6))} for _ in range(3)]
    rows = rows_of(model)

    def collected(limit: int | None) -> dict[str, Any]:
        found = collect(model, batches, rows, importance="fisher", loss=Cycle(), store=MemoryStore(), limit=limit)
        return {name: (found.uses[name], found.moments(name)) for name in found.uses}

    once = collected(None)
    limit = 4 * 3 * (24**2 + 16**2)
    assert 2 < len(split(rows, limit)) < len(rows)
    several = collected(limit)
    checkpoint_blocks_(model)
    again = collected(None)
    for name, (seen, moments) in once.items():
        for other in (several, again):
            assert other[name][0] == seen
            torch.testing.assert_close(other[name][1].inputs, moments.inputs)
            torch.testing.assert_close(other[name][1].gradients, moments.gradients)


class Cycle(SampledLoss):
    """The same draws each time, so that runs can be compared."""

    def __init__(self) -> None:
        super().__init__(0)

    def __call__(self, outputs: Any, batch: Any) -> tuple[Tensor, int]:
        self._generator = None
        return super().__call__(outputs, batch)


def test_batches_that_are_none_and_unknown_importances_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="no calibration batch"):
        lrsurgery.collect_statistics(model, [])
    with pytest.raises(CalibrationError, match="unknown importance 'cosine'; known: fisher, activations"):
        lrsurgery.collect_statistics(model, [torch.randn(2, 4)], importance="cosine")
    with pytest.raises(CalibrationError, match="without logits; pass a loss"):
        lrsurgery.collect_statistics(nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), [torch.randn(2, 4)])


def test_a_bfloat16_model_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    x = torch.randn(3000, 6).bfloat16()
    moments = lrsurgery.collect_statistics(model, list(x.split(100)), importance="activations").moments("0")
    wanted = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(moments.inputs.double(), wanted, rtol=1e-5, atol=1e-5)
    lrsurgery.factorise_(model, rank=2, statistics=lrsurgery.collect_statistics(model, [x]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert KINDS["linear"].to_matrices(model[0].u.weight, model[0].v.weight).u.shape == (4, 2)


def test_flattened_inputs_are_masked_too() -> None:
    """As OPT's layers are given theirs."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 3)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    statistics = lrsurgery.collect_statistics(Flat(), [{"x": x, "attention_mask": mask}])
    counted = x[mask.bool()]
    assert statistics.uses["layer"].positions == 7
    torch.testing.assert_close(statistics.moments("layer").inputs, counted.T @ counted / 7)


def test_an_input_that_was_changed_in_between_is_another_one() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.one(x) + self.two(x.mul_(2))  # type: ignore[no-any-return]

    statistics = lrsurgery.collect_statistics(InPlace(), [torch.randn(6, 4)], importance="activations")
    one, two = (statistics.moments(name).inputs for name in ("one", "two"))
    torch.testing.assert_close(two, 4 * one)


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    def steep(outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return (outputs - outputs.detach()).abs().sqrt().sum(), len(outputs)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        CalibrationError, match=r"^1: its gradients hold NaN or Inf; --importance activations needs none"
    ):
        lrsurgery.collect_statistics(model, [torch.randn(3, 4)], loss=steep)


def test_logits_that_are_not_finite_are_told() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 1e39  # type: ignore[no-any-return]

    with pytest.raises(CalibrationError, match="logits hold NaN or Inf"):
        lrsurgery.collect_statistics(Overflowing(), [torch.randn(5, 4)])
    ruled_out = torch.tensor([[0.5, -torch.inf, 1.0]]).requires_grad_()
    value, _ = SampledLoss(0)(ruled_out, None)
    value.backward()  # type: ignore[no-untyped-call]
    assert ruled_out.grad is not None
    assert ruled_out.grad[0, 1] == 0
    assert bool((ruled_out.grad[0, ::2] != 0).all())


def test_flops_of_layers_that_saw_nothing_are_not_known() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    model = Unused()
    statistics = lrsurgery.collect_statistics(model, [torch.randn(9, 20)], importance="activations")
    with pytest.raises(BudgetError, match="no layer received calibration input"):
        lrsurgery.factorise_(model, budget="flops:0.5", statistics=statistics, include=["unused"])


@pytest.mark.parametrize("marked", ["attention_mask", "labels"])
def test_only_what_counts_is_scored(marked: str) -> None:
    """Padding does not, nor what masked language modelling leaves out."""
    counted = torch.tensor([[True, False, True], [False, False, True]])
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mark = counted.long() if marked == "attention_mask" else torch.where(counted, 4, -100)
    loss = SampledLoss(0)
    value, count = loss({"logits": logits}, {marked: mark})
    value.backward()  # type: ignore[no-untyped-call]
    assert count == 3
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, counted)
    p = logits.detach()[counted].softmax(-1)
    assert loss.uncertainty == pytest.approx(float((1 - p.square().sum(-1)).mean()), rel=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_the_fisher_information_of_independent_outputs_is_the_hessian_of_their_loss(binary: bool) -> None:
    """Against autograd, of the loss that transformers takes; random signs leave the diagonal exact in every draw."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, requires_grad=True)
    if binary:

        def loss(z: Tensor) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))

    else:

        def loss(z: Tensor) -> Tensor:
            return torch.nn.functional.mse_loss(z, torch.zeros(1, 4))

    wanted = torch.autograd.functional.hessian(loss, logits.detach()).reshape(4, 4)
    estimate, draws = IndependentLoss(0, binary=binary), 2000
    mean = torch.zeros(4, 4)
    for _ in range(draws):
        value, count = estimate({"logits": logits}, None)
        (g,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(g[0].square(), wanted.diagonal())
        mean += g.T @ g / draws
    assert count == 1
    torch.testing.assert_close(mean, wanted, rtol=0, atol=5 * float(wanted.max()) / draws**0.5)


@pytest.mark.parametrize("kept", ["in memory", "in a folder"])
def test_what_was_seen_on_two_occasions_adds_up(kept: str, tmp_path: Path) -> None:
    x, g = torch.randn(9, 4), torch.randn(9, 3)
    store = MemoryStore() if kept == "in memory" else StatisticsWriter(tmp_path)
    for rows in (slice(0, 2), slice(2, 9)):
        part, use = x[rows], LayerUse("linear", 3, 4, len(x[rows]), len(x[rows]))
        store.add("layer", use, Moments(part.T @ part / len(part), g[rows].T @ g[rows]))
    found = store.finish({"metric": "fisher"})
    assert (found.uses["layer"].positions, found.uses["layer"].outputs) == (9, 9)
    torch.testing.assert_close(found.moments("layer").inputs, x.T @ x / 9)
    torch.testing.assert_close(found.moments("layer").gradients, g.T @ g)


def test_statistics_of_another_scheme_or_shape_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    x = torch.randn(2, 3, 6, 6)
    statistics = lrsurgery.collect_statistics(model, [x], importance="activations", conv="channel")
    with pytest.raises(CalibrationError, match="0 was calibrated as conv2d-channel, but is planned as conv2d-spatial"):
        lrsurgery.factorise_(model, rank=1, conv="spatial", statistics=statistics)
    with pytest.raises(CalibrationError, match=r"0 was \(5, 27\) and is \(6, 27\) here"):
        lrsurgery.factorise_(nn.Sequential(nn.Conv2d(3, 6, 3)), rank=1, statistics=statistics)


def test_statistics_whose_files_were_mixed_up_are_refused(tmp_path: Path) -> None:
    writer = StatisticsWriter(tmp_path)
    for name in ("one", "two"):
        writer.add(name, LayerUse("linear", 4, 4, 1, 1), Moments(torch.randn(4, 4), None))
    found = writer.finish({"metric": "activations"})
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].write_bytes(files[1].read_bytes())
    found.moments("two")
    with pytest.raises(CalibrationError, match=r"00000\.safetensors: damaged, or of other"):
        found.moments("one")


def test_without_gradients_statistics_are_those_of_the_activations() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(9, 6)
    both = lrsurgery.collect_statistics(model, [x])
    assert both.has_gradients
    inputs = both.without_gradients()
    alone = lrsurgery.collect_statistics(model, [x], importance="activations")
    assert not inputs.has_gradients
    for name in ("0", "1"):
        ours, theirs = inputs.metric(name), alone.metric(name)
        assert ours is not None
        assert theirs is not None
        assert ours.gradients is theirs.gradients is None
        torch.testing.assert_close(ours.inputs, theirs.inputs)


@pytest.mark.parametrize(("positions", "shares"), [(10_000, (1e-3, 1e-2)), (10, (0.04, 0.09)), (1, (1.0, 1.0))])
def test_moments_of_few_positions_are_damped_more(positions: int, shares: tuple[float, float]) -> None:
    """By (size / 2 positions)^2 of the inputs' mean diagonal, (size / positions)^2 of the gradients'; at most by 1."""
    x, g = torch.randn(50, 4), torch.randn(50, 3)
    store = MemoryStore()
    store.add("layer", LayerUse("linear", 3, 4, positions, positions), Moments(x.T @ x, g.T @ g))
    metric = store.finish({"metric": "fisher"}).metric("layer")
    assert metric is not None
    for found, wide, share in zip(metric, ((x.T @ x).double(), (g.T @ g).double()), shares, strict=True):
        wanted = wide + share * wide.diagonal().mean() * torch.eye(len(wide))
        torch.testing.assert_close(found, wanted)
