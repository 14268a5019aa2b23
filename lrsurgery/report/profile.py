"""A dense model before surgery: each layer's spectrum, and what a ladder of ranks would keep, lose and save."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrsurgery.checkpoints.build import check_not_converted
from lrsurgery.checkpoints.mapping import Checkpoint, list_entries, open_checkpoint
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.spectra import SpectrumCache
from lrsurgery.errors import WeightError
from lrsurgery.factorise.jobs import tensor_digest
from lrsurgery.factorise.options import Options, pick_device
from lrsurgery.linalg.spectrum import RESOLVED, EffectiveRanks, Points, predicted_damage
from lrsurgery.linalg.svd import singular_values
from lrsurgery.progress import Progress
from lrsurgery.report.rows import parameters_after, planned_row
from lrsurgery.report.schema import Report, Row, Rung
from lrsurgery.surgery.layers import KINDS
from lrsurgery.surgery.plan import Kept, Replacement, find_heads, plan_rows
from lrsurgery.surgery.ranks import FractionRank, RankSpec, parse_policy
from lrsurgery.surgery.threads import in_order, layers_at_once, memory

LADDER = (
    *("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"),
    *("params:0.25", "params:0.5", "params:0.75", "energy:0.8", "energy:0.9", "energy:0.95", "energy:0.99"),
)


def iter_profile(source: Source, options: Options, *, planned: bool) -> Generator[Progress, None, Report]:
    """The report of a dense checkpoint, one layer a step; with `planned`, what `options.rank` would do beside it.

    Weights are read one at a time, and not at all decomposed where the cache holds their singular values.

    Raises SurgeryError: which file or layer, what is wrong.
    """
    options.check()
    check_not_converted(source)
    checkpoint = open_checkpoint(source, trust_remote_code=options.trust_remote_code)
    # a layer that an override spells out is looked at though it is a head
    named = options.spec.overrides if planned else ()
    whole = RankSpec(FractionRank(1.0), tuple((pattern, FractionRank(1.0)) for pattern, _ in named))
    candidates = plan_rows(
        checkpoint.model, whole, conv=options.conv, include=options.include,
        exclude=options.exclude, allow_larger=True, heads=find_heads(checkpoint.model), tied=checkpoint.tied,
    )  # fmt: skip
    plan = options.plan_for(checkpoint.model, checkpoint.tied) if planned else None
    wanted = {row.name: row for row in plan.rows} if plan else {}
    layers = [row for row in candidates if isinstance(row, Replacement)]
    rows: dict[str, Row] = {}
    energies: dict[str, float] = {}
    for done, (row, values) in enumerate(_all_values(checkpoint, layers, options), 1):
        planning = wanted.get(row.name)
        if plan and isinstance(planning, Replacement) and planning.rank is None:
            planning = plan.decide(planning, values)
        ladder = tuple(rung_of(text, row, values, options.multiple_of) for text in LADDER)
        limit = RESOLVED if values.dtype == torch.float32 else math.inf
        rows[row.name] = replace(
            _row(row, planning, values), before=EffectiveRanks.of(values.double(), limit=limit),
            spectrum_before=Points.of(values), ladder=ladder,
        )  # fmt: skip
        energies[row.name] = float(values.double().square().sum())
        yield Progress(row.name, done, len(layers))
    every = tuple(rows.get(row.name) or planned_row(row) for row in candidates)
    if options.cache:
        SpectrumCache().trim()
    ladders = [(row.ladder or (), energies[row.name], row) for row in rows.values()]
    return Report(
        every, checkpoint.parameters, parameters_after(every, checkpoint.parameters) if planned else None,
        bytes_before=sum(file.stat().st_size for file in source.files),
        source={"reference": source.reference, "hub_id": source.hub_id, "revision": source.revision},
        command=options.command, options=options.recorded() if planned else {},
        about="plan" if planned else "dense", name=source.name,
        ladder=tuple(_model_rung(i, ladders, checkpoint.parameters) for i in range(len(LADDER))) if ladders else None,
    )  # fmt: skip


def _row(row: Replacement, planning: Replacement | Kept | None, values: Tensor) -> Row:
    """The layer as it is, or as it is planned, with the errors that the plan would have (Eckart & Young)."""
    if not isinstance(planning, Replacement):
        kept = Kept(row.name, row.kind, row.shape, row.parameters, planning.reason if planning else "")
        shown = replace(planned_row(kept), reason=planning.reason if planning else None)
        return replace(shown, full_rank=row.full_rank, flops_before=row.flops, flops_after=row.flops)
    assert planning.rank is not None
    kept_energy, error = _kept(values, planning.rank)
    top = float(values[0])
    left_out = float(values[planning.rank]) if planning.rank < row.full_rank else 0.0
    return replace(
        planned_row(planning),
        energy_kept=kept_energy,
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


def rung_of(text: str, row: Replacement, values: Tensor, multiple_of: int = 1) -> Rung:
    """What `--rank text` would do to a layer with these singular values (full rank,)."""
    spec = RankSpec(parse_policy(text), (), multiple_of)
    rank = spec.rank_of(row.name, row.rows, row.columns, values)
    after = replace(row, rank=rank).factorised_parameters
    assert after is not None
    if after >= row.parameters:
        return Rung(text, None, row.parameters, 1.0, 0.0, 0.0)
    energy, error = _kept(values, rank)
    stable = EffectiveRanks.of(values).stable
    return Rung(text, rank, after, energy, error, predicted_damage(row.parameters, after, stable))


def _model_rung(i: int, ladders: Sequence[tuple[Sequence[Rung], float, Row]], parameters: int) -> Rung:
    """The same rung of every layer together: energies and errors weighted by each layer's squared norm."""
    rungs = [(ladder[i], energy, row) for ladder, energy, row in ladders]
    before = sum(row.parameters_before for *_, row in rungs)
    after = sum(rung.parameters for rung, *_ in rungs)
    total = sum(energy for _, energy, _ in rungs)
    lost = sum(energy * rung.relative_error**2 for rung, energy, _ in rungs) / total if total else 0.0
    stable = sum(row.before.stable for *_, row in rungs if row.before) / len(rungs)
    return Rung(
        rungs[0][0].rank, sum(rung.to is not None for rung, *_ in rungs), parameters - before + after,
        1 - lost, math.sqrt(lost), predicted_damage(before, after, stable),
    )  # fmt: skip


def _all_values(
    checkpoint: Checkpoint, layers: Sequence[Replacement], options: Options
) -> Generator[tuple[Replacement, Tensor], None, None]:
    """Each layer with its singular values, several layers at once."""
    names = {row.name for row in layers}
    entries = {
        entry.target.removesuffix(".weight"): entry
        for entry in list_entries(checkpoint, names)
        if entry.target and entry.target.endswith(".weight")
    }
    cache = SpectrumCache() if options.cache else None
    device = pick_device(options.device)

    def values_of(row: Replacement) -> Tensor:
        tensor = entries[row.name].read()
        digest = tensor_digest(tensor.dtype, tuple(tensor.shape), [tensor])

        def find(what: str, matrix: Callable[[], Tensor]) -> Tensor:
            known = cache.get(digest, what) if cache else None
            if known is not None:
                return known.values
            values = singular_values(matrix()).cpu()
            if cache:
                cache.put(digest, what, values)
            return values

        try:
            values = find(row.kind, lambda: KINDS[row.kind].to_matrix(tensor.to(device)))
            if not _resolved(values):  # the small ones drown in fp32's Gram matrix
                values = find(f"{row.kind}-fp64", lambda: KINDS[row.kind].to_matrix(tensor.to(device)).double())
        except WeightError as e:
            raise WeightError(f"{checkpoint.source.reference}: {row.name}: {e}") from e
        return values

    threads = torch.get_num_threads()
    needs = [memory(row, 8) for row in layers]
    at_once = (options.jobs or layers_at_once(needs, threads)) if device.type == "cpu" else 1
    yield from zip(layers, in_order(values_of, layers, at_once, threads), strict=True)


def _resolved(values: Tensor) -> bool:
    """Whether roots of a Gram matrix in fp32 tell all of these values to about a percent."""
    return values.dtype == torch.float64 or float(values[0]) <= RESOLVED * float(values[-1])
