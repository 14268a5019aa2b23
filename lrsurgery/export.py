"""`export`: a factorised checkpoint as a folder that needs no lrsurgery."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.cards import dense_card
from lrsurgery.checkpoints import Checkpoint, key_map, output_config
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.layers import FactorisedLayer, dense_weight
from lrsurgery.skeletons import build_model
from lrsurgery.sources import resolve
from lrsurgery.staging import check_output, copy_companions, staged
from lrsurgery.steps import Progress
from lrsurgery.surgery import factorised_layers, swap_
from lrsurgery.tensors import ShardWriter, in_write_order, open_tensors, parse_size, write_text

TARGETS = ("dense",)


def export_dense(
    folder: str | Path,
    output: str | Path,
    *,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Writes the factorised checkpoint in `folder` as an ordinary one: every product multiplied out, in its dtype.

    Raises SurgeryError: which file or layer, what is wrong, what to do. Nothing is written then.
    """
    for _ in iter_export(
        str(folder), Path(output), shard_size, overwrite=overwrite, trust_remote_code=trust_remote_code
    ):
        pass


def iter_export(
    reference: str,
    output: Path,
    shard_size: str = "5GB",
    *,
    to: str = "dense",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> Generator[Progress, None, None]:
    """As `export_dense`, one layer a step."""
    if to not in TARGETS:
        raise SurgeryError(f"unknown target '{to}'; known: {', '.join(TARGETS)}")
    limit = parse_size(shard_size)
    source = resolve(reference)
    quantization = source.config.get("quantization_config") or {}
    if quantization.get("quant_method") != "lrsurgery":
        raise SourceError(f"{reference}: not a factorised checkpoint, so there is nothing to export")
    check_output(output, source, overwrite)
    from lrsurgery.hf import check_layers

    layers = check_layers(quantization.get("layers"))
    model = build_model(source, device="meta", trust_remote_code=trust_remote_code)
    dense_keys = key_map(Checkpoint(source, model, open_tensors([])))
    swap_(model, {name: (spec["kind"], spec["rank"]) for name, spec in layers.items()})
    tensors = open_tensors(list(source.files))
    checkpoint = Checkpoint(source, model, tensors)
    keys, modules = key_map(checkpoint), factorised_layers(model)
    readers: dict[str, tuple[torch.dtype, Callable[[], Tensor]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    found: set[str] = set()
    for key in tensors.keys():  # noqa: SIM118
        dtype, shape = tensors.describe(key)
        place = keys.target(key)[0] or ""
        layer, part = _split(place, modules)
        if layer is None:
            if shape == (0,) and key.endswith(".weight"):
                continue  # the tripwire
            readers[key] = (dtype, lambda key=key: tensors.read(key))  # type: ignore[misc]
            continue
        found.add(place)
        if tuple(keys.state[place].shape) != shape:
            raise SourceError(f"{reference}: {key} has shape {shape}, the model wants {tuple(keys.state[place].shape)}")
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
            readers[name] = (dtype, _multiply(tensors, modules[layer], stem))
            dtypes[name] = dtype
        elif part == "u.bias":
            readers[f"{stem}.bias"] = (dtype, lambda key=key: tensors.read(key))  # type: ignore[misc]
    for layer, module in modules.items():
        for part in ("v.weight", "u.weight", *(["u.bias"] if module.bias is not None else [])):
            if f"{layer}.{part}" not in found:
                raise SourceError(f"{reference}: {layer}.{part} is missing from the checkpoint")
    total, done = len(dtypes), 0
    with staged(output, overwrite=overwrite) as stage:
        writer = ShardWriter(stage, shard_size=limit)
        try:
            for name in in_write_order([(dtype, name) for name, (dtype, _) in readers.items()]):
                writer.add(name, readers[name][1]())
                if name in dtypes:
                    done += 1
                    yield Progress(name.removesuffix(".weight"), done, total)
            writer.finish()
        finally:
            writer.close()
        copy_companions(source, stage)
        config = output_config(checkpoint, {}, None)
        write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(stage / "README.md", dense_card(source, output.name, config, command))


def _split(place: str, modules: dict[str, FactorisedLayer]) -> tuple[str | None, str]:
    """(layer, part) of a state-dict key inside a factorised layer; None for any other key."""
    for part in ("u.weight", "v.weight", "u.bias"):
        layer = place.removesuffix(f".{part}")
        if layer != place and layer in modules:
            return layer, part
    return None, ""


def _multiply(tensors: object, module: FactorisedLayer, stem: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # one layer's factors are put into its skeleton for as long as the product takes
        module.u.weight = torch.nn.Parameter(tensors.read(f"{stem}.u.weight"), requires_grad=False)  # type: ignore[attr-defined]
        module.v.weight = torch.nn.Parameter(tensors.read(f"{stem}.v.weight"), requires_grad=False)  # type: ignore[attr-defined]
        product = dense_weight(module)
        module.to("meta")
        return product

    return read
