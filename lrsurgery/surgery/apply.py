"""Application of a plan to a model in memory, and its reverse. All decisions are in the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrsurgery.errors import OutputError, PlanError, SurgeryError
from lrsurgery.linalg.inits import InitProblem, get_init, in_stack, layer_generator
from lrsurgery.linalg.pivot import is_permutation
from lrsurgery.linalg.svd import Decomposition, RankChoice, Spectrum
from lrsurgery.linalg.weighted import Metric, StackedMetric
from lrsurgery.modules import References, Unfilled
from lrsurgery.progress import SILENT, Listener
from lrsurgery.runtime import Compute
from lrsurgery.surgery.forms.fill import dense_bias, fill_
from lrsurgery.surgery.kinds.folds import fold_of, plain_of, weight_of
from lrsurgery.surgery.kinds.table import CHANNEL, KINDS
from lrsurgery.surgery.layers import (
    Dense,
    FactorisedLayer,
    Kind,
    Spec,
    Stored,
    build_dense,
    dense_weight,
    factor_weights,
)
from lrsurgery.surgery.parameters.views import VIEWS, dense_layers, replace_layer_
from lrsurgery.surgery.plan import Plan
from lrsurgery.surgery.rows import Replacement, whole_of
from lrsurgery.surgery.shared.forms import (
    Part,
    decompose_together,
    fill_group_,
    store_together,
)
from lrsurgery.surgery.shared.modules import SharedLinear, build_shared, is_led, join
from lrsurgery.surgery.shared.specs import groups_in
from lrsurgery.surgery.tables.ties import leaders_of_tied, make_partner, tie_


def factorised_layers(model: nn.Module) -> dict[str, FactorisedLayer]:
    """The factorised layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedLayer)}


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace `old` by `new` wherever the model holds it: a shared module has several parents, of which one is shown.

    Raises PlanError that names a place where it cannot be replaced.
    """
    References(model).replace_(old, new)


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """What each factorised layer of a model is, by name."""
    layers = factorised_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    first = leaders_of_tied(layers)
    return {
        name: layer.spec._replace(v_of=names[id(layer.leader)])  # type: ignore[attr-defined]
        if is_led(layer)
        else layer.spec._replace(tied_to=first.get(name))
        for name, layer in layers.items()
    }


def swap_(model: nn.Module, layers: Mapping[str, Spec]) -> None:
    """Replace dense layers by factorised ones with weights on the meta device.

    Raises PlanError for an unknown name or kind, for a layer of another kind or without such a form, or for layers that
    cannot share their v.
    """
    modules, references = dense_layers(model), References(model)
    groups = groups_in(layers, PlanError)
    shared = {name: leader for leader, names in groups.items() for name in names}
    built: dict[str, SharedLinear] = {}
    for name, spec in layers.items():
        kind_name, rank, side, *_ = spec
        kind = KINDS.get(kind_name)
        if kind is None:
            raise PlanError(f"{name}: unknown kind '{kind_name}'; known: {', '.join(KINDS)}")
        held = modules.get(name)
        dense = None if held is None else plain_of(held)
        weight = getattr(dense, "weight", None)
        if held is None or dense is None or not isinstance(weight, Tensor):
            raise PlanError(f"{name}: this {type(model).__name__} has no such layer")
        viewed = kind.parameter or isinstance(dense, VIEWS)
        if weight.ndim != kind.weight_axes or (viewed and not kind.matches(dense, CHANNEL)):
            raise PlanError(f"{name}: a {type(dense).__name__} cannot become a {kind_name} layer")
        new: FactorisedLayer
        if name in shared:
            _check_shared(name, spec, kind, dense, modules[shared[name]])
            with Unfilled():
                new = built[name] = build_shared(kind, dense, spec, leads=shared[name] == name)
        else:
            rows, columns = kind.matrix_shape(weight.shape)
            if (found := getattr(dense, "groups", 1)) != spec.groups:
                raise PlanError(f"{name}: has {found} groups, and {spec.groups} in the checkpoint")
            if rank > (full := min(rows // spec.groups, columns)):
                raise PlanError(f"{name}: rank {rank} exceeds {full}, the full rank of {tuple(weight.shape)}")
            if side is not None and (side not in kind.sides(dense) or rank == full):
                raise PlanError(f"{name}: a {type(dense).__name__} of rank {rank} has no pivots among its {side}")
            with Unfilled():
                new = kind.make(dense, rank, side)
        if not weight.requires_grad:
            new.requires_grad_(False)
        _take_place_(model, references, held, new)
    tie_(factorised_layers(model), {name: spec.tied_to for name, spec in layers.items() if spec.tied_to is not None})
    for leader, names in groups.items():
        group = [built[name] for name in names]
        rows = sum(layer.out_features for layer in group)
        join(group)
        full = min(rows, group[0].in_features)
        if group[0].rank > full - (1 if group[0].side else 0):
            raise PlanError(f"{leader}: rank {group[0].rank} is too large for {len(names)} layers of full rank {full}")


def _take_place_(model: nn.Module, references: References, dense: nn.Module, new: FactorisedLayer) -> None:
    # of a layer made dense before, the class that loads it is still that
    new.folded = type(dense).__name__ if fold_of(dense) is not None else getattr(dense, "folded", None)
    replace_layer_(model, references, dense, new)


def _check_shared(name: str, spec: Spec, kind: Kind, dense: Dense, leader: Dense) -> None:
    """Raise PlanError for a layer that cannot have one v with the layer `leader`."""
    rows, columns = kind.matrix_shape(dense.weight.shape)
    of_leader = getattr(leader, "weight", None)
    if not kind.shares_v or not isinstance(of_leader, Tensor) or of_leader.ndim != kind.weight_axes:
        raise PlanError(f"{name}: a {type(dense).__name__} cannot share the v of {spec.v_of or name}")
    if kind.matrix_shape(of_leader.shape)[1] != columns or (leader.bias is None) != (dense.bias is None):
        raise PlanError(f"{name}: its inputs or its bias are not those of {spec.v_of}, whose v it would have")
    if spec.pivots is not None and spec.pivots[1] > rows:
        raise PlanError(f"{name}: {spec.pivots[1]} pivots exceed its {rows} outputs")


def decomposition_cost(row: Replacement) -> float:
    """Relative time of a decomposition: a Gram product over the long side and an eigensolver, 4 short^3."""
    short, long = sorted((row.rows, row.columns))
    return row.matrices * float(short) ** 2 * (long + 4 * short)


def decomposition_bytes(row: Replacement, item_size: int, *, weighted: bool = False) -> int:
    """Peak memory of a decomposition in bytes: the tensor, an fp32 copy, five short x short matrices, factors twice.

    With a metric all of these are in fp64, beside both moments of the metric as read (fp32) and as damped (fp64).
    Pivots come afterwards and can need more: the factors in both widths, the part that is kept, and six fp64 matrices
    of the other's size, such as the basis, its LU and the mixing.

    The experts of a bank are decomposed one after the other, beside the whole bank, its moments and its factors.
    """
    if row.layout.stacked and row.matrices > 1:
        each = replace(row, shape=(1, *row.shape[1:]))
        held = item_size * row.rows * row.columns + 4 * (row.rank or row.full_rank) * (row.rows + row.columns)
        held += 4 * (row.rows**2 + row.columns**2) if weighted else 0
        return row.matrices * held + decomposition_bytes(each, item_size, weighted=weighted)
    short, long = sorted((row.rows, row.columns))
    rank, wide = row.rank or short, max(8 if weighted else 4, item_size)
    if row.groups > 1:  # one after the other, beside the tensor, its matrices, the factors and the metrics of all
        one = decomposition_bytes(replace(row, groups=1), item_size, weighted=weighted)
        moments = 12 * (row.rows**2 + row.columns**2) if weighted else 0
        return one + row.groups * (short * long * (item_size + wide) + 2 * wide * rank * (short + long) + moments)
    pivoting = short * long * item_size + _pivoting_bytes(row, rank, wide) if row.side else 0
    solver = wide * (5 * short**2 + 2 * rank * (short + long))
    if weighted:
        of_rows = row.rows if row.diagonal else row.rows**2
        return max(12 * (of_rows + row.columns**2) + 3 * wide * short * long + solver, pivoting)
    return max(short * long * (item_size + wide) + solver, pivoting)


def _pivoting_bytes(row: Replacement, rank: int, wide: int) -> int:
    along, across = (row.rows, row.columns) if row.side == "rows" else (row.columns, row.rows)
    return (wide + 8) * rank * (along + across) + 8 * rank * (6 * along + across)


def decompose(
    row: Replacement,
    weight: Tensor,
    *,
    init: str,
    seed: int,
    rank: RankChoice | None = None,
    metric: Metric | StackedMetric | None = None,
    svd: str = "auto",
    known: Spectrum | None = None,
    keep: bool = False,
) -> Decomposition:
    """Decompose one dense weight into factors in the working dtype; groups and banks matrix by matrix, at one rank.

    `rank`, a rank or a function of the singular values, is used if the plan has none yet. `metric` weights the errors.
    `svd`, `known` and `keep` go to `linalg.spectral_factors`.

    Raises SurgeryError that names the layer.
    """
    choice = row.rank if row.rank is not None else rank
    assert choice is not None
    problem = InitProblem(
        row.layout.matrix_of(weight, row.groups),
        choice,
        row.layout.fan_in(weight.shape),
        layer_generator(seed, row.name),
        metric,
        svd=svd,
        known=known,
        keep=keep,
    )
    try:
        several = row.layout.stacked or row.groups > 1
        return in_stack(get_init(init), problem) if several else get_init(init)(problem)
    except SurgeryError as e:
        raise type(e)(f"{row.name}: {e}") from e


def apply_plan_(
    model: nn.Module,
    plan: Plan,
    *,
    init: str,
    seed: int,
    device: torch.device | None = None,
    metric_of: Callable[[str], Metric | StackedMetric | None] = lambda name: None,
    svd: str = "auto",
    listener: Listener = SILENT,
) -> None:
    """Replace every planned layer of a model in memory, computing on `device` (the layer's own by default).

    The plan's ranks must be known. `metric_of` returns the metric of a layer, or None for plain SVD.

    Raises SurgeryError that names the layer. Earlier layers are replaced by then; work on a copy to be safe.
    """
    modules, references = dense_layers(model), References(model)

    def read(row: Replacement) -> Tensor:
        weight = weight_of(modules[row.name])
        if weight.is_meta:
            raise PlanError(f"{row.name}: its weight is on the meta device; load the model first")
        return weight.to(device or weight.device)

    def parts_of(unit: tuple[Replacement, ...]) -> list[Stored] | list[Part]:
        row, weights = unit[0], [read(each) for each in unit]
        like = weight_of(modules[row.name])
        if row.joint is None:
            found = decompose(row, weights[0], init=init, seed=seed, metric=metric_of(row.name), svd=svd)
            return [factor_weights(row.layout, like, found.factors, row.pivots)]
        metrics = [metric for each in unit if isinstance(metric := metric_of(each.name), Metric)]
        assert row.rank is not None
        factors, _ = decompose_together(row.joint.names, row.layout, weights, row.rank, metrics)
        return store_together(factors, [each.rows for each in unit], like, pivoted=row.pivots is not None)

    units = plan.units
    devices = {device or each.device for row in plan.replacements for each in modules[row.name].parameters()}
    on_cpu = all(each.type == "cpu" for each in devices)
    compute = Compute(device=torch.device("cpu") if on_cpu else torch.device("cuda"))
    needs = [
        decomposition_bytes(whole_of(unit), plain_of(modules[unit[0].name]).weight.element_size()) for unit in units
    ]
    for done, (unit, parts) in enumerate(zip(units, compute.in_order(parts_of, units, needs), strict=True), 1):
        held = [modules[row.name] for row in unit]
        dense = [plain_of(each) for each in held]
        trained, biases = [each.weight.requires_grad for each in dense], [getattr(each, "bias", None) for each in dense]
        new: list[FactorisedLayer] = []
        with Unfilled():
            for row, each, part in zip(unit, dense, parts, strict=True):
                assert row.rank is not None
                new.append(
                    build_shared(row.layout, each, row.spec_with(part.pivots), leads=row.leads)
                    if isinstance(part, Part)
                    else row.layout.make(each, row.rank, row.pivots)
                )
        if isinstance(parts[0], Stored):
            fill_(new[0], parts[0], biases[0], trained[0])
        else:
            group = [layer for layer in new if isinstance(layer, SharedLinear)]
            join(group)
            fill_group_(group, parts, biases, trained)  # type: ignore[arg-type]
        for old, layer in zip(held, new, strict=True):
            _take_place_(model, references, old, layer)
        for name, kind in unit[0].tied:
            assert unit[0].rank is not None
            partner = make_partner(modules[name], kind, unit[0].rank, unit[0].pivots)
            references.replace_(modules[name], partner)
        listener.progress(unit[0].name, done, len(units))
    tie_(factorised_layers(model), {name: row.name for row in plan.replacements for name, _ in row.tied})


def densify_layers_(model: nn.Module) -> None:
    """Replace every factorised layer by a dense layer that holds the product of its factors."""
    references = References(model)
    tied: dict[int, nn.Parameter] = {}  # u's weight -> the dense weight of the layers that have it
    # a layer that stores the v of others comes after them
    for layer in sorted(factorised_layers(model).values(), key=lambda layer: not is_led(layer)):
        with Unfilled():
            dense = build_dense(layer)
        key = id(layer.u.weight)
        if key not in tied:
            tied[key] = nn.Parameter(dense_weight(layer), requires_grad=layer.u.weight.requires_grad)
        dense.weight = tied[key]
        if (bias := dense_bias(layer)) is not None:
            dense.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        if layer.folded is not None:
            dense.folded = layer.folded  # type: ignore[assignment]
        replace_layer_(model, references, layer, dense)


def check_storable(model: nn.Module) -> None:
    """Raise OutputError that names a layer made dense which its class, once loaded, would give another weight."""
    for name, module in model.named_modules():
        was = None if isinstance(module, FactorisedLayer) else getattr(module, "folded", None)
        if was is not None:
            raise OutputError(
                f"{name}: was made dense, and the {was} that loads it computes its weight from other tensors; save the"
                " model before densify_"
            )


def check_orders(model: nn.Module) -> None:
    """Raise PlanError that names a pivoted layer whose order, read from a file, is no permutation."""
    for name, layer in factorised_layers(model).items():
        order = layer.order
        if order is not None and not order.is_meta and not is_permutation(order):
            raise PlanError(f"{name}.order: is no permutation of {len(order):,} places, so the file is damaged")
