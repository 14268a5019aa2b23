"""A vLLM plugin: factorised checkpoints load and run with their layers low rank.

vLLM calls `register` through its entry points. A merged projection, as of q, k and v, has a part for each layer of the
checkpoint, with a rank of its own. With tensor parallelism each process has its rows of u, or its columns of v, of the
balanced form. The plugin knows linear layers; other kinds are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from lrsurgery.checkpoints.format import FORMAT_VERSION, METHOD
from lrsurgery.checkpoints.upstream.forms import check_layers, specs_from
from lrsurgery.errors import SourceError
from lrsurgery.files.json import check_version
from lrsurgery.serving.factors import KINDS, Part, rows_of
from lrsurgery.surgery.layers import Spec

NAMES = ("weight", "u.weight", "v.weight", "u.bias", "v.bias", "order")  # of tensors in the files
SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # of merged projections, as vLLM calls them


class LowRankConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a factorised checkpoint. Raises SourceError for layers that the plugin does not run."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.specs = dict(specs)
        for name, spec in specs.items():
            if spec.kind not in KINDS or spec.v_of is not None or spec.pivots is not None or spec.tied_to is not None:
                what = "shares its v" if spec.v_of or spec.pivots else f"is of kind {spec.kind}"
                raise SourceError(
                    f"{name} {what}, which the vLLM plugin does not run; lrsurgery export --to dense writes a folder"
                    " that vLLM loads"
                )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        check_version(config.get("format_version"), FORMAT_VERSION, "quantization_config")
        return cls(specs_from(check_layers(config.get("layers"))))

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM renames weights."""
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.specs:
            raise SourceError(f"{prefix} is a head, which the vLLM plugin does not run low rank; leave it dense")
        if not isinstance(layer, LinearBase):
            return None
        stem, _, last = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.specs and last in self.packed_modules_mapping:
            names = [f"{stem}.{name}" for name in self.packed_modules_mapping[last]]
        if not any(name in self.specs for name in names):
            return UnquantizedLinearMethod()
        return LowRankMethod([(name, self.specs.get(name)) for name in names])


class LowRankMethod(LinearMethodBase):  # type: ignore[misc]
    """What a linear layer of vLLM does where it, or a part of it, is low rank; `layers` are the parts in order."""

    def __init__(self, layers: list[tuple[str, Spec | None]]) -> None:
        self.layers = layers

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Make a place for each tensor of the files; what is loaded there goes to the parts."""
        sizes = getattr(layer, "output_sizes", None) or [output_size]
        layer.blocks = sizes
        if len(self.layers) != len(sizes):  # GPT-2 has queries, keys and values in one layer
            sizes = [output_size]
        heads = getattr(layer, "total_num_kv_heads", None)
        if heads is not None and heads < get_tensor_model_parallel_world_size():
            raise SourceError(f"{self.layers[0][0]}: fewer key-value heads than processes; use fewer of them")
        layer.parts = [
            Part(name, rows, input_size, spec) for (name, spec), rows in zip(self.layers, sizes, strict=True)
        ]
        layer.dtype = params_dtype
        layer.u, layer.v = nn.Module(), nn.Module()
        for name in NAMES:
            owner, _, attribute = name.rpartition(".")
            place = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            place.weight_loader = _loader(layer, name)  # type: ignore[attr-defined]
            (getattr(layer, owner) if owner else layer).register_parameter(attribute, place)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there, fold the biases of the factors into the layer's own, and keep this process's share.

        Raises SourceError that names a tensor which is missing.
        """
        rank, count = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        by_columns, start = isinstance(layer, RowParallelLinear), 0
        device = layer.weight.device
        for part in layer.parts:
            part.check()
            part.tensors = {name: tensor.to(device) for name, tensor in part.tensors.items()}
            rows: slice | Tensor = slice(0, part.rows)
            columns, size = slice(0, part.columns), part.rows
            if by_columns:
                columns = _share(part.columns, rank, count)
            elif count > 1:
                rows = rows_of(layer.blocks if len(layer.parts) == 1 else [part.rows], rank, count)
                size = len(rows)
            bias = part.dense_bias()
            if bias is not None:
                layer.bias.data[start : start + size].copy_(bias[rows])
            start += size
            part.slice_(rows, columns)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [part.apply(x) for part in layer.parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return output if bias is None else output + bias


def _share(size: int, rank: int, count: int) -> slice:
    return slice(size // count * rank, size // count * (rank + 1))


def _loader(layer: Any, name: str) -> Callable[..., None]:
    """What vLLM calls with a tensor of the files, and the shard of a merged projection that it is of."""

    def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        index = shard if isinstance(shard, int) else SHARDS[shard]
        dtype = torch.int32 if name == "order" else layer.dtype
        layer.parts[index].load(name, tensor.to(dtype))

    return load


def register() -> None:
    """Register the format with vLLM; the entry point of `vllm.general_plugins`."""
    register_quantization_config(METHOD)(LowRankConfig)
