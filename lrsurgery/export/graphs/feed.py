"""Inputs of a model, to trace it and to compare two of its forms: which it has, of which sizes, and random ones."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.images import Preprocessing
from lrsurgery.data.text.padding import position_limit
from lrsurgery.errors import DataError, SurgeryError

IMAGE, TOKENS, DECODER, MASK = "pixel_values", "input_ids", "decoder_input_ids", "attention_mask"
MOST_TOKENS = 2048  # of a sequence, where neither the model nor its config bounds it and a runtime needs a bound


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The inputs of a model by name, and what may change between two calls."""

    names: tuple[str, ...]
    image: tuple[int, int, int] | None = None  # (channels, height, width), which stay as they are; None: tokens
    vocabulary: int = 0  # ids of tokens are below it
    limit: int | None = None  # the most tokens of a sequence; None: the model has no bound

    def random(self, batch: int, length: int, seed: int) -> dict[str, Tensor]:
        """Random inputs: images (batch, channels, height, width), or tokens (batch, length), none of them padding."""
        generator = torch.Generator().manual_seed(seed)
        if self.image is not None:
            return {IMAGE: torch.randn(batch, *self.image, generator=generator)}
        shape = (batch, min(length, self.limit or length))

        def of(name: str) -> Tensor:
            if name in (TOKENS, DECODER):
                return torch.randint(min(2, self.vocabulary - 1), self.vocabulary, shape, generator=generator)
            return torch.ones(shape, dtype=torch.long) if name == MASK else torch.zeros(shape, dtype=torch.long)

        return {name: of(name) for name in self.names}

    def shapes(self, *, batch: bool) -> dict[str, dict[int, Any]]:
        """The axes of each input that may change, as `torch.export` takes them; with `batch`, the first, too."""
        first = {0: torch.export.Dim("batch", min=1)} if batch else {}
        if self.image is not None:
            return {IMAGE: first}
        most = self.limit or MOST_TOKENS
        axes = {name: torch.export.Dim(name, min=1, max=most) for name in ("length", "decoder_length")}
        return {name: {**first, 1: axes["decoder_length" if name == DECODER else "length"]} for name in self.names}


def feed_of(source: Source, model: nn.Module, *, trust_remote_code: bool = False) -> Feed:
    """Tell what a model takes. Raises SurgeryError if that is neither tokens nor images of one size."""
    if source.library == "timm":
        shape = Preprocessing.of(source, model, None).shape
        assert shape is not None, "timm names one size"
        return Feed(names=(IMAGE,), image=shape)
    main = getattr(model, "main_input_name", TOKENS)
    if main == IMAGE:
        return Feed(names=(IMAGE,), image=_image_of(source, model, trust_remote_code))
    if main != TOKENS:
        raise SurgeryError(f"{source.reference}: takes {main}; models of tokens or of images alone are exported")
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    names = [TOKENS, *([MASK] if MASK in taken else [])]
    if "token_type_ids" in taken and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    names += [DECODER] if DECODER in taken and getattr(config, "is_encoder_decoder", False) else []
    limit, relative = position_limit(model)
    vocabulary = int(config.get_text_config().vocab_size)
    return Feed(names=tuple(names), vocabulary=vocabulary, limit=None if relative else limit)


def _image_of(source: Source, model: nn.Module, trust_remote_code: bool) -> tuple[int, int, int]:
    """The pixels that the checkpoint's own processor makes, or that its config names. Raises SurgeryError."""
    config: Any = model.config
    try:
        shape = Preprocessing.of(source, model, None, trust_remote_code=trust_remote_code).shape
    except DataError:  # a folder without a processor
        size = getattr(config, "image_size", None)
        edges = (size, size) if isinstance(size, int) else tuple(size or ())
        shape = (getattr(config, "num_channels", 3), *edges) if len(edges) == 2 else None
    if shape is None:
        raise SurgeryError(
            f"{source.reference}: neither its processor nor its config names one size of images, which a graph needs"
        )
    return shape
