"""`factorise_` and `densify_` on any module in memory, and `factorise_checkpoint` from folder to folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.allocation import share_out
from lrsurgery.budget import Budget
from lrsurgery.errors import SurgeryError
from lrsurgery.layers import KINDS
from lrsurgery.linalg import singular_values
from lrsurgery.metric import Metric, weighted_values
from lrsurgery.moments import Statistics
from lrsurgery.options import Options
from lrsurgery.plan import Plan, Replaced, settle_all
from lrsurgery.ranks import RankLike
from lrsurgery.report import Report
from lrsurgery.steps import result_of
from lrsurgery.stream import iter_factorise
from lrsurgery.surgery import apply_plan_, densify_layers_


def factorise_(
    module: nn.Module,
    *,
    rank: RankLike | None = None,
    budget: str | float | None = None,
    statistics: Statistics | None = None,
    init: str = "spectral",
    conv: str = "channel",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    allow_larger: bool = False,
    multiple_of: int = 1,
    seed: int = 0,
    min_speedup: float | None = None,
    device: str | torch.device | None = None,
    svd: str = "auto",
) -> None:
    """Replaces the layers of any module in memory by factorised ones; a transformers model then saves as such.

    `rank` is the CLI's text, a number, a policy, or a list of texts. Factors are computed on `device` (each layer's own
    by default) and stored in the dense layer's dtype, on its device. `min_speedup` leaves dense what would not run so
    many times as fast on `device` (the GPU by default, where there is one). `budget`, in place of `rank`, is the share
    of the layers' parameters to keep (0.5, "flops:0.5"), or bytes of the model's weights ("bytes:500MB").
    `statistics`, from `collect_statistics`, weigh errors by what they do to the model's outputs or loss.

    Raises RankError, PlanError or WeightError that name the layer; BudgetError for a budget out of reach;
    CalibrationError for statistics of another model.
    """
    where = torch.device(device) if device is not None else None
    runs_on = "auto" if where is None or min_speedup is None else str(where)
    options = Options(
        rank, init, conv, include, exclude, allow_larger, multiple_of, seed, device=runs_on, min_speedup=min_speedup,
        svd=svd, budget=budget,
    )  # fmt: skip
    options.check()
    modules = dict(module.named_modules())

    def metric_of(name: str) -> Metric | None:
        return statistics.metric(name) if statistics is not None else None

    def values_of(row: Replaced) -> Tensor:
        weight = modules[row.name].weight.detach()
        matrix, metric = KINDS[row.kind].to_matrix(weight.to(where or weight.device)), metric_of(row.name)
        try:
            return singular_values(matrix) if metric is None else weighted_values(matrix, metric)
        except SurgeryError as e:
            raise type(e)(f"{row.name}: {e}") from e

    tied = dict(getattr(module, "all_tied_weights_keys", None) or {})
    plan = options.plan_for(module, tied)
    if statistics is not None:
        statistics.check_for(plan.replaced)
    plan = _with_ranks(module, plan, values_of, statistics)
    apply_plan_(module, plan, init=init, seed=seed, device=where, metric_of=metric_of, svd=svd)
    if _is_transformers_model(module):
        from lrsurgery.hf import attach_

        attach_(module)


def _with_ranks(
    module: nn.Module, plan: Plan, values_of: Callable[[Replaced], Tensor], statistics: Statistics | None
) -> Plan:
    budget = plan.spec.default
    if not isinstance(budget, Budget):
        return settle_all(plan, values_of)
    values = {row.name: values_of(row) for row in plan.replaced}
    weights = {p.data_ptr(): p for p in module.parameters()}.values()
    widths = {name: m.weight.element_size() for name, m in module.named_modules() if name in values}  # type: ignore[operator]
    return share_out(
        plan, budget, values, statistics, parameters=sum(p.numel() for p in weights), widths=widths,
        total_bytes=sum(p.numel() * p.element_size() for p in weights),
    )  # fmt: skip


def densify_(module: nn.Module) -> None:
    """Multiplies every factorised layer out into the ordinary layer that it replaced, in its dtype."""
    densify_layers_(module)
    if _is_transformers_model(module):
        from lrsurgery.hf import detach_

        detach_(module)


def _is_transformers_model(module: nn.Module) -> bool:
    # a transformers model has brought transformers along; anything else need not wait for its import
    return "transformers" in sys.modules and any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def factorise_checkpoint(
    source: str | Path, output: str | Path, *, rank: RankLike | None = None, **options: Any
) -> Report:
    """From checkpoint to checkpoint, in the memory of a few tensors; `options` are the fields of `Options`.

    Raises SurgeryError: which file or layer, what is wrong, what to do. Nothing is written then.
    """
    steps = iter_factorise(str(source), Path(output), Options(rank, **options))
    return result_of(steps)
