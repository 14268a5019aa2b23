"""`--conv auto`: each convolution takes the scheme that loses less, against every choice tried here."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import lrsurgery
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.surgery.apply import factorised_layers

SCHEMES = ("channel", "spatial")


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, (3, 2)), nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.randn(1, 3, 6, 7))
    with torch.no_grad():  # smooth kernels along one axis or the other, as trained ones are
        model[0].weight.mul_(0.1).add_(model[0].weight.mean(2, keepdim=True) * 3)
        model[2].weight.mul_(0.1).add_(torch.einsum("or,rikl->oikl", torch.randn(4, 2), torch.randn(2, 6, 3, 2)))
    return model.eval()


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(40, 3, 6, 7)


def squares(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    return outputs.square().sum() / 2, len(outputs)


def collect(model: nn.Module, conv: str) -> Statistics:
    return lrsurgery.collect_statistics(model, [images()], conv=conv, loss=squares, exclude=["4"])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def loss_of(model: nn.Module, dense: nn.Module, statistics: dict[str, Statistics]) -> float:
    """The second-order loss of a factorised model, each layer in the metric of its own scheme."""
    total = 0.0
    for name, layer in factorised_layers(model).items():
        metric = statistics[layer.kind.removeprefix("conv2d-")].metric(name)
        assert metric is not None
        assert metric.inputs is not None
        assert metric.gradients is not None
        error = layer.layout.to_matrix(dense.get_submodule(name).weight - layer.weight).detach().double()  # type: ignore[operator]
        total += 0.5 * float((metric.gradients @ error @ metric.inputs * error).sum())
    return total


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_no_schemes_and_ranks_within_the_budget_lose_less(share: float, form: str) -> None:
    """Against every scheme and rank of both layers, and dense."""
    dense = make_model()
    alone = {scheme: collect(dense, scheme) for scheme in SCHEMES}
    options: dict[str, Any] = {"form": form, "exclude": ["4"]}
    tried: dict[str, list[tuple[int, float]]] = {}
    for name in ("0", "2"):
        tried[name] = [(0, 0.0)]
        for scheme, rank in itertools.product(SCHEMES, range(1, 19)):
            model = copy.deepcopy(dense)
            try:
                lrsurgery.factorise_(model, rank=rank, conv=scheme, statistics=alone[scheme], include=[name], **options)
            except lrsurgery.SurgeryError:  # over break-even
                continue
            tried[name].append((parameters(model) - parameters(dense), loss_of(model, dense, alone)))
    budget = (share - 1) * sum(dense[int(name)].weight.numel() for name in tried)  # type: ignore[operator, arg-type]
    least = min(a[1] + b[1] for a, b in itertools.product(*tried.values()) if a[0] + b[0] <= budget)

    model = copy.deepcopy(dense)
    lrsurgery.factorise_(model, budget=share, statistics=collect(dense, "auto"), **options)
    assert parameters(model) - parameters(dense) <= budget
    assert loss_of(model, dense, alone) == pytest.approx(least, rel=1e-4)


def test_both_schemes_are_taken_where_each_is_better() -> None:
    model = make_model()
    lrsurgery.factorise_(model, budget=0.5, statistics=collect(model, "auto"), exclude=["4"])
    assert {layer.kind for layer in factorised_layers(model).values()} == {"conv2d-channel", "conv2d-spatial"}


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("rank", [1, 2, "params:0.6", "energy:0.8"])
def test_a_rank_is_the_parameters_of_channel_in_the_scheme_with_less_error(rank: Any, form: str) -> None:
    dense = make_model()
    found, channel = copy.deepcopy(dense), copy.deepcopy(dense)
    lrsurgery.factorise_(found, rank=rank, form=form, exclude=["4"])
    lrsurgery.factorise_(channel, rank=rank, form=form, conv="channel", exclude=["4"])
    for name, layer in factorised_layers(channel).items():
        weight = dense.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr]
        most = parameters(layer)
        errors = {"conv2d-channel": float((weight - layer.weight).norm())}
        for r in range(1, 19):
            spatial = nn.Sequential(copy.deepcopy(dense.get_submodule(name)))
            try:
                lrsurgery.factorise_(spatial, rank=r, conv="spatial")
            except lrsurgery.SurgeryError:
                break
            if parameters(spatial) <= most:
                errors["conv2d-spatial"] = float((weight - spatial[0].weight).norm())  # type: ignore[operator]
        chosen = found.get_submodule(name)
        assert chosen.kind == min(errors, key=errors.__getitem__)
        assert float((weight - chosen.weight).norm()) == pytest.approx(min(errors.values()), rel=1e-4)  # type: ignore[operator]
        assert parameters(chosen) <= most


def test_statistics_of_both_schemes_are_those_of_each() -> None:
    dense = make_model()
    both = collect(dense, "auto")
    for scheme in SCHEMES:
        alone = collect(dense, scheme)
        for name in ("0", "2"):
            found, wanted = both.moments(name, f"conv2d-{scheme}"), alone.moments(name)
            torch.testing.assert_close(found.inputs, wanted.inputs)
            torch.testing.assert_close(found.gradients, wanted.gradients)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_statistics_of_one_scheme_decide_for_it(scheme: str) -> None:
    dense = make_model()
    model = copy.deepcopy(dense)
    lrsurgery.factorise_(model, budget=0.5, statistics=collect(dense, scheme), exclude=["4"])
    assert {layer.kind for layer in factorised_layers(model).values()} == {f"conv2d-{scheme}"}
    for other in SCHEMES:  # and statistics of both are those of either
        one, two = copy.deepcopy(dense), copy.deepcopy(dense)
        lrsurgery.factorise_(one, budget=0.5, conv=other, statistics=collect(dense, "auto"), exclude=["4"])
        lrsurgery.factorise_(two, budget=0.5, conv=other, statistics=collect(dense, other), exclude=["4"])
        x = images()
        torch.testing.assert_close(one(x), two(x))


def test_inits_without_directions_keep_to_channel() -> None:
    model = make_model()
    lrsurgery.factorise_(model, rank=2, init="he", exclude=["4"])
    assert {layer.kind for layer in factorised_layers(model).values()} == {"conv2d-channel"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("schemes")
    tiny.save_timm(folder / "model")
    tiny.write_images(folder / "images")
    return folder


@pytest.mark.parametrize(
    "how", ["--rank 0.4", "--budget 0.5 --calibration DATA", "--rank energy:0.8 --calibration DATA"]
)
def test_the_plan_is_what_is_done_and_what_resumes(
    how: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["factorise", place / "model", *how.replace("DATA", str(place / "images")).split(), "--json"]
    done = []
    for more in (["--dry-run"], ["-o", tmp_path / "a"]):
        assert tiny.run(*words, *more) == 0
        done.append(json.loads(capfd.readouterr().out))
    decisions = [
        [(row["name"], row["kind"], row["rank"]) for row in each["layers"] if row["status"] == "factorised"]
        for each in done
    ]
    assert decisions[0] == decisions[1]
    layers = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["layers"]
    assert {name: (layer["kind"], layer["rank"]) for name, layer in layers.items()} == {
        name: (kind, rank) for name, kind, rank in decisions[0]
    }
    assert len({kind for _, kind, _ in decisions[0]}) > 1
    in_memory = lrsurgery.load_model(tmp_path / "a")
    assert {n: (layer.kind, layer.rank) for n, layer in factorised_layers(in_memory).items()} == {
        name: (kind, rank) for name, kind, rank in decisions[0]
    }


def test_report_plans_what_factorise_does(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = []
    for words in (
        ["report", place / "model", "--rank", "0.4"],
        ["factorise", place / "model", "--rank", "0.4", "--dry-run"],
    ):
        assert tiny.run(*words, "--json") == 0
        rows = json.loads(capfd.readouterr().out)["layers"]
        found.append({row["name"]: (row["kind"], row["rank"]) for row in rows if row["status"] == "factorised"})
    assert found[0] == found[1]


def test_statistics_of_one_scheme_are_said_to_be(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = place / "images"
    assert (
        tiny.run(
            "factorise",
            place / "model",
            "--budget",
            "0.5",
            "--calibration",
            data,
            "--conv",
            "spatial",
            "--save-statistics",
            tmp_path / "statistics",
            "-o",
            tmp_path / "a",
        )
        == 0
    )
    assert (
        tiny.run(
            "factorise",
            place / "model",
            "--budget",
            "0.5",
            "--statistics",
            tmp_path / "statistics",
            "-o",
            tmp_path / "b",
        )
        == 0
    )
    assert "hold one convolution scheme of" in capfd.readouterr().err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
