"""Tensors of quantised checkpoints, dequantised one at a time as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lrsurgery.checkpoints.quantised.gguf import GgufSource
from lrsurgery.checkpoints.quantised.library import dequantise_blocks, dequantise_mxfp4
from lrsurgery.checkpoints.quantised.schemes import FLOAT8, GGUF, MXFP4, Block, Scheme
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import TensorSource, in_slices, open_tensors
from lrsurgery.errors import SourceError

# last parts of keys: scales of activations and of the KV cache, which dense weights have no use for
ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale")
ELEMENTS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
AGAIN = "download the model again"


class Packed(Protocol):
    """A weight of several tensors in the files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors in the files, the largest first."""
        ...

    def read(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The dense weight of what `read` gives for `keys`. Raises ValueError for scales that are not finite."""
        ...

    def part(self) -> Packed:
        """A slice of the first axis, that `read` is called for with such slices; of a weight of three axes."""
        ...


@dataclass(frozen=True)
class Float8:
    """A weight (..., m, n) in float8 with a scale for each block: W = elements * scale."""

    shape: tuple[int, ...]
    keys: tuple[str, str]  # of the elements and the scales
    block: tuple[int, int]

    def read(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        elements, scales = (read(key) for key in self.keys)
        scales = (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("NaN or Inf")
        return dequantise_blocks(elements, scales.reshape(*self.shape[:-2], *self.grid), self.block).to(dtype)

    def part(self) -> Float8:
        return replace(self, shape=self.shape[1:])

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are below and beside each other."""
        rows, columns = (-(-size // step) for size, step in zip(self.shape[-2:], self.block, strict=True))
        return rows, columns


@dataclass(frozen=True)
class Mxfp4:
    """Experts (E, n, m), stored (E, m, n / 32, 16) as pairs of 4-bit elements with an exponent for each 32 of them."""

    shape: tuple[int, ...]
    keys: tuple[str, str]  # of the elements and the exponents

    def read(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        elements, exponents = (read(key) for key in self.keys)
        if bool((exponents == 255).any()):  # the NaN of E8M0
            raise ValueError("NaN")
        if len(self.shape) == 2:
            return dequantise_mxfp4(elements[None], exponents[None], dtype)[0]
        return dequantise_mxfp4(elements, exponents, dtype)

    def part(self) -> Mxfp4:
        return replace(self, shape=self.shape[1:])


class DequantisedSource:
    """Tensors of another source, with dense weights in place of the packed ones and without what belongs to those."""

    def __init__(self, tensors: TensorSource, packed: Mapping[str, Packed], reference: str, dtype: torch.dtype) -> None:
        """`packed` maps the key of a dense weight to its tensors, `reference` names the model in errors."""
        self._tensors, self._packed, self._reference, self._dtype = tensors, packed, reference, dtype
        self.wrappers, self.beside = tensors.wrappers, tensors.beside
        place = {each.keys[0]: key for key, each in packed.items()}
        dropped = {key for each in packed.values() for key in each.keys[1:]}
        self._keys = [
            place.get(key, key)
            for key in tensors.keys()  # noqa: SIM118
            if key not in dropped and key.rpartition(".")[2] not in ACTIVATIONS
        ]

    def keys(self) -> list[str]:
        return list(self._keys)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if key not in self._packed:
            return self._tensors.describe(key)
        return self._dtype, self._packed[key].shape

    def read(self, key: str) -> Tensor:
        if key not in self._packed:
            return self._tensors.read(key)
        return self._dense(key, self._packed[key], self._tensors.read)

    def slices(self, key: str) -> Iterator[Tensor]:
        return self._tensors.slices(key) if key not in self._packed else in_slices(self.read(key))

    def part(self, key: str, index: int) -> Tensor:
        if key not in self._packed:
            return self._tensors.part(key, index)
        if len(self._packed[key].shape) == 2:
            return self.read(key)[index]
        return self._dense(key, self._packed[key].part(), lambda stored: self._tensors.part(stored, index))

    def _dense(self, key: str, packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
        try:
            weight = packed.read(read, self._dtype)
        except ValueError as e:
            raise SourceError(f"{self._reference}: {packed.keys[1]}, the scales of {key}, holds {e}; {AGAIN}") from e
        if not bool(torch.isfinite(weight).all()):
            name = str(self._dtype).removeprefix("torch.")
            raise SourceError(f"{self._reference}: {key} is not finite once dequantised to {name}; {AGAIN}")
        return weight


def open_weights(source: Source) -> TensorSource:
    """Open a checkpoint's files, with dense weights. Raises SourceError, as `dequantised` does."""
    return dequantised(source, open_tensors(list(source.files)))


def dequantised(source: Source, tensors: TensorSource) -> TensorSource:
    """The dense weights of a quantised source's tensors; those of any other source as they are.

    Raises SourceError that names a weight without its scales, scales of another shape or without a weight; also if no
    weight is stored as the config says.
    """
    scheme = source.scheme
    if scheme is None or isinstance(tensors, GgufSource):
        return tensors
    packed = FIND[scheme.stored](source.reference, tensors, scheme)
    if not packed:
        raise SourceError(
            f"{source.reference}: config.json has a quantization_config for {scheme.name}, and no tensor of the"
            " files is one; take the config.json of these weights"
        )
    return DequantisedSource(tensors, packed, source.reference, scheme.dtype)


def weight_bytes(source: Source) -> int | None:
    """Bytes of the weight files; of a quantised source those of its dense weights. None without weight files."""
    if source.scheme is None or not source.files:
        return source.bytes
    tensors = open_weights(source)
    described = (tensors.describe(key) for key in tensors.keys())  # noqa: SIM118
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in described)


def usual_dtype(source: Source) -> torch.dtype:
    """The dtype of most of the checkpoint's floating-point tensors; fp32 without weight files."""
    if not source.files:
        return torch.float32
    tensors = open_weights(source)
    dtypes = [tensors.describe(key)[0] for key in tensors.keys()]  # noqa: SIM118
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(set(floating), key=floating.count) if floating else torch.float32


def _find_float8(reference: str, tensors: TensorSource, scheme: Scheme) -> dict[str, Packed]:
    keys = dict.fromkeys(tensors.keys())
    found: dict[str, Packed] = {}
    for key in keys:
        dtype, shape = tensors.describe(key)
        if dtype not in ELEMENTS or len(shape) < 2:
            continue
        names = [_scale_key(key, name) for name in scheme.scale_names]
        scale = next((name for name in names if name in keys), None)
        if scale is None:
            name = str(dtype).removeprefix("torch.")
            raise SourceError(f"{reference}: {key} is {name}, and its scales, {names[0]}, are missing; {AGAIN}")
        have = tensors.describe(scale)[1]
        options = [Float8(shape, (key, scale), _block_of(block, shape)) for block in scheme.blocks]
        fits = [each for each in options if _same(have, (*shape[:-2], *each.grid))]
        if not fits:
            wanted = " or ".join(str((*shape[:-2], *each.grid)) for each in options)
            block = " or ".join(f"{m}x{n}" for m, n in (each.block for each in options))
            raise SourceError(
                f"{reference}: {scale} has shape {have}, and the weight {shape} in blocks of {block} wants {wanted};"
                " take the config.json and the weights of one model"
            )
        found[key] = fits[0]
    scales = {each.keys[1] for each in found.values()}
    for key in keys:
        if key.endswith(scheme.scale_names[0]) and key not in scales:
            raise SourceError(f"{reference}: {key} holds scales, and no float8 weight goes with it; {AGAIN}")
    return found


def _scale_key(key: str, name: str) -> str:
    """The key of a weight's scales; of a parameter that is no `weight`, its own key with an ending."""
    stem, _, last = key.rpartition(".")
    return f"{stem}.{name}" if last == "weight" else f"{key}{name.removeprefix('weight')}"


def _block_of(block: Block, shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = block
    return rows or shape[-2], columns or shape[-1]


def _same(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether scales have the wanted shape, of which axes of 1 at the end may be left out."""
    return have == wanted[: len(have)] and all(size == 1 for size in wanted[len(have) :])


def _find_mxfp4(reference: str, tensors: TensorSource, scheme: Scheme) -> dict[str, Packed]:
    keys = dict.fromkeys(tensors.keys())
    found: dict[str, Packed] = {}
    for key in keys:
        if key.endswith("_scales") and (partner := f"{key.removesuffix('_scales')}_blocks") not in keys:
            raise SourceError(f"{reference}: {key} holds scales, and {partner} is missing; {AGAIN}")
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        scale = f"{name}_scales"
        if scale not in keys:
            raise SourceError(f"{reference}: {key} is MXFP4, and its scales, {scale}, are missing; {AGAIN}")
        (dtype, shape), (other, have) = tensors.describe(key), tensors.describe(scale)
        if dtype != torch.uint8 or other != torch.uint8 or len(shape) != 4 or have != shape[:-1]:
            raise SourceError(
                f"{reference}: {key} {shape} and {scale} {have} are no MXFP4 weight, whose blocks have 4 axes and whose"
                f" scales the first 3 of them, both uint8; {AGAIN}"
            )
        experts, rows, groups, size = shape
        found[name] = Mxfp4((experts, 2 * groups * size, rows), (key, scale))
    return found


FIND: Mapping[str, Callable[[str, TensorSource, Scheme], dict[str, Packed]]] = {
    FLOAT8: _find_float8,
    MXFP4: _find_mxfp4,
    GGUF: lambda reference, tensors, scheme: {},  # whose files are no safetensors
}
