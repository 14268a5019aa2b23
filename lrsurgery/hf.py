"""The transformers integration: importing this enables `from_pretrained` and the like for factorised checkpoints."""

from lrsurgery.checkpoints.quantizer import LowRankConfig, LowRankQuantizer, attach_, detach_

__all__ = ["LowRankConfig", "LowRankQuantizer", "attach_", "detach_"]
