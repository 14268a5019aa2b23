"""A dense model before surgery: each layer's spectrum, and what a ladder of ranks would keep, lose and save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrsurgery.checkpoints.build import check_not_converted
from lrsurgery.checkpoints.mapping import Checkpoint, list_entries, open_checkpoint, weights_by_layer
from lrsurgery.checkpoints.quantised.dense import weight_bytes
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.checkpoints.spectra import SpectrumCache, SpectrumLookup, cache_limit
from lrsurgery.errors import WeightError
from lrsurgery.linalg.spectrum import RESOLVED, EffectiveRanks, Points, predicted_damage
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.rows import parameters_after, planned_row, recorded_options
from lrsurgery.report.schema import Report, Row, Rung
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import decomposition_bytes
from lrsurgery.surgery.plan import Plan, SurgeryOptions, find_heads, make_plan, plan_rows
from lrsurgery.surgery.ranks import PIVOTED, FractionRank, RankSpec, parse_policy
from lrsurgery.surgery.rows import Kept, Replacement

LADDER = (
    *("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"),
    *("params:0.25", "params:0.5", "params:0.75", "energy:0.8", "energy:0.9", "energy:0.95", "energy:0.99"),
)
WIDEST = 8  # bytes of a number, in fp64


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Which layers of a dense model are profiled, and the ranks planned for them, if any.

    Raises SurgeryError for a value that no model could make right.
    """

    target: RankSpec | None = None  # a plan to show beside the spectra
    conv: str = "auto"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    multiple_of: int | None = None  # of the ladder's ranks; a target has its own, which is the same
    form: str = PIVOTED  # of the layers that are planned, and on the ladder

    def __post_init__(self) -> None:
        assert self.target is None or self.target.multiple_of == self.multiple_of, self
        _ = self.every_layer, RankSpec(None, (), self.multiple_of)  # which check their values

    @property
    def plan(self) -> SurgeryOptions | None:
        """The surgery that is planned."""
        if self.target is None:
            return None
        return SurgeryOptions(
            target=self.target, conv=self.conv, include=self.include, exclude=self.exclude, form=self.form
        )

    @property
    def every_layer(self) -> SurgeryOptions:
        """Full rank for each layer that is profiled: a head is one where the target spells its name out."""
        named = self.target.overrides if self.target is not None else ()
        full = FractionRank(1.0)
        return SurgeryOptions(
            target=RankSpec(full, tuple((pattern, full) for pattern, _ in named)),
            conv=self.conv,
            include=self.include,
            exclude=self.exclude,
            allow_larger=True,
            form=self.form,
        )


def profile(
    source: Source,
    options: ProfileOptions,
    compute: Compute,
    *,
    trust_remote_code: bool = False,
    command: str | None = None,
    listener: Listener = SILENT,
) -> Report:
    """The report of a dense checkpoint, and of what the options' target would do to it.

    Weights are read one at a time; a weight whose singular values are in the cache is not decomposed.

    Raises SurgeryError: which file or layer, what is wrong.
    """
    check_not_converted(source)
    checkpoint = open_checkpoint(source, SourceOptions(trust_remote_code=trust_remote_code))
    model, tied, heads = checkpoint.model, checkpoint.tied, find_heads(checkpoint.model)
    candidates = plan_rows(model, options.every_layer, heads=heads, tied=tied)
    plan = None if options.plan is None else make_plan(model, options.plan, heads=heads, tied=tied)
    planned = {row.name: row for row in plan.rows} if plan is not None else {}
    layers = [row for row in candidates if isinstance(row, Replacement)]
    found = _all_values(checkpoint, [option for row in layers for option in row.options], compute)
    rows: dict[str, Row] = {}
    energies: dict[str, float] = {}
    for done, row in enumerate(layers, 1):
        values_of = {option.kind: next(found) for option in row.options}
        values = values_of[row.kind]
        becomes = planned.get(row.name)
        if plan is not None and isinstance(becomes, Replacement) and becomes.undecided:
            becomes = plan.decide(becomes, *values_of.values())
        resolved = RESOLVED if values.dtype == torch.float32 else math.inf
        rows[row.name] = replace(
            _row(row, becomes, values_of[becomes.kind] if isinstance(becomes, Replacement) else values),
            before=EffectiveRanks.of(values.double(), limit=resolved),
            spectrum_before=Points.of(values),
            ladder=tuple(rung_of(text, row, *values_of.values(), multiple_of=options.multiple_of) for text in LADDER),
        )
        energies[row.name] = float(values.double().square().sum())
        listener.progress(row.name, done, len(layers))
    every = tuple(rows.get(row.name) or planned_row(row) for row in candidates)
    if compute.cache:
        SpectrumCache().trim(cache_limit())
    parameters = checkpoint.parameters
    rungs = [(row.ladder or (), energies[row.name], row) for row in rows.values()]
    return Report(
        every,
        parameters,
        None if plan is None else parameters_after(every, parameters),
        bytes_before=weight_bytes(source),
        source={"reference": source.reference, "hub_id": source.hub_id, "revision": source.revision},
        command=command,
        options={} if options.plan is None else recorded_options(options.plan),
        notes=checkpoint.notes,
        about="dense" if plan is None else "plan",
        name=source.name,
        ladder=tuple(_model_rung(i, rungs, parameters) for i in range(len(LADDER))) if rungs else None,
    )


def _row(row: Replacement, planned: Replacement | Kept | None, values: Tensor) -> Row:
    """The layer as it is or is planned, with the errors of the planned rank's best approximation (Eckart & Young)."""
    if not isinstance(planned, Replacement):
        kept = Kept(row.name, row.kind, row.shape, row.parameters, "")
        return replace(
            planned_row(kept),
            reason=planned.reason if planned is not None else None,
            full_rank=row.full_rank,
            flops_before=row.flops,
            flops_after=row.flops,
        )
    assert planned.rank is not None
    energy, error = _kept(values, planned.rank)
    top = float(values[0])
    left_out = float(values[planned.rank]) if planned.rank < row.full_rank else 0.0
    return replace(
        planned_row(planned),
        energy_kept=energy,
        relative_error=error,
        spectral_error=left_out / top if top else 0.0,
    )


def _kept(values: Tensor, rank: int) -> tuple[float, float]:
    """(energy kept, relative Frobenius error) of the best approximation of this rank."""
    squares = values.double().square()
    total = float(squares.sum())
    if not total:
        return 1.0, 0.0
    lost = float(squares[rank:].sum()) / total
    return 1 - lost, math.sqrt(lost)


def rung_of(text: str, row: Replacement, *values: Tensor, multiple_of: int | None = None) -> Rung:
    """What `--rank text` would do to a layer with these singular values (full rank,), given for each of its options."""
    spec = RankSpec(parse_policy(text), (), multiple_of)
    undecided = replace(row, rank=None, others=tuple(replace(option, rank=None) for option in row.others))
    becomes = Plan((), spec, allow_larger=False).decide(undecided, *values)
    if isinstance(becomes, Kept):
        return Rung(text, None, row.parameters, 1.0, 0.0, 0.0)
    after, place = becomes.factorised_parameters, [option.kind for option in row.options].index(becomes.kind)
    assert after is not None
    assert becomes.rank is not None
    energy, error = _kept(values[place], becomes.rank)
    stable = EffectiveRanks.of(values[place]).stable
    return Rung(text, becomes.rank, after, energy, error, predicted_damage(row.parameters, after, stable))


def _model_rung(i: int, ladders: Sequence[tuple[Sequence[Rung], float, Row]], parameters: int) -> Rung:
    """The i-th rung of every layer together: energies and errors weighted by each layer's squared norm."""
    rungs = [(ladder[i], energy, row) for ladder, energy, row in ladders]
    before = sum(row.parameters_before for *_, row in rungs)
    after = sum(rung.parameters for rung, *_ in rungs)
    total = sum(energy for _, energy, _ in rungs)
    lost = sum(energy * rung.relative_error**2 for rung, energy, _ in rungs) / total if total else 0.0
    stable = sum(row.before.stable for *_, row in rungs if row.before) / len(rungs)
    return Rung(
        rank=rungs[0][0].rank,
        to=sum(rung.to is not None for rung, *_ in rungs),
        parameters=parameters - before + after,
        energy_kept=1 - lost,
        relative_error=math.sqrt(lost),
        damage=predicted_damage(before, after, stable),
    )


def _all_values(checkpoint: Checkpoint, layers: Sequence[Replacement], compute: Compute) -> Iterator[Tensor]:
    """The singular values (full rank,) of each layer, several layers at once."""
    names = {row.name for row in layers}
    entries = weights_by_layer(checkpoint, list_entries(checkpoint, names))

    def values_of(row: Replacement) -> Tensor:
        lookup = SpectrumLookup(entries[row.name].weight(), row.layout, compute, groups=row.groups)
        try:
            values = lookup.values().cpu()
            # fp32's Gram matrix does not resolve the small ones
            return values if _resolved(values) else lookup.wide_values().cpu()
        except WeightError as e:
            raise WeightError(f"{checkpoint.source.reference}: {row.name}: {e}") from e

    return compute.in_order(values_of, layers, [decomposition_bytes(row, WIDEST) for row in layers])


def _resolved(values: Tensor) -> bool:
    """Whether roots of a Gram matrix in fp32 tell all of these values to about a percent."""
    return values.dtype == torch.float64 or float(values[0]) <= RESOLVED * float(values[-1])
