"""Batch normalisation behind compressed layers: its statistics, estimated again from what it is given now."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lrsurgery.modules import batch_norms
from lrsurgery.refine.activations import Cache, run
from lrsurgery.runtime import Processes


def refresh_norms_(block: nn.Module, given: Cache, numbers: Sequence[int], processes: Processes) -> bool:
    """Take the means and variances of a block's batch norms over these calls; whether it has any.

    The caller keeps them only where held-out samples say so: on weak models they help much, on strong ones they harm.
    """
    norms = batch_norms(block)
    if not norms:
        return False
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        with torch.no_grad():
            for number in numbers:
                run(block, given[number])
            for norm in norms:
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    processes.sum_(statistic).div_(processes.size)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return True
