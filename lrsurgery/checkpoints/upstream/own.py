"""Models of one's own, and what they must have to be measured and trained as transformers' models are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.upstream.samples import sample_inputs

LIBRARIES = ("transformers", "timm", "torchvision")


def is_own(model: nn.Module) -> bool:
    """Tell whether the model's class is of neither library: registered by its author, or a checkpoint's own code."""
    return type(model).__module__.partition(".")[0] not in LIBRARIES


def lacks_for_loading(model: nn.Module) -> str | None:
    """What keeps transformers from loading a class; None if nothing does."""
    if hasattr(model, "all_tied_weights_keys"):
        return None
    return "does not call self.post_init() at the end of its __init__, without which transformers loads no model"


def lacks_argument(model: nn.Module, names: Sequence[str]) -> str | None:
    """Which of the arguments its forward does not take; None if it takes all of them."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    missing = [name for name in names if name not in parameters]
    return f"its forward does not take {', '.join(missing)}" if missing else None


def lacks_for_measuring(model: nn.Module, names: Sequence[str]) -> str | None:
    """What keeps a model with a head from being measured on inputs of these names; None if nothing does.

    Its forward is run on a few random tokens or pixels, on the device of its weights, be it meta.
    """
    if (found := lacks_argument(model, names)) is not None:
        return found
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {name: tensor.to(device) for name, tensor in sample_inputs(model)[-1].items()}
    if not inputs:
        return None
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    except Exception as e:
        if device.type == "meta" and isinstance(e, NotImplementedError):  # an operation that only this device lacks
            return None
        return f"its forward fails on {' and '.join(inputs)} ({' '.join(str(e).split())[:200]})"
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return None
    return f"its forward returns a {type(outputs).__name__} without logits, not one of transformers' outputs"
