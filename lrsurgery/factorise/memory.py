"""`factorise_` and `densify_` for modules in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrsurgery.calibration.allocate import Weights, allocate_ranks
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import is_transformers_model, tied_weights
from lrsurgery.checkpoints.output import tell_form
from lrsurgery.factorise.options import parse_target
from lrsurgery.linalg.weighted import Metric, StackedMetric
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.runtime import Compute, pick_device
from lrsurgery.surgery.apply import apply_plan_, densify_layers_
from lrsurgery.surgery.forms.change import balance_layers_, pivot_layers_
from lrsurgery.surgery.kinds.folds import weight_of
from lrsurgery.surgery.kinds.table import AUTO
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.plan import Plan, SurgeryOptions, find_heads, layers_of_several_names
from lrsurgery.surgery.ranks import BALANCED, RankLike
from lrsurgery.surgery.speed import SpeedTable, make_timer, plan_layers


def factorise_(
    module: nn.Module,
    *,
    rank: RankLike | None = None,
    budget: str | float | None = None,
    statistics: Statistics | None = None,
    init: str = "spectral",
    conv: str = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    allow_larger: bool = False,
    multiple_of: int | None = None,
    seed: int = 0,
    min_speedup: float | None = None,
    device: str | torch.device | None = None,
    svd: str = "auto",
    cache: bool = False,
    form: str = BALANCED,
    share: str = AUTO,
    embeddings: bool | None = None,
    heads: bool = False,
    listener: Listener = USUAL,
) -> None:
    """Replace the layers of a module in memory by factorised ones. A transformers model then saves as factorised.

    `rank` is CLI text, a number, a policy, or a list of texts. `budget`, in place of `rank`, is the share of the
    layers' parameters or FLOPs to keep (0.5, "flops:0.5"), or the size of the model's weights ("bytes:500MB").
    `statistics`, from `collect_statistics`, weight errors by their effect on the model's outputs or loss. Factors are
    computed on `device` (by default each layer's own) and stored in the dense layer's dtype on its device. Layers
    whose speedup on `device` (by default the GPU, if there is one) is below `min_speedup` stay dense. `cache` keeps
    singular values on disk, as the CLI does. `form` "pivoted" stores rank^2 numbers less a layer, and saves below every
    full rank; "balanced" trains better. With a budget and statistics by the loss, layers with the same inputs share one
    v where that loses less; `share` "never" keeps them apart. `embeddings` takes tables of tokens with the heads tied
    to them, as a budget of bytes does by itself, without `statistics` each token alike; `heads` takes output heads and
    classifiers. `listener` is told of the layers that are done.

    Raises RankError, PlanError or WeightError that name the layer; BudgetError for an infeasible budget;
    CalibrationError for statistics of another model.
    """
    options = SurgeryOptions(
        target=parse_target(rank, budget, multiple_of=multiple_of),
        init=init,
        conv=conv,
        include=include,
        exclude=exclude,
        allow_larger=allow_larger,
        seed=seed,
        min_speedup=min_speedup,
        svd=svd,
        form=form,
        share=share,
        embeddings=embeddings,
        heads=heads,
    )
    factorise_module_(
        module,
        options,
        statistics,
        torch.device(device) if device is not None else None,
        cache=cache,
        listener=listener,
    )


def factorise_module_(
    module: nn.Module,
    options: SurgeryOptions,
    statistics: Statistics | None = None,
    device: torch.device | None = None,
    *,
    cache: bool = False,
    change: Callable[[Plan], Plan] = lambda plan: plan,
    listener: Listener = SILENT,
) -> None:
    """Replace the layers of a module in memory, with parsed options; see `factorise_`.

    `change` is applied to the plan once all ranks are known.
    """

    runs_on = pick_device("auto" if device is None or options.min_speedup is None else str(device))
    plan = plan_layers(module, options, tied=tied_weights(module), device=runs_on)
    if statistics is not None:
        statistics.check_for(plan.replacements)
    timed = options.budget is not None and options.budget.kind == "time"
    clock = pick_device("auto" if device is None else str(device))
    timer = make_timer(module, options.conv, SpeedTable(clock)) if timed else None
    weights = replace(_weights(module, plan, device), timer=timer)
    if plan.needs_spectra:
        computes_on = device or next((m.device for m in _dense(module, plan).values()), torch.device("cpu"))
        compute = Compute(device=computes_on, cache=cache)
        plan = allocate_ranks(plan, weights, compute, statistics, share=options.shares)
    plan = change(plan)
    rows = {row.name: row for row in plan.replacements}

    def metric_of(name: str) -> Metric | StackedMetric | None:
        return statistics.metric_of(rows[name]) if statistics is not None else None

    apply_plan_(
        module,
        plan,
        init=options.init,
        seed=options.seed,
        device=device,
        metric_of=metric_of,
        svd=options.svd,
        listener=listener,
    )
    tell_form(module)


def _dense(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The dense weight of each layer of a plan."""
    modules = dense_layers(module)
    return {row.name: weight_of(modules[row.name]) for row in plan.replacements}


def _weights(module: nn.Module, plan: Plan, device: torch.device | None) -> Weights:
    """Access to the dense weights of a model in memory."""
    dense = _dense(module, plan)
    stored = {p.data_ptr(): p for p in module.parameters()}.values()  # tied parameters once
    widths = {name: weight.element_size() for name, weight in dense.items()}
    return Weights(
        read=dense.__getitem__,
        widths=widths,
        stored_widths=widths,
        parameters=sum(p.numel() for p in stored),
        stored_bytes=sum(p.numel() * p.element_size() for p in stored),
        device=device,
        alone=layers_of_several_names(module),
        heads=frozenset(find_heads(module)),
    )


def densify_(module: nn.Module) -> None:
    """Replace every factorised layer by a dense layer that holds the product of its factors, in its dtype."""
    densify_layers_(module)
    if is_transformers_model(module):
        from lrsurgery.checkpoints.pretrained.register import detach_

        detach_(module)


def pivot_(module: nn.Module) -> None:
    """Put every factorised layer below full rank into the pivoted form, which stores rank^2 numbers less.

    Layers of kinds without that form stay as they are. Outputs are the same up to rounding; the balanced form trains
    better. Create optimizers afterwards.
    """
    pivot_layers_(module)
    tell_form(module)


def balance_(module: nn.Module) -> None:
    """Put every factorised layer into the balanced form, u^T u = v v^T, which trains better; see `pivot_`."""
    balance_layers_(module)
    tell_form(module)
