"""Export of factorised checkpoints to folders that load without lrsurgery."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import check_folder
from lrsurgery.checkpoints.mapping import check_plain, key_map
from lrsurgery.checkpoints.output import (
    OutputOptions,
    ShardWriter,
    check_output,
    copy_companions,
    in_write_order,
    output_config,
)
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.checkpoints.tensors import TensorSource, check_weights, open_tensors
from lrsurgery.checkpoints.upstream.layouts import check_shape, missing
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import json_text
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.linalg.pivot import is_permutation
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import dense_card
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.layers import FactorisedLayer, dense_weight
from lrsurgery.units import parse_size


def export_dense(
    folder: str | Path,
    output: str | Path,
    *,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the factorised checkpoint in `folder` as a dense one, with the product of each layer's factors.

    Weights keep their dtype. Raises SurgeryError that gives the file or layer, the fault and the remedy; nothing is
    written then.
    """
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite)
    export(str(folder), Path(output), SourceOptions(trust_remote_code=trust_remote_code), options)


def export(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    *,
    to: str = "dense",
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint in one of the formats of `EXPORTS`. Raises SurgeryError."""
    if to not in EXPORTS:
        raise SurgeryError(f"unknown target '{to}'; known: {', '.join(EXPORTS)}")
    output = with_name(output)
    with disk_faults(output, lambda: "nothing is written"), locked(output):
        EXPORTS[to](reference, output, source_options, options, listener)


def to_dense(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint as a dense one; see `export_dense`."""
    source = source_options.resolve(reference)
    if not source.is_factorised:
        raise SourceError(f"{reference}: not a factorised checkpoint, so there is nothing to export")
    check_output(output, source, options.overwrite)
    check_weights(source.folder, source.files)
    model = build_model(source, device="meta", trust_remote_code=source_options.trust_remote_code)
    dense_keys = key_map(source, model)
    swap_(model, source.layers)
    tensors = open_tensors(list(source.files))
    every = model.named_modules(remove_duplicate=False)
    keys, modules = key_map(source, model), {name: m for name, m in every if isinstance(m, FactorisedLayer)}
    readers: dict[str, tuple[torch.dtype, Callable[[], Tensor]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    unused: list[str] = []  # keys that the model class does not use
    places: set[str] = set()  # state-dict keys of factors and biases in the files
    for key in tensors.keys():  # noqa: SIM118
        dtype, shape = tensors.describe(key)
        place = keys.target(key)[0] or ""
        if place:
            check_plain(source, key, dtype, keys.state[place])
        layer, part = _split(place, modules)
        if layer is None:
            if shape == (0,) and key.endswith(".weight"):
                continue  # the tripwire
            readers[key] = (dtype, _reader(tensors, key))
            unused += [] if place else [key]
            continue
        places.add(place)
        check_shape(source, key, shape, tuple(keys.state[place].shape))
        stem = key.removesuffix(f".{part}")
        if part == "v.weight":
            name = next(
                (n for n in (f"{stem}.weight", f"{layer}.weight") if dense_keys.target(n) == (f"{layer}.weight", None)),
                None,
            )
            if name is None:
                raise SurgeryError(
                    f"{layer}: transformers would rename its dense weight on loading; it cannot be exported"
                )
            readers[name] = (dtype, _weight(tensors, modules[layer], stem))
            dtypes[name] = dtype
        elif part == "u.bias":
            in_two = modules[layer].side == "rows"
            read = _bias(tensors, modules[layer], stem) if in_two else _reader(tensors, key)
            readers[f"{stem}.bias"] = (dtype, read)
    names_of: dict[int, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(id(module), []).append(name)
    for layer, module in factorised_layers(model).items():
        for part in module.state_dict():
            if not any(f"{name}.{part}" in places for name in names_of[id(module)]):
                raise missing(source, f"{layer}.{part}", ())
    total, done = len(dtypes), 0
    with staged(output, overwrite=options.overwrite) as stage:
        writer = ShardWriter(stage, shard_size=options.shard_size)
        try:
            for name in in_write_order([(dtype, name) for name, (dtype, _) in readers.items()]):
                writer.add(name, readers[name][1]())
                if name in dtypes:
                    done += 1
                    listener.progress(name.removesuffix(".weight"), done, total)
            writer.finish()
        finally:
            writer.close()
        copy_companions(source, stage)
        config = output_config(source, model, {})
        write_text(stage / "config.json", json_text(config))
        check_folder(stage, reference, unused=unused, trust_remote_code=source_options.trust_remote_code)
        write_text(stage / "README.md", dense_card(source, output.name, config, options.command))


def _split(place: str, modules: dict[str, FactorisedLayer]) -> tuple[str | None, str]:
    """(layer, part) of a state-dict key inside a factorised layer; None for any other key."""
    for part in ("u.weight", "v.weight", "u.bias", "v.bias", "order"):
        layer = place.removesuffix(f".{part}")
        if layer != place and layer in modules:
            return layer, part
    return None, ""


def _reader(tensors: TensorSource, key: str) -> Callable[[], Tensor]:
    return lambda: tensors.read(key)


def _weight(tensors: TensorSource, module: FactorisedLayer, stem: str) -> Callable[[], Tensor]:
    return lambda: dense_weight(_held(tensors, module, stem))


def _bias(tensors: TensorSource, module: FactorisedLayer, stem: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        bias = _held(tensors, module, stem).bias
        assert bias is not None
        return bias.detach()

    return read


def _held(tensors: TensorSource, module: FactorisedLayer, stem: str) -> FactorisedLayer:
    """A layer like `module` with the values of the file."""
    held = copy.deepcopy(module)
    held.load_state_dict({part: tensors.read(f"{stem}.{part}") for part in module.state_dict()}, assign=True)
    if held.order is not None and not is_permutation(held.order):
        raise SourceError(f"{stem}.order is no permutation, so the file is damaged")
    return held


# the formats of `export --to`
Export = Callable[[str, Path, SourceOptions, OutputOptions, Listener], None]
EXPORTS: dict[str, Export] = {"dense": to_dense}
