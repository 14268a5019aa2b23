"""The columns of a curve, listed once; every view draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lrsurgery.report.targets.schema import Curve, Point
from lrsurgery.report.views.columns import HEADINGS, QUALITY, Column, QualityName, Terse, Value


class Place(NamedTuple):
    """A point of a curve, and whether it is the knee."""

    point: Point
    is_knee: bool


def places_of(curve: Curve) -> list[Place]:
    """The points of a curve, from small to large."""
    return [Place(point, i == curve["knee"]) for i, point in enumerate(curve["points"])]


def columns_of(curve: Curve) -> tuple[Column[Place], ...]:
    """The columns that a curve has values for."""
    known = [name for name in QUALITY if any(name in point["values"] for point in curve["points"])]
    return (*SIZES, *(_quality(name) for name in known), *TIMES, KNEE)


def _quality(name: QualityName) -> Column[Place]:
    def value(place: Place) -> Value:
        return place.point["values"].get(name)

    form = "share" if name in ("top1", "top5", "f1", "exact_match", "pixel_accuracy", "mean_iou") else "number"
    text = _text(value, QUALITY[name].format)
    terse = Terse(HEADINGS[name], text, wide=name in ("perplexity", "top5"))
    return Column(key=f"values.{name}", title=HEADINGS[name], form=form, value=value, terse=terse)


def _text(value: Callable[[Place], Value], form: Callable[[Value], str]) -> Callable[[Place], str]:
    def text(place: Place) -> str:
        found = value(place)
        return "" if found is None else form(found)

    return text


def _interval(place: Place) -> str:
    speedup, interval = place.point.get("speedup"), place.point.get("interval")
    if speedup is None:
        return ""
    return f"{speedup:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


SIZES: tuple[Column[Place], ...] = (
    Column(
        key="budget",
        title="`--budget`",
        label="budget",
        form="text",
        value=lambda place: place.point["budget"] or "dense",
        terse=Terse("--budget", lambda place: place.point["budget"] or "dense"),
    ),
    Column(
        key="layers",
        title="layers",
        label="layers factorised",
        form="count",
        value=lambda place: place.point["layers"],
        terse=Terse("layers", lambda place: str(place.point["layers"]), wide=True),
    ),
    Column(
        key="parameters",
        title="parameters",
        form="size",
        value=lambda place: place.point["parameters"],
        terse=Terse("parameters", lambda place: f"{place.point['parameters']:,}"),
    ),
    Column(
        key="share",
        title="share",
        form="share",
        value=lambda place: place.point["share"],
        terse=Terse("share", lambda place: f"{place.point['share']:.1%}"),
    ),
    Column(
        key="bytes",
        title="bytes",
        form="size",
        value=lambda place: place.point["bytes"],
        terse=Terse("bytes", lambda place: f"{place.point['bytes']:,}", wide=True),
    ),
)
TIMES: tuple[Column[Place], ...] = (
    Column(
        key="speedup",
        title="speedup",
        form="times",
        value=lambda place: place.point.get("speedup"),
        terse=Terse("speedup", _interval),
    ),
)
KNEE: Column[Place] = Column(
    key="knee",
    title="",
    label="knee",
    form="text",
    value=lambda place: "knee" if place.is_knee else "",
    terse=Terse("", lambda place: "knee" if place.is_knee else ""),
)


def curve_words(curve: Curve) -> list[str]:
    """What people are told of a curve: its data, what was timed, the rule of the knee."""
    said = [f"measured on {curve['data']}" + (f", after {curve['heal']} finetune steps" if curve["heal"] else "")]
    if curve["setting"] is not None:
        said.append(f"speedup: over the dense model, {curve['setting']}")
    found = "no knee" if curve["knee"] is None else f"knee at --budget {curve['points'][curve['knee']]['budget']}"
    return [*said, f"{found}: {curve['rule']}"]
