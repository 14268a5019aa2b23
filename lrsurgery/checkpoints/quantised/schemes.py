"""What a config says of quantised weights: which schemes are read, and how each is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from lrsurgery.checkpoints.upstream.forms import objects_in, quantisations
from lrsurgery.files.json import Json, checked

Size: TypeAlias = Annotated[int, Field(gt=0, lt=1 << 31)]
BlockSize: TypeAlias = Annotated[list[Size], Field(min_length=2, max_length=2)]
Block: TypeAlias = tuple[int | None, int | None]  # rows and columns that have one scale; None for all of them
WHOLE: Block = (None, None)
DEEPSEEK_BLOCK = (128, 128)  # where the config names none, as in transformers' FineGrainedFP8Config
FLOAT8, MXFP4, GGUF = "float8", "mxfp4", "gguf"


@dataclass(frozen=True)
class Scheme:
    """How the quantised weights of a checkpoint are stored."""

    name: str  # for the user
    stored: str  # FLOAT8, MXFP4 or GGUF
    dtype: torch.dtype  # of the weights that are read
    blocks: tuple[Block, ...] = ()  # of FLOAT8, any of these
    scale_names: tuple[str, ...] = ()  # of FLOAT8: what follows the weight's key, in place of "weight", for its scales

    @property
    def note(self) -> str:
        return f"{self.name} are dequantised to {str(self.dtype).removeprefix('torch.')} on reading"


class _Open(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class _Fp8(_Open, total=False):
    """transformers' FineGrainedFP8Config."""

    weight_block_size: BlockSize | None
    expert_dtype: str | None


class _Weights(_Open, total=False):
    type: str | None
    num_bits: int | None
    strategy: str | None
    symmetric: bool | None
    block_structure: BlockSize | None


class _Group(_Open, total=False):
    format: str | None
    weights: _Weights | None


class _CompressedTensors(_Open, total=False):
    """The config of compressed-tensors."""

    format: str | None
    config_groups: dict[str, _Group] | None
    sparsity_config: dict[str, Any] | None


def without_quantisations(config: Json) -> Json:
    """The config, and the configs in it, without their quantization_config."""
    return {
        key: without_quantisations(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def scheme_of(config: Json, where: str) -> Scheme | None:
    """The scheme of a model's weights, if it is one that is read. Raises SourceError, which `where` begins."""
    found = quantisations(config)
    if not found or any(each != found[0] for each in found):
        return None
    read = READ.get(str(found[0].get("quant_method")))
    return (
        None
        if read is None
        else read(found[0], stored_dtype(config) or torch.bfloat16, f"{where}: quantization_config")
    )


def scheme_name(quantisation: Json) -> str:
    """A quantization_config by its method, and its format where that makes a difference."""
    method = quantisation.get("quant_method")
    # a config that names no method is one all the same
    name = str(method)[:60] if method else "an unnamed method"
    if method == "compressed-tensors":
        groups = quantisation.get("config_groups")
        inner = [each.get("format") for each in groups.values() if isinstance(each, dict)] if groups else []
        formats = dict.fromkeys(str(each)[:60] for each in (quantisation.get("format"), *inner) if each)
        return f"{name} ({', '.join(formats)})" if formats else name
    if method == "fp8" and quantisation.get("expert_dtype") not in (None, "fp8"):
        return f"{name} (experts in {str(quantisation['expert_dtype'])[:60]})"
    return name


def stored_dtype(config: Json) -> torch.dtype | None:
    """The floating-point dtype that a config, or one in it, gives; None where none does."""
    for _, each in objects_in(config):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(each.get(key)).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return None


def _fp8(body: Json, dtype: torch.dtype, where: str) -> Scheme | None:
    found: _Fp8 = checked(_Fp8, body, where)
    if found.get("expert_dtype") not in (None, "fp8"):
        return None
    size = found.get("weight_block_size", list(DEEPSEEK_BLOCK))
    # transformers renames the last two, of DeepSeek-V4 and Mistral Large
    names = ("weight_scale_inv", "scale", "qscale_weight")
    return Scheme("fp8 weights", FLOAT8, dtype, (WHOLE if size is None else (size[0], size[1]),), names)


def _compressed_tensors(body: Json, dtype: torch.dtype, where: str) -> Scheme | None:
    found: _CompressedTensors = checked(_CompressedTensors, body, where)
    groups = list((found.get("config_groups") or {}).values())
    if {group.get("format") or found.get("format") for group in groups} != {"float-quantized"}:
        return None
    if (found.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        return None
    blocks: dict[Block, None] = {}
    for group in groups:
        weights = group.get("weights")
        if weights is None or weights.get("type") != "float" or weights.get("num_bits") != 8:
            return None
        if weights.get("symmetric") is False:
            return None
        size = weights.get("block_structure") or DEEPSEEK_BLOCK
        known: dict[str | None, Block] = {"tensor": WHOLE, "channel": (1, None), "block": (size[0], size[1])}
        if weights.get("strategy") not in known:
            return None
        blocks[known[weights.get("strategy")]] = None
    return Scheme("float8 weights of compressed-tensors", FLOAT8, dtype, tuple(blocks), ("weight_scale",))


def _mxfp4(body: Json, dtype: torch.dtype, where: str) -> Scheme:
    return Scheme("MXFP4 experts", MXFP4, dtype)


def _gguf(body: Json, dtype: torch.dtype, where: str) -> Scheme:
    return Scheme("GGUF tensors", GGUF, dtype)


# quantization_config.quant_method -> what makes a scheme of such a config; None for a form of it that is not read
READ = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4, "gguf": _gguf}
