"""What is drawn from a report holds its numbers: Markdown, terminal tables, figures."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lrsurgery.errors import OutputError
from lrsurgery.linalg.spectrum import EffectiveRanks, Points
from lrsurgery.report.schema import Report, Row, Rung
from lrsurgery.report.views.figures import draw
from lrsurgery.report.views.markdown import markdown
from lrsurgery.report.views.terminal import BARS, block_of, report_parts, sorted_rows, sparkline

HOSTILE = "block.0.<b>|`x`*_[y](z)\\"


def rows(count: int) -> list[Row]:
    """Layers of a model of blocks of 8, each with a spectrum of its own."""
    made = []
    for i in range(count):
        values = torch.linspace(4, 0.1, 32).double() ** (1 + i % 5)
        rank, error = 8 + i % 3, 0.01 * (1 + i * 7 % 40)
        made.append(
            Row(
                f"model.layers.{i // 8}.mlp.proj_{i % 8}", "linear", (64, 32), "factorised", None, 32, rank,
                64 * 32, rank * 96, 1 - error**2, error, error / 2, EffectiveRanks.of(values),
                EffectiveRanks.of(values[:rank]), 2 * 64 * 32, 2 * rank * 96, Points.of(values),
                Points.of(values[:rank]),
            )
        )  # fmt: skip
    return made


def report(count: int, **more: Any) -> Report:
    layers = rows(count)
    staying = Row(HOSTILE, "linear", (5, 5), "dense", "excluded", None, None, 30, 30)
    before = sum(row.parameters_before for row in layers) + 30
    after = sum(row.parameters_after or 0 for row in layers) + 30
    return Report((*layers, staying), before, after, 4 * before, 4 * after, name="a model", **more)


def run_of(name: str, losses: list[float]) -> dict[str, Any]:
    settings = {"decay": "frobenius", "decay_strength": 0.01, "lr": 5e-4, "steps": 30}
    steps = [10 * i for i in range(len(losses))]
    course: dict[str, Any] = {"step": steps}
    for i, measure in enumerate(("nuclear_rank", "entropy_rank", "stable_rank", "frobenius_norm", "spectral_norm")):
        course[measure] = [i + loss for loss in losses]
    evaluations = [{"step": s, "stage": "factorised", "loss": x} for s, x in zip(steps, losses, strict=True)]
    return {
        "name": name, "settings": settings, "stages": {}, "evaluations": evaluations,
        "losses": [{"step": 5, "loss": 3.25, "lr": 1e-4}], "layers": {"a.0": course, "a.1": course},
    }  # fmt: skip


# Markdown


def cells(text: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading, a row a dict."""
    lines = text.partition(f"## {heading}\n")[2].strip().splitlines()
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    headers = [cell.strip() for cell in table[0]]
    body = []
    for line in table[2:]:
        if len(line) != len(headers):
            break
        body.append(dict(zip(headers, (cell.strip() for cell in line), strict=True)))
    return body


def test_markdown_holds_the_numbers_of_the_json() -> None:
    found = report(20, ladder=(Rung("0.5", 20, 1234, 0.875, 0.125, 3.5),), training=(run_of("a", [3.5, 3.25]),))
    text, body = markdown(found), found.to_dict()
    assert f"parameters: {found.parameters_before:,} → {found.parameters_after:,}" in text
    shown = cells(text, "Layers")
    assert len(shown) == 20
    for line, row in zip(shown, body["layers"][:-1], strict=True):  # the last one stays dense
        assert line["layer"] == row["name"].replace("_", "\\_")
        assert (line["rank"], line["break-even"]) == (str(row["rank"]), str(row["break_even"]))
        assert line["after"] == f"{row['parameters_after']:,}"
        assert line["relative error"] == f"{row['relative_error']:.2%}"
        assert float(line["entropy rank"]) == pytest.approx(row["before"]["entropy"], rel=1e-5)
        assert float(line["stable rank, after"]) == pytest.approx(row["after"]["stable"], rel=1e-5)
        assert ("(high)" in line["predicted damage"]) == row["damage_high"]
    assert any("(high)" in line["predicted damage"] for line in shown)
    assert cells(text, "What each rank would keep")[0]["energy kept"] == "87.50%"
    assert [line["loss"] for line in cells(text, "Training")] == ["3.5", "3.25"]


def test_a_hostile_name_is_text_in_markdown() -> None:
    line = next(line for line in markdown(report(1)).splitlines() if "block.0" in line)
    assert line.startswith(r"| block.0.\<b\>\|\`x\`\*\_\[y\](z)\\ |")


# terminal


def shown(found: Report, width: int, **options: Any) -> list[str]:
    console = Console(width=width, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report_parts(found, width, **options):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return console.export_text().splitlines()


@pytest.mark.parametrize("count", [4, 70, 1000])
def test_nothing_is_cut_off_in_eighty_columns(count: int) -> None:
    found = report(count, training=(run_of("healed-frobenius", [3.5, 3.25]),), about="plan")
    lines = shown(found, 80)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any(line.startswith("healed-frobenius") for line in lines)
    if count == 1000:
        assert len(lines) < 160  # a line a block
        assert "1000 layers; --all shows each" in lines
        assert sum(line.startswith("model.layers.7 ") for line in lines) == 1
        assert len(shown(found, 80, every=True)) > 1000
    else:
        assert sum(line.startswith("model.layers.") for line in lines) == count


def test_rows_are_sorted_as_asked() -> None:
    made = rows(50)
    errors = [row.relative_error for row in sorted_rows(made, "error")]
    assert errors == sorted((row.relative_error for row in made), reverse=True)  # type: ignore[type-var]
    assert [row.name for row in sorted_rows(made, "name")] == sorted(row.name for row in made)
    assert sorted_rows(made, "model") == made
    worst = max(made, key=lambda row: row.relative_error or 0)
    lines = shown(report(50), 80, sort="error")
    assert lines[1].startswith(worst.name)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_a_sparkline_keeps_the_order(values: list[float]) -> None:
    drawn = sparkline(values)
    count = min(8, len(values))
    picked = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    heights = [BARS.index(bar) for bar in drawn]
    assert len(heights) == count
    pairs = list(zip(picked, heights, strict=True))
    for (a, x), (b, y) in itertools.pairwise(pairs):
        assert (a - b) * (x - y) >= 0
    if max(picked) > min(picked):
        assert heights[picked.index(max(picked))] == len(BARS) - 1


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


def test_figures_are_drawn_for_what_is_known(tmp_path: Path) -> None:
    found = report(20, ladder=(Rung("0.5", 20, 1234, 0.875, 0.125, 3.5),), training=(run_of("a", [3.5, 3.25]),))
    files = draw(found, tmp_path / "figures")
    assert {file.stem for file in files} == {"spectra", "effective_ranks", "ladder", "energy_kept", "training"}
    assert {file.suffix for file in files} == {".svg", ".png"}
    assert sorted(files) == sorted((tmp_path / "figures").iterdir())
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert b'xlink:href="http' not in content
    text = (tmp_path / "figures" / "energy_kept.svg").read_text()
    assert "model.layers.*.mlp.proj_3" in text  # text stays text
    again = draw(found, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_figures_are_not_overwritten_and_nothing_is_half_written(tmp_path: Path) -> None:
    (tmp_path / "ladder.png").write_text("mine")
    found = report(4, ladder=(Rung("0.5", 4, 1234, 0.875, 0.125, 3.5),))
    with pytest.raises(OutputError, match=r"ladder\.png: exists already"):
        draw(found, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ladder.png"]
    with pytest.raises(OutputError, match="nothing to draw"):
        draw(Report((), 0, None, about="runs", name="empty"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_json_of_a_thousand_layers_is_compact_and_comes_back() -> None:
    found = report(1000, ladder=(Rung("0.5", 4, 1234, 0.875, 0.125, 3.5),))
    text = found.to_json()
    assert text.count("\n") < 90 * 1000
    assert Report.from_dict(json.loads(text)) == found
