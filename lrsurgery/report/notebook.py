"""A report in a notebook: its line, its table, and a data frame of its layers."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lrsurgery.errors import SurgeryError
from lrsurgery.report.schema import Report
from lrsurgery.report.views.columns import COLUMNS, columns_with_values, plain_text

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 40  # of a table; a data frame has all
RIGHT = ' style="text-align: right"'


def to_html(report: Report) -> str:
    """An HTML fragment: what `repr` says, the notes, and a row for each factorised layer up to `MOST_ROWS`.

    Of a report without such layers, a row for each layer that has a full rank.
    """
    rows = report.factorised or [row for row in report.rows if row.full_rank is not None]
    columns = columns_with_values(rows, without=("kind", "status"))
    parts = [f"<p><b>{escape(report.summary)}</b></p>"]
    parts += [f"<p>Note: {escape(note)}</p>" for note in report.notes]
    if rows:
        head = "".join(f"<th{'' if c.form == 'text' else RIGHT}>{escape(c.title)}</th>" for c in columns)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
        for row in rows[:MOST_ROWS]:
            cells = ((c, escape(plain_text(c.shown(row), c.form))) for c in columns)
            line = "".join(f"<td{'' if c.form == 'text' else RIGHT}>{text}</td>" for c, text in cells)
            parts.append(f"<tr>{line}</tr>")
        parts.append("</tbody></table>")
    if len(rows) > MOST_ROWS:
        parts.append(f"<p>and {len(rows) - MOST_ROWS} more; <code>to_pandas()</code> has every layer</p>")
    return "\n".join(parts)


def to_pandas(report: Report) -> pd.DataFrame:
    """A data frame of every layer, factorised or not: the columns of the CSV, missing values as NaN or None."""
    try:
        import pandas as pd
    except ImportError as e:
        raise SurgeryError("to_pandas needs pandas: pip install pandas") from e
    columns = [column for column in COLUMNS if column.drawn or column.form != "text"]
    return pd.DataFrame({column.key: [column.value(row) for row in report.rows] for column in columns})
