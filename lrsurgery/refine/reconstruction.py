"""Reconstruction of a block: its parameters by Adam against the outputs of the dense block, without labels.

The dense block's outputs on the dense stream are the target, the compressed stream's inputs what it is given, so that a
block also makes up for the errors of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrsurgery.refine.activations import Cache, Masks, fitting, run
from lrsurgery.refine.options import Refinement
from lrsurgery.runtime import Processes

LOOKS = 10  # at the held-out samples, over the steps
HELD_OUT = 8  # one call of so many is held out
PATIENCE = 4  # looks in a row without gain; at each, the best state comes back and the rate falls to a third


@dataclass(frozen=True)
class Fit:
    """What fitting did to a block: relative squared errors of its outputs on held-out samples."""

    name: str
    before: float
    after: float
    steps: int  # of Adam, up to the kept state


class Samples:
    """What a block is given and should return, call by call.

    Errors are squared, relative to the mean square of the targets; where a block returns several tensors, the mean.
    Positions of padding do not count.
    """

    def __init__(self, given: Cache, targets: Cache, masks: Sequence[Masks], processes: Processes) -> None:
        self.given, self._targets, self._masks, self.processes = given, targets, masks, processes
        squares: list[float] = []
        for number in range(len(targets)):
            means = [float(_mean_square(target, masks[number])) for target in targets[number]]
            squares = means if not squares else [a + b for a, b in zip(squares, means, strict=True)]
        self._scales = [processes.mean(square / len(targets)) or 1.0 for square in squares]

    def __len__(self) -> int:
        return len(self.given)

    def loss(self, block: nn.Module, number: int) -> Tensor:
        """The error of the block in a call."""
        each = [
            _mean_square(output.float() - target, self._masks[number]) / scale
            for output, target, scale in zip(
                run(block, self.given[number]), self._targets[number], self._scales, strict=True
            )
        ]
        return torch.stack(each).mean()

    def error(self, block: nn.Module, numbers: Sequence[int]) -> float:
        """The mean error of the block over these calls, of all processes."""
        with torch.no_grad():
            found = sum(float(self.loss(block, number)) for number in numbers) / max(1, len(numbers))
        return self.processes.mean(found)


def _mean_square(x: Tensor, masks: Masks) -> Tensor:
    mask = fitting(masks, x.shape[:2]) if x.ndim > 2 else None
    return (x if mask is None else x[mask.to(x.device)]).square().mean()


def held_out(count: int) -> int:
    """How many of so many calls are held out; 0 of a single one."""
    return min(count - 1, max(1, count // HELD_OUT))


def fit_(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    options: Refinement,
    *,
    per_call: int,
    seed: int,
) -> int:
    """Fit the parameters of a block and return the steps up to the kept state, the best on held-out calls.

    A call holds `per_call` samples, and a step takes as many calls as `options.batch` asks for. The rate rises up to
    the first look: Adam's first steps would undo a good start, such as the closed form, and the rate would fall for it.
    """
    if not options.steps or not parameters:
        return 0
    count = len(samples)
    out = held_out(count)
    training, held = list(range(count - out)), list(range(count - out, count))
    best, chosen, worse, scale = samples.error(block, held), 0, 0, 1.0
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=options.lr, betas=(0.9, 0.95))
    order = _endless(training, torch.Generator().manual_seed(seed))
    processes = samples.processes
    calls = max(1, round(options.batch / (per_call * processes.size)))
    every = max(1, options.steps // LOOKS)
    try:
        for step in range(1, options.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = scale * options.lr * min(1.0, step / every) * _half_cosine((step - 1) / options.steps)
            optimizer.zero_grad(set_to_none=True)
            for number in (next(order) for _ in range(calls)):
                (samples.loss(block, number) / calls).backward()  # type: ignore[no-untyped-call]
            for parameter in parameters if processes.size > 1 else ():
                if parameter.grad is not None:
                    processes.sum_(parameter.grad).div_(processes.size)
            optimizer.step()
            if step % every and step != options.steps:
                continue
            now = samples.error(block, held)
            if now < best:
                best, chosen, worse = now, step, 0
                for copy, parameter in zip(kept, parameters, strict=True):
                    copy.copy_(parameter.detach())
            else:  # also for an error that is not finite
                worse += 1
                if worse == PATIENCE:
                    break
                scale /= 3
                _assign_(parameters, kept)
    finally:
        _assign_(parameters, kept)
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.requires_grad_(needed)
    return chosen


def _half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def _assign_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _endless(numbers: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[place]
