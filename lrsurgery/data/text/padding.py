"""Padding of batches, and figures that do not depend on it; how many positions a model has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lrsurgery.data.batches import IGNORED, Batch, Collator, Example

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_LOGITS = 1 << 28  # held at once: 1 GB in fp32


def pad_tokens(token: int) -> Collator:
    """A collator that pads sequences on the right, outside of the attention mask, with labels that no loss counts."""

    def collate(examples: Sequence[Example]) -> Batch:
        longest = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), longest), token)
        labels = torch.full_like(ids, IGNORED)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length], labels[i, :length] = example["input_ids"], example["labels"]
            mask[i, :length] = example.get("attention_mask", 1)
            types[i, :length] = example.get("token_type_ids", 0)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {**batch, "token_type_ids": types} if "token_type_ids" in examples[0] else batch

    return collate


def position_limit(model: nn.Module) -> tuple[int | None, bool]:
    """Read the most tokens that a text model takes, and whether positions are relative, so that more work.

    The config names the rows of the table of positions. If that has a padding entry, as in RoBERTa's kin, MPNet,
    Longformer and ESM, positions begin after it.
    """
    config: PreTrainedConfig = model.config.get_text_config()  # type: ignore[operator, union-attr]
    # XLNet's kin write -1 where there is no limit; MPT has a name of its own, and so have decoders of speech
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    limits = (getattr(config, name, None) for name in names)
    limit = next((found for found in limits if isinstance(found, int) and found > 0), None)
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if (
            limit
            and padding is not None
            and table is not None
            and "position" in name.rpartition(".")[2]
            and len(table) == limit
        ):
            limit -= padding + 1
            break
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "position_embedding_type", None) == "rotary"
    return limit, limit is None or bool(rotary)


def without_padding(
    inputs: Batch, model: nn.Module, width: int = 1, *, labels_of_tokens: bool = False
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Split a batch that is padded on the right into parts of examples of one length: their places, and their inputs.

    So no figure depends on padding: not on its side, not on its token, not on layers that ignore the mask. Batches
    without padding stay whole, except for a head that finds the last token and has no padding token to go by, and for
    more than `MOST_LOGITS` where the model gives `width` of them for each token. `labels_of_tokens`: there is a label
    for each token, too.
    """
    mask = inputs.get("attention_mask")
    config = getattr(model, "config", None)
    everything = torch.arange(len(next(iter(inputs.values()))))
    if mask is None or mask.ndim != 2 or config is None:
        yield everything, inputs
        return
    longest = mask.shape[1]
    # labels of several outputs can be as many as the tokens
    cut = {name for name in inputs if labels_of_tokens or (name != "labels" and not name.startswith("decoder_"))}
    alone = pad_token_of(config) is None and finds_last_token(model)
    lengths = mask.sum(-1)
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if not bool((mask.bool() == prefix).all()):  # the examples' own masks, and no padding of ours
        yield everything, inputs
        return
    for length in sorted(set(lengths.tolist())):
        most = 1 if alone else max(1, MOST_LOGITS // max(1, length * width))
        for chosen in torch.split((lengths == length).nonzero()[:, 0], most):
            part = {
                name: v[chosen, :length] if name in cut and v.ndim > 1 and v.shape[1] == longest else v[chosen]
                for name, v in inputs.items()
            }
            yield chosen.cpu(), part


def pad_token_of(config: PreTrainedConfig) -> int | None:
    """The padding token of a config; one of somebody's own need not have the entry."""
    return getattr(config.get_text_config(), "pad_token_id", None)


def finds_last_token(model: nn.Module) -> bool:
    """Tell whether the head answers at the last token, which it finds by the config's padding token."""
    return "pad_token_id" in inspect.getsource(inspect.unwrap(type(model).forward))
