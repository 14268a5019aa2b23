"""What happens to a model before and after transformers fills it from a factorised checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from lrsurgery.checkpoints.pretrained.beside import remember_
from lrsurgery.checkpoints.quantizer.names import config_names, ignore_tripwires, match_names, weight_key, with_partners
from lrsurgery.checkpoints.quantizer.parallel import adapt_styles, shard_waiting_
from lrsurgery.checkpoints.tensors import check_weights
from lrsurgery.checkpoints.upstream.transformers import is_filled, keep_names_plain, retie_
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import check_orders, factorised_layers, specs_of, swap_
from lrsurgery.surgery.layers import Spec, outline
from lrsurgery.surgery.tables.ties import copy_orders_


def swap_in_(model: PreTrainedModel, specs: Mapping[str, Spec], files: Sequence[str]) -> dict[str, Spec]:
    """Put factorised layers in a model on the meta device, and return them as the config of this class names them.

    `files` are the weights, none where they are in memory. Raises SurgeryError.
    """
    if files:
        weights = [Path(file) for file in files]
        check_weights(weights[0].parent, [*weights, Path("config.json")])
        remember_(model, weights[0].parent)
    layers = with_partners(model, match_names(model, specs))
    tripwires = {weight_key(name, spec) for name, spec in specs.items()}
    swap_(model, layers)
    retie_(model)
    ignore_tripwires(model, tripwires)
    if getattr(model.config, "distributed_config", None) is not None:
        adapt_styles(model)
    # an AutoModel loaded from a checkpoint with a head, or the reverse, has other names than the config
    return config_names(model, layers)


def finish_(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, Spec] | None:
    """Check a filled model, whose tensors had these shapes before, and fit it for saving.

    `shapes` are none if it was factorised in memory. Returns the layers as a config names them if their forms have
    changed, else None. Raises SurgeryError.
    """
    if shapes:
        _check_filled(model)
    state = model.state_dict(keep_vars=True)
    for name, shape in shapes.items():
        # transformers 5.17 does not compare shapes if there is a quantizer
        if name in state and (found := outline(state[name]).shape) != shape:
            raise SourceError(
                f"{name} has shape {tuple(found)}, the model wants {tuple(shape)}; take the config.json"
                " and the weights of one model"
            )
    copy_orders_(factorised_layers(model).values())
    check_orders(model)
    keep_names_plain(model, [layer.layout.weight_key(name) for name, layer in factorised_layers(model).items()])
    balanced = shard_waiting_(model)
    if not balanced:
        return None
    logging.get_logger("transformers").warning(
        f"{len(balanced)} pivoted layers cannot be sharded as the plan says and were balanced, which takes more"
        f" memory: {balanced[0]} and such; lrsurgery export --form balanced does it once for all loads"
    )
    return config_names(model, specs_of(model))


def _check_filled(model: PreTrainedModel) -> None:
    """Raise SourceError that names a factor which a load left without values of the files."""
    for name, layer in factorised_layers(model).items():
        for part, tensor in layer.named_parameters():
            if not is_filled(tensor):
                raise SourceError(
                    f"{name}.{part}: missing from the files, or of another shape there, so the layer would be random;"
                    f" the config says that it is factorised (rank {layer.rank}). Take the config.json and the weights"
                    " of one model; tools that quantise a factorised folder must keep the names of its tensors"
                )
