"""An encoder that embeds sentences: pooled as the checkpoint's sentence-transformers files say, compared by cosine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, normalize

from lrsurgery.data.interfaces.wrapped import Wrapped
from lrsurgery.errors import DataError
from lrsurgery.files.json import read_bytes, read_json

TEMPERATURE = 0.05  # of similarities in the contrastive loss, as MultipleNegativesRankingLoss has it (scale 20)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.to(torch.int32).argmax(1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    return hidden[torch.arange(len(hidden)), (mask * places).argmax(1)]


def _most(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)


def _root(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


# sentence-transformers' name -> hidden states (batch, length, channels) and mask (batch, length) -> (batch, channels)
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "lasttoken": _last,
    "max": _most,
    "mean_sqrt_len_tokens": _root,
}
MODULES = ("Transformer", "Pooling", "Normalize")  # of modules.json; lengths make no difference to a cosine


def pooling_of(folder: Path | None) -> tuple[str, str | None]:
    """The pooling of a checkpoint, and a note where it names none. Raises DataError for one that is not known."""
    if folder is None or not (folder / "modules.json").is_file():
        return "mean", "it names no pooling (modules.json): the mean over the tokens is taken"
    for module in _modules(folder / "modules.json"):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in MODULES:
            raise DataError(f"{folder / 'modules.json'}: has a {kind}; only {', '.join(MODULES)} are known")
        if kind == "Pooling":
            return _named(folder / str(module.get("path")) / "config.json"), None
    return "mean", f"{folder / 'modules.json'} names no Pooling: the mean over the tokens is taken"


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(read_bytes(file, "a list of modules", DataError))
    except ValueError as e:
        raise DataError(f"{file}: not JSON ({e})") from e
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise DataError(f"{file}: not a list of sentence-transformers' modules")
    return found


def _named(file: Path) -> str:
    """The pooling in 1_Pooling/config.json, of its older or newer form."""
    config: dict[str, Any] = read_json(file)
    given = config.get("pooling_mode")
    if given is None:
        flags = {
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token"): name
            for name, value in config.items()
            if name.startswith("pooling_mode_") and value is True
        }
        given = ["mean_sqrt_len_tokens" if "sqrt" in name else name for name in flags]
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != 1 or names[0] not in POOLINGS:
        raise DataError(
            f"{file}: pools by {', '.join(map(str, names)) or 'nothing'}; known: one of {', '.join(POOLINGS)}"
        )
    return str(names[0])


class SentenceEncoder(Wrapped):
    """An encoder of transformers behind the interface that its Trainer expects, for pairs of sentences.

    Inputs are (batch, 2, length). With labels (batch,) the loss is the squared error of the cosines. Without them it is
    MultipleNegativesRankingLoss (Henderson et al. 2017, arXiv 1705.00652): each first sentence has to find its second
    among those of the batch, by cosine / 0.05.
    """

    main_input_name = "input_ids"

    def __init__(self, body: nn.Module, pooling: str) -> None:
        super().__init__(body)
        self.pooling = pooling

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        flat = {name: value.flatten(0, 1) for name, value in inputs.items() if value is not None}
        hidden = self.body(**flat).last_hidden_state
        embeddings = POOLINGS[self.pooling](hidden, flat["attention_mask"]).float()
        first, second = embeddings.view(-1, 2, embeddings.shape[-1]).unbind(1)
        similarity = cosine_similarity(first, second)
        if labels is not None:
            loss = mse_loss(similarity, labels.float())
        else:
            scores = normalize(first, dim=-1) @ normalize(second, dim=-1).T / TEMPERATURE
            loss = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        return {"loss": loss, "logits": similarity, "embeddings": embeddings}
