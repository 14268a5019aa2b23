"""The quantizer that makes factorised checkpoints load and save through transformers' own `from_pretrained`.

Factorised checkpoints name "lrsurgery" as their quantization method, transformers' extension point for folders whose
modules differ from their config's class. Importing this registers the method.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from lrsurgery.checkpoints.source import FORMAT_VERSION, METHOD, check_layers
from lrsurgery.checkpoints.upstream.transformers import ignore_unexpected, keep_names_plain
from lrsurgery.errors import PlanError, SourceError
from lrsurgery.files import Json
from lrsurgery.surgery.apply import densify_layers_, factorised_layers, swap_


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a factorised checkpoint: layers maps a layer's name to {"kind": ..., "rank": ...}."""

    def __init__(self, layers: dict[str, Json], format_version: int = FORMAT_VERSION, **_: object) -> None:
        if format_version > FORMAT_VERSION:
            raise SourceError(
                f"checkpoint format {format_version} is newer than this lrsurgery reads ({FORMAT_VERSION}); upgrade it"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = check_layers(layers)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the layers on the meta device before the weights are loaded, and puts the tripwire back on saving."""

    requires_calibration = False
    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        layers = names_in(model, self.quantization_config.layers)
        tripwires = {f"{name}.weight" for name in self.quantization_config.layers}
        swap_(model, {name: (spec["kind"], spec["rank"]) for name, spec in layers.items()})
        # an AutoModel on a head checkpoint, and the reverse, carries other names from here on
        self.quantization_config = LowRankConfig(names_in_config(model, layers))
        expect_tripwire(model, tripwires)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        state = model.state_dict()
        for name, shape in getattr(self, "_shapes", {}).items():
            # older transformers (5.17) compare no shapes where a quantizer is at work
            if name in state and state[name].shape != shape:
                raise SourceError(f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(shape)}")
        keep_names_plain(model, [f"{name}.weight" for name in factorised_layers(model)])
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def names_in(model: nn.Module, layers: Mapping[str, Json]) -> dict[str, Json]:
    """The layers under the names that `model` has for them: with or without the base model's prefix.

    A base model leaves out the layers of a head. Raises PlanError that names a layer which the model should have.
    """
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") + "."
    is_base = not prefix.removesuffix(".") or prefix.removesuffix(".") not in modules
    headed = is_base and any(name.startswith(prefix) for name in layers)
    found: dict[str, Json] = {}
    for name, spec in layers.items():
        here = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if here is not None:
            found[here] = spec
        elif not (headed and not name.startswith(prefix)):
            raise PlanError(
                f"{name}: the checkpoint has this layer factorised and {type(model).__name__} has no such layer"
            )
    return found


def names_in_config(model: PreTrainedModel, layers: dict[str, Json]) -> dict[str, Json]:
    """The names that config.json carries: the model class's own, and timm's own for a timm model in its wrapper."""
    if model.config.model_type != "timm_wrapper":
        return layers
    return {name.removeprefix("timm_model."): spec for name, spec in layers.items()}


def expect_tripwire(model: PreTrainedModel, names: set[str]) -> None:
    """Let a load pass over the zero-length tensors under these keys, in any spelling of the prefix."""
    prefix = model.base_model_prefix + "."
    patterns = {f"^{_escape(spelling)}$" for n in names for spelling in (n, n.removeprefix(prefix), prefix + n)}
    ignore_unexpected(model, patterns)


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def attach_(model: nn.Module) -> None:
    """Make a transformers model that was factorised in memory save and load as a factorised checkpoint."""
    layers = {name: {"kind": layer.kind, "rank": layer.rank} for name, layer in factorised_layers(model).items()}
    quantizer = LowRankQuantizer(LowRankConfig(names_in_config(model, layers)))
    quantizer_owner: Any = model
    quantizer_owner.hf_quantizer = quantizer
    quantizer_owner.is_quantized = True
    quantizer_owner.quantization_method = METHOD
    quantizer.postprocess_model(model)


def detach_(model: nn.Module) -> None:
    """The reverse of `attach_`, for a model that is dense again."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, LowRankQuantizer):
        quantizer.remove_quantization_config(model)
