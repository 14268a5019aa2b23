"""`save_pretrained` of factorised models: the weights it is given, or the model's own, and the tripwire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lrsurgery.checkpoints.mapping import with_tripwire
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import check_storable, factorised_layers

GIVEN = "_given_state_dict"  # of a quantizer, while a model is being saved


@contextmanager
def giving(model: Any, given: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let the quantizer of a model write the state dict that `save_pretrained` was given.

    transformers asks the quantizer for the weights in its place, without a word of them, so a gathered or averaged
    state dict (FSDP, ZeRO, EMA) would be replaced by the model's own.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if given is None or quantizer is None:
        yield
        return
    vars(quantizer)[GIVEN] = given
    try:
        yield
    finally:
        del vars(quantizer)[GIVEN]


def weights_to_save(model: nn.Module, quantizer: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a factorised folder, with the tripwire, and the metadata of its files.

    They are those that `save_pretrained` was given, or the model's. Raises SourceError if a given dense weight stands
    where the model has factors, or if factors are quantised and weights are given.
    """
    check_storable(model)
    given = vars(quantizer).get(GIVEN)
    if quantizer.then is not None:
        if given is not None:
            raise SourceError("state_dict: a model with quantised factors is saved with its own weights, so give none")
        state, metadata = quantizer.then.get_state_dict_and_metadata(model)
        return with_tripwire(model, model.state_dict() if state is None else state), metadata
    if given is None:
        return with_tripwire(model, model.state_dict()), {}
    for name, layer in factorised_layers(model).items():
        key = layer.layout.weight_key(name)
        if key in given and given[key].numel() > 0:
            raise SourceError(
                f"state_dict: {key} is a dense weight, but the model's layer is factorised (rank {layer.rank}); give"
                " save_pretrained the state dict of the factorised model, or save the dense one"
            )
    return with_tripwire(model, dict(given)), {}
