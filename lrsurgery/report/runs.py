"""Training runs, read back from the folders that `finetune` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast, get_args

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from lrsurgery.errors import RecipeError, SourceError
from lrsurgery.files.json import Json, read_lines
from lrsurgery.files.yaml import read_yaml

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
DENSE_TRAINED = "dense trained"  # stage of the dense model that is trained as long, to compare with

# of a factorised layer at one evaluation
Measure: TypeAlias = Literal[
    "nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm", "spectral_norm", "u_norm", "v_norm"
]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Settings(TypedDict):
    """Settings of a run that its report shows; None where its recipe does not name them."""

    model: str | None
    data: str | None
    eval_data: str | None
    rank: list[str]
    init: str | None
    dense_steps: int | None
    switch_lr: float | None
    decay: str | None
    decay_strength: float | None
    weight_decay: float | None
    optimizer: str | None
    lr: float | None
    schedule: str | None
    batch_size: int | None
    accumulate: int | None
    seed: int | None
    teacher: str | None
    steps: int  # that were taken


class Quality(TypedDict, total=False):
    """Figures of one evaluation, as far as the task has them; further ones may stand beside these."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    loss: float
    perplexity: float
    top1: float
    top5: float
    f1: float
    exact_match: float
    mse: float
    pearson: float
    spearman: float
    kl: float
    cosine: float
    relative_mse: float
    pixel_accuracy: float
    mean_iou: float


class Evaluation(Quality):
    """An evaluation within a run."""

    step: int
    stage: str  # "dense" or "factorised"


class Loss(TypedDict):
    """A logged training loss."""

    step: int
    loss: float
    lr: float | None


class SpectrumCourse(TypedDict):
    """Some singular values of U V: `values[k][i]` is the `index[i]`-th at the k-th evaluation."""

    index: list[int]
    values: list[list[float | None]]


class _LayerCourse(TypedDict):
    step: list[int]
    nuclear_rank: list[float | None]
    entropy_rank: list[float | None]
    stable_rank: list[float | None]
    frobenius_norm: list[float | None]
    spectral_norm: list[float | None]
    u_norm: list[float | None]
    v_norm: list[float | None]


class LayerCourse(_LayerCourse, total=False):
    """What became of a layer: a list for each measure, with one entry for each evaluation that knows the layer."""

    spectrum: SpectrumCourse


class _Spectrum(TypedDict):
    index: list[int]
    value: list[float | None]


class _Layer(TypedDict, total=False):
    """A factorised layer at one evaluation."""

    nuclear_rank: float | None
    entropy_rank: float | None
    stable_rank: float | None
    frobenius_norm: float | None
    spectral_norm: float | None
    u_norm: float | None
    v_norm: float | None
    spectrum: _Spectrum


class Record(TypedDict):
    """A line of metrics.jsonl: a logged loss, or an evaluation. Further figures may stand beside these."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    stage: Literal["dense", "factorised", "dense trained"]
    loss: NotRequired[float | None]
    learning_rate: NotRequired[float | None]
    eval: NotRequired[dict[str, float]]
    layers: NotRequired[dict[str, _Layer]]


class Run(TypedDict):
    """A run, as a report's JSON holds it."""

    name: str
    settings: Settings
    stages: dict[str, Quality]
    evaluations: list[Evaluation]
    losses: list[Loss]
    layers: dict[str, LayerCourse]


def is_run(folder: Path) -> bool:
    """Whether a folder holds the metrics of a run, finished or not."""
    return (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Settings, evaluations, losses and the dynamics of each layer.

    Raises SourceError where the folder holds no run or damaged metrics, RecipeError for a damaged recipe.
    """
    if not is_run(folder):
        raise SourceError(f"{folder}: no {METRICS} in it; give folders that lrsurgery finetune wrote")
    return _run_of(folder, read_metrics(folder))


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run's metrics.jsonl; a last line that a kill cut short is left out. Raises SourceError."""
    return read_lines(Record, folder / METRICS, "a record of a run")


def stages_of(evaluated: Sequence[Record], stage: str) -> dict[str, dict[str, float]]:
    """What was measured at each stage of a run that is now in `stage`, from its records of evaluations in order."""
    dense = [record["eval"] for record in evaluated if record["stage"] == "dense"]
    factorised = [record["eval"] for record in evaluated if record["stage"] == "factorised"]
    if stage == "dense":
        return {"before": dense[0], "trained": dense[-1]} if dense else {}
    found = {"dense": dense[-1]} if dense else {}
    as_long = [record["eval"] for record in evaluated if record["stage"] == DENSE_TRAINED]
    if as_long:
        found[DENSE_TRAINED] = as_long[-1]
    return {**found, "factorised": factorised[0], "healed": factorised[-1]} if factorised else found


def untrained_dense(stages: Mapping[str, object], dense_steps: int = 0) -> str | None:
    """What to say of a comparison with a dense model that had no such training; None where there is none."""
    if dense_steps or not stages.get("dense") or "healed" not in stages or DENSE_TRAINED in stages:
        return None
    return (
        "the dense model had none of this training, so a comparison with it flatters the healed one; --against-trained"
        " adds the dense model trained as long"
    )


def _run_of(folder: Path, records: Sequence[Record]) -> Run:
    compared = [record for record in records if "eval" in record and record["stage"] == DENSE_TRAINED]
    records = [record for record in records if record["stage"] != DENSE_TRAINED]
    evaluated = [record for record in records if "eval" in record]
    # a run that began low rank evaluates the dense model once, to compare with: a stage, but no step of its course
    began_low_rank = any(r["stage"] == "factorised" and r["step"] == 0 for r in evaluated)
    course = [r for r in evaluated if not (began_low_rank and r["stage"] == "dense")]
    steps = max((record["step"] for record in records), default=0)
    stages = stages_of([*evaluated, *compared], evaluated[-1]["stage"]) if evaluated else {}
    return Run(
        name=folder.resolve().name,
        settings=_settings(folder / RECIPE, steps),
        stages={stage: _quality(values) for stage, values in stages.items()},
        evaluations=[cast(Evaluation, {"step": r["step"], "stage": r["stage"], **_quality(r["eval"])}) for r in course],
        losses=[
            Loss(step=r["step"], loss=loss, lr=r.get("learning_rate"))
            for r in records
            if (loss := r.get("loss")) is not None
        ],
        layers=_layers(evaluated),
    )


def _settings(file: Path, steps: int) -> Settings:
    found: Json = {}
    if file.is_file():
        found = {key.replace("-", "_"): value for key, value in read_yaml(file).items()}

    def text(name: str) -> str | None:
        return None if found.get(name) is None else str(found[name])

    def number(name: str) -> float | None:
        try:
            return None if found.get(name) is None else float(found[name])  # YAML takes 1e-3 for text
        except (TypeError, ValueError, OverflowError) as e:
            raise RecipeError(f"{file}: {name} '{found[name]}': write a number") from e

    def count(name: str) -> int | None:
        value = number(name)
        if value is not None and not value.is_integer():
            raise RecipeError(f"{file}: {name} '{found[name]}': write a whole number")
        return None if value is None else int(value)

    rank = found.get("rank") or []
    return Settings(
        model=text("model"),
        data=text("data"),
        eval_data=text("eval_data"),
        rank=[str(part) for part in (rank if isinstance(rank, list) else [rank])],
        init=text("init"),
        dense_steps=count("dense_steps"),
        switch_lr=number("switch_lr"),
        decay=text("decay"),
        decay_strength=number("decay_strength"),
        weight_decay=number("weight_decay"),
        optimizer=text("optimizer"),
        lr=None if found.get("lr") == "auto" else number("lr"),  # not found yet
        schedule=text("schedule"),
        batch_size=count("batch_size"),
        accumulate=count("accumulate"),
        seed=count("seed"),
        teacher=text("teacher"),
        steps=steps,
    )


def _quality(values: Mapping[str, float]) -> Quality:
    """The figures without the number of positions that they are of."""
    return cast(Quality, {name: value for name, value in values.items() if name != "scored"})


def _layers(evaluated: Sequence[Record]) -> dict[str, LayerCourse]:
    """Each layer's measures over the evaluations that have it; evaluations of a dense stage have no layers."""
    found: dict[str, LayerCourse] = {}
    for record in evaluated:
        for name, values in record.get("layers", {}).items():
            course = found.setdefault(name, cast(LayerCourse, {"step": [], **{measure: [] for measure in MEASURES}}))
            course["step"].append(record["step"])
            for measure in MEASURES:
                course[measure].append(values.get(measure))
            if "spectrum" in values:
                empty = SpectrumCourse(index=values["spectrum"]["index"], values=[])
                course.setdefault("spectrum", empty)["values"].append(values["spectrum"]["value"])
    return found
