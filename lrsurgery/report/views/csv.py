"""A report as comma-separated values, for spreadsheets and data frames: one row a layer, numbers as they are."""

from __future__ import annotations

import csv
from io import StringIO

from lrsurgery.report.schema import Report
from lrsurgery.report.views.columns import COLUMNS, Value, sorted_rows

ENDINGS = (".csv",)
FORMULA = tuple("=+-@\t\r")  # how a text starts that a spreadsheet would run


def render(report: Report, *, sort: str = "model", every: bool = True) -> str:
    """Every layer, whether factorised or not, and every column of `COLUMNS` that is a value of its own."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [column for column in COLUMNS if column.drawn or column.form != "text"]
    writer.writerow([column.key for column in columns])
    for row in sorted_rows(report.rows, sort):
        writer.writerow([_cell(column.value(row)) for column in columns])
    return out.getvalue()


def _cell(value: Value) -> str | int | float:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
