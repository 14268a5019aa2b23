"""What it costs to form the products of a factorised LSTM on every call: EnCodec's shape at half of its full rank.

Two layers of 512, batch 1. EnCodec has 75 steps a second of sound.

    python examples/benchmarks/recurrent.py [--save]
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import harness
import torch
from torch import nn

import lrsurgery

STEPS = (1, 150, 1500, 6000)


def main() -> None:
    given = harness.parser(__doc__ or "").parse_args()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.LSTM(512, 512, 2)).eval().requires_grad_(False)
    half = copy.deepcopy(dense)
    lrsurgery.factorise_(half, rank=0.5, form="pivoted")
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        x = torch.randn(steps, 1, 512)
        runs = {"dense": functools.partial(dense, x), "half": functools.partial(half, x)}
        seconds = harness.in_turn(runs, given.repeats)
        rows.append({"steps": steps, **harness.ratio(seconds["half"], seconds["dense"])})
    harness.finish("recurrent", rows, given)


if __name__ == "__main__":
    main()
