"""Puts a plan into effect on a model in memory. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.errors import PlanError, SurgeryError
from lrsurgery.inits import Given, get_init, layer_generator
from lrsurgery.layers import (
    KINDS,
    FactorisedLayer,
    build_dense,
    dense_weight,
    factor_weights,
)
from lrsurgery.linalg import Decomposed
from lrsurgery.metric import Metric
from lrsurgery.plan import Plan, Replaced
from lrsurgery.threads import in_order, layers_at_once, memory


def factorised_layers(model: nn.Module) -> dict[str, FactorisedLayer]:
    """Every factorised layer of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedLayer)}


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is registered: a shared module has several parents, `named_modules` shows one."""
    new.train(old.training)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def swap_(model: nn.Module, layers: Mapping[str, tuple[str, int]]) -> None:
    """Replaces dense layers by factorised ones with empty weights on the meta device: name -> (kind, rank).

    Raises PlanError for a name that the model does not have, or a layer that is not of this kind.
    """
    modules = dict(model.named_modules())
    for name, (kind, rank) in layers.items():
        if kind not in KINDS:
            raise PlanError(f"{name}: unknown kind '{kind}'; known: {', '.join(KINDS)}")
        dense = modules.get(name)
        if dense is None or not isinstance(getattr(dense, "weight", None), Tensor):
            raise PlanError(f"{name}: this {type(model).__name__} has no such layer")
        if dense.weight.ndim != (4 if kind.startswith("conv2d") else 2):
            raise PlanError(f"{name}: a {type(dense).__name__} cannot become a {kind} layer")
        new = KINDS[kind].build(dense, kind, rank)
        if not dense.weight.requires_grad:
            new.requires_grad_(False)
        replace_module_(model, dense, new)


def decompose(
    row: Replaced, weight: Tensor, init: str, seed: int, choose: Callable[[Tensor], int] | None, *,
    metric: Metric | None = None, **effort: Any,
) -> Decomposed:  # fmt: skip
    """Factors of one dense weight, in the working dtype; `choose` maps singular values to a rank not planned yet.

    `metric`: what weighs its errors. `effort`: what `linalg.spectral_factors` takes by name (svd, known, keep).

    Raises SurgeryError that names the layer.
    """
    matrix = KINDS[row.kind].to_matrix(weight)
    rank = row.rank if row.rank is not None else choose
    assert rank is not None
    fan_in = weight.numel() // (row.shape[1] if row.kind == "conv1d" else row.shape[0])
    try:
        return get_init(init)(Given(matrix, rank, fan_in, layer_generator(seed, row.name), metric, effort))
    except SurgeryError as e:
        raise type(e)(f"{row.name}: {e}") from e


def apply_plan_(
    model: nn.Module, plan: Plan, *, init: str, seed: int, device: torch.device | None = None, **effort: Any
) -> None:
    """Replaces every planned layer of a model in memory, computing on `device` (the layer's own by default).

    `effort`: what `iter_apply_plan_` takes by name.

    Raises SurgeryError that names the layer; layers before it are replaced by then, so work on a copy if that matters.
    """
    for _ in iter_apply_plan_(model, plan, init=init, seed=seed, device=device, **effort):
        pass


def iter_apply_plan_(
    model: nn.Module, plan: Plan, *, init: str, seed: int, device: torch.device | None = None,
    metric_of: Callable[[str], Metric | None] = lambda name: None, **effort: Any,
) -> Iterator[tuple[Replaced, Decomposed]]:  # fmt: skip
    """As `apply_plan_`, one layer a step. The plan's ranks must be settled. `metric_of` gives a layer's metric."""
    modules = dict(model.named_modules())

    def factors_of(row: Replaced) -> tuple[Decomposed, Tensor, Tensor]:
        weight: Tensor = modules[row.name].weight.detach()
        if weight.is_meta:
            raise PlanError(f"{row.name}: its weight is on the meta device; load the model first")
        result = decompose(
            row, weight.to(device or weight.device), init, seed, None, metric=metric_of(row.name), **effort
        )
        return result, *factor_weights(row.kind, weight, result.factors)

    threads = torch.get_num_threads()
    weights: list[Tensor] = [modules[row.name].weight for row in plan.replaced]
    on_cpu = all((device or weight.device).type == "cpu" for weight in weights)
    needs = [memory(row, w.element_size()) for row, w in zip(plan.replaced, weights, strict=True)]
    at_once = layers_at_once(needs, threads) if on_cpu else 1
    for row, (result, u, v) in zip(plan.replaced, in_order(factors_of, plan.replaced, at_once, threads), strict=True):
        dense = modules[row.name]
        assert row.rank is not None
        new = KINDS[row.kind].build(dense, row.kind, row.rank)
        new.u.weight = nn.Parameter(u, requires_grad=dense.weight.requires_grad)
        new.v.weight = nn.Parameter(v, requires_grad=dense.weight.requires_grad)
        if dense.bias is not None:
            new.u.bias = dense.bias
        replace_module_(model, dense, new)
        yield row, result


def densify_layers_(model: nn.Module) -> None:
    """Multiplies every factorised layer out into the ordinary layer that it replaced."""
    for layer in factorised_layers(model).values():
        dense = build_dense(layer)
        dense.weight = nn.Parameter(dense_weight(layer), requires_grad=layer.u.weight.requires_grad)
        dense.bias = layer.u.bias  # type: ignore[assignment]
        replace_module_(model, layer, dense)
