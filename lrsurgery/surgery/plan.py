"""Plans: the rank of each layer to factorise, and the reason why each other layer stays dense. Changes no model.

The file is long because it holds all that decides about a layer before its weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.errors import PlanError, SurgeryError
from lrsurgery.linalg.inits import WITHOUT_DIRECTIONS, get_init
from lrsurgery.linalg.svd import check_engine
from lrsurgery.modules import References, output_modules
from lrsurgery.surgery.budget import SHARING, TOGETHER, UNITS, Budget
from lrsurgery.surgery.kinds.folds import fold_of, plain_of
from lrsurgery.surgery.kinds.table import AUTO, check_conv, explain_no_kind, kind_of, kinds_of
from lrsurgery.surgery.layers import Dense, FactorisedLayer, Kind, count_parameters, outline, packing_of, side_for
from lrsurgery.surgery.parameters.matrix import explain_parameter
from lrsurgery.surgery.parameters.views import views_in
from lrsurgery.surgery.ranks import BALANCED, PIVOTED, RankSpec, break_even_rank, check_form
from lrsurgery.surgery.rows import Kept, Replacement
from lrsurgery.surgery.tables.find import find_tables, partners_of, reason_to_keep

Target: TypeAlias = RankSpec | Budget  # a policy decides each layer alone, a budget all layers together
ALREADY = "already factorised"


@dataclass(frozen=True, kw_only=True)
class SurgeryOptions:
    """Options that decide which layers are factorised, and how. Raises SurgeryError for invalid values."""

    target: Target
    init: str = "spectral"
    conv: str = AUTO
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    allow_larger: bool = False
    seed: int = 0
    min_speedup: float | None = None  # layers with a lower measured speedup stay dense
    svd: str = "auto"
    form: str = BALANCED  # of the layers, where their kinds have it
    share: str = TOGETHER  # whether layers with the same inputs may share one v, where a budget finds that better
    embeddings: bool | None = (
        None  # factorise tables of tokens, with the heads tied to them; None: as the budget has it
    )
    heads: bool = False  # factorise output heads and classifiers

    def __post_init__(self) -> None:
        get_init(self.init)
        check_form(self.form)
        check_conv(self.conv)
        if self.share not in SHARING:
            raise PlanError(f"unknown sharing '{self.share}'; known: {', '.join(SHARING)}")
        check_engine(self.svd)
        if isinstance(self.target, Budget):
            for name, given in (("--min-speedup", self.min_speedup), ("--allow-larger", self.allow_larger or None)):
                if given is not None:
                    raise SurgeryError(
                        f"{name} and --budget are both given; a budget only assigns ranks that save parameters,"
                        f" so leave {name} out"
                    )
        if self.min_speedup is not None and not 0 < self.min_speedup < math.inf:
            raise SurgeryError(f"min speedup {self.min_speedup}: write a number above 0, such as 1.0")
        if self.seed < 0:
            raise SurgeryError(f"seed {self.seed}: write an integer of at least 0")

    @property
    def budget(self) -> Budget | None:
        return self.target if isinstance(self.target, Budget) else None

    @property
    def takes_embeddings(self) -> bool:
        """Whether tables of tokens are factorised: a budget over the whole model takes them like any other layer."""
        if self.embeddings is None:
            return self.budget is not None and self.budget.of == "model"
        return self.embeddings

    @property
    def shares(self) -> bool:
        """Whether layers may share one v, which is the best of its rank only for the pretrained values."""
        return self.share == TOGETHER and self.init == "spectral"


Refusal: TypeAlias = "Callable[[Replacement], str | None]"  # why a layer of known rank stays dense, or None


@dataclass(frozen=True)
class Plan:
    """The decisions for a model's layers, in the order of the model."""

    rows: tuple[Replacement | Kept, ...]
    target: Target
    allow_larger: bool
    refuse: Refusal | None = field(default=None, compare=False, repr=False)

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        return tuple(row for row in self.rows if isinstance(row, Replacement))

    @property
    def units(self) -> list[tuple[Replacement, ...]]:
        """The replacements, those of a group together in the place of its first."""
        rows = {row.name: row for row in self.replacements}
        return [
            (row,) if row.joint is None else tuple(rows[name] for name in row.joint.names)
            for row in rows.values()
            if row.joint is None or row.leads
        ]

    @property
    def needs_spectra(self) -> bool:
        return any(row.undecided for row in self.replacements)

    def decide(self, row: Replacement, *values: Tensor, in_loss: bool = False) -> Replacement | Kept:
        """Decide a row from the singular values (full rank,) of each of its options.

        Of several schemes that with the least error is taken, at a rank with no more parameters than the first scheme
        has at the rank of the policy. Errors compare as they are if the values are those `in_loss`, else as shares.
        """
        assert isinstance(self.target, RankSpec), "a budget decides all ranks together"
        first, *others = row.options
        if first.rank is None:
            first = replace(first, rank=first.rank_by(self.target, values[0]))
        decided = _apply_refusal(first, self.allow_larger, self.refuse if not others else None)
        if not others or isinstance(decided, Kept):
            return decided
        assert first.rank is not None
        most = first.cost(first.rank)
        ranked = [
            replace(option, rank=option.rank_within(most, option.multiple_of(self.target.multiple_of)))
            for option in others
        ]
        fitting = [(first, values[0]), *((o, v) for o, v in zip(ranked, values[1:], strict=True) if o.rank)]
        best, _ = min(fitting, key=lambda option: float(losses(option[1], in_loss=in_loss)[option[0].rank or 0]))
        return _apply_refusal(best, self.allow_larger, self.refuse)

    def with_rows(self, decided: Mapping[str, Replacement | Kept]) -> Plan:
        """The plan with `decided` in place of the rows of the same names."""
        return replace(self, rows=tuple(decided.get(row.name, row) for row in self.rows))


def _apply_refusal(row: Replacement, allow_larger: bool, refuse: Refusal | None) -> Replacement | Kept:
    """The row, or Kept if its rank saves no parameters or `refuse` gives a reason; rows without a rank pass."""
    if row.rank is None:
        return row
    limit = break_even_rank(row.rows, row.columns, pivoted=row.side is not None)
    reason = None
    if row.rank > limit and not allow_larger:
        why = f"rank {row.rank} is full rank" if row.side else f"rank {row.rank} is over break-even ({limit})"
        reason = why if limit else "no rank saves parameters"
    elif refuse is not None:
        reason = refuse(row)
    return row if reason is None else Kept(row.name, row.kind, row.shape, row.parameters, reason)


def plan_rows(
    model: nn.Module,
    options: SurgeryOptions,
    *,
    heads: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    refuse: Refusal | None = None,
) -> list[Replacement | Kept]:
    """Decide every layer of `model`, which may be on the meta device.

    `heads` maps layers that stay dense to a reason; a rank override that names such a layer exactly takes precedence.
    `tied` maps a parameter's name to the parameter it is tied to (parameters shared in memory are detected). `refuse`
    may reject each layer whose rank is known.

    Raises PlanError for a glob that matches no layer; RankError for a rank above a layer's full rank.
    """
    spec = options.target if isinstance(options.target, RankSpec) else None
    layers = list(_layers(model))
    names = [name for name, *_ in layers]
    overridden = [pattern for pattern, _ in spec.overrides] if spec else []
    for option, patterns in (("include", options.include), ("exclude", options.exclude), ("rank", overridden)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = f"; layers are named like '{names[len(names) // 2]}'" if names else ""
                raise PlanError(f"{option} '{pattern}' matches no layer{near}")
    shared, references = _find_shared(model, tied or {}), References(model)
    tables = find_tables(model)
    rows: list[Replacement | Kept] = []
    for name, module, weight in layers:
        kinds = kinds_of(module, options.conv) if module is not None else ()
        kind = next(iter(kinds), None)
        inside = not isinstance(module, FactorisedLayer)
        own = count_parameters(module, recurse=inside) if module is not None else weight.numel()
        reason = (
            _no_layer_reason(name, model, module, weight)
            or _packed_reason(weight)
            or _reason_to_keep(name, model, module, weight, kind, heads or {}, shared, tables, options)
            or (references.reason_to_keep(module) if module is not None else None)
        )
        if reason is not None:
            shown = kind.name if kind else (type(module).__name__ if module is not None else "Parameter")
            rows.append(Kept(name, shown, tuple(outline(weight).shape), own, reason))
            continue
        assert kind is not None
        # an init without directions gives no reason to prefer a scheme
        taken = kinds if options.init not in WITHOUT_DIRECTIONS else kinds[:1]
        first, *others = (_row(name, module, weight, each, own - weight.numel(), options.form) for each in taken)
        first = replace(first, tied=tuple(partners_of(f"{name}.weight", model, shared)) if kind.lookup else ())
        policy = spec.policy_for(name) if spec else None
        if spec and policy and not policy.needs_spectrum:
            first = replace(first, rank=first.rank_by(spec))
        refuses = None if others or kind.lookup else refuse  # what it times is a layer by itself
        decided = _apply_refusal(first, options.allow_larger, refuses)
        rows.append(replace(decided, others=tuple(others)) if isinstance(decided, Replacement) else decided)
    return rows


def _packed_reason(weight: Tensor) -> str | None:
    packing = packing_of(weight)
    return None if packing is None else f"quantised weight ({packing.quant_type})"


def _row(name: str, module: Dense, weight: Tensor, kind: Kind, more: int, form: str) -> Replacement:
    """The row of a layer; `more` counts its parameters beside the weight."""
    groups = getattr(module, "groups", 1)
    rows, columns = kind.matrix_shape(weight.shape)
    matrix = rows // groups, columns
    side = side_for(kind, module, matrix) if form == PIVOTED else None
    held = getattr(module, "bias", None)
    bias = 0 if held is None else held.numel()
    per_u, shape = kind.v_per_u(module), tuple(weight.shape)
    row = Replacement(name, kind.name, shape, *matrix, None, bias, per_u, side=side, groups=groups, folded=more - bias)
    return replace(row, active=kind.active(module))


def losses(values: Tensor, *, in_loss: bool) -> Tensor:
    """The loss at each rank (full rank + 1,), in fp64: the sum of the squared singular values (full rank,) left out.

    As a share of all of them, unless they are those `in_loss`, which compare with each other.
    """
    squares = values.detach().double().cpu().square()
    total = float(squares.sum())
    if total > 0 and not in_loss:
        squares = squares / total
    return torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])


def make_plan(
    model: nn.Module,
    options: SurgeryOptions,
    *,
    heads: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    refuse: Refusal | None = None,
) -> Plan:
    """Make the plan of a model; arguments and errors are those of `plan_rows`.

    Also raises PlanError if no layer would be factorised.
    """
    rows = plan_rows(model, options, heads=heads, tied=tied, refuse=refuse)
    plan = Plan(tuple(rows), options.target, options.allow_larger, refuse)
    if not plan.replacements:
        reasons = sorted({row.reason for row in rows if isinstance(row, Kept)})
        why = f" ({'; '.join(reasons[:4])}{'; ...' if len(reasons) > 4 else ''})" if reasons else ""
        raise PlanError(f"nothing to factorise at {options.target.description}: every layer stays dense{why}")
    return plan


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, Tensor]]:
    """Yield (name, module, matrix) for everything that holds a matrix; module is None for a container's parameter."""
    inside: str | None = None  # of the last factorised layer, or of one with parts, whose own modules follow it
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, FactorisedLayer):
            inside = f"{name}."
            yield name, module, module.v.weight
            continue
        if name and fold_of(module) is not None:
            inside = f"{name}."
            yield name, module, plain_of(module).weight
            continue
        own = {key: p for key, p in module.named_parameters(recurse=False) if p is not None and p.ndim >= 2}
        if "weight" in own and not any(True for _ in module.children()):
            if name:
                yield name, module, own["weight"]
            continue
        views = dict(views_in(module))
        for key, parameter in own.items():
            yield f"{name}.{key}".lstrip("."), views.get(key), parameter


def layers_of_several_names(model: nn.Module) -> frozenset[str]:
    """The first names of the modules that a model holds under several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return frozenset(each[0] for each in names.values() if len(each) > 1)


def _find_shared(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Parameter name -> name of the parameter it is shared with, for parameters of more than one module."""
    partner = dict(tied) | {other: name for name, other in tied.items()}
    first: dict[int, tuple[str, int]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}".lstrip(".")
            other, owner = first.setdefault(id(parameter), (name, id(module)))
            if owner != id(module):
                partner.setdefault(name, other)
                partner.setdefault(other, name)
    return partner


def _no_layer_reason(name: str, model: nn.Module, module: nn.Module | None, weight: Tensor) -> str | None:
    """The reason why a parameter is no layer to factorise, or None."""
    if module is None:
        parametrised = ".parametrizations." in f".{name}"
        holder, _, key = f".{name}".partition(".parametrizations.") if parametrised else name.rpartition(".")
        if (reason := explain_parameter(model.get_submodule(holder.lstrip(".")), key)) is not None:
            return reason
        if parametrised:
            return "part of a weight that is parametrised in another way than weight norm"
        experts = ".experts." in f".{name}" and weight.ndim == 3
        return "fused experts of an unknown class" if experts else "a bare parameter, not a layer"
    return ALREADY if isinstance(module, FactorisedLayer) else None


def _reason_to_keep(
    name: str,
    model: nn.Module,
    module: nn.Module | None,
    weight: Tensor,
    kind: Kind | None,
    heads: Mapping[str, str],
    shared: Mapping[str, str],
    tables: Sequence[str],
    options: SurgeryOptions,
) -> str | None:
    assert module is not None
    spec = options.target if isinstance(options.target, RankSpec) else None
    is_table = kind is not None and kind.lookup
    if is_table:
        if not (options.takes_embeddings or (spec and spec.names(name))):
            asked = options.budget is not None and options.budget.of == "model" and options.embeddings is False
            return "embedding: the statistics have none of it" if asked else "embedding"
        if (reason := reason_to_keep(name, model, shared, tables, options.budget)) is not None:
            return reason
    fold = fold_of(module)
    weight_key = f"{name}.weight" if kind is None else kind.weight_key(name)
    for key in (weight_key,) if fold is None else [f"{name}.{part}" for part in fold.parts]:
        if key in shared and not is_table:
            return f"tied to {shared[key].removesuffix('.weight')}"
    if kind is None:
        return explain_no_kind(module)
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"quantised weight ({str(weight.dtype).removeprefix('torch.')})"
    if kind.no_form is not None and (reason := kind.no_form(module)) is not None:
        return reason
    if kind.multiplied and options.budget is not None and options.budget.kind in ("flops", "time"):
        return f"its product is formed on every call, so it has no {UNITS[options.budget.kind]} to save"
    if name in heads and not (options.heads or (spec and spec.names(name))):
        return heads[name]
    if not any(fnmatchcase(name, pattern) for pattern in options.include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in options.exclude):
        return "excluded"
    if spec and spec.policy_for(name) is None:
        return "no rank given for it"
    return None


def find_heads(model: nn.Module) -> dict[str, str]:
    """Find the output heads and classifiers of a model: name -> the reason shown in the plan.

    transformers models: the output embeddings and the layers outside the base model. timm models: `get_classifier()`.
    Others: the layers whose output is the model's, unless the model has no other weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    heads: list[nn.Module] = []
    base = getattr(model, "base_model", None)
    anything: Any = model
    if isinstance(base, nn.Module) and hasattr(model, "get_output_embeddings"):
        output = anything.get_output_embeddings()
        heads += [output] if isinstance(output, nn.Module) else []
        if base is not model:
            inside = {id(module) for module in base.modules()}
            heads += [module for module in model.modules() if id(module) not in inside and kind_of(module, "channel")]
    wrapped: Any = base if isinstance(base, nn.Module) else model
    if callable(getattr(wrapped, "get_classifier", None)):
        classifier = wrapped.get_classifier()
        for part in classifier if isinstance(classifier, tuple | list) else [classifier]:
            heads += [m for m in part.modules() if kind_of(m, "channel")] if isinstance(part, nn.Module) else []
    elif not isinstance(base, nn.Module):
        heads = [m for m in output_modules(model) if kind_of(m, "channel")]
        if {p for p in model.parameters() if p.ndim > 1} <= {p for head in heads for p in head.parameters()}:
            return {}
    return {names[id(module)]: "output head" for module in heads if id(module) in names}


def decide_all(plan: Plan, values_of: Callable[[Replacement], Tensor], *, in_loss: bool = False) -> Plan:
    """Decide every rank and scheme not known yet; `values_of` returns the singular values of a row by one scheme."""
    return plan.with_rows(
        {
            row.name: plan.decide(row, *map(values_of, row.options), in_loss=in_loss)
            for row in plan.replacements
            if row.undecided
        }
    )
