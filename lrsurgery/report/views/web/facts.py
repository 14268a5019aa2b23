"""What the page says besides its sentences: where a report comes from, its options, facts of bench, what words mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lrsurgery.report.bench import Bench, BenchModel
from lrsurgery.report.schema import Report
from lrsurgery.report.views.web.sentences import Code, Figure, Link, Part, size, spelled, whole

ABOUT = {
    "dense": "Profile of a dense model, before any surgery",
    "plan": "Planned surgery; nothing has been changed yet",
    "factorised": "Low-rank model, after surgery",
    "runs": "Training runs compared",
}
NAMED = 8  # layers that a sentence names; the table beside it has them all
TERMS: dict[str, tuple[Part, ...]] = {
    "Rank": (
        "How many independent directions a layer\u2019s matrix uses. A matrix of m by n is replaced by two, m by r and"
        " r by n; r is the rank kept, and the full rank is the smaller of m and n.",
    ),
    "Break-even rank": (
        "The largest rank at which the two factors have fewer parameters than the matrix that they replace.",
    ),
    "Energy kept": (
        "The sum of the squared singular values that are kept, over the sum of all of them. 100\u202f% is the same"
        " matrix. It speaks of weights, not of the model\u2019s answers.",
    ),
    "Relative error, spectral error": (
        "The size of what the layer lost against the size of what it was: in the Frobenius norm (all directions"
        " together), and in the spectral norm (the largest direction lost).",
    ),
    "Nuclear, entropy and stable rank": (
        "Three measures of how many directions matter, which need no threshold. Nuclear rank: the sum of the singular"
        " values over the largest. Entropy rank: the exponential of the entropy of the singular values as shares of"
        " their sum (Roy and Vetterli 2007). Stable rank: the sum of their squares over the largest square; the least"
        " of the three to be moved by small values.",
    ),
    "Importance, error in the metric, predicted loss": (
        "Calibration runs the model on data and sums second moments of each layer\u2019s inputs (activations) and of"
        " its output gradients too (fisher). They weigh the error of every entry of the matrix; the error in the"
        " metric is the relative error so weighed. With fisher, the squared error so weighed is the increase of the"
        " loss to second order: the predicted loss.",
    ),
    "Principal angles, overlap": (
        "How far the main directions of the dense layer and of the factorised one lie apart. An angle of 0\u00b0 or an"
        " overlap of 1 is the same subspace; 90\u00b0 or 0 has nothing in common.",
    ),
    "Predicted damage": (
        "Share of parameters removed times stable rank. Xu 2026, ",
        Link("arXiv:2604.18085", "https://arxiv.org/abs/2604.18085"),
        ", found compression ratio times stable rank to correlate with accuracy loss (Pearson 0.84 to 0.89 over Qwen3"
        " and Gemma3); a rough guide, not a measurement.",
    ),
    "Healing": (
        "Training after surgery, to win back what surgery lost. Frobenius decay pulls on the product of the two"
        " factors, L2 on each of them alone.",
    ),
    "Speedup, ideal": (
        "Dense time over factorised time of the same work, with the interval in which repeated measurements put it."
        " Ideal is the ratio of the arithmetic; memory and overhead keep real runs from it.",
    ),
}


def origin(report: Report) -> list[str]:
    """Where a report comes from: the source, its digest, the versions of what made it."""
    reference, hub_id, revision = (report.source.get(key) for key in ("reference", "hub_id", "revision"))
    places = [reference, hub_id if hub_id != reference else None, f"revision {revision}" if revision else None]
    known = [str(place) for place in places if place]
    digest = report.source.get("digest")
    return [
        *([f"from {', '.join(known)}"] if known and report.about != "runs" else []),
        *([f"digest {digest}"] if digest else []),
        *(f"{name} {version}" for name, version in report.versions.items()),
    ]


def option_facts(options: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, list[Part]]]:
    """Each option that has a value, and its text; those within an option have its name in front."""
    for key, value in options.items():
        name = f"{prefix}{'learning rate' if key == 'lr' else key.replace('_', ' ')}"
        if value is None or value in ([], {}):
            continue
        if isinstance(value, Mapping):
            yield from option_facts(value, f"{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, [Figure(value, str(value))]
        elif isinstance(value, list | tuple):
            yield (
                name,
                [", ".join(str(one) if isinstance(one, str | int | float) else json.dumps(one) for one in value)],
            )
        else:
            yield name, [str(value).lower() if isinstance(value, bool) else str(value)]


def bench_facts(bench: Bench) -> Iterator[tuple[str, list[Part]]]:
    """The models that were timed, the machine and the options."""
    yield "this model", _model_words(bench["model"])
    if bench["against"] is not None:
        yield "dense model", _model_words(bench["against"])
    for name, value in bench["machine"].items():
        if value is not None:
            yield name, [str(value)]
    yield from option_facts(bench["options"])


def _model_words(model: BenchModel) -> list[Part]:
    said: list[Part] = [Figure(model["parameters"], spelled(model["parameters"])), " parameters"]
    for before, of in ((", ", model["bytes"]), (", peak memory ", model["peak_memory"])):
        said += [before, Figure(of, size(of))] if of is not None else []
    return said


def slower_words(bench: Bench) -> list[Part]:
    """Which layers got slower; nothing where layers were not timed."""
    if not bench["layers"]:
        return []
    names = [name for row in bench["layers"] if row["slower"] for name in row["names"]]
    if not names:
        return ["No layer was measured to be slower factorised than dense."]
    said: list[Part] = [Figure(len(names), whole(len(names))), f" {'layer is' if len(names) == 1 else 'layers are'}"]
    said += [" slower factorised than dense on this machine: "]
    for i, name in enumerate(names[:NAMED]):
        said += [", " if i else "", Code(name)]
    return [*said, f" and {len(names) - NAMED} more; the table has them all." if len(names) > NAMED else "."]
