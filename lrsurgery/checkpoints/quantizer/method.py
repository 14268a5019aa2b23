"""A transformers quantizer that loads and saves factorised checkpoints through `from_pretrained`.

Factorised checkpoints give "lrsurgery" as their quantization method. Quantizers are transformers' extension point for
checkpoints whose modules differ from those of the config's class. Importing this module registers the method. It does
so in every process that loads transformers (`autoload`), so what loads and saves models is imported only once that is
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsurgery.checkpoints.format import FORMAT_VERSION, METHOD

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from lrsurgery.checkpoints.upstream.forms import LayerSpec
    from lrsurgery.surgery.layers import Spec


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a factorised checkpoint; `layers` maps names to {"kind": ..., "rank": ...}.

    `then` is the quantization_config of the tool that quantised the factors, if one did.

    Raises SourceError for a newer format or a malformed `layers`.
    """

    def __init__(
        self,
        layers: dict[str, LayerSpec] | None = None,
        format_version: int = FORMAT_VERSION,
        then: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        from lrsurgery.checkpoints.upstream.forms import check_layers
        from lrsurgery.files.json import check_version

        check_version(format_version, FORMAT_VERSION, "quantization_config")
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = check_layers(layers)
        if then is not None:
            self.then = then

    @classmethod
    def of(cls, specs: Mapping[str, Spec], then: dict[str, Any] | None = None) -> LowRankConfig:
        from lrsurgery.checkpoints.upstream.forms import layers_entry

        entry = layers_entry(specs)
        return cls(**entry) if then is None else cls(entry["layers"], then=then)

    @property
    def specs(self) -> dict[str, Spec]:
        """The factorised layers."""
        from lrsurgery.checkpoints.upstream.forms import specs_from

        return specs_from(self.layers)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swap layers on the meta device before weights are loaded, and add the tripwire on saving."""

    requires_calibration = False
    quantization_config: LowRankConfig
    method = METHOD
    shapes: Mapping[str, torch.Size] = {}  # of the tensors that a load will fill

    def __init__(self, quantization_config: LowRankConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        # the quantizer of the factors, which are linear layers to it
        self.then: Any = None
        if self.then_config is not None:
            self.then = AutoHfQuantizer.from_config(dict(self.then_config), **options)

    @property
    def then_config(self) -> dict[str, Any] | None:
        return vars(self.quantization_config).get("then")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **options: object
    ) -> PreTrainedModel:
        from lrsurgery.checkpoints.quantizer.loading import swap_in_

        specs = swap_in_(model, self.quantization_config.specs, checkpoint_files or ())
        self.quantization_config = LowRankConfig.of(specs, self.then_config)
        if self.then is not None:
            self.then._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **options)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        from lrsurgery.checkpoints.quantizer.loading import finish_

        shapes, self.shapes = self.shapes, {}
        changed = finish_(model, shapes)
        if changed is not None:
            self.quantization_config = LowRankConfig.of(changed, self.then_config)
            model.config.quantization_config = self.quantization_config
        if self.then is None:
            model.is_quantized = False  # factors are ordinary weights: half(), float() and the like work on them
        else:
            from lrsurgery.checkpoints.quantizer.packed import keep_layout_
            from lrsurgery.checkpoints.upstream.transformers import forget_deserialisers_

            self.then._process_model_after_weight_loading(model)
            keep_layout_(model)
            forget_deserialisers_(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        from lrsurgery.checkpoints.quantizer.saving import weights_to_save

        return weights_to_save(model, self)

    # what the quantizer of the factors does in a load, where there is one

    def _other(self, base: Any) -> Any:
        return base if self.then is None else self.then

    def validate_environment(self, *args: Any, **options: Any) -> None:
        self._other(super()).validate_environment(*args, **options)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._other(super()).update_dtype(dtype)  # type: ignore[no-any-return]

    def update_device_map(self, device_map: Any) -> Any:
        return self._other(super()).update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return self._other(super()).adjust_max_memory(max_memory)  # type: ignore[no-any-return]

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        return self._other(super()).param_element_size(model, param_name, param)  # type: ignore[no-any-return]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        return self._other(super()).param_needs_quantization(model, param_name, **options)  # type: ignore[no-any-return]

    def get_quantize_ops(self) -> Any:
        return self._other(super()).get_quantize_ops()

    def get_weight_conversions(self) -> Any:
        return self._other(super()).get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:  # which 5.17 does not pass
        # the state of a load, such as the files' metadata, is the other quantizer's
        return self._other(super()).update_weight_conversions(weight_conversions, *model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return self._other(super()).get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: object = None) -> PreTrainedModel:
        from lrsurgery.checkpoints.pretrained.beside import forget_
        from lrsurgery.surgery.apply import densify_layers_

        densify_layers_(model)
        forget_(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.then is None or bool(self.then.is_trainable)

    @property
    def is_qat_trainable(self) -> bool:
        return self.then is None or bool(self.then.is_qat_trainable)

    @property
    def is_compileable(self) -> bool:
        return self.then is None or bool(self.then.is_compileable)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)


def own_(model: PreTrainedModel, quantizer: LowRankQuantizer) -> None:
    """Give a model in memory the quantizer that loads and saves it."""
    owner: Any = model
    owner.hf_quantizer = quantizer
    owner.quantization_method = METHOD
    quantizer.postprocess_model(model)
