"""Weights that bitsandbytes packs into 4 bits, in a model that is loaded or quantised here."""

from __future__ import annotations

from torch import nn

SWITCH = "support_avx512bf16_for_cpu"  # of a bitsandbytes layer


def keep_layout_(model: nn.Module) -> None:
    """Keep bitsandbytes' layers from packing their weights anew on the first call, as on CPUs with AVX512-BF16.

    That raises for most ranks (64 must divide them), and rounds scales, which are then saved in another order
    (bitsandbytes 0.50).
    """
    for module in model.modules():
        if SWITCH in vars(module):
            setattr(module, SWITCH, False)
