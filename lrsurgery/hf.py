"""The transformers integration: after `import lrsurgery.hf`, `from_pretrained`, `pipeline` and `save_pretrained` work.

Factorised checkpoints name "lrsurgery" as their quantization method, transformers' extension point for folders whose
modules differ from their config's class. This registers the method, and holds all that we ask of transformers' loader.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsurgery.errors import PlanError, SourceError
from lrsurgery.surgery import factorised_layers, swap_

METHOD = "lrsurgery"
FORMAT_VERSION = 1


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a factorised checkpoint: layers maps a layer's name to {"kind": ..., "rank": ...}."""

    def __init__(self, layers: dict[str, dict[str, Any]], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        if format_version > FORMAT_VERSION:
            raise SourceError(
                f"checkpoint format {format_version} is newer than this lrsurgery reads ({FORMAT_VERSION}); upgrade it"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = check_layers(layers)


def check_layers(layers: Any) -> dict[str, dict[str, Any]]:
    """The `layers` entry of a config, as read. Raises SourceError for anything but name -> kind and rank."""
    well_formed = isinstance(layers, dict) and all(
        isinstance(spec, dict)
        and isinstance(spec.get("kind"), str)
        and isinstance(spec.get("rank"), int)
        and spec["rank"] > 0
        for spec in layers.values()
    )
    if not well_formed:
        raise SourceError("config.json: quantization_config.layers must map layer names to a kind and a rank")
    return dict(layers)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the layers on the meta device before the weights are loaded, and puts the tripwire back on saving."""

    requires_calibration = False
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        layers = names_in(model, self.quantization_config.layers)
        tripwires = {f"{name}.weight" for name in self.quantization_config.layers}
        swap_(model, {name: (spec["kind"], spec["rank"]) for name, spec in layers.items()})
        # an AutoModel on a head checkpoint, and the reverse, carries other names from here on
        self.quantization_config = LowRankConfig(names_in_config(model, layers))
        expect_tripwire(model, tripwires)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        state = model.state_dict()
        for name, shape in getattr(self, "_shapes", {}).items():
            # older transformers (5.17) compare no shapes where a quantizer is at work
            if name in state and state[name].shape != shape:
                raise SourceError(f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(shape)}")
        keep_names_plain(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return with_tripwire(model, model.state_dict()), {}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        from lrsurgery.surgery import densify_layers_

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


def names_in(model: nn.Module, layers: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers under the names that `model` has for them: with or without the base model's prefix.

    A base model leaves out the layers of a head. Raises PlanError that names a layer which the model should have.
    """
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") + "."
    is_base = not prefix.removesuffix(".") or prefix.removesuffix(".") not in modules
    headed = is_base and any(name.startswith(prefix) for name in layers)
    found: dict[str, dict[str, Any]] = {}
    for name, spec in layers.items():
        here = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if here is not None:
            found[here] = spec
        elif not (headed and not name.startswith(prefix)):
            raise PlanError(
                f"{name}: the checkpoint has this layer factorised and {type(model).__name__} has no such layer"
            )
    return found


def names_in_config(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The names that config.json carries: the model class's own, and timm's own for a timm model in its wrapper."""
    if model.config.model_type != "timm_wrapper":
        return layers
    return {name.removeprefix("timm_model."): spec for name, spec in layers.items()}


def expect_tripwire(model: PreTrainedModel, names: set[str]) -> None:
    """Lets a load pass over the zero-length tensors under these keys, in any spelling of the prefix."""
    prefix = model.base_model_prefix + "."
    patterns = {f"^{_escape(spelling)}$" for n in names for spelling in (n, n.removeprefix(prefix), prefix + n)}
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | patterns


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def with_tripwire(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict and, under the dense key of the first factorised layer, a zero-length tensor.

    A load without `import lrsurgery.hf` then fails on its shape, where it would go on with random layers.
    """
    for name, layer in factorised_layers(model).items():
        return {**state, f"{name}.weight": torch.empty(0, dtype=layer.u.weight.dtype)}
    return state


def keep_names_plain(model: PreTrainedModel) -> None:
    """Saves under the model's own names where transformers would fuse a factorised layer's weight with another's."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    converters = [c.reverse_transform() for c in conversions if isinstance(c, WeightConverter)]
    dense = [f"{name}.weight" for name in factorised_layers(model)]
    if any(converter.rename_source_key(key)[1] is not None for converter in converters for key in dense):
        model._weight_conversions = []


def attach_(model: PreTrainedModel) -> None:
    """Makes a transformers model that was factorised in memory save and load as a factorised checkpoint."""
    layers = {name: {"kind": layer.kind, "rank": layer.rank} for name, layer in factorised_layers(model).items()}
    quantizer = LowRankQuantizer(LowRankConfig(names_in_config(model, layers)))
    quantizer_owner: Any = model
    quantizer_owner.hf_quantizer = quantizer
    quantizer_owner.is_quantized = True
    quantizer_owner.quantization_method = METHOD
    quantizer.postprocess_model(model)


def detach_(model: PreTrainedModel) -> None:
    """The reverse of `attach_`, for a model that is dense again."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, LowRankQuantizer):
        quantizer.remove_quantization_config(model)


class KeyMap:
    """Where transformers' loader would put a checkpoint key in `model`, by transformers' own renamings."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        self._model = model
        self.state: dict[str, Tensor] = model.state_dict()

    def target(self, key: str) -> tuple[str | None, str | None]:
        """(state-dict key or None, the pattern of the converter that takes the tensor in or None)."""
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        if renamed not in self.state and key in self.state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self.state)
        return (renamed, pattern) if renamed in self.state else (None, None)

    def convert(self, target: str, pieces: list[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """What the converter behind these (source key, pattern, tensor) makes of them: state-dict key -> tensor."""
        converter = next(c for c in self._converters if pieces[0][1] in c.source_patterns)
        converter = copy.deepcopy(converter)
        for key, pattern, tensor in pieces:
            converter.add_tensor(target, key, pattern, tensor)
        made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether the model is one of transformers'."""
    return isinstance(model, PreTrainedModel)
