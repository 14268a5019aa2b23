"""What is drawn from a report holds the numbers of its JSON: terminal, Markdown, CSV, figures."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from support.reports import HOSTILE, WHICH, Reports

from lrsurgery.errors import OutputError
from lrsurgery.report import views
from lrsurgery.report.schema import Report
from lrsurgery.report.views import VIEWS, figures, render
from lrsurgery.report.views.terminal import BARS, block_of, report_parts, sparkline

Json = Any


def body_of(report: Report) -> Json:
    return json.loads(report.to_json())


def at(row: Json, path: str) -> Any:
    """The value at a path of keys, such as before.stable."""
    for key in path.split("."):
        row = None if row is None else row[key]
    return row


def check_text(text: str, value: float | None, digits: int = 4) -> None:
    """A text that people read says this number, as far as its digits go."""
    number = text.replace(",", "").lstrip("+")
    if value is None:
        assert number == ""
    elif number.endswith("%"):
        assert float(number[:-1]) / 100 == pytest.approx(value, abs=0.5 * 10 ** -(len(number.partition(".")[2]) + 1))
    elif isinstance(value, int):
        assert int(number) == value
    else:
        assert float(number) == pytest.approx(value, rel=10**-digits)


# Markdown


def markdown_table(text: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading, a row a dict."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


IN_MARKDOWN = {
    "rank": "rank",
    "full rank": "full_rank",
    "break-even": "break_even",
    "parameters": "parameters_before",
    "energy kept": "energy_kept",
    "relative error": "relative_error",
    "spectral error": "spectral_error",
    "nuclear rank": "before.nuclear",
    "entropy rank": "before.entropy",
    "stable rank": "before.stable",
    "nuclear rank, after": "after.nuclear",
    "entropy rank, after": "after.entropy",
    "stable rank, after": "after.stable",
    "largest angle, output": "overlap.output.largest",
    "largest angle, input": "overlap.input.largest",
    "error in the metric": "weighted_error",
    "predicted loss": "predicted_loss",
}


@pytest.mark.process
@pytest.mark.parametrize("which", ["after surgery", "before surgery", "a plan", "calibrated", "untrained"])
def test_markdown_holds_the_layers_of_the_json(which: str, report_of: Reports) -> None:
    report = report_of(which)
    layers = [row for row in body_of(report)["layers"] if row["full_rank"] is not None]
    shown = markdown_table(render(report, "markdown"), "Layers")
    assert [line["layer"] for line in shown] == [row["name"].replace("_", "\\_") for row in layers]
    for title, path in IN_MARKDOWN.items():
        values = [at(row, path) for row in layers]
        assert (title in shown[0]) == any(value is not None for value in values), title
        for line, value in zip(shown, values, strict=True):
            check_text(line.get(title, ""), value, digits=5)
    for line, row in zip(shown, layers, strict=True):
        check_text(line.get("after", ""), row["parameters_after"] if row["status"] == "factorised" else None)
        damage, high, _ = line.get("predicted damage", "").partition(" (high)")
        check_text(damage, row["damage"], digits=5)
        assert bool(high) == bool(row["damage_high"])
        balance = row["balance"] or 0
        assert bool(line.get("unbalanced")) == (balance >= 0.01)  # below, it is rounding
        assert not line.get("unbalanced") or float(line["unbalanced"][:-1]) == pytest.approx(100 * balance, abs=0.005)


@pytest.mark.process
def test_markdown_holds_totals_ladder_runs_and_speed(report_of: Reports) -> None:
    report = report_of("after surgery")
    body, text = body_of(report), render(report, "markdown")
    line = next(line for line in text.splitlines() if line.startswith("- parameters"))
    before, after, share = re.findall(r"[\d,.]+%?", line)
    check_text(before, body["totals"]["parameters_before"])
    check_text(after, body["totals"]["parameters_after"])
    check_text(share, body["totals"]["share"])
    staying = [row for row in body["layers"] if row["status"] == "dense"]
    assert Counter(line["reason"] for line in markdown_table(text, "Layers that stay dense")) == Counter(
        row["reason"].replace("_", "\\_") for row in staying
    )
    (run,) = body["training"]
    shown = markdown_table(text, "Training")
    assert [(line["step"], line["stage"]) for line in shown] == [
        (str(e["step"]), e["stage"]) for e in run["evaluations"]
    ]
    for line, evaluation in zip(shown, run["evaluations"], strict=True):
        for figure in ("loss", "perplexity", "top1", "top5"):
            check_text(line[figure], evaluation[figure], digits=5)
    shown = markdown_table(text, "Speed")
    assert len(shown) == len(body["bench"]["runs"]) >= 2
    for line, measured in zip(shown, body["bench"]["runs"], strict=True):
        assert line["work"] == measured["work"]
        for title, key in (("batch", "batch"), ("length", "length"), ("median ms", "median_ms"), ("ideal", "ideal")):
            check_text(line[title], measured[key], digits=5)
        low, high = line["95% interval"].split(" to ")
        check_text(low, measured["interval"][0], digits=5)
        check_text(high, measured["interval"][1], digits=5)
    report = report_of("before surgery")
    shown = markdown_table(render(report, "markdown"), "What each rank would keep")
    ladder = body_of(report)["ladder"]
    assert [line["`--rank`"] for line in shown] == [step["rank"] for step in ladder]
    for line, step in zip(shown, ladder, strict=True):
        for title in ("layers", "parameters", "share", "energy kept", "relative error"):
            check_text(line[title], step[title.replace(" ", "_")])
        check_text(line["predicted damage"], step["damage"], digits=5)


@pytest.mark.process
def test_a_hostile_name_is_text_in_markdown(report_of: Reports) -> None:
    text = render(report_of("hostile names"), "markdown")
    for line in text.splitlines():
        if "onerror" in line and not line.startswith("`"):  # the command is a literal
            assert not re.search(r"(?<!\\)[<>`*_&\[\]]", line.removeprefix("> ")), line
    assert len(markdown_table(text, "Layers")) == len(report_of("hostile names").factorised)
    assert HOSTILE.split("=")[0].replace("<", "\\<").replace(">", "\\>") in text


# CSV


@pytest.mark.process
@pytest.mark.parametrize("which", [which for which in WHICH if which not in ("training runs", "nothing but a name")])
def test_csv_holds_every_number_as_it_is(which: str, report_of: Reports) -> None:
    report = report_of(which)
    layers = body_of(report)["layers"]
    table = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert [row["name"] for row in table] == [layer["name"] for layer in layers]
    ours = {"name", "kind", "shape", "status", "form", "kept", "shared"}  # texts, and what is reckoned
    for row, layer in zip(table, layers, strict=True):
        found = {key: float(text) if text else None for key, text in row.items() if key not in ours}
        assert found == {key: at(layer, key) for key in found}
        assert row["shape"] == "x".join(map(str, layer["shape"]))
        assert row["form"] == (layer["form"] or "")
        assert row["status"].startswith(layer["status"])
        if layer["status"] == "factorised":
            assert float(row["kept"]) == layer["parameters_after"] / layer["parameters_before"]
    missing = {"reason", "ladder", "overlap", "spectrum_before", "spectrum_after", "before", "after"}
    missing |= {"flops_before", "flops_after", "damage_high"}
    assert {key.partition(".")[0] for key in table[0]} >= set(layers[0]) - missing


@pytest.mark.process
def test_csv_and_markdown_are_sorted_as_asked(report_of: Reports) -> None:
    report = report_of("untrained")
    errors = [layer["relative_error"] for layer in body_of(report)["layers"] if layer["relative_error"] is not None]
    table = csv.DictReader(io.StringIO(render(report, "csv", sort="error")))
    assert [float(row["relative_error"]) for row in table if row["relative_error"]] == sorted(errors, reverse=True)
    shown = markdown_table(render(report, "markdown", sort="name"), "Layers")
    assert [line["layer"] for line in shown] == sorted(line["layer"] for line in shown)


@pytest.mark.process
def test_a_formula_stays_text_in_a_csv(report_of: Reports) -> None:
    report = report_of("calibrated")
    names = ["=1+1", "@cmd", 'a "b", c', "plain"]
    rows = tuple(replace(row, name=name) for row, name in zip(report.rows[: len(names)], names, strict=True))
    table = csv.DictReader(io.StringIO(render(replace(report, rows=rows), "csv")))
    assert [row["name"] for row in table] == ["'=1+1", "'@cmd", 'a "b", c', "plain"]


# terminal


def shown_in(report: Report, width: int, **options: Any) -> list[str]:
    console = Console(width=width, highlight=False, record=True, file=io.StringIO())
    for part in report_parts(report, width, **options):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return console.export_text().splitlines()


def terminal_table(lines: Iterable[str], first: str) -> list[dict[str, str]]:
    """The table whose first heading is `first`, a row a dict. A cell ends where its heading does."""
    table = list(itertools.takewhile(str.strip, itertools.dropwhile(lambda line: not line.startswith(first), lines)))
    ends = [found.end() for found in re.finditer(r"\S+( \S+)*", table[0])]
    starts = [0, *ends[:-1]]
    starts[1] = max(len(line.split("  ")[0]) for line in table)  # the first column is wider than its heading
    ends[0] = starts[1]
    cells = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]


IN_THE_TERMINAL = {
    "rank": "rank",
    "full": "full_rank",
    "before": "parameters_before",
    "after": "parameters_after",
    "energy": "energy_kept",
    "error": "relative_error",
    "unbalanced": "balance",
}


@pytest.mark.process
@pytest.mark.parametrize("which", ["after surgery", "a plan", "calibrated", "untrained"])
def test_the_terminal_holds_the_layers_of_the_json(which: str, report_of: Reports) -> None:
    report = report_of(which)
    layers = [row for row in body_of(report)["layers"] if row["status"] == "factorised"]
    shown = terminal_table(shown_in(report, 160), "layer  ")
    assert [line["layer"] for line in shown] == [row["name"] for row in layers]
    for line, row in zip(shown, layers, strict=True):
        for title, path in IN_THE_TERMINAL.items():
            if line.get(title):
                check_text(line[title], at(row, path))
        assert {"rank", "full", "before", "after", "kept", "energy", "error"} <= {key for key in line if line[key]}
        check_text(line["kept"], row["parameters_after"] / row["parameters_before"])
        if "loss" in line:
            check_text(line["loss"], row["predicted_loss"], digits=1)
        before, _, after = line["entropy rank"].partition(" → ")
        check_text(before, row["before"]["entropy"], digits=2)
        assert not after or float(after) == pytest.approx(row["after"]["entropy"], abs=0.05)
    assert ("loss" in shown[0]) == (which == "calibrated")


@pytest.mark.process
def test_the_terminal_holds_the_ladder_and_half_of_a_dense_models_parameters(report_of: Reports) -> None:
    report = report_of("before surgery")
    body, lines = body_of(report), shown_in(report, 160)
    shown = terminal_table(lines, "--rank")
    assert [line["--rank"] for line in shown] == [step["rank"] for step in body["ladder"]]
    for line, step in zip(shown, body["ladder"], strict=True):
        for title, key in (
            ("layers", "layers"),
            ("parameters", "parameters"),
            ("share", "share"),
            ("error", "relative_error"),
        ):
            check_text(line[title], step[key])
    layers = [row for row in body["layers"] if row["full_rank"] is not None]
    shown = terminal_table([line for line in lines if not line.startswith("even:")], "layer ")
    for line, row in zip(shown, layers, strict=True):
        half = next(step for step in row["ladder"] if step["rank"] == "params:0.5")
        assert line["layer"] == row["name"]
        check_text(line["even"], row["break_even"])
        check_text(line["energy"], half["energy_kept"])
        check_text(line["error"], half["relative_error"])
        assert float(line["nuclear"]) == pytest.approx(row["before"]["nuclear"], abs=0.05)


@pytest.mark.process
@pytest.mark.parametrize("which", WHICH)
def test_nothing_is_cut_off_in_eighty_columns(which: str, report_of: Reports) -> None:
    report = report_of(which)
    lines = shown_in(report, 80)
    if which != "hostile names":
        assert max(map(len, lines), default=0) <= 80
    assert "…" not in "".join(lines)
    for run in report.training:
        assert any(line.startswith(run["name"]) for line in lines)


@pytest.mark.process
def test_hundreds_of_layers_are_a_line_a_block(report_of: Reports) -> None:
    report = report_of("hundreds of layers")
    layers = body_of(report)["layers"]
    able = [row for row in layers if row["full_rank"] is not None]
    lines = shown_in(report, 80)
    assert f"{len(able)} layers; --all shows each" in lines
    blocks = terminal_table(lines, "block ")
    assert len(blocks) == 70
    for i, line in enumerate(blocks):
        members = [row for row in able if row["name"].startswith(f"transformer.h.{i}.")]
        assert (line["block"], line["layers"]) == (f"transformer.h.{i}", str(len(members)))
        kept = sum(row["parameters_after"] for row in members) / sum(row["parameters_before"] for row in members)
        check_text(line["kept"], kept)
        low, _, high = line["energy"].partition(" to ")
        check_text(low, min(row["energy_kept"] for row in members))
        check_text(high or low, max(row["energy_kept"] for row in members))
    every = shown_in(report, 80, every=True)
    assert sum(line.startswith("transformer.h.") for line in every) >= len(able)
    by_error = terminal_table(shown_in(report, 160, sort="error"), "layer ")
    worst = max(able, key=lambda row: row["relative_error"])
    assert by_error[0]["layer"] == worst["name"]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_a_sparkline_keeps_the_order(values: list[float]) -> None:
    heights = [BARS.index(bar) for bar in sparkline(values)]
    assert len(heights) == len(values)
    for (a, x), (b, y) in itertools.combinations(zip(values, heights, strict=True), 2):
        assert (a - b) * (x - y) >= 0
    if max(values) > min(values):
        assert heights[values.index(max(values))] == len(BARS) - 1


@given(st.lists(st.floats(0, 1e6), min_size=9, max_size=400), st.booleans())
def test_a_sparkline_of_many_values_has_eight_bars_from_the_first_to_the_last(values: list[float], up: bool) -> None:
    heights = [BARS.index(bar) for bar in sparkline(sorted(values, reverse=not up))]
    assert len(heights) == 8
    assert heights == sorted(heights, reverse=not up)
    if max(values) > min(values):
        assert heights[-1 if up else 0] == len(BARS) - 1


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer.h.11.mlp.c_fc", "transformer.h.11"),
        ("model.layers.3.experts.7.up", "model.layers.3"),
        ("0.conv", "0"),
        ("layer1.0.conv1", "layer1.0"),
        ("conv1", "conv1"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_block_ends_with_the_first_number(name: str, block: str) -> None:
    assert block_of(name) == block


# figures


def lines_of(report: Report, name: str) -> list[tuple[str, list[Any], list[Any]]]:
    """(title of its axes or their label, x, y) of each line of a figure."""
    fill = next(fill for found, fill, _ in figures._figures(report) if found == name)
    figure = Figure()
    fill(figure)
    return [
        (axes.get_title() or axes.get_ylabel(), list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    ]


@pytest.mark.process
def test_figures_hold_the_numbers_of_the_json(report_of: Reports) -> None:
    report = report_of("after surgery")
    body = body_of(report)
    known = [row for row in body["layers"] if row["spectrum_before"]]
    dense = [(x, y) for title, x, y in lines_of(report, "spectra") if title == "dense"]
    assert len(dense) == len(known)
    for (x, y), row in zip(dense, known, strict=True):
        values = row["spectrum_before"]["value"]
        assert y == pytest.approx([value / values[0] for value in values][: len(y)])
        assert x[-1] <= 1
    stable = [y for title, _, y in lines_of(report, "effective_ranks") if title == "stable rank"]
    assert stable == [[row[when]["stable"] for row in known] for when in ("before", "after")]
    turned = [row for row in body["layers"] if row["overlap"]]
    drawn = lines_of(report, "directions")
    assert len(drawn) == 2 * len(turned)
    assert drawn[0][2] == [share["output"] for share in turned[0]["overlap"]["leading"]]
    (run,) = body["training"]
    lines = {title: (x, y) for title, x, y in lines_of(report, "training")}
    assert lines["Loss, evaluation"] == (
        [e["step"] for e in run["evaluations"]],
        [e["loss"] for e in run["evaluations"]],
    )
    courses = list(run["layers"].values())
    means = [sum(course["stable_rank"][i] for course in courses) / len(courses) for i in range(len(courses[0]["step"]))]
    assert lines["Stable rank, mean"] == (courses[0]["step"], pytest.approx(means))


@pytest.mark.process
def test_the_ladders_figure_holds_its_steps(report_of: Reports) -> None:
    report = report_of("before surgery")
    ladder = body_of(report)["ladder"]
    points = {
        (x, y)
        for title, xs, ys in lines_of(report, "ladder")
        if title == "energy kept"
        for x, y in zip(xs, ys, strict=True)
    }
    assert points == {(step["share"], step["energy_kept"]) for step in ladder}


@pytest.mark.process
def test_figures_are_drawn_for_what_is_known(report_of: Reports, tmp_path: Path) -> None:
    report = report_of("after surgery")
    files = figures.draw(report, tmp_path / "figures")
    assert {file.stem for file in files} == {"spectra", "effective_ranks", "energy_kept", "directions", "training"}
    assert {file.suffix for file in files} == {".svg", ".png"}
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert b'xlink:href="http' not in content
    text = (tmp_path / "figures" / "energy_kept.svg").read_text()
    assert "transformer.h.*.mlp.c_fc" in text  # text stays text
    again = figures.draw(report, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


@pytest.mark.process
def test_figures_are_not_overwritten_and_nothing_is_half_written(report_of: Reports, tmp_path: Path) -> None:
    (tmp_path / "ladder.png").write_text("mine")
    with pytest.raises(OutputError, match=r"ladder\.png: exists already"):
        figures.draw(report_of("before surgery"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ladder.png"]
    with pytest.raises(OutputError, match="nothing to draw"):
        figures.draw(report_of("nothing but a name"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# views


@pytest.mark.process
@pytest.mark.parametrize("which", WHICH)
def test_json_is_compact_and_comes_back(which: str, report_of: Reports) -> None:
    report = report_of(which)
    text = render(report, "json")
    assert Report.from_dict(json.loads(text)) == report
    if which == "hundreds of layers":
        assert text.count("\n") < 90 * len(report.rows)


def test_a_view_is_known_by_its_file() -> None:
    folder = Path(views.__file__).parent
    assert set(VIEWS) == {file.stem for file in folder.glob("*.py") if "\nENDINGS = " in file.read_text()}
    assert {"terminal", "markdown", "csv", "json", "html"} <= set(VIEWS)
    endings = [ending for ends in VIEWS.values() for ending in ends]
    assert len(endings) == len(set(endings))
    assert all(ending.startswith(".") for ending in endings)


@pytest.mark.process
def test_the_names_of_views_are_known_without_torch() -> None:
    code = "import sys; from lrsurgery.report.views import VIEWS; assert VIEWS; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
