"""A report in a notebook, against its CSV and JSON, and bars for jobs there."""

from __future__ import annotations

import csv
import html
import io
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import tqdm.auto
from support import tiny
from torch import nn

import lrsurgery
from lrsurgery.errors import SurgeryError
from lrsurgery.progress import USUAL, Listener, in_notebook
from lrsurgery.report.notebook import MOST_ROWS
from lrsurgery.report.schema import Report
from lrsurgery.report.views import render


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("gpt2")
    made = lrsurgery.factorise_checkpoint(tiny.save_gpt2(folder / "dense"), folder / "low", rank=0.4)
    return replace(made, name="low", notes=())


def test_repr_is_a_line(report: Report) -> None:
    share = report.parameters_after / report.parameters_before  # type: ignore[operator]
    sizes = f"{report.parameters_before:,} -> {report.parameters_after:,} parameters ({share:.1%})"
    assert repr(report) == f"<Report: low: 8 of 11 layers factorised, {sizes}>"
    planned = replace(report, about="plan", parameters_after=None, name=None)
    assert (
        repr(planned) == f"<Report: 8 of 11 layers factorised planned, {report.parameters_before:,} parameters before>"
    )
    dense = replace(report, about="dense")
    assert repr(dense) == f"<Report: low: 11 layers, dense, {report.parameters_before:,} parameters>"
    assert repr(replace(report, about="runs", rows=())) == "<Report: low: 0 training runs>"


def cells(text: str, tag: str) -> list[str]:
    return [html.unescape(cell) for cell in re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", text)]


def test_the_table_is_that_of_markdown(report: Report) -> None:
    odd = replace(report.rows[1], name="a<b>&c")
    shown = replace(report, rows=(odd, *report.rows[2:]), notes=("x < y",))
    text = shown._repr_html_()
    assert html.escape(shown.summary) in text
    assert "Note: x &lt; y" in text
    assert "a<b>" not in text
    table = [line for line in render(report, "markdown").splitlines() if line.startswith("| ")]
    titles, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert cells(text, "th") == titles
    found = cells(report._repr_html_(), "td")
    assert len(found) == 8 * len(titles)
    written = [cell.replace("\\", "") for row in rows[:8] for cell in row]
    assert [cell.replace("×", "x") for cell in found] == [cell.replace("×", "x") for cell in written]


def test_a_long_table_is_cut(report: Report) -> None:
    many = replace(report, rows=tuple(report.factorised * 10))
    text = many._repr_html_()
    assert text.count("<tr>") == MOST_ROWS + 1
    assert f"and {80 - MOST_ROWS} more" in text
    assert replace(report, rows=())._repr_html_().count("<t") == 0


def test_to_pandas_is_the_csv(report: Report) -> None:
    frame = report.to_pandas()
    wanted = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert list(frame.columns) == list(wanted[0])
    assert len(frame) == len(report.rows) == len(wanted)
    for key in frame.columns:
        for value, text in zip(frame[key], (row[key] for row in wanted), strict=True):
            if text == "":
                assert pd.isna(value)
            elif isinstance(value, str):
                assert value == text
            else:
                assert float(value) == pytest.approx(float(text))
    assert frame["parameters_before"].dtype == "int64"
    assert (frame[frame["rank"].notna()]["energy_kept"] < 1).all()


def test_without_pandas(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SurgeryError, match="pip install pandas"):
        report.to_pandas()


class ZMQInteractiveShell:
    """Named as IPython's class of a kernel."""


class TerminalInteractiveShell:
    """Named as that of a terminal."""


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that are drawn, in a notebook."""
    drawn: list[Any] = []

    class Bar(tqdm.std.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            drawn.append(self)
            super().__init__(*args, **options, file=io.StringIO())

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    shell: Any = types.ModuleType("IPython")
    shell.get_ipython = ZMQInteractiveShell
    monkeypatch.setitem(sys.modules, "IPython", shell)
    return drawn


def test_where_a_notebook_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shell: Any = types.ModuleType("IPython")
    for made, wanted in ((ZMQInteractiveShell, True), (TerminalInteractiveShell, False), (lambda: None, False)):
        shell.get_ipython = made
        monkeypatch.setitem(sys.modules, "IPython", shell)
        assert in_notebook() is wanted
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_jobs_draw_bars_in_a_notebook(bars: list[Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    statistics = lrsurgery.collect_statistics(model, [torch.randn(4, 12)], importance="activations")
    before = len(bars)
    lrsurgery.factorise_(model, rank=3, statistics=statistics)
    (bar,) = bars[before:]
    assert (bar.n, bar.total, bar.disable) == (3, 3, True)  # a closed bar is disabled
    lrsurgery.factorise_checkpoint(tiny.save_gpt2(tmp_path / "dense"), tmp_path / "low", rank=0.4)
    assert len(bars) > before + 1
    assert all(bar.n == bar.total for bar in bars)
    assert not USUAL._bars


def test_another_listener_draws_none(bars: list[Any]) -> None:
    seen = []

    class Mine(Listener):
        def progress(self, name: str, done: int, total: int) -> None:
            seen.append((name, done, total))

    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    lrsurgery.factorise_(model, rank=3, listener=Mine())
    assert seen == [("0", 1, 2), ("1", 2, 2)]
    assert not bars


def test_a_job_outside_of_notebooks_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    lrsurgery.factorise_(nn.Sequential(nn.Linear(12, 12)), rank=3)
    USUAL.note("x")
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_job_leaves_no_bar_behind(bars: list[Any]) -> None:
    """A job that begins anew gets a bar of its own."""
    for done in (1, 2, 1, 2, 3):
        USUAL.progress("layer", done, 3)
    assert [bar.n for bar in bars] == [2, 3]
    assert not USUAL._bars
