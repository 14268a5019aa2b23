"""The curve of a dense model: what it loses and gains in time at ten sizes, and where its knee is."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from lrsurgery.data.datasets import digest_of
from lrsurgery.errors import SurgeryError
from lrsurgery.factorise.options import FactoriseOptions
from lrsurgery.measure.targets.goals import EvalData
from lrsurgery.measure.targets.heal import Healing
from lrsurgery.measure.targets.search import STEPS, budget_at, lowest_place, title_of
from lrsurgery.measure.targets.trials import Timing, Trials
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.targets.schema import Curve, Point

POINTS = 10
LEAST = 0.1  # share of the layers' parameters at the first point, if that can be met
SHORT = Timing(precision=0.05, seconds=2.0)
RULE = "farthest below the chord from the first point to the last, both axes scaled to 1 (Kneedle, Satopaa et al. 2011)"


def measure_curve(
    reference: str,
    options: FactoriseOptions,
    data: EvalData,
    healing: Healing | None = None,
    listener: Listener = SILENT,
) -> Curve:
    """Measure ten models between a tenth of the layers' parameters, or the least possible, and the dense model itself.

    `options` has any budget. Each point is what `factorise` with its budget would write, measured as `evaluate` and
    `bench` (with a short precision) measure it. Raises SurgeryError.
    """
    trials = Trials.open(reference, options, data, healing)
    notes = [] if trials.note is None else [trials.note]
    calibration = trials.options.calibration
    if calibration is not None and calibration.data is not None:
        how = calibration.how
        if digest_of(calibration.data, calibration.split, how.subset) == digest_of(
            data.data, data.split, data.how.subset
        ):
            notes.append(f"{data.data}: both --calibration and --eval-data, so the figures are better than on others")
    for note in (*notes, *trials.notes()):
        listener.note(note)
    dense = trials.dense(listener)
    listener.evaluated("dense", 0, 0, dense)
    with tempfile.TemporaryDirectory(prefix="lrsurgery-") as folder:
        trials.collect(Path(folder, "statistics"), "", listener)
        points = _points(trials, listener)
    last: Point = {**trials.dense_point(dense), "speedup": 1.0}
    points.append(last)
    return Curve(
        points=points,
        knee=knee_of(points),
        rule=RULE,
        data=data.data,
        setting=trials.setting_text(),
        heal=0 if healing is None else healing.steps,
        notes=notes,
    )


def _points(trials: Trials, listener: Listener) -> list[Point]:
    """All points but the dense model."""
    if trials.plan_for(budget_at(STEPS)) is None:
        raise SurgeryError(f"{trials.source.reference}: no budget can be met")
    lowest = max(round(LEAST * STEPS), lowest_place(lambda place: trials.plan_for(budget_at(place)) is not None))
    found: list[Point] = []
    for i in range(POINTS - 1):
        budget = budget_at(round(lowest + i * (STEPS - lowest) / (POINTS - 1)))
        listener.progress(f"budget {budget}", i, POINTS - 1)
        plan = trials.plan_for(budget)
        if plan is None or not plan.replacements:
            continue
        found.append(trials.measure(budget, plan, SHORT, listener))
        listener.evaluated(title_of(found[-1]), i + 1, POINTS - 1, found[-1]["values"])
    listener.progress("", POINTS - 1, POINTS - 1)
    return found


def knee_of(points: Sequence[Point]) -> int | None:
    """The index of the point at which a smaller model begins to cost more; None where no point is below the chord.

    Loss over parameters, both from 0 to 1. Source: Satopaa et al. 2011, "Finding a Kneedle in a Haystack", for a
    decreasing convex curve without smoothing.
    """
    known = [
        (i, point["parameters"], point["values"]["loss"]) for i, point in enumerate(points) if "loss" in point["values"]
    ]
    if len(known) < 3:
        return None
    (_, left, top), (_, right, bottom) = known[0], known[-1]
    if right <= left or top <= bottom:
        return None
    below = {i: 1 - (x - left) / (right - left) - (y - bottom) / (top - bottom) for i, x, y in known}
    best = max(below, key=lambda i: below[i])
    return best if below[best] > 1e-9 else None
