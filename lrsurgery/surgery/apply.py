"""Puts a plan into effect on a model in memory. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lrsurgery.errors import PlanError, SurgeryError
from lrsurgery.linalg.inits import InitProblem, get_init, layer_generator
from lrsurgery.linalg.svd import Decomposition, RankChoice, Spectrum
from lrsurgery.linalg.weighted import Metric
from lrsurgery.runtime import Compute
from lrsurgery.surgery.kinds import KINDS
from lrsurgery.surgery.layers import FactorisedLayer, build_dense, dense_weight, factor_weights
from lrsurgery.surgery.plan import Plan, Replacement


def factorised_layers(model: nn.Module) -> dict[str, FactorisedLayer]:
    """Every factorised layer of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedLayer)}


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered: a shared module has several parents, `named_modules` shows one."""
    new.train(old.training)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def swap_(model: nn.Module, layers: Mapping[str, tuple[str, int]]) -> None:
    """Replace dense layers by factorised ones with empty weights on the meta device: name -> (kind, rank).

    Raises PlanError for a name that the model does not have, or a layer that is not of this kind.
    """
    modules = dict(model.named_modules())
    for name, (kind_name, rank) in layers.items():
        kind = KINDS.get(kind_name)
        if kind is None:
            raise PlanError(f"{name}: unknown kind '{kind_name}'; known: {', '.join(KINDS)}")
        dense = modules.get(name)
        weight = getattr(dense, "weight", None)
        if dense is None or not isinstance(weight, Tensor):
            raise PlanError(f"{name}: this {type(model).__name__} has no such layer")
        if weight.ndim != kind.weight_axes:
            raise PlanError(f"{name}: a {type(dense).__name__} cannot become a {kind_name} layer")
        new = kind.build(dense, rank)
        if not weight.requires_grad:
            new.requires_grad_(False)
        replace_module_(model, dense, new)


def decomposition_cost(row: Replacement) -> float:
    """Proportional to a decomposition's time: products over the long side, an eigensolver worth four of the short."""
    short, long = sorted((row.rows, row.columns))
    return float(short) ** 2 * (long + 4 * short)


def decomposition_bytes(row: Replacement, item_size: int, *, weighted: bool = False) -> int:
    """Bytes at a decomposition's peak: the tensor, its copy in fp32, the eigensolver's five squares, factors twice.

    In a metric all of that is in fp64, with both of the metric's moments, read in fp32 and damped.
    """
    short, long = sorted((row.rows, row.columns))
    wide = max(8 if weighted else 4, item_size)
    solver = wide * (5 * short**2 + 2 * (row.rank or short) * (short + long))
    if weighted:
        return 12 * (row.rows**2 + row.columns**2) + 3 * wide * short * long + solver
    return short * long * (item_size + wide) + solver


def decompose(
    row: Replacement,
    weight: Tensor,
    *,
    init: str,
    seed: int,
    rank: RankChoice | None = None,
    metric: Metric | None = None,
    svd: str = "auto",
    known: Spectrum | None = None,
    keep: bool = False,
) -> Decomposition:
    """Factors of one dense weight, in the working dtype.

    `rank` maps singular values to a rank where the plan has none yet; `metric` weighs the weight's errors; `svd`,
    `known` and `keep` are those of `linalg.spectral_factors`.

    Raises SurgeryError that names the layer.
    """
    choice = row.rank if row.rank is not None else rank
    assert choice is not None
    problem = InitProblem(
        row.layout.to_matrix(weight),
        choice,
        row.layout.fan_in(weight.shape),
        layer_generator(seed, row.name),
        metric,
        svd=svd,
        known=known,
        keep=keep,
    )
    try:
        return get_init(init)(problem)
    except SurgeryError as e:
        raise type(e)(f"{row.name}: {e}") from e


def apply_plan_(
    model: nn.Module,
    plan: Plan,
    *,
    init: str,
    seed: int,
    device: torch.device | None = None,
    metric_of: Callable[[str], Metric | None] = lambda name: None,
    svd: str = "auto",
) -> None:
    """Replace every planned layer of a model in memory, computing on `device` (the layer's own by default).

    The plan's ranks must be known. `metric_of` gives a layer's metric.

    Raises SurgeryError that names the layer; layers before it are replaced by then, so work on a copy if that matters.
    """
    modules = dict(model.named_modules())

    def factors_of(row: Replacement) -> tuple[Tensor, Tensor]:
        weight: Tensor = modules[row.name].weight.detach()
        if weight.is_meta:
            raise PlanError(f"{row.name}: its weight is on the meta device; load the model first")
        found = decompose(
            row, weight.to(device or weight.device), init=init, seed=seed, metric=metric_of(row.name), svd=svd
        )
        return factor_weights(row.layout, weight, found.factors)

    weights: list[Tensor] = [modules[row.name].weight for row in plan.replacements]
    on_cpu = all((device or weight.device).type == "cpu" for weight in weights)
    compute = Compute(device=torch.device("cpu") if on_cpu else torch.device("cuda"))
    needs = [
        decomposition_bytes(row, weight.element_size()) for row, weight in zip(plan.replacements, weights, strict=True)
    ]
    found = compute.in_order(factors_of, plan.replacements, needs)
    for row, (u, v) in zip(plan.replacements, found, strict=True):
        dense = modules[row.name]
        assert row.rank is not None
        new = row.layout.build(dense, row.rank)
        new.u.weight = nn.Parameter(u, requires_grad=dense.weight.requires_grad)
        new.v.weight = nn.Parameter(v, requires_grad=dense.weight.requires_grad)
        if dense.bias is not None:
            new.u.bias = dense.bias
        replace_module_(model, dense, new)


def densify_layers_(model: nn.Module) -> None:
    """Multiply every factorised layer out into the ordinary layer that it replaced."""
    for layer in factorised_layers(model).values():
        dense = build_dense(layer)
        dense.weight = nn.Parameter(dense_weight(layer), requires_grad=layer.u.weight.requires_grad)
        dense.bias = layer.u.bias  # type: ignore[assignment]
        replace_module_(model, layer, dense)
