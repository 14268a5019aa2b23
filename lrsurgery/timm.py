"""timm's `create_model` and `load_checkpoint`, for factorised folders as well.

    from lrsurgery.timm import create_model
    create_model("low", num_classes=10)                     # with a new head
    create_model("low", features_only=True, in_chans=1)

`python -m lrsurgery.timm validate.py --model local-dir:low --pretrained ...` runs a script of timm's with both.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.loading.modules import fill_into_, load_timm
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.upstream.timm import adapted_to_channels
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.modules import Unfilled
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.forms.fill import dense_bias
from lrsurgery.surgery.kinds.folds import plain_of
from lrsurgery.surgery.layers import FactorisedLayer, Spec, dense_weight
from lrsurgery.surgery.parameters.views import dense_layers

__all__ = ["create_model", "load_checkpoint"]

LOCAL = "local-dir:"
_create, _load = timm.create_model, timm.models.load_checkpoint
OURS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
)  # arguments that the folder decides
INNER = ("model", "body", "graph_module")  # the attribute of timm's feature extractors that holds the model
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def create_model(model: str | Path, **options: Any) -> nn.Module:
    """Create a timm model with the weights and the factorised layers of a folder, in training mode as timm does.

    `options` are those of `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `out_indices`, `img_size`,
    `drop_path_rate` and so on. timm itself adapts the weights to them. A layer whose weight it had to change stays
    dense, with a warning, unless that is an input convolution, whose `v` alone depends on the number of channels.

    Raises SourceError for a folder that is no timm model's, or for an option that would be ignored.
    """
    ignored = [name for name in OURS if name in options]
    if ignored:
        raise SourceError(f"{model}: create_model takes no {ignored[0]}, since weights and config are the folder's")
    source = _timm_folder(str(model))
    if not source.is_factorised:
        return _create(f"{LOCAL}{source.folder}", pretrained=True, **options)  # type: ignore[no-any-return]
    whole = load_timm(source)
    state = _dense_state(source, whole)
    overlay = {"source": "", "state_dict": state}
    try:
        made: nn.Module = _create(f"{LOCAL}{source.folder}", True, pretrained_cfg_overlay=overlay, **options)
    except Exception as e:  # constructors raise exceptions of any type for an option that they do not take
        raise SourceError(f"{model}: timm cannot create this model ({' '.join(str(e).split())[:300]})") from e
    config: Any = made.pretrained_cfg
    config.pop("state_dict", None)
    config.update(source="local-dir", file=str(source.folder))
    _place_layers_(made, whole, state)
    return made


def load_checkpoint(model: nn.Module, checkpoint_path: str, *args: Any, **options: Any) -> Any:
    """As `timm.models.load_checkpoint`; of a factorised folder, or the weights in one, the model gets the layers too.

    Raises SourceError for a tensor that is missing, unexpected or of the wrong shape, with the model as it was.
    """
    folder = _factorised_folder(checkpoint_path)
    if folder is None:
        return _load(model, checkpoint_path, *args, **options)
    fill_into_(model, resolve(folder))
    return None


def _timm_folder(reference: str) -> Source:
    source = resolve(reference.removeprefix(LOCAL))
    if source.library != "timm" or source.folder is None:
        raise SourceError(f"{reference}: no folder of a timm model; use lrsurgery.load_model")
    return source


def _factorised_folder(path: str) -> str | None:
    """The factorised timm folder that a path or a name of timm's means; None if it means anything else."""
    place = Path(path.removeprefix(LOCAL))
    place = place.parent if place.is_file() else place
    if not (place / "config.json").is_file():
        return None
    source = resolve(str(place))
    return str(place) if source.library == "timm" and source.is_factorised else None


def _dense_state(source: Source, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense model; what a layer's class keeps beside its weight is as that builds it."""
    state: dict[str, Tensor] = build_model(source, device="cpu").state_dict()
    state |= {key: value for key, value in model.state_dict().items() if key in state}
    for name, layer in factorised_layers(model).items():
        state[layer.layout.weight_key(name)] = dense_weight(layer)
        if (bias := dense_bias(layer)) is not None:
            state[f"{name}.bias"] = bias.detach()
    return state


@torch.no_grad()
def _place_layers_(made: nn.Module, whole: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the dense layers of a model by the factorised ones of `whole` that have the same weight.

    timm gives the modules of feature extractors other names, with "_" for "." and one of INNER in front, so that a
    layer is found by its name and told by its weight.
    """
    layers, held = factorised_layers(whole), dense_layers(made)
    inner = f"{next((name for name in INNER if isinstance(getattr(made, name, None), nn.Module)), '')}."
    flat = {name.removeprefix(inner).replace(".", "_"): name for name in held}
    heads: Any = getattr(made, "pretrained_cfg", {}).get("classifier") or ()
    heads = {heads} if isinstance(heads, str) else set(heads)
    places: dict[str, str] = {}
    inputs: dict[str, Tensor] = {}  # v of a layer that reads another number of channels
    for name, layer in layers.items():
        place = flat.get(name.replace(".", "_"))
        dense: Any = held[place] if place is not None else None
        found = getattr(dense, "weight", None)
        if place is None or not isinstance(found, Tensor):
            continue  # a part of the model that these options leave out
        wanted = state[layer.layout.weight_key(name)]
        if torch.equal(found, wanted):
            places[name] = place
        elif (adapted := _adapted(layer, dense, found)) is not None:
            places[name], inputs[name] = place, adapted
        elif layer.folded is not None:
            raise SurgeryError(f"{name}: timm changed its weight for these options, and a {layer.folded} has no other")
        elif name not in heads:
            warnings.warn(f"{name}: timm changed its weight for these options, so it stays dense", stacklevel=3)
    specs = _renamed(specs_of(whole), places)
    swap_(made, specs)
    new = factorised_layers(made)
    for name, place in places.items():
        if place not in specs:
            continue
        tensors = {**layers[name].state_dict(keep_vars=True)}
        if name in inputs:
            tensors["v.weight"] = nn.Parameter(inputs[name])
        new[place].load_state_dict(tensors, assign=True)
        for hooks in HOOKS:  # of a feature extractor that listens to its layers
            getattr(new[place], hooks).update(getattr(held[place], hooks, {}))


def _adapted(layer: FactorisedLayer, dense: nn.Module, wanted: Tensor) -> Tensor | None:
    """`v.weight` of an input convolution for the channels of `dense`, whose weight timm adapted to `wanted`.

    None if the product is another, or if a layer of so few columns cannot have this rank.
    """
    v = layer.v.weight
    if layer.side == "columns" or layer.groups > 1 or v.ndim != 4 or wanted.ndim != 4:
        return None
    found = adapted_to_channels(v, wanted.shape[1])
    if found is None or layer.rank > min(layer.layout.matrix_shape(wanted.shape)) - (0 if layer.side is None else 1):
        return None
    with Unfilled():
        new = layer.layout.make(plain_of(dense), layer.rank, layer.side)
    if new.v.weight.shape != found.shape:
        return None
    new.load_state_dict({**layer.state_dict(), "v.weight": found}, assign=True)
    same = torch.allclose(dense_weight(new), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    return found if same else None


def _renamed(specs: Mapping[str, Spec], places: Mapping[str, str]) -> dict[str, Spec]:
    """The specs of the layers that have a place, by its name; of a group that shares one v, all of them or none."""
    lost = specs.keys() - places.keys()
    torn = lost | {specs[name].v_of for name in lost}
    kept = {}
    for name, spec in specs.items():
        if name in lost:
            continue
        if {name, spec.v_of, spec.tied_to} & torn - {None}:
            warnings.warn(
                f"{name}: shares factors with a layer that these options leave out, so it stays dense", stacklevel=4
            )
            continue
        v_of, tied_to = (None if leader is None else places[leader] for leader in (spec.v_of, spec.tied_to))
        kept[places[name]] = spec._replace(v_of=v_of, tied_to=tied_to)
    return kept


def _run_script() -> None:
    """Run the script that the command line names, with both functions in timm's place."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m lrsurgery.timm SCRIPT [ARGUMENTS]")

    def create(model_name: str, pretrained: bool = False, *args: Any, **options: Any) -> Any:
        folder = _factorised_folder(model_name) if pretrained and model_name.startswith(LOCAL) else None
        if folder is None:
            return _create(model_name, pretrained, *args, **options)
        return create_model(folder, **{name: value for name, value in options.items() if value not in (None, "")})

    for module in (timm, timm.models, sys.modules[_create.__module__], sys.modules[_load.__module__]):
        vars(module).update(create_model=create, load_checkpoint=load_checkpoint)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _run_script()
