"""Grouped convolutions: a matrix a group, one rank for all of them, against an ordinary convolution for each group."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrsurgery
from lrsurgery.errors import PlanError
from lrsurgery.linalg.weighted import weighted_norm
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.layers import FactorisedLayer, Spec
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept

# name -> (layer of 3 groups, shape of an input)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "2-d": (lambda: nn.Conv2d(6, 48, (3, 2), (2, 1), (1, 0), (1, 2), groups=3), (2, 6, 9, 8)),
    "1x1": (lambda: nn.Conv2d(60, 48, 1, groups=3, bias=False), (2, 60, 5, 4)),
    "more inputs": (lambda: nn.Conv2d(60, 48, 3, groups=3, padding="same"), (2, 60, 5, 4)),
    "1-d": (lambda: nn.Conv1d(6, 48, 8, padding=4, groups=3), (2, 6, 9)),
    "3-d": (lambda: nn.Conv3d(6, 48, (2, 3, 1), groups=3, padding=1, padding_mode="circular"), (2, 6, 4, 5, 6)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 48, 4, groups=3), dim=2),
        (2, 12, 9),
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = nn.Sequential(build()).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, torch.randn(*shape, dtype=dtype)


def low(model: nn.Sequential, rank: Any = 4, **options: Any) -> tuple[nn.Sequential, FactorisedLayer]:
    model = copy.deepcopy(model)
    lrsurgery.factorise_(model, rank=rank, allow_larger=True, **options)
    (layer,) = factorised_layers(model).values()
    return model, layer


def matrices(weight: Tensor) -> Tensor:
    return weight.detach().reshape(3, 16, -1)


def plain(dense: Any) -> Any:
    """An ordinary convolution in the place of one with a weight norm."""
    if not hasattr(dense, "parametrizations"):
        return copy.deepcopy(dense)
    product = nn.Conv1d(12, 48, 4, groups=3).double()
    product.bias = dense.bias
    return product


def alone(dense: Any, group: int) -> Any:
    """The ordinary convolution of one group."""
    inputs = dense.in_channels // 3
    base = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(dense, c))
    one = base(
        inputs,
        16,
        dense.kernel_size,
        dense.stride,
        dense.padding,
        dense.dilation,
        bias=dense.bias is not None,
        padding_mode=dense.padding_mode,
    ).to(dense.weight.dtype)
    one.weight.data = dense.weight.detach()[16 * group : 16 * group + 16].clone()
    if dense.bias is not None:
        one.bias.data = dense.bias.detach()[16 * group : 16 * group + 16].clone()
    return one


@pytest.mark.parametrize("name", LAYERS)
def test_every_group_is_the_best_of_its_rank(name: str) -> None:
    model, x = make(name)
    weight = model[0].weight.detach()
    full, layer = low(model, 1.0)
    assert layer.groups == 3
    torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-9)
    for form in ("balanced", "pivoted"):  # which it does not have
        found, layer = low(model, 4, form=form)
        assert (layer.rank, layer.form, layer.v.out_channels, layer.u.in_channels) == (4, "balanced", 12, 12)
        left_out = torch.linalg.svdvals(matrices(weight))[:, 4:].norm()
        torch.testing.assert_close((layer.weight - weight).norm().detach(), left_out, rtol=1e-9, atol=1e-9)
        # its product in an ordinary grouped convolution computes the same
        product = plain(model[0])
        product.weight.data = layer.weight.detach() + 0
        torch.testing.assert_close(found(x), product(x), rtol=1e-9, atol=1e-9)
    densified = copy.deepcopy(found)
    lrsurgery.densify_(densified)
    assert densified[0].groups == 3
    torch.testing.assert_close(densified(x), found(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_counts_and_report(name: str) -> None:
    model, _ = make(name)
    weight = model[0].weight.detach()
    (planned,) = make_plan(model, SurgeryOptions(target=parse_rank(4), allow_larger=True)).replacements
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.flops == 2 * weight.numel()
    found, layer = low(model, 4)
    assert planned.factorised_parameters == sum(p.numel() for p in found.parameters())
    assert planned.factorised_flops == 2 * (layer.u.weight.numel() + layer.v.weight.numel())
    (row,) = lrsurgery.rank_report(found, against=model).rows
    values = torch.linalg.svdvals(matrices(weight))
    assert (row.groups, row.full_rank, row.shape) == (3, values.shape[1], tuple(weight.shape))
    assert row.relative_error == pytest.approx(float(values[:, 4:].norm() / values.norm()), rel=1e-6)
    assert row.energy_kept == pytest.approx(float(values[:, :4].norm() / values.norm()) ** 2, rel=1e-6)
    assert row.spectral_error == pytest.approx(float(values[:, 4].norm() / values[:, 0].norm()), rel=1e-6)
    assert row.spectrum_before is not None
    stacked = values.square().sum(0).sqrt().tolist()
    assert row.spectrum_before.value[:3] == pytest.approx(stacked[:3], rel=1e-4)
    assert row.balance == pytest.approx(0, abs=1e-9)
    assert row.break_even == max(r for r in range(100) if r * (16 + weight[0].numel()) < 16 * weight[0].numel())


def test_energy_decides_by_all_groups_together() -> None:
    model, _ = make("2-d")
    values = torch.linalg.svdvals(matrices(model[0].weight)).square().sum(0)
    kept = values.cumsum(0) / values.sum()
    for share in (0.5, 0.8, 0.9):
        _, layer = low(model, f"energy:{share}")
        assert layer.rank == int((kept < share).sum()) + 1


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "weight norm"])
def test_moments_and_the_best_in_their_metric_are_those_of_each_group(name: str) -> None:
    model, x = make(name, torch.float32)
    dense: Any = model[0]

    def loss(outputs: Any, batch: Any) -> tuple[Tensor, int]:
        return outputs.square().sum() / 2, len(outputs)

    statistics = lrsurgery.collect_statistics(model, [x], loss=loss, conv="channel")
    moments, metric = statistics.moments("0"), statistics.metric("0")
    assert moments.gradients is not None
    assert metric is not None
    _, layer = low(model, 4, statistics=statistics, conv="channel")
    weighted = 0.0
    for group in range(3):
        one = nn.Sequential(alone(dense, group))
        channels = dense.in_channels // 3
        own = lrsurgery.collect_statistics(
            one, [x[:, channels * group : channels * group + channels]], loss=loss, conv="channel"
        )
        other = own.moments("0")
        torch.testing.assert_close(moments.inputs[group], other.inputs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.gradients[group], other.gradients, rtol=1e-3, atol=1e-3)
        lrsurgery.factorise_(one, rank=4, statistics=own, conv="channel", allow_larger=True)
        best = one[0].weight.detach() + 0
        torch.testing.assert_close(layer.weight.detach()[16 * group : 16 * group + 16], best, rtol=1e-2, atol=1e-3)
        own_metric = own.metric("0")
        assert own_metric is not None
        weighted += (
            weighted_norm(dense.weight.detach()[16 * group : 16 * group + 16].flatten(1) - best.flatten(1), own_metric)
            ** 2
        )
    plan = make_plan(model, SurgeryOptions(target=parse_rank(4), conv="channel", allow_larger=True))
    from lrsurgery.calibration.allocate import Weights, allocate_ranks
    from lrsurgery.runtime import Compute

    weights = Weights(
        read=lambda _: dense.weight.detach(), widths={"0": 4}, stored_widths={"0": 4}, parameters=1, stored_bytes=1
    )
    (row,) = allocate_ranks(plan, weights, Compute(device=torch.device("cpu"), cache=False), statistics).replacements
    assert row.predicted_loss == pytest.approx(weighted / 2, rel=1e-3)


def test_a_budget_spends_on_the_group_spectra() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3, groups=4), nn.Conv2d(128, 64, 3, groups=2), nn.Conv2d(64, 32, 1))
    before = sum(p.numel() for p in model.parameters())
    lrsurgery.factorise_(model, budget=0.5, form="pivoted")
    assert {layer.groups for layer in factorised_layers(model).values()} == {2, 4}
    after = sum(p.numel() for p in model.parameters())
    assert 0.45 * before < after <= 0.51 * before


def test_small_groups_stay_dense() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1, groups=32)),
        *(nn.Conv1d(64, 64, 3, groups=4), nn.Linear(9, 9)),
    )
    for conv in ("auto", "spatial", "channel"):
        found = make_plan(model, SurgeryOptions(target=parse_rank(2), conv=conv))
        assert {row.name: row.reason for row in found.rows if isinstance(row, Kept)} == {
            "0": "grouped convolution with 8 outputs a group (16 needed)",
            "1": "depthwise convolution",
            "2": "depthwise convolution",
        }


@pytest.mark.parametrize("init", ["he", "spectral-ones", "spectral-shuffled", "random-directions"])
def test_other_inits(init: str) -> None:
    model, _ = make("2-d")
    _, layer = low(model, 4, init=init)
    u, v = layer.factors
    assert (u.shape, v.shape) == ((3, 16, 4), (3, 4, 12))
    assert len({float(each.norm()) for each in u}) > 1 or init == "spectral-ones"
    if init == "spectral-ones":
        torch.testing.assert_close(torch.linalg.svdvals(u @ v)[:, :4], torch.ones(3, 4, dtype=torch.float64))


def test_groups_of_another_number_are_refused() -> None:
    with pytest.raises(PlanError, match="0: has 3 groups, and 1 in the checkpoint"):
        swap_(nn.Sequential(nn.Conv2d(6, 48, 3, groups=3)), {"0": Spec("conv2d-channel", 4)})


@pytest.mark.parametrize("cardinality", [4])
def test_from_files(cardinality: int, tmp_path: Path) -> None:
    import json

    import timm
    import transformers as tf
    from support.checks import assert_close, load, run
    from support.tiny import write_images
    from timm.models import save_for_hf

    import lrsurgery.hf

    small: dict[str, Any] = {
        "layers": [1, 1, 1, 1],
        "channels": [32, 64, 64, 64],
        "cardinality": cardinality,
        "base_width": 24,
    }
    torch.manual_seed(0)
    model = timm.create_model("resnext50_32x4d", num_classes=5, **small)
    save_for_hf(model, tmp_path / "dense", safe_serialization=True, model_args=small)
    dense = lrsurgery.load_model(tmp_path / "dense")
    images = torch.randn(2, 3, 32, 32)

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Any = model(images)
        return found.logits if hasattr(found, "logits") else found  # type: ignore[no-any-return]

    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = lrsurgery.load_model(tmp_path / "full")
    assert {layer.groups for layer in factorised_layers(full).values()} == {1, cardinality}
    assert_close(logits(full), logits(dense), 1e-4)

    told = run("factorise", tmp_path / "dense", "--rank", "0.4", "--check", "--output", tmp_path / "low")
    low = lrsurgery.load_model(tmp_path / "low")
    rows = {row["name"]: row for row in told["layers"] if row["status"] == "factorised"}
    assert told["totals"]["parameters_after"] == sum(p.numel() for p in low.parameters())
    config = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    for name, layer in factorised_layers(low).items():
        assert config["layers"][name].get("groups", 1) == layer.groups
        matrix = layer.layout.to_matrix(dense.get_submodule(name).weight.detach())  # type: ignore[arg-type]
        values = torch.linalg.svdvals(matrix.reshape(layer.groups, -1, matrix.shape[1]))
        error = float(values[:, layer.rank :].norm() / values.norm())
        assert rows[name]["relative_error"] == pytest.approx(error, rel=1e-3)
    in_memory = lrsurgery.load_model(tmp_path / "dense")
    lrsurgery.factorise_(in_memory, rank="0.4", form="pivoted")
    assert torch.equal(logits(low), logits(in_memory))
    assert_close(logits(load(tf.AutoModelForImageClassification, tmp_path / "low")), logits(low), 1e-4)
    compared = run("report", tmp_path / "low", "--against", tmp_path / "dense")
    for row in compared["layers"]:
        if row["status"] == "factorised":
            assert row["relative_error"] == pytest.approx(rows[row["name"]]["relative_error"], rel=1e-3)
    run("report", tmp_path / "dense")

    run("export", tmp_path / "low", "--to", "dense", "--output", tmp_path / "back")
    assert_close(logits(lrsurgery.load_model(tmp_path / "back")), logits(low), 1e-4)

    data = write_images(tmp_path / "images", size=32)
    command = ("factorise", tmp_path / "dense", "--budget", "0.3", "--calibration", data, "--samples", "16")
    told = run(*command, "--save-statistics", tmp_path / "statistics", "--output", tmp_path / "half")
    half = lrsurgery.load_model(tmp_path / "half")
    assert told["totals"]["parameters_after"] == sum(p.numel() for p in half.parameters())
    assert cardinality in {layer.groups for layer in factorised_layers(half).values()}
    again = run(
        "factorise",
        tmp_path / "dense",
        "--budget",
        "0.3",
        "--statistics",
        tmp_path / "statistics",
        "--output",
        tmp_path / "again",
    )
    assert [row["rank"] for row in again["layers"]] == [row["rank"] for row in told["layers"]]
