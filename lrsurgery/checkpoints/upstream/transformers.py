"""All uses of transformers' undocumented interface; tests/checkpoints/test_upstream.py shows what depends on each.

Written against transformers 5.17 to 5.24.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.change import reform_
from lrsurgery.surgery.layers import FactorisedLayer

DENSE_TIES = "_tied_weights_keys_of_dense_layers"


class KeyMap:
    """Map of checkpoint keys to state-dict keys of `model`, by the renamings of transformers' loader."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        self._model = model
        self.state: dict[str, Tensor] = model.state_dict()

    def target(self, key: str) -> tuple[str | None, str | None]:
        """(state-dict key or None, pattern of the converter that merges the tensor or None)."""
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        if renamed not in self.state and key in self.state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self.state)
        return (renamed, pattern) if renamed in self.state else (None, None)

    def convert(self, target: str, pieces: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Apply the converter of these (source key, pattern, tensor) pieces: state-dict key -> tensor."""
        converter = next(c for c in self._converters if pieces[0][1] in c.source_patterns)
        converter = copy.deepcopy(converter)
        for key, pattern, tensor in sorted(pieces, key=lambda piece: _natural(piece[0])):  # experts by their number
            converter.add_tensor(target, key, pattern, tensor)
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def expert_reader(
        self, target: str, members: Sequence[tuple[str, str]], tensors: Any, wanted: tuple[str, tuple[int, ...]]
    ) -> Callable[[int], Tensor] | None:
        """What reads one expert's matrix of a bank from its own (source key, pattern) pieces; None if there are none.

        `wanted` is the key and shape of the bank, `tensors` the files.
        """
        (name, shape), patterns = wanted, dict[str, list[tuple[str, str]]]()
        for member in sorted(members, key=lambda member: _natural(member[0])):
            patterns.setdefault(member[1], []).append(member)
        if any(len(found) != shape[0] for found in patterns.values()):
            return None
        pieces = list(zip(*patterns.values(), strict=True))

        def convert(number: int, read: Callable[[str], Tensor]) -> Tensor:
            return self.convert(target, [(key, pattern, read(key)) for key, pattern in pieces[number]])[name]

        one = convert(0, lambda key: torch.empty(tensors.describe(key)[1], device="meta"))
        return (lambda number: convert(number, tensors.read)[0]) if one.shape == (1, *shape[1:]) else None


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def keep_names_plain(model: PreTrainedModel, dense_keys: Iterable[str]) -> None:
    """Disable key conversion on saving if transformers would fuse one of these keys with another."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    # those of a quantizer make its tensors of what the files have, and have no reverse
    ours = [c for c in conversions if isinstance(c, WeightConverter) and not any(map(_of_quantizer, c.operations))]
    converters = [c.reverse_transform() for c in ours]
    if any(converter.rename_source_key(key)[1] is not None for converter in converters for key in dense_keys):
        model._weight_conversions = []


def retie_(model: PreTrainedModel) -> None:
    """Tell transformers which tensors are tied, after layers of a model have become factorised or dense again."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        own = vars(module)
        if DENSE_TIES in own:  # an earlier call put others in front of what the class or its constructor says
            before = own.pop(DENSE_TIES)
            own.pop("_tied_weights_keys") if before is None else own.update(_tied_weights_keys=before)
        every = factorised_layers(module)
        layers = {name: layer for name, layer in every.items() if layer.tied}
        if layers:
            ties: Mapping[str, str] = module._tied_weights_keys or {}
            own[DENSE_TIES] = own.get("_tied_weights_keys")
            module._tied_weights_keys = {
                key: other for pair in ties.items() for key, other in zip(*_keys_of(pair, layers), strict=True)
            }
        for method, resize in RESIZED.items():
            own.pop(method, None)
            if any(layer.layout.lookup for layer in every.values()):
                own[method] = functools.partial(resize, module)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _of_quantizer(operation: object) -> bool:
    return hasattr(operation, "hf_quantizer")


def forget_deserialisers_(model: PreTrainedModel) -> None:
    """Forget the conversions that made quantised tensors of a load, without whose reverse transformers cannot save."""
    known = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in known if not (isinstance(c, WeightConverter) and any(map(_of_quantizer, c.operations)))]
    if len(kept) != len(known):
        model._weight_conversions = kept


def _resize_table(model: PreTrainedModel, table: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As the method of `model`: of a factorised table u is resized, which stays low rank; its new rows are means."""
    inner = table.u if isinstance(table, FactorisedLayer) else table
    resized: Any = type(model)._get_resized_embeddings(model, inner, *args, **kwargs)
    if not isinstance(table, FactorisedLayer):
        return resized  # type: ignore[no-any-return]
    table.u = resized
    return table


def _resize_head(model: PreTrainedModel, head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As the method of `model`: of a factorised head u is resized, in a form whose outputs are in their order."""
    if not isinstance(head, FactorisedLayer):
        return type(model)._get_resized_lm_head(model, head, *args, **kwargs)  # type: ignore[no-any-return]
    if head.side == "rows":
        reform_(head, None)
    head.u = type(model)._get_resized_lm_head(model, head.u, *args, **kwargs)
    return head


RESIZED = {"_get_resized_embeddings": _resize_table, "_get_resized_lm_head": _resize_head}


def _keys_of(keys: Iterable[str], layers: Mapping[str, FactorisedLayer]) -> Iterator[list[str]]:
    """The keys of tied tensors of layers, factorised ones among them."""
    for key in keys:
        name, _, part = key.rpartition(".")
        if name not in layers:
            yield [key]
        else:
            yield [f"{name}.u.weight", f"{name}.v.weight"] if part == "weight" else [f"{name}.u.{part}"]


def ignore_unexpected(model: PreTrainedModel, patterns: set[str]) -> None:
    """Make the loader ignore keys that match these patterns and are not in the model."""
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns


def missing_keys_excused(model: nn.Module) -> tuple[str, ...]:
    """Patterns of keys that a checkpoint of this model may lack."""
    return tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def is_filled(parameter: Tensor) -> bool:
    """Whether a load has given a parameter values, or needs none: meta, or ZeRO-3's, whose parts come later."""
    return parameter.is_meta or hasattr(parameter, "ds_id") or getattr(parameter, "_is_hf_initialized", False)


def auto_classes(config_class: type) -> dict[str, type]:
    """AutoModel... -> the class that it loads for a config of this class."""
    from transformers.models.auto import modeling_auto

    found: dict[str, type] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            cls = mapping[config_class]
            found[name] = cls[0] if isinstance(cls, tuple) else cls
    return found


def config_of(config: Mapping[str, Any]) -> Any:
    """The configuration of a model that transformers has, from the entries of its config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def is_native(model_type: object) -> bool:
    """Whether transformers has a configuration class for this model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def model_class(config: Any, folder: Path, auto_map: Mapping[str, Any] | None) -> Any:
    """The class in a config's `architectures`, or in the checkpoint's code if `auto_map` is given; None if none is.

    A class of one's own is known by its registration with an AutoModel. Raises AttributeError for a class that
    transformers does not have.
    """
    import transformers

    names = config.architectures or []
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    if auto_map is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next((auto_map[k] for k in auto_map if k.startswith("AutoModelFor")), auto_map.get("AutoModel"))
        return None if reference is None else get_class_from_dynamic_module(reference, folder)
    if names:
        own = next((cls for cls in _registered() if cls.__name__ == names[0]), None)
        if own is None:
            raise AttributeError(names[0])
        return own
    return transformers.AutoModel._model_mapping[type(config)]


def forget_quantisation_(config: Any) -> None:
    """Take the quantization_config out of a config and of the configs in it."""
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            forget_quantisation_(inner)
    vars(config).pop("quantization_config", None)


def _registered(mapping: str | None = None) -> list[type]:
    """Classes registered with `AutoModel....register`: with that of one kind of head, or with any."""
    from transformers.models.auto import modeling_auto

    if mapping is not None:
        mappings = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING")]
    else:
        mappings = [
            value for value in vars(modeling_auto).values() if isinstance(value, modeling_auto._LazyAutoMapping)
        ]
    found = [value for each in mappings for value in each._extra_content.values()]
    return [cls for value in found for cls in (value if isinstance(value, tuple) else (value,))]


def head_classes(mapping: str) -> frozenset[str]:
    """Names of the model classes with one kind of head, such as "CAUSAL_LM"."""
    from transformers.models.auto import modeling_auto

    values = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    names = {name for value in values for name in (value if isinstance(value, tuple) else (value,))}
    return frozenset(names | {cls.__name__ for cls in _registered(mapping)})


def is_only_causal(model_type: str) -> bool:
    """Whether models of this type are decoders: they have a causal head and no masked one."""
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def checkpoint_blocks_(model: nn.Module) -> None:
    """Enable gradient checkpointing in evaluation mode, which transformers supports in training mode only.

    The backward pass then recomputes each block, which reloads weights that were offloaded after the forward pass.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable_checkpointing_(model)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of the block only; dropout layers in it stay in evaluation mode


def enable_checkpointing_(model: Any) -> None:
    """Enable gradient checkpointing, by the method's newer name if this transformers has it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train_on_one_gpu_(arguments: Any) -> None:
    """Use one GPU of several: DataParallel in one process is slower than one GPU; torchrun uses them all."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """Let a Trainer measure a model with quantised weights, which it refuses to hold for fear of training it."""
    own = vars(model)
    if not own.get("is_quantized"):
        yield
        return
    own["is_quantized"] = False
    try:
        yield
    finally:
        own["is_quantized"] = True


def forget_preparation_(modules: Iterable[nn.Module]) -> None:
    """Clear accelerate's mark on modules, so that it prepares them again for DDP and autocast."""
    for module in modules:
        vars(module).pop("_is_accelerate_prepared", None)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' account of a load, and its progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
