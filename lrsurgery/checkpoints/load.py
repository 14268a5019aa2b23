"""Loading of factorised and dense checkpoints into modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrsurgery.checkpoints.build import build_model, timm_tensors
from lrsurgery.checkpoints.mapping import key_map
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.layers import FactorisedLayer


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False, **options: Any
) -> nn.Module:
    """Load a factorised or dense checkpoint in eval mode, as a timm module or as the transformers class of its config.

    `options` go to transformers' `from_pretrained` (`device_map`, `attn_implementation`, ...).

    Raises SourceError that names a tensor which is missing, unexpected or of the wrong shape.
    """
    source = resolve(str(path))
    if source.library == "timm":
        return load_timm(source, dtype)
    import lrsurgery.checkpoints.quantizer  # noqa: F401  (registers the format)

    _check_whole(source)
    skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    cls: Any = type(skeleton)
    try:
        model, info = cls.from_pretrained(
            source.folder,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with the tensor's name, which transformers' error lacks
            **options,
        )
    except SurgeryError:
        raise
    except (RuntimeError, ValueError, OSError) as e:
        raise SourceError(f"{path}: {' '.join(str(e).split())[:300]}") from e
    for key, shape, wanted in sorted(info["mismatched_keys"]):
        raise SourceError(f"{path}: {key} has shape {tuple(shape)}, the model wants {tuple(wanted)}")
    if info["missing_keys"]:
        raise SourceError(f"{path}: {min(info['missing_keys'])} is missing from the checkpoint")
    return model.eval()  # type: ignore[no-any-return]


def _check_whole(source: Source) -> None:
    """Raise SourceError that names a truncated safetensors file, which transformers does not name.

    Pickles are not checked, since that would mean reading them.
    """
    if all(file.suffix == ".safetensors" for file in source.files):
        open_tensors(list(source.files))


@dataclass(frozen=True)
class FactorisedCheckpoint:
    """A factorised checkpoint whose weights stay on disk until they are read."""

    model: nn.Module  # on the meta device
    layers: Mapping[str, FactorisedLayer]
    factors: Mapping[str, Callable[[torch.device], Factors]]  # layer -> function that reads its factors to a device


def open_factorised(source: Source, *, trust_remote_code: bool = False) -> FactorisedCheckpoint:
    """Open a factorised checkpoint without reading its weights.

    Raises SourceError for a missing factor, a factor of the wrong shape or an invalid config.
    """
    layers = source.layers
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    swap_(model, layers)
    tensors = open_tensors(list(source.files))
    keys, modules = key_map(source, model), factorised_layers(model)
    places = {keys.target(key)[0]: key for key in tensors.keys()}  # noqa: SIM118

    def reader(name: str, layer: FactorisedLayer) -> Callable[[torch.device], Factors]:
        parts = []
        for place, wanted in ((f"{name}.u.weight", layer.u.weight), (f"{name}.v.weight", layer.v.weight)):
            key = places.get(place)
            if key is None:
                raise SourceError(f"{source.reference}: {place} is missing from the checkpoint")
            shape = tensors.describe(key)[1]
            if shape != tuple(wanted.shape):
                raise SourceError(f"{source.reference}: {key} has shape {shape}, the model wants {tuple(wanted.shape)}")
            parts.append(key)
        u, v = parts
        return lambda device: layer.layout.to_matrices(tensors.read(u).to(device), tensors.read(v).to(device))

    return FactorisedCheckpoint(model, modules, {name: reader(name, layer) for name, layer in modules.items()})


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

    import lrsurgery.checkpoints.quantizer  # noqa: F401  (registers the format)

    _check_whole(source)
    options: dict[str, Any] = {}
    if id2label is not None:
        options = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            source.folder,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of another shape is newly initialised
            **options,
        )
    except SurgeryError:
        raise
    except (RuntimeError, ValueError, OSError) as e:
        raise SourceError(f"{source.reference}: {' '.join(str(e).split())[:300]}") from e
    keys = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    return model.eval(), sorted({key.rpartition(".")[0] for key in keys})


def load_timm(source: Source, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the timm module of a factorised or dense timm folder.

    Raises SourceError that names a tensor which is missing, unexpected or of the wrong shape.
    """
    model = build_model(source, device="cpu")
    tensors = open_tensors(list(source.files))
    if source.is_factorised:
        layers = source.layers
        swap_(model, layers)
        state = {key: tensors.read(key) for key in tensors.keys() if key.removesuffix(".weight") not in layers}  # noqa: SIM118
    else:
        converted = timm_tensors(source, model, tensors)
        state = {key: converted.read(key) for key in converted.keys()}  # noqa: SIM118
    wanted = model.state_dict()
    for key in sorted(wanted.keys() - state.keys()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
        else:
            raise SourceError(f"{source.reference}: {key} is missing from the checkpoint")
    for key, tensor in state.items():
        if key not in wanted:
            raise SourceError(f"{source.reference}: {key} has no place in {source.config['architecture']}")
        if tensor.shape != wanted[key].shape:
            raise SourceError(
                f"{source.reference}: {key} has shape {tuple(tensor.shape)}, the model wants {tuple(wanted[key].shape)}"
            )
    model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    return (model.to(dtype) if dtype is not None else model).eval()
