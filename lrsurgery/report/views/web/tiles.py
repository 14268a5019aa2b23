"""The page's tiles: a few big figures before anything else."""

from __future__ import annotations

from dataclasses import dataclass

from lrsurgery.report.schema import Report
from lrsurgery.report.views.columns import HEADINGS
from lrsurgery.report.views.web.sentences import (
    STAGES,
    Figure,
    Part,
    count,
    course_of,
    energy_kept,
    halfway,
    last_figures,
    measured_run,
    quality_form,
    share,
    spelled,
    three_digits,
    times,
    whole,
    work_of,
)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One big figure."""

    label: str
    value: Figure
    note: tuple[Part, ...]
    bar: float | None = None  # a share to draw


def tiles(report: Report) -> list[Tile]:
    """The tiles that the report has a figure for."""
    found = [
        *_size_tiles(report),
        _energy_tile(report),
        _loss_tile(report),
        _quality_tile(report),
        *_run_tiles(report),
        _speed_tile(report),
        _risk_tile(report),
    ]
    return [tile for tile in found if tile is not None]


def _size_tiles(report: Report) -> list[Tile]:
    before, after = report.parameters_before, report.parameters_after
    if report.about == "runs" or not before:
        return []
    if after is not None and report.about != "dense":
        part = after / before
        words = (Figure(after, spelled(after)), " of ", Figure(before, spelled(before)), " parameters")
        return [Tile(label="Size", value=Figure(part, share(part)), note=words, bar=min(1.0, part))]
    tiles = [Tile(label="Size", value=Figure(before, count(before)), note=("parameters",))]
    found = halfway(report)
    if found is not None:
        rung, part = found
        note = (Figure(rung.parameters, spelled(rung.parameters)), " parameters")
        tiles += [
            Tile(label=f"Size at rank {rung.rank}", value=Figure(part, share(part)), note=note, bar=min(1.0, part)),
            Tile(
                label=f"Energy kept at rank {rung.rank}",
                value=Figure(rung.energy_kept, share(rung.energy_kept)),
                note=("in the layers that would be factorised",),
            ),
        ]
    return tiles


def _energy_tile(report: Report) -> Tile | None:
    energy = energy_kept(report)
    if energy is None:
        return None
    return Tile(label="Energy kept", value=Figure(energy, share(energy)), note=("in the replaced layers",))


def _loss_tile(report: Report) -> Tile | None:
    loss = report.predicted_loss
    if loss is None:
        return None
    unit = (report.calibration or {}).get("scored_in", "sample")
    return Tile(
        label="Predicted loss", value=Figure(loss, f"+{three_digits(loss)}"), note=(f"nats a {unit}, to second order",)
    )


def _quality_tile(report: Report) -> Tile | None:
    found = course_of(report)
    if found is None:
        return None
    stages = [stage for stage in reversed(STAGES) if stage in found.values] or list(found.values)[::-1]
    now, *former = stages
    note: list[Part] = [{"healed": "after healing", "factorised": "after surgery"}.get(now, now)]
    for i, stage in enumerate(reversed(former)):
        label = {"dense": "dense", "factorised": "before healing"}.get(stage, stage)
        note += [f"{', ' if i else '; '}{label} ", Figure(found.values[stage], found.form(found.values[stage]))]
    heading = HEADINGS[found.name]
    value = Figure(found.values[now], found.form(found.values[now]))
    return Tile(label=f"{heading[0].upper()}{heading[1:]}", value=value, note=tuple(note))


def _run_tiles(report: Report) -> list[Tile]:
    if report.about != "runs":
        return []
    name, ranked = last_figures(report)
    form = quality_form(name)
    return [
        Tile(label=run, value=Figure(value, form(value)), note=(f"{HEADINGS[name]} at step {whole(step)}",))
        for value, step, run in ranked[:4]
    ]


def _speed_tile(report: Report) -> Tile | None:
    run = measured_run(report)
    if run is None or run["speedup"] is None:
        return None
    return Tile(label="Speed", value=Figure(run["speedup"], times(run["speedup"])), note=(work_of(run),))


def _risk_tile(report: Report) -> Tile | None:
    high = sum(bool(row["damage_high"]) for row in report.to_dict()["layers"])
    if not high:
        return None
    note = f"{'layer' if high == 1 else 'layers'} with high predicted damage"
    return Tile(label="At risk", value=Figure(high, whole(high)), note=(note,))
