"""Tensor and expert parallelism of factorised layers, by transformers' plans (`tp_plan`, `DistributedConfig`).

A plan gives styles to positions, such as `layers.*.mlp.up_proj`, which may hold dense and factorised layers at once. So
a style there becomes one of ours, which does the same to a dense layer and shards one factor of a factorised one:

- by outputs (colwise): u by its rows, v whole on every process;
- by inputs (rowwise): v by its columns, u whole. Rank numbers a token are summed, not one per output.

Pivots mix what a process holds with what it does not, unless they are on the other side: such layers are loaded whole,
balanced, and sharded then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from lrsurgery.errors import PlanError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.experts.banks import FactorisedBank
from lrsurgery.surgery.forms.change import reform_
from lrsurgery.surgery.layers import FactorisedLayer, FactorisedLinear
from lrsurgery.surgery.shared.modules import SharedLinear, is_led

OUTPUTS, INPUTS = "outputs", "inputs"  # which axis of the matrix a style shards
SHARDED = {
    "colwise": OUTPUTS,
    "colwise_rep": OUTPUTS,
    "colwise_gather_output": OUTPUTS,
    "packed_colwise": OUTPUTS,
    "rowwise": INPUTS,
    "rowwise_rep": INPUTS,
    "rowwise_split_input": INPUTS,
    "packed_rowwise": INPUTS,
}
GATHERED = ("colwise_rep", "colwise_gather_output")  # of which every process gets all outputs
LOOKUPS = ("embedding_rowwise", "embedding_colwise")
BY_EXPERT = "grouped_gemm"
WAITING = "_waits_for_balance"  # of a layer that is sharded after its weights are loaded


def adapt_styles(model: PreTrainedModel) -> None:
    """Make transformers' styles know the factorised layers of a model that is about to be distributed.

    They are registered anew, and act on other modules as before: a rule may come from the model's class, its config or
    the caller. Raises PlanError if experts cannot be divided.
    """
    for name in (*SHARDED, *LOOKUPS, BY_EXPERT):
        former = ALL_PARALLEL_STYLES.get(name)
        if former is not None and not isinstance(former, _Style):
            ALL_PARALLEL_STYLES.register(name, _Style(name, former))
    given = getattr(model.config, "distributed_config", None)
    size = getattr(given, "ep_size", None)
    if given is not None and size is None:  # transformers 5.17 to 5.20 have no size of its own
        size = given.tp_size if getattr(given, "enable_expert_parallel", False) else 1
    if size and size > 1:
        for name, layer in factorised_layers(model).items():
            if isinstance(layer, FactorisedBank):
                _count_local_experts(model.get_submodule(name.rpartition(".")[0]), name, len(layer), size)


def _count_local_experts(owner: Any, name: str, experts: int, size: int) -> None:
    """Tell a module of experts how many of them are here; transformers reads that off a dense parameter."""
    if experts % size:
        raise PlanError(f"{name}: {experts} experts cannot be divided among {size} processes")
    if hasattr(owner, "num_experts"):
        owner.num_experts = experts // size
        owner._is_expert_parallel = True


class _Style:
    """One of transformers' styles, and what it means for a factorised layer."""

    def __init__(self, name: str, former: Any) -> None:
        self.name, self.former = name, former

    def __getattr__(self, name: str) -> Any:  # a dense layer in this place
        return getattr(vars(self)["former"], name)

    def install_forward(self, module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
        if not isinstance(module, FactorisedLayer):
            return self.former.install_forward(module, mesh, **options)  # type: ignore[no-any-return]
        if isinstance(module, FactorisedBank):
            _shard_bank_(module, self.name, mesh)
        elif module.tied or module.layout.lookup or self.name in LOOKUPS:
            if self.name in SHARDED and self.name not in GATHERED:
                raise PlanError(f"a head that is tied to a table is whole on every process, so not '{self.name}'")
        elif _fits(module, self.name):
            _shard_(module, self.name, mesh)
        else:
            vars(module)[WAITING] = (self.name, mesh)
        return module


def _fits(layer: FactorisedLayer, style: str) -> bool:
    return layer.side is None or layer.side == ("columns" if SHARDED[style] == OUTPUTS else "rows")


def _shard_(layer: FactorisedLayer, name: str, mesh: Any) -> None:
    if not isinstance(layer, FactorisedLinear):
        raise PlanError(f"a factorised layer of kind {layer.kind} cannot be sharded in the style '{name}'")
    if SHARDED[name] == INPUTS and isinstance(layer, SharedLinear):
        raise PlanError(
            f"a layer that shares its v cannot be sharded in the style '{name}'; export with --form balanced"
        )
    style, part = ALL_PARALLEL_STYLES[name].former, layer.u if SHARDED[name] == OUTPUTS else layer.v
    for key in list(part._parameters):
        style.shard_param(part, key, mesh)
    style.install_forward(part, mesh)


def _shard_bank_(bank: FactorisedBank, name: str, mesh: Any) -> None:
    """Shard a bank by expert, or one factor of each expert; the other is a copy whose gradients are summed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    def place(part: Any, placement: Any) -> None:
        weight = part.weight
        sharded = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
        part.weight = nn.Parameter(sharded, requires_grad=weight.requires_grad)

    if name == BY_EXPERT:
        place(bank.u, Shard(0))
        place(bank.v, Shard(0))
        return
    outputs = (SHARDED[name] == OUTPUTS) != bank.transposed  # styles name the axes of the dense parameter
    part, other, axis = (bank.u, bank.v, 1) if outputs else (bank.v, bank.u, 2)
    place(part, _StridedShard(axis, split_factor=2) if name.startswith("packed") else Shard(axis))
    place(other, Replicate())


def shard_waiting_(model: nn.Module) -> list[str]:
    """Balance the loaded layers whose pivots do not fit their style, then shard them; return their names."""
    waiting = {name: layer for name, layer in factorised_layers(model).items() if WAITING in vars(layer)}
    for layer in waiting.values():
        if layer.side is not None:
            reform_(layer, None)
    for layer in waiting.values():
        style, mesh = vars(layer).pop(WAITING)
        for tensor in _own_tensors(layer):  # the same on all processes, whatever their machines make of a last digit
            torch.distributed.broadcast(tensor, group=mesh.get_group(), group_src=0)
        _shard_(layer, style, mesh)
    return list(waiting)


def _own_tensors(layer: FactorisedLayer) -> Iterator[Tensor]:
    parts = (layer.u,) if is_led(layer) else (layer.v, layer.u)
    for part in parts:
        for parameter in part.parameters():
            yield parameter.data
