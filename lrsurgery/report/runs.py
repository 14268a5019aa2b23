"""The course of training runs, read back from the folders that `finetune` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.training.recipe import Recipe, read_recipe
from lrsurgery.training.run_folder import METRICS, RECIPE, read_metrics, stages_of

SETTINGS = (
    *("model", "data", "eval_data", "rank", "init", "dense_steps", "switch_lr", "decay", "decay_strength"),
    *("weight_decay", "optimizer", "lr", "schedule", "batch_size", "accumulate", "seed", "teacher"),
)
MEASURES = (*("nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm", "spectral_norm", "u_norm", "v_norm"),)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the course of a run, finished or not."""
    return (folder / METRICS).is_file()


def read_run(folder: Path) -> dict[str, Any]:
    """Settings, evaluations, losses and each layer's dynamics over the steps, as the report's JSON has them.

    Raises SourceError where the folder holds no run or damaged metrics, RecipeError for a damaged recipe.
    """
    if not is_run(folder):
        raise SourceError(f"{folder}: no {METRICS} in it; give folders that lrsurgery finetune wrote")
    try:
        return _course_of(folder, read_metrics(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, SurgeryError):
            raise
        raise SourceError(f"{folder / METRICS}: not the metrics of a run ({e!r})") from e


def _course_of(folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    recipe = Recipe().merged(read_recipe(folder / RECIPE)) if (folder / RECIPE).is_file() else Recipe()
    evaluated = [record for record in records if "eval" in record]
    # the dense model that a run was measured against at its start is a stage of it, and not on its course
    begun_low_rank = any(r["stage"] == "factorised" and r["step"] == 0 for r in evaluated)
    course = [r for r in evaluated if not (begun_low_rank and r["stage"] == "dense")]
    steps = max((record["step"] for record in records), default=0)
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in SETTINGS}
    return {
        "name": folder.resolve().name,
        "settings": {**settings, "rank": list(recipe.rank), "steps": steps},
        "stages": {stage: _quality(values) for stage, values in stages_of(evaluated, evaluated[-1]["stage"]).items()}
        if evaluated
        else {},
        "evaluations": [{"step": r["step"], "stage": r["stage"], **_quality(r["eval"])} for r in course],
        "losses": [
            {"step": r["step"], "loss": r["loss"], "lr": r.get("learning_rate")} for r in records if "loss" in r
        ],
        "layers": _layers(evaluated),
    }


def _quality(values: dict[str, float]) -> dict[str, float]:
    """The figures without the number of positions that they are of."""
    return {name: value for name, value in values.items() if name != "scored"}


def _layers(evaluated: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Layer -> one list a measure over the evaluations that have it (dense stages have none)."""
    found: dict[str, dict[str, Any]] = {}
    for record in evaluated:
        for name, values in record.get("layers", {}).items():
            course = found.setdefault(name, {"step": [], **{measure: [] for measure in MEASURES}})
            course["step"].append(record["step"])
            for measure in MEASURES:
                course[measure].append(values.get(measure))
            if "spectrum" in values:
                spectrum = course.setdefault("spectrum", {"index": values["spectrum"]["index"], "values": []})
                spectrum["values"].append(values["spectrum"]["value"])
    return found
