"""Export as a dense folder that loads without lrsurgery, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.checkpoints.loading.check import check_folder
from lrsurgery.checkpoints.output import (
    OutputOptions,
    ShardWriter,
    copy_companions,
    in_write_order,
    output_config,
)
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.checkpoints.tensors import TensorSource
from lrsurgery.errors import SurgeryError
from lrsurgery.export.parts import Parts, open_parts, read_layer
from lrsurgery.files.json import json_text
from lrsurgery.files.writing import staged, write_text
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import dense_card
from lrsurgery.surgery.forms.fill import dense_bias
from lrsurgery.surgery.layers import dense_weight


def to_dense(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint as a dense one; see `export_dense`."""
    parts = open_parts(reference, output, source_options, overwrite=options.overwrite)
    source, tensors = parts.source, parts.tensors
    readers: dict[str, tuple[torch.dtype, Callable[[], Tensor]]] = {
        key: (tensors.describe(key)[0], _reader(tensors, key)) for key in parts.others
    }
    weights = set()
    for stem, layer in parts.layers.items():
        names = _dense_names(parts, stem, layer)
        for number, name in enumerate(names):
            readers[name] = (tensors.describe(f"{stem}.u.weight")[0], _weight(parts, stem, number))
        weights.add(names[-1])
        if parts.modules[layer].bias is not None:
            readers[f"{stem}.bias"] = (tensors.describe(f"{stem}.u.bias")[0], _bias(parts, stem))
    done = 0
    with staged(output, overwrite=options.overwrite) as stage:
        writer = ShardWriter(stage, shard_size=options.shard_size)
        try:
            for name in in_write_order([(dtype, name) for name, (dtype, _) in readers.items()]):
                writer.add(name, readers[name][1]())
                if name in weights:
                    done += 1
                    listener.progress(name.removesuffix(".weight"), done, len(weights))
            writer.finish()
        finally:
            writer.close()
        copy_companions(source, stage)
        config = output_config(source, parts.model, {})
        write_text(stage / "config.json", json_text(config))
        check_folder(stage, reference, unused=parts.unused, trust_remote_code=source_options.trust_remote_code)
        write_text(stage / "README.md", dense_card(source, output.name, config, options.command))


def _dense_names(parts: Parts, stem: str, layer: str) -> list[str]:
    """The keys of a layer's dense weight, or of the tensors that it is computed from.

    Raises SurgeryError where there are none.
    """
    key_of = parts.modules[layer].layout.weight_key
    wanted = [(key_of(stem), key_of(layer))]
    names = []
    if layer in parts.folds:
        module, fold = parts.folds[layer]
        if fold.store is None:
            raise SurgeryError(
                f"{layer}: a {type(module).__name__} standardises its weight, so it can hold no product of factors; it"
                " cannot be exported"
            )
        wanted = [(f"{stem}.{part}", f"{layer}.{part}") for part in fold.parts]
    for own, target in wanted:
        for name in (own, target):
            if parts.dense_keys.target(name) == (target, None):
                names.append(name)
                break
        else:
            raise SurgeryError(f"{layer}: transformers would rename its dense weight on loading; it cannot be exported")
    return names


def _reader(tensors: TensorSource, key: str) -> Callable[[], Tensor]:
    return lambda: tensors.read(key)


def _weight(parts: Parts, stem: str, number: int) -> Callable[[], Tensor]:
    """What reads a layer's dense weight; or the tensor of this number, of those that it is computed from."""
    module, fold = parts.folds.get(parts.layers[stem], (None, None))

    def read() -> Tensor:
        weight = dense_weight(read_layer(parts, stem))
        return weight if fold is None or fold.store is None else fold.store(module, weight)[number]

    return read


def _bias(parts: Parts, stem: str) -> Callable[[], Tensor]:
    if parts.modules[parts.layers[stem]].side != "rows":
        return _reader(parts.tensors, f"{stem}.u.bias")

    def read() -> Tensor:
        bias = dense_bias(read_layer(parts, stem))
        assert bias is not None
        return bias

    return read
