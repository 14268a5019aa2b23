"""The parts of a rank report about targets: points, the search that chose the model, the curve of a dense model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lrsurgery.report.bench import Count


class Point(TypedDict):
    """A model of one size, and what was measured of it."""

    budget: str | None  # as --budget takes it; None for the dense model
    layers: Count  # factorised
    parameters: Count  # of the whole model
    share: float  # of the dense model's parameters
    bytes: Count  # of all weights, as they are written
    values: dict[str, float]  # figures of `evaluate`; none where nothing was measured on data
    unhealed: NotRequired[dict[str, float]]  # the same before healing, where the values are after it
    speedup: NotRequired[float | None]  # over the dense model
    interval: NotRequired[Annotated[list[float], Field(min_length=2, max_length=2)] | None]  # of the speedup, 95%


class Curve(TypedDict):
    """Points of a dense model from small to large, the last of them the model itself."""

    points: Annotated[list[Point], Field(min_length=1)]
    knee: int | None  # index of a point; None where no point lies below the chord
    rule: str  # by which the knee was found
    data: str  # that the points were measured on
    setting: str | None  # what was timed, such as "prefill of 1 x 128 on cpu"
    heal: Count  # finetune steps before each measurement
    notes: list[str]  # how the points came about


class Choice(TypedDict):
    """How the size of a model was chosen."""

    target: str  # the option, as it was given
    lines: list[str]  # for people: what was asked for, found and measured, on which data
    budget: str  # that gives this model
    bound: float
    dense: dict[str, float]  # figures of the dense model
    values: dict[str, float]  # of the written model, on the data that chose it
    points: list[Point]  # that were measured on the way
    data: NotRequired[str | None]
    test: NotRequired[dict[str, dict[str, float]] | None]  # "dense" and "factorised", on other data
    heal: NotRequired[Count]
    next: NotRequired[str | None]  # the command that heals the written model
