"""Registration of all that transformers is told of the format, and models in memory that save as factorised.

Importing this module is what `import lrsurgery.hf` does.
"""

from __future__ import annotations

from torch import nn

import lrsurgery.checkpoints.pretrained.classes  # noqa: F401  (`from_config` and `save_pretrained` of all models)
from lrsurgery.checkpoints.pretrained.beside import forget_
from lrsurgery.checkpoints.quantizer.method import LowRankConfig, LowRankQuantizer, own_
from lrsurgery.checkpoints.quantizer.names import config_names
from lrsurgery.checkpoints.upstream.transformers import retie_
from lrsurgery.surgery.apply import specs_of


def attach_(model: nn.Module) -> None:
    """Make `save_pretrained` of a model factorised in memory write a factorised checkpoint."""
    retie_(model)
    own_(model, LowRankQuantizer(LowRankConfig.of(config_names(model, specs_of(model)))))


def detach_(model: nn.Module) -> None:
    """Undo `attach_`, for a model that is dense again; one that cannot be saved so keeps what refuses it."""
    quantizer = getattr(model, "hf_quantizer", None)
    retie_(model)
    forget_(model)
    if any(getattr(module, "folded", None) for module in model.modules()):
        return
    if isinstance(quantizer, LowRankQuantizer):
        quantizer.remove_quantization_config(model)
