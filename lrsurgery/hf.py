"""The transformers integration: importing this enables `from_pretrained` and the like for factorised checkpoints.

An installed package does so by itself, unless LRSURGERY_AUTOLOAD=0 (`checkpoints.quantizer.autoload`).
"""

from lrsurgery.checkpoints.pretrained.adapters import lora_targets
from lrsurgery.checkpoints.pretrained.register import attach_, detach_
from lrsurgery.checkpoints.quantizer.method import LowRankConfig, LowRankQuantizer

__all__ = ["LowRankConfig", "LowRankQuantizer", "attach_", "detach_", "lora_targets"]
