"""transformers' own arithmetic of quantised weights, which it has in undocumented places.

Written against transformers 5.17 to 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import SAFETENSORS_NAMES, TensorSource
from lrsurgery.errors import SourceError


def dequantise_blocks(elements: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of float8 elements (..., m, n) by its fp32 scale; the product is in fp32.

    `scales` are (..., ceil(m / rows), ceil(n / columns)) for blocks of rows x columns.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = elements.shape[-2:]
    # transformers divides the weight evenly among its scales, which is another block where the last one is cut off
    below, beside = scales.shape[-2] * block[0] - rows, scales.shape[-1] * block[1] - columns
    wide = torch.nn.functional.pad(elements.float(), (0, beside, 0, below))
    dense: Tensor = Fp8Dequantize(None)._dequantize_one(wide, scales)  # in the dtype of the scales
    return dense[..., :rows, :columns].contiguous()


def dequantise_mxfp4(elements: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack experts (E, m, n / 32, 16) with their exponents (E, m, n / 32) into the (E, n, m) that the model has."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense: Tensor = convert_moe_packed_tensors(elements, exponents, dtype=dtype)
    return dense


class WeightOnDisk:
    """A tensor that is read as transformers' loader slices it: what a slice of a safetensors file is there."""

    def __init__(self, tensors: TensorSource, key: str) -> None:
        self._tensors, self._key = tensors, key

    def get_dtype(self) -> str:
        return SAFETENSORS_NAMES[self._tensors.describe(self._key)[0]]

    def get_shape(self) -> list[int]:
        return list(self._tensors.describe(self._key)[1])

    def __getitem__(self, place: Any) -> Tensor:
        return self._tensors.read(self._key)[place]


def read_generation_config_(model: Any, source: Source) -> None:
    """Give a model that was filled from tensors the generation_config.json of its folder. Raises SourceError."""
    from transformers import GenerationConfig

    if source.folder is None or not (source.folder / "generation_config.json").is_file() or not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    except Exception as e:  # of a file by hand, it may raise anything
        cause = " ".join(str(e).split())[:300]
        raise SourceError(f"{source.reference}: generation_config.json cannot be read ({cause})") from e
