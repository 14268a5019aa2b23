"""What PEFT adapts in a model with factorised layers: their parts `u` and `v`, into which adapters merge as they are.

An adapter beside a whole layer, W + B A, has the rank of both: merging it would raise the rank of the layer, or cut
some of it off. One for each part, (U + B A) (V + D C), leaves the rank as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import PARTS, FactorisedLayer
from lrsurgery.surgery.shared.modules import SharedLinear

ALL_LINEAR = "all-linear"
ADAPTED = (*PARTS, nn.Embedding)  # classes that PEFT has adapters for, transformers' Conv1D besides


def lora_targets(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """The `target_modules` of a PEFT config that adapt these layers, low rank or dense.

    `targets` are names, or the last parts of names, as PEFT takes them, or "all-linear", which leaves out the output
    head and what is tied to the table of tokens. A dense layer is returned by its name, a factorised one by the names
    of its parts, which keep their rank when adapters are merged.

        LoraConfig(target_modules=lrsurgery.hf.lora_targets(model, ["q_proj", "v_proj"]))

    Raises SurgeryError for a name that no module has, or for a layer whose parts PEFT cannot adapt.
    """
    layers, modules = factorised_layers(model), dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise SurgeryError(f"{targets}: write a list of names, or {ALL_LINEAR!r}")
    if targets == ALL_LINEAR:
        chosen = list(_linear(model))
    else:
        chosen = [name for name in modules if any(name == t or name.endswith(f".{t}") for t in targets)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in chosen):
                near = get_close_matches(target, {name.rpartition(".")[2] for name in modules if name}, 3, 0.4)
                hint = f"; similar: {', '.join(near)}" if near else ""
                raise SurgeryError(f"{target}: no module of this {type(model).__name__} has this name{hint}")
    found: dict[str, None] = {}
    for name in chosen:
        found.update(dict.fromkeys(_parts(name, layers[name], names) if name in layers else [name]))
    return list(found)


def _parts(name: str, layer: FactorisedLayer, names: dict[int, str]) -> list[str]:
    """The names of the parts of a layer that PEFT can adapt; a shared v is that of the layer that stores it."""
    leader = names[id(layer.leader)] if isinstance(layer, SharedLinear) else name
    parts = [f"{leader}.v"] if isinstance(layer.v, ADAPTED) else []
    parts += [f"{name}.u"] if isinstance(layer.u, ADAPTED) else []
    if not parts:
        raise SurgeryError(f"{name}: PEFT has no adapter for the parts of a {layer.kind} layer; leave it out")
    return parts


def _linear(model: Any) -> Iterator[str]:
    """The linear layers of a model, dense or factorised, but for the output head and layers tied to others."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inner: set[int] = set()  # within factorised layers
    for name, module in model.named_modules():
        if isinstance(module, FactorisedLayer):
            inner.update(id(part) for part in module.modules() if part is not module)
        if module is head or id(module) in inner:
            continue
        low_rank = isinstance(module, FactorisedLayer) and isinstance(module.u, nn.Linear) and not module.tied
        if low_rank or isinstance(module, (nn.Linear, Conv1D)):
            yield name
