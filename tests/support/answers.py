"""What the tests of tags, pairs and spans share: rows, moments of inputs one example at a time, FLOPs of a pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support import tiny

import lrsurgery
from lrsurgery.measure.workloads import Contender, count_flops, make_workload


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def moments_by_hand(model: Any, layer: str, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The mean of x x^T over the positions of examples that run one at a time, so that nothing is padded."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for each in inputs:
            model(**each)
    handle.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


def calibrated(folder: Path, data: Path, output: Path, *more: str) -> lrsurgery.Statistics:
    kept = output.with_name(f"{output.name}-statistics")
    command = ["factorise", folder, "--rank", "0.5", "--calibration", data, "--samples", "5", "--output", output]
    assert tiny.run(*command, "--save-statistics", kept, "--device", "cpu", "--quiet", *more) == 0
    return lrsurgery.Statistics.read(kept)


def flops_of(folder: Path) -> tuple[str, str, int]:
    """What `bench` times: the work, its unit, and the FLOPs of a pass."""
    contender = Contender.of(str(folder))
    model = contender.load(torch.device("cpu"), None)
    (work,) = contender.works
    workload = make_workload(model, contender.random_input(model, 2, 8, 0), work)
    assert workload is not None
    return work, contender.unit, count_flops(workload)
