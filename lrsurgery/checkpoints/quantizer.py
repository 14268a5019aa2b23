"""A transformers quantizer that loads and saves factorised checkpoints through `from_pretrained`.

Factorised checkpoints give "lrsurgery" as their quantization method. Quantizers are transformers' extension point for
checkpoints whose modules differ from those of the config's class. Importing this module registers the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsurgery.checkpoints.mapping import with_tripwire
from lrsurgery.checkpoints.tensors import check_weights
from lrsurgery.checkpoints.upstream.forms import (
    FORMAT_VERSION,
    METHOD,
    LayerSpec,
    check_layers,
    layers_entry,
    specs_from,
)
from lrsurgery.checkpoints.upstream.transformers import KeyMap, ignore_unexpected, keep_names_plain, retie_
from lrsurgery.errors import PlanError, SourceError
from lrsurgery.files.json import check_version
from lrsurgery.surgery.apply import check_orders, check_storable, densify_layers_, factorised_layers, specs_of, swap_
from lrsurgery.surgery.kinds.table import KINDS, kind_of
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.tables.ties import copy_orders_


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a factorised checkpoint; `layers` maps names to {"kind": ..., "rank": ...}.

    Raises SourceError for a newer format or a malformed `layers`.
    """

    def __init__(
        self, layers: dict[str, LayerSpec] | None = None, format_version: int = FORMAT_VERSION, **_: object
    ) -> None:
        check_version(format_version, FORMAT_VERSION, "quantization_config")
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = check_layers(layers)

    @classmethod
    def of(cls, specs: Mapping[str, Spec]) -> LowRankConfig:
        return cls(**layers_entry(specs))

    @property
    def specs(self) -> dict[str, Spec]:
        """The factorised layers."""
        return specs_from(self.layers)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swap layers on the meta device before weights are loaded, and add the tripwire on saving."""

    requires_calibration = False
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: object
    ) -> PreTrainedModel:
        if checkpoint_files:  # none, if weights are given in memory
            files = [Path(file) for file in checkpoint_files]
            check_weights(files[0].parent, [*files, Path("config.json")])
        layers = with_partners(model, match_names(model, self.quantization_config.specs))
        tripwires = {_weight_key(name, spec) for name, spec in self.quantization_config.specs.items()}
        swap_(model, layers)
        retie_(model)
        # an AutoModel loaded from a checkpoint with a head, or the reverse, has other names than the config
        self.quantization_config = LowRankConfig.of(config_names(model, layers))
        ignore_tripwires(model, tripwires)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        state = model.state_dict()
        for name, shape in getattr(self, "_shapes", {}).items():
            # transformers 5.17 does not compare shapes if there is a quantizer
            if name in state and state[name].shape != shape:
                raise SourceError(
                    f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(shape)}; take the config.json"
                    " and the weights of one model"
                )
        copy_orders_(factorised_layers(model).values())
        check_orders(model)
        keep_names_plain(model, [layer.layout.weight_key(name) for name, layer in factorised_layers(model).items()])
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        check_storable(model)
        return with_tripwire(model, model.state_dict()), {}

    def _dequantize(self, model: PreTrainedModel, dtype: object = None) -> PreTrainedModel:
        densify_layers_(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)


def _weight_key(name: str, spec: Spec) -> str:
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
        loaded = (keys.target(_weight_key(name, spec))[0] or "").removesuffix(".weight")
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


def attach_(model: nn.Module) -> None:
    """Make `save_pretrained` of a model factorised in memory write a factorised checkpoint."""
    retie_(model)
    quantizer = LowRankQuantizer(LowRankConfig.of(config_names(model, specs_of(model))))
    quantizer_owner: Any = model
    quantizer_owner.hf_quantizer = quantizer
    quantizer_owner.is_quantized = True
    quantizer_owner.quantization_method = METHOD
    quantizer.postprocess_model(model)


def detach_(model: nn.Module) -> None:
    """Undo `attach_`, for a model that is dense again; one that cannot be saved so keeps what refuses it."""
    quantizer = getattr(model, "hf_quantizer", None)
    retie_(model)
    if any(getattr(module, "folded", None) for module in model.modules()):
        return
    if isinstance(quantizer, LowRankQuantizer):
        quantizer.remove_quantization_config(model)
