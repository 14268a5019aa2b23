"""The transformers integration: after `import lrsurgery.hf`, `from_pretrained`, `pipeline` and `save_pretrained` work."""

from lrsurgery.checkpoints.quantizer import LowRankConfig, LowRankQuantizer, attach_, detach_

__all__ = ["LowRankConfig", "LowRankQuantizer", "attach_", "detach_"]
