"""What a report says in words, for a reader who goes no further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lrsurgery.report.bench import BenchRun
from lrsurgery.report.runs import Run
from lrsurgery.report.schema import Report, Rung
from lrsurgery.report.views.columns import HEADINGS, QualityName

# the summary tells the first that is known
FAMILIAR: tuple[QualityName, ...] = ("perplexity", "top1", "f1", "spearman", "mse", "loss")
LOWER_IS_BETTER = ("perplexity", "mse", "loss")
STAGES = ("dense", "factorised", "healed")
THIN, FIXED = "\u202f", "\u00a0"  # spaces at which a line does not break


@dataclass(frozen=True)
class Figure:
    """A number of the report with the text that stands for it."""

    value: float
    text: str


@dataclass(frozen=True)
class Code:
    """Text in the typeface of a program."""

    code: str


@dataclass(frozen=True)
class Link:
    """A text that leads elsewhere."""

    text: str
    href: str


Part: TypeAlias = str | Figure | Code | Link
Form: TypeAlias = Callable[[float], str]


# numbers as text


def whole(value: float) -> str:
    return f"{value:,.0f}"


def _scaled(value: float, units: Sequence[str], space: str) -> str:
    at = 0
    while abs(value) >= 999.5 and at < len(units) - 1:
        value, at = value / 1000, at + 1
    digits = 0 if at == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}{space + units[at] if units[at] else ''}"


def count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T"), THIN)


def spelled(value: float) -> str:
    return _scaled(value, ("", "thousand", "million", "billion", "trillion"), FIXED)


def size(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"), FIXED)


def share(value: float) -> str:
    return f"{100 * value:.{2 if 0.99 < value < 1 else 1}f}{THIN}%"


def times(value: float) -> str:
    return f"{value:.2f}\u00d7"


def three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else whole(value)


def quality_form(name: str) -> Form:
    return share if name.startswith(("top", "f1", "exact")) else (lambda value: f"{value:.4g}")


# what is known of the whole


def energy_kept(report: Report) -> float | None:
    """Share of the squared Frobenius norm of all replaced weights that the factors keep.

    A layer's squared norm is its stable rank times its largest singular value squared. None where a layer lacks one of
    them.
    """
    kept = whole_energy = 0.0
    for row in report.factorised:
        if row.energy_kept is None or row.before is None or row.spectrum_before is None:
            return None
        energy = row.before.stable * row.spectrum_before.value[0] ** 2
        kept, whole_energy = kept + row.energy_kept * energy, whole_energy + energy
    return kept / whole_energy if whole_energy else None


def halfway(report: Report) -> tuple[Rung, float] | None:
    """The rung of a dense model's ladder nearest to half its size, and its share of the parameters."""
    if not report.ladder or report.about == "factorised":
        return None
    shares = [(rung, rung.parameters / report.parameters_before) for rung in report.ladder]
    return min(shares, key=lambda pair: abs(pair[1] - 0.5))


@dataclass(frozen=True)
class Course:
    """The best-known figure of a model's run at each of its stages."""

    name: QualityName
    run: Run
    values: dict[str, float]

    @property
    def form(self) -> Form:
        return quality_form(self.name)


def course_of(report: Report) -> Course | None:
    staged = [run for run in report.training if run["stages"]]
    if not staged or report.about == "runs":
        return None
    run = next((one for one in staged if one["name"] == report.name), staged[-1])
    for name in FAMILIAR:
        values = {stage: figures[name] for stage, figures in run["stages"].items() if name in figures}
        if values:
            return Course(name, run, values)
    return None


def last_figures(report: Report) -> tuple[QualityName, list[tuple[float, int, str]]]:
    """The best-known figure, and its last value, step and run of each run, best first."""
    for name in FAMILIAR:
        found = [
            (float(last[name]), last["step"], run["name"])
            for run in report.training
            for last in [e for e in run["evaluations"] if name in e][-1:]
        ]
        if found:
            return name, sorted(found, key=lambda one: one[0], reverse=name not in LOWER_IS_BETTER)
    return FAMILIAR[0], []


def measured_run(report: Report) -> BenchRun | None:
    return next((run for run in (report.bench or {"runs": []})["runs"] if run["speedup"] is not None), None)


def work_of(run: BenchRun) -> str:
    """A setting of bench in words, such as "prefill, 1 x 128"."""
    name = "decode" if run["work"] == "token by token" else run["work"]
    return f"{name}, {run['batch']} \u00d7 {run['length']}"


# sentences


def sentences(report: Report) -> list[list[Part]]:
    """The sentences that the report has something to say in, each as its parts."""
    said = [
        _size_words(report),
        _ladder_words(report),
        _energy_words(report),
        _calibration_words(report),
        _loss_words(report),
        _check_words(report),
        _refined_words(report),
        _quality_words(report),
        _speed_words(report),
        _runs_words(report),
    ]
    return [words for words in said if words]


def _size_words(report: Report) -> list[Part]:
    totals = report.to_dict()["totals"]
    if totals is None:
        return []
    before, after = totals["parameters_before"], totals["parameters_after"]
    factorised, dense = totals["layers_factorised"], totals["layers_dense"]
    if report.about == "dense" or after is None:
        looked_at = Figure(factorised + dense, whole(factorised + dense))
        return ["The model has ", Figure(before, spelled(before)), " parameters and ", looked_at, " layers."]
    said: list[Part] = [
        "The plan replaces " if report.about == "plan" else "Surgery replaced ",
        Figure(factorised, whole(factorised)),
        f" {'layer' if factorised == 1 else 'layers'} by low-rank ones and leaves ",
        Figure(dense, whole(dense)),
        " dense. The model goes from ",
        Figure(before, spelled(before)),
        " parameters to ",
        Figure(after, spelled(after)),
        ", ",
        Figure(totals["share"], share(totals["share"])),
        " of the original.",
    ]
    if report.share_saved_by_form is not None:
        said += [" Their pivoted form saves ", Figure(report.saved_by_form, whole(report.saved_by_form))]
        said += [" parameters (", Figure(report.share_saved_by_form, share(report.share_saved_by_form))]
        said += [" of the model) against the balanced one at the same ranks."]
    old, new = totals["bytes_before"], totals["bytes_after"]
    if old is not None and new is not None:
        verb = "shrink" if new < old else "go"
        said += [f" Its files {verb} from ", Figure(old, size(old)), " to ", Figure(new, size(new)), "."]
    old, new = totals["flops_before"], totals["flops_after"]
    if old is not None and new is not None:
        said += [" The arithmetic of a token in the layers goes from ", Figure(old, count(old)), " to "]
        said += [Figure(new, count(new)), " FLOPs."]
    return said


def _ladder_words(report: Report) -> list[Part]:
    found = halfway(report)
    if found is None:
        return []
    rung, part = found
    return [
        "At rank ",
        Code(rung.rank),
        ", the step of the ladder nearest to half the size, it would have ",
        Figure(rung.parameters, spelled(rung.parameters)),
        " parameters, ",
        Figure(part, share(part)),
        " of now, and the factorised layers would keep ",
        Figure(rung.energy_kept, share(rung.energy_kept)),
        " of their energy.",
    ]


def _energy_words(report: Report) -> list[Part]:
    energy = energy_kept(report)
    if energy is None:
        return []
    known = course_of(report) is not None or (report.loss_check or {}).get("measured")
    unmeasured = report.about == "factorised" and not known
    return [
        "The replaced layers would keep " if report.about == "plan" else "The replaced layers kept ",
        Figure(energy, share(energy)),
        " of the energy of their weights (the sum of their squared singular values)",
        "; what that does to the model\u2019s answers has not been measured here." if unmeasured else ".",
    ]


def _calibration_words(report: Report) -> list[Part]:
    told = report.calibration
    if not told:
        return []
    samples, tokens = told.get("samples"), told.get("tokens")
    said: list[Part] = ["Errors were weighed by the importance ", Code(str(told.get("metric"))), ", from "]
    if samples is not None:
        said += [Figure(samples, whole(samples)), f" {'sequences' if tokens else 'samples'}"]
        said += [" of ", Figure(tokens, whole(tokens)), " tokens"] if tokens else []
        said += [" of "]
    return [*said, Code(str(told.get("data"))), "."]


def _loss_words(report: Report) -> list[Part]:
    loss = report.predicted_loss
    if loss is None:
        return []
    unit = (report.calibration or {}).get("scored_in", "sample")
    return [
        "By these data surgery is predicted to add ",
        Figure(loss, three_digits(loss)),
        f" to the loss of a {unit}, to second order and as if layers did not disturb each other.",
    ]


def _check_words(report: Report) -> list[Part]:
    check = report.loss_check
    return ["The loss right after surgery: ", str(check["text"]), "."] if check and check.get("measured") else []


def _refined_words(report: Report) -> list[Part]:
    return [f"Refined: {report.refinement['text']}."] if report.refinement is not None else []


def _quality_words(report: Report) -> list[Part]:
    found = course_of(report)
    if found is None:
        return []
    better = "lower" if found.name in LOWER_IS_BETTER else "higher"
    heading = HEADINGS[found.name]
    said: list[Part] = [f"{heading[0].upper()}{heading[1:]} ({better} is better) "]
    phrases = {"dense": "for the dense model", "factorised": "right after surgery", "healed": "after healing"}
    stages = [stage for stage in STAGES if stage in found.values] or list(found.values)
    for i, stage in enumerate(stages):
        verb = "was " if i == 0 else " and is " if stage == "healed" else ", "
        said += [verb, Figure(found.values[stage], found.form(found.values[stage]))]
        said += [f" {phrases.get(stage, stage)}"]
    settings = found.run["settings"]
    if "healed" in found.values:
        decay = settings["decay"]
        said += [", which took ", Figure(settings["steps"], whole(settings["steps"])), " training steps"]
        said += [f" with {decay} decay"] if decay and decay != "none" else []
    return [*said, "."]


def _speed_words(report: Report) -> list[Part]:
    run = measured_run(report)
    if run is None or report.bench is None or run["speedup"] is None:
        return []
    said: list[Part] = ["It runs " if run["speedup"] >= 1 else "It runs slower, "]
    said += [Figure(run["speedup"], times(run["speedup"])), f" as fast as the dense model ({work_of(run)}"]
    if run["interval"]:
        low, high = run["interval"]
        confidence = run.get("confidence")
        said += [f"; {100 * confidence:.0f}{THIN}% interval " if confidence else "; interval "]
        said += [Figure(low, times(low)), " to ", Figure(high, times(high))]
    said += [")"]
    if run["ideal"] is not None:
        said += ["; the arithmetic alone would allow ", Figure(run["ideal"], times(run["ideal"]))]
    slower = [one for one in report.bench["runs"] if one["speedup"] is not None and one["speedup"] < 1]
    if slower and run["speedup"] >= 1:
        said += [". In ", Figure(len(slower), whole(len(slower)))]
        said += [f" of the {len(report.bench['runs'])} runs it is slower than dense"]
    return [*said, "."]


def _runs_words(report: Report) -> list[Part]:
    if report.about != "runs" or not report.training:
        return []
    number = len(report.training)
    said: list[Part] = [Figure(number, whole(number)), " training run." if number == 1 else " training runs."]
    name, ranked = last_figures(report)
    if not ranked:
        return said
    form = quality_form(name)
    value, step, best = ranked[0]
    said += [f" The best last {HEADINGS[name]} is ", Figure(value, form(value)), f", by {best} at step {whole(step)}"]
    if len(ranked) > 1:
        value, _, second = ranked[1]
        said += [f", ahead of {second} at ", Figure(value, form(value))]
    return [*said, "."]
