"""The examples as people run them: in a process of their own, with what they print read back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.warm import program

import lrsurgery

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(name: str, output: Path, *options: str) -> list[list[str]]:
    """The words of each line that an example prints, all of its output folder written."""
    done = program(sys.executable, EXAMPLES / f"{name}.py", "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def table(lines: list[list[str]], first: str, columns: int) -> dict[str, list[float]]:
    """The rows under the header that begins with `first`, up to an empty line, as numbers."""
    start = next(i for i, line in enumerate(lines) if line[:1] == [first]) + 1
    rows: dict[str, list[float]] = {}
    for line in lines[start:]:
        if not line:
            break
        rows[" ".join(line[:-columns])] = [float(word.replace(",", "")) for word in line[-columns:]]
    return rows


def test_shrink_language_model(tmp_path: Path) -> None:
    lines = printed("shrink_language_model", tmp_path / "out", "--rank", "params:0.75", "params:0.5")
    rows = table(lines, "rank", 3)
    assert list(rows) == ["dense", "params:0.75", "params:0.5"]
    parameters, size, perplexity = (list(column) for column in zip(*rows.values(), strict=True))
    assert parameters == sorted(parameters, reverse=True)
    assert size == sorted(size, reverse=True)
    # that of the dense model over the whole of valid.txt is 36.0
    assert 20 < perplexity[0] < perplexity[1] < perplexity[2] < 100
    assert lines[-1][:2] == ["params:0.5", "writes:"]
    assert len(lines[-1]) > 8
    assert lrsurgery.Report.read(tmp_path / "out" / "rank-params-0.5").parameters_after == parameters[2]


def test_heal_timm_cnn(tmp_path: Path) -> None:
    rows = table(printed("heal_timm_cnn", tmp_path / "out", "--images", "35"), "parameters", 3)
    assert list(rows) == ["dense", "factorised", "healed"]
    dense, factorised, healed = rows.values()
    assert dense[0] * 0.2 < factorised[0] == healed[0] < dense[0] * 0.3
    assert dense[2] > 0.6
    # one letter in ten is guessed right
    assert factorised[2] < dense[2] - 0.3
    assert healed[2] > factorised[2] + 0.2


def test_train_low_rank(tmp_path: Path) -> None:
    rows = table(printed("train_low_rank", tmp_path / "out"), "decay", 4)
    assert list(rows) == ["l2", "frobenius"]
    for loss, nuclear, entropy, stable in rows.values():
        assert 3 < loss < 7.4  # a guess among the 2048 tokens costs 7.62
        assert 1 <= stable <= nuclear <= entropy <= 48  # half of the width
    # decay of the factors is decay of the product's nuclear norm, and so lowers each rank further
    assert all(of_l2 < other for of_l2, other in zip(rows["l2"][1:], rows["frobenius"][1:], strict=True))
    assert (tmp_path / "out" / "l2" / "metrics.jsonl").is_file()


def test_own_training_loop(tmp_path: Path) -> None:
    lines = printed("own_training_loop", tmp_path / "out")
    layers = table(lines, "layer", 4)
    assert len(layers) == 12
    for rank, nuclear, entropy, stable in layers.values():
        assert 1 <= stable <= nuclear <= entropy <= rank == 24
    rows = table(lines, "parameters", 2)
    assert rows["low rank"][0] < 0.5 * rows["densified"][0]
    assert rows["low rank"][1] > 0.5  # one in eight is guessed right
    assert abs(rows["low rank"][1] - rows["densified"][1]) < 0.01
    assert (tmp_path / "out" / "dense.safetensors").is_file()
