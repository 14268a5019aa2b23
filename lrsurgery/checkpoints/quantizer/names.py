"""Names of factorised layers: in the config, in the files, and in the class of model that loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from lrsurgery.checkpoints.upstream.transformers import KeyMap, ignore_unexpected
from lrsurgery.errors import PlanError
from lrsurgery.surgery.kinds.table import KINDS, kind_of
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.parameters.views import dense_layers


def weight_key(name: str, spec: Spec) -> str:
    return KINDS[spec.kind].weight_key(name)


def match_names(model: PreTrainedModel, layers: Mapping[str, Spec]) -> dict[str, Spec]:
    """Rename layers to their names in `model`, which may be the base model of the checkpoint's class or the reverse.

    Transformers' loader decides where a layer's tensors go. Where it drops them, as it drops the heads of a checkpoint
    that is loaded into a base model, the layer is left out.

    Raises PlanError that names a layer which the checkpoint's own class lacks, or if the model has none of the layers.
    """
    modules, keys = dense_layers(model), KeyMap(model)
    prefix = model.base_model_prefix + "."
    matched: dict[str, Spec] = {}
    renamed: dict[str, str] = {}
    left_out: list[str] = []
    for name, spec in layers.items():
        loaded = (keys.target(weight_key(name, spec))[0] or "").removesuffix(".weight")
        candidates = (name, name.removeprefix(prefix), prefix + name, loaded)
        here = next((n for n in candidates if n and n in modules), None)
        if here is not None:
            matched[here], renamed[name] = spec, here
        else:
            left_out.append(name)
    own = type(model).__name__ in (model.config.architectures or [type(model).__name__])
    if left_out and (own or not matched):
        raise PlanError(
            f"{left_out[0]}: factorised in the checkpoint, but this {type(model).__name__} has no such layer"
        )
    return {name: _rename_leader(spec, renamed) for name, spec in matched.items()}


def with_partners(model: PreTrainedModel, layers: dict[str, Spec]) -> dict[str, Spec]:
    """The layers, with the heads that this class of model ties to a table among them and the checkpoint's has not."""
    tied: Mapping[str, str] = model.all_tied_weights_keys or {}
    modules, found = dict(model.named_modules()), dict(layers)
    for pair in tied.items():
        name, other = (key.removesuffix(".weight") for key in pair)
        for each, leader in ((name, other), (other, name)):
            if each in modules and each not in found and leader in layers and KINDS[layers[leader].kind].lookup:
                kind = kind_of(modules[each])
                assert kind is not None, each
                found[each] = Spec(kind.name, layers[leader].rank, layers[leader].side, tied_to=leader)
    return found


def _rename_leader(spec: Spec, renamed: Mapping[str, str]) -> Spec:
    v_of, tied_to = (None if name is None else renamed.get(name, name) for name in (spec.v_of, spec.tied_to))
    return spec._replace(v_of=v_of, tied_to=tied_to)


def config_names(model: PreTrainedModel, layers: dict[str, Spec]) -> dict[str, Spec]:
    """Rename layers to their names in config.json: those of the model class, or timm's for a wrapped timm model."""
    if model.config.model_type != "timm_wrapper":
        return layers
    renamed = {name: name.removeprefix("timm_model.") for name in layers}
    return {renamed[name]: _rename_leader(spec, renamed) for name, spec in layers.items()}


def ignore_tripwires(model: PreTrainedModel, names: set[str]) -> None:
    """Make the loader ignore the zero-length tensors under these keys, with the base model's prefix, without, or twice.

    Layers that differ in their numbers alone share a pattern, since transformers compiles all of them for each load.
    """
    prefix = model.base_model_prefix + "."
    alike = {re.sub(r"\d+", r"\\d+", re.escape(n.removeprefix(prefix))) for n in names}
    ignore_unexpected(model, {f"^({re.escape(prefix)}){{0,2}}{pattern}$" for pattern in alike})
