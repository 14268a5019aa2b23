"""A report as its own JSON: what every other view is drawn from."""

from __future__ import annotations

from lrsurgery.report.schema import Report

ENDINGS = (".json",)


def render(report: Report, *, sort: str = "model", every: bool = True) -> str:
    """The whole report, its layers in the model's order."""
    return report.to_json()
