"""`--budget time:0.7`: ranks by times of a made-up device; what a clock shows is never asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import lrsurgery
from lrsurgery.errors import BudgetError
from lrsurgery.factorise.work.rewrite import Rewriter
from lrsurgery.surgery import speed
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import Spec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("LRSURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def device(monkeypatch: pytest.MonkeyPatch, tile: int, fixed: float = 0.0) -> Callable[[Any, Spec | None], float]:
    """A device that works in tiles of so many ranks, and takes a fixed time for each product."""

    def seconds(dense: Any, spec: Spec | None) -> float:
        rows, columns = dense.weight.shape[0], dense.weight[0].numel()
        if spec is None:
            return fixed + 1e-9 * rows * columns
        tiles = -(-spec.rank // tile) * tile
        return 2 * fixed + 1e-9 * tiles * (rows + columns)

    monkeypatch.setattr(
        speed, "measure_speedup", lambda dense, spec, device, dtype: seconds(dense, None) / seconds(dense, spec)
    )
    monkeypatch.setattr(speed, "measure_seconds", lambda dense, device, dtype: seconds(dense, None))
    return seconds


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.small = nn.Linear(96, 160), nn.Linear(160, 96), nn.Linear(96, 24)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_layers_take_at_most_the_share_of_their_time(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = device(monkeypatch, tile=1, fixed=1e-6)
    model, dense = Three(), Three()
    lrsurgery.factorise_(model, budget=f"time:{share}")
    layers = factorised_layers(model)
    assert layers
    taken = sum(
        seconds(module, layers[name].spec if name in layers else None) for name, module in dense.named_children()
    )
    whole = sum(seconds(module, None) for module in dense.children())
    assert 0.9 * share * whole < taken <= share * whole * (1 + 1e-9)


def test_a_layer_that_no_rank_makes_faster_stays_dense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, tile=1, fixed=5e-6)  # a second product costs more than all of the small layer
    model = Three()
    lrsurgery.factorise_(model, budget="time:0.8")
    assert "small" not in factorised_layers(model)
    (folder / "speed.json").unlink()
    device(monkeypatch, tile=1)
    model = Three()
    lrsurgery.factorise_(model, budget="time:0.12")
    assert "small" in factorised_layers(model)


def test_a_share_that_no_ranks_reach_says_which_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, tile=1, fixed=5e-6)
    with pytest.raises(
        BudgetError, match=r"budget time:0\.1: out of reach; the smallest that can be met is time:0\.\d"
    ):
        lrsurgery.factorise_(Three(), budget="time:0.1")
    with pytest.raises(BudgetError, match="time is counted for the layers only; remove --budget-of"):
        lrsurgery.factorise_checkpoint(
            tiny.save_gpt2(tmp_path / "model"), tmp_path / "y", budget="time:0.5", budget_of="model", calibration="none"
        )


def test_a_convolution_needs_to_know_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, tile=1)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=4))
    with pytest.raises(BudgetError, match="number of positions of a convolution is unknown; add --calibration"):
        lrsurgery.factorise_(model, budget="time:0.5")
    x = torch.randn(4, 8, 20, 20)
    statistics = lrsurgery.collect_statistics(model, [x], importance="activations")
    lrsurgery.factorise_(model, budget="time:0.5", statistics=statistics)
    assert factorised_layers(model)
    assert model(x).shape == (4, 8, 4, 4)


def test_a_resumed_job_uses_the_times_of_the_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a machine whose speeds have changed and whose cache is gone, the files come out the same."""
    tiny.save_gpt2(tmp_path / "model")
    words = ["factorise", tmp_path / "model", "--budget", "time:0.6", "--calibration", "none", "--no-loss-check"]
    device(monkeypatch, tile=1)
    assert tiny.run(*words, "-o", tmp_path / "whole") == 0
    (folder / "speed.json").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        run = Rewriter.run

        def run_then_stop(self: Rewriter, *arguments: Any) -> None:
            run(self, *arguments)
            stop()

        patch.setattr(Rewriter, "run", run_then_stop)
        assert tiny.run(*words, "-o", tmp_path / "halves") != 0
    (folder / "speed.json").unlink()
    device(monkeypatch, tile=1, fixed=2e-7)
    assert tiny.run(*words, "-o", tmp_path / "halves", "--resume") == 0
    assert "device of the times" not in capfd.readouterr().err
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert files[0] == files[1]
    assert tiny.run(*words, "-o", tmp_path / "other") == 0  # the new speeds do matter
    layers = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["layers"]
        for name in ("whole", "other")
    ]
    assert layers[0] != layers[1]
    notes = json.loads((tmp_path / "whole" / "rank_report.json").read_text())["notes"]
    assert any("the time of the layers alone" in note for note in notes)
