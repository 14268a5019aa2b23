"""Loading of factorised and dense checkpoints into modules; timm's and one's own are in `loading.modules`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.checkpoints.build import (
    build_model,
    check_plain_factors,
    factors_quantised_by,
    has_own_code,
)
from lrsurgery.checkpoints.loading.modules import load_timm
from lrsurgery.checkpoints.mapping import check_plain, is_wide, key_map, unwrap_keys
from lrsurgery.checkpoints.quantised.dense import open_weights
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.tensors import RenamedSource, check_weights, open_tensors
from lrsurgery.checkpoints.upstream.layouts import check_not_packed, check_shape, missing
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.linalg.factors import Factors
from lrsurgery.linalg.pivot import is_permutation
from lrsurgery.modules import Unfilled
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.layers import FactorisedLayer, Spec, Stored, product_factors
from lrsurgery.surgery.shared.forms import Part, product_of
from lrsurgery.surgery.shared.modules import SharedLinear


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False, **options: Any
) -> nn.Module:
    """Load a factorised or dense checkpoint in eval mode, as a timm module or as the transformers class of its config.

    `options` go to transformers' `from_pretrained` (`device_map`, `attn_implementation`, ...); a timm model takes none.

    Raises SourceError that names a tensor which is missing, unexpected or of the wrong shape, or an option that would
    be ignored.
    """
    return load_source(resolve(str(path)), dtype=dtype, trust_remote_code=trust_remote_code, **options)


def load_source(
    source: Source, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False, **options: Any
) -> nn.Module:
    """As `load_model`, of a checkpoint that is resolved."""
    check_weights(source.folder, source.files)
    if source.library == "timm":
        if options:
            raise SourceError(
                f"{source.reference}: load_model passes {', '.join(options)} to transformers, and this is a timm model;"
                " lrsurgery.timm.create_model takes timm's options"
            )
        return load_timm(source, dtype)
    import lrsurgery.checkpoints.pretrained.register  # noqa: F401  (registers the format)

    skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    _check_files(source, skeleton)
    options |= {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if source.scheme is not None:
        model, info = _dequantised(type(skeleton), source, options, skeleton)
    else:
        model, info = from_pretrained(type(skeleton), source, options, source.folder)
    if info["missing_keys"] and not source.is_factorised and source.scheme is None:
        model, info = _unwrapped(type(skeleton), source, options, skeleton) or (model, info)
    for key, shape, wanted in sorted(info["mismatched_keys"]):
        check_shape(source, key, shape, wanted)
    if info["missing_keys"]:
        raise missing(source, min(info["missing_keys"]), ())
    return model.eval()  # type: ignore[no-any-return]


def from_pretrained(
    cls: Any, source: Source, options: Mapping[str, Any], folder: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and transformers' account of its loading from `folder`, or from tensors in `options`.

    Raises SourceError with its reason if it cannot load.
    """
    if has_own_code(source) and "config" not in options:
        options = _with_config(source, options)
    try:
        with Unfilled():
            model, info = cls.from_pretrained(
                folder,
                output_loading_info=True,
                # reported with the tensor's name, which transformers' error lacks; another head is newly initialised
                ignore_mismatched_sizes=True,
                **options,
            )
    except SurgeryError:
        raise
    except Exception as e:  # odd files beside the weights, such as generation_config.json, make it raise anything
        cause = " ".join(str(e).split())[:300]
        raise SourceError(f"{source.reference}: transformers cannot load it ({type(e).__name__}: {cause})") from e
    return model, info


def _with_config(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the config that a folder would have without the code of its layers."""
    from lrsurgery.checkpoints.upstream.transformers import config_of

    labels = {name: options[name] for name in ("id2label", "label2id") if name in options}
    rest = {name: value for name, value in options.items() if name not in labels}
    return {**rest, "trust_remote_code": False, "config": config_of({**source.config, **labels})}


def _unwrapped(
    cls: Any, source: Source, options: Mapping[str, Any], skeleton: nn.Module
) -> tuple[nn.Module, dict[str, Any]] | None:
    """As `_from_pretrained` from weights that something wraps; None if nothing does. `skeleton` is of the own class."""
    found = unwrap_keys(source, skeleton, open_tensors(list(source.files)))
    if not found.wrappers:
        return None
    prefixes = found.prefixes if isinstance(found, RenamedSource) else None
    if prefixes is not None and all(file.suffix == ".safetensors" for file in source.files):
        mapping = {f"^{re.escape(p)}": "" for p in prefixes}
        return from_pretrained(cls, source, {**options, "key_mapping": mapping}, source.folder)
    # transformers neither looks into the entries of a pickle nor takes a part out of a name
    return _from_tensors(cls, source, options, skeleton, {key: found.read(key) for key in found.keys()})  # noqa: SIM118


def _dequantised(
    cls: Any, source: Source, options: Mapping[str, Any], skeleton: nn.Module
) -> tuple[nn.Module, dict[str, Any]]:
    """As `_from_pretrained` from a quantised source, whose weights are dequantised one at a time as the model fills."""
    from lrsurgery.checkpoints.quantised.library import WeightOnDisk, read_generation_config_

    assert source.scheme is not None
    tensors = unwrap_keys(source, skeleton, open_weights(source))
    state = {key: WeightOnDisk(tensors, key) for key in tensors.keys()}  # noqa: SIM118
    dtype = source.scheme.dtype if options["dtype"] == "auto" else options["dtype"]
    model, info = _from_tensors(cls, source, {**options, "dtype": dtype}, skeleton, state)
    read_generation_config_(model, source)
    return model, info


def _from_tensors(
    cls: Any, source: Source, options: Mapping[str, Any], skeleton: nn.Module, state: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """As `_from_pretrained` from tensors by their keys; `skeleton` is of the own class of the source."""
    if hasattr(cls, "from_config"):  # an AutoModelFor...
        with torch.device("meta"):
            cls = type(cls.from_config(skeleton.config, trust_remote_code=options["trust_remote_code"]))
    given = {name: value for name, value in options.items() if name not in ("id2label", "label2id")}
    config = copy.deepcopy(skeleton.config)
    for name in ("id2label", "label2id"):
        if name in options:
            setattr(config, name, options[name])
    return from_pretrained(cls, source, {**given, "config": config, "state_dict": state}, None)


def _check_files(source: Source, skeleton: nn.Module | None = None, *, trust_remote_code: bool = False) -> None:
    """Raise SourceError that names a damaged weight file, or a weight that is quantised without a config.

    Transformers names neither.
    """
    tensors = open_tensors(list(source.files))
    if (source.quant_method is not None and not source.is_factorised) or factors_quantised_by(source) is not None:
        return
    narrow = [key for key in tensors.keys() if not is_wide(tensors.describe(key)[0])]  # noqa: SIM118
    if not narrow:
        return
    if skeleton is None or source.is_factorised:
        skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    if source.is_factorised:
        swap_(skeleton, source.layers)
    keys = key_map(source, skeleton)
    for key in narrow:
        target = keys.target(key)[0]
        if target is not None:
            check_plain(source, key, tensors.describe(key)[0], keys.state[target])
    check_not_packed(source, {key for key in narrow if keys.target(key)[0] is None})


@dataclass(frozen=True)
class FactorisedCheckpoint:
    """A factorised checkpoint whose weights stay on disk until they are read."""

    model: nn.Module  # on the meta device
    layers: Mapping[str, FactorisedLayer]
    factors: Mapping[str, Callable[[torch.device], Factors]]  # layer -> function that reads its factors to a device


def open_factorised(source: Source, *, trust_remote_code: bool = False) -> FactorisedCheckpoint:
    """Open a factorised checkpoint without reading its weights.

    Raises SourceError for a missing factor, a factor of the wrong shape or an invalid config, and for factors that are
    quantised.
    """
    check_plain_factors(source)
    check_weights(source.folder, source.files)
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    swap_(model, source.layers)
    tensors = open_tensors(list(source.files))
    keys, modules = key_map(source, model), factorised_layers(model)
    places = {keys.target(key)[0]: key for key in tensors.keys()}  # noqa: SIM118
    specs = specs_of(model)
    alike: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if spec.tied_to is not None:
            alike.setdefault(spec.tied_to, []).append(name)

    def reader(name: str, layer: FactorisedLayer) -> Callable[[torch.device], Factors]:
        parts = []
        stored = stored_name(name, specs, alike, places)
        for place, wanted in (
            (f"{stored}.u.weight", layer.u.weight),
            (f"{specs[name].v_of or stored}.v.weight", layer.v.weight),
            *([] if layer.order is None else [(f"{name}.order", layer.order)]),
        ):
            key = places.get(place)
            if key is None:
                raise missing(source, place, places.values())
            dtype, shape = tensors.describe(key)
            check_plain(source, key, dtype, wanted)
            check_shape(source, key, shape, tuple(wanted.shape))
            parts.append(key)

        def read(device: torch.device) -> Factors:
            u, v, *order = (tensors.read(key).to(device) for key in parts)
            if order and not is_permutation(order[0]):
                raise SourceError(f"{source.reference}: {parts[-1]} is no permutation, so the file is damaged")
            if isinstance(layer, SharedLinear):
                return product_of(Part(u, v, order[0] if order else None, layer.spec.pivots))
            return product_factors(layer.layout, Stored(u, v, *order), layer.side)

        return read

    return FactorisedCheckpoint(model, modules, {name: reader(name, layer) for name, layer in modules.items()})


def stored_name(
    name: str, specs: Mapping[str, Spec], alike: Mapping[str, Sequence[str]], places: Container[str | None]
) -> str:
    """Under which name the files have the factors of a layer: its own, or that of one of those it is tied to.

    `alike` maps a layer to those that are tied to it.
    """
    leader = specs[name].tied_to or name
    names = (leader, *alike.get(leader, ()))
    return next((each for each in names if f"{each}.u.weight" in places), name)


def load_with_head(
    source: Source,
    auto_class: str,
    *,
    id2label: dict[int, str] | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, list[str]]:
    """Load a model with another head or other classes; return it with the names of its new, untrained modules.

    `auto_class` names one of transformers' `AutoModelFor...`. Raises SourceError if transformers cannot load it.
    """
    import transformers

    import lrsurgery.checkpoints.pretrained.register  # noqa: F401  (registers the format)

    check_weights(source.folder, source.files)
    _check_files(source, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if id2label is not None:
        options |= {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    cls = getattr(transformers, auto_class)
    if source.scheme is not None:
        skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
        model, info = _dequantised(cls, source, options, skeleton)
    else:
        model, info = from_pretrained(cls, source, options, source.folder)
    if info["missing_keys"] and not source.is_factorised and source.scheme is None:
        skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
        model, info = _unwrapped(cls, source, options, skeleton) or (model, info)
    keys = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    return model.eval(), sorted({key.rpartition(".")[0] for key in keys})
