"""Models of one's own: a file that registers them with timm, through the command line and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import tiny, warm

import lrsurgery
from lrsurgery.errors import SourceError
from lrsurgery.runtime import import_file

FILE = Path(__file__).parents[2] / "examples" / "wide_resnet.py"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    import_file(FILE)


def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return warm.program(*tiny.PROGRAM, *arguments)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    # Zagoruyko & Komodakis (2016), table 4 and 5: 36.5 M, 2.8 M (with 100 classes), 0.7 M
    [("wide_resnet28_10", 100, 36.5e6), ("wide_resnet16_4", 100, 2.8e6), ("wide_resnet16_2", 10, 0.7e6)],
)
def test_the_networks_are_of_the_papers_size(name: str, classes: int, parameters: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, classes)


@pytest.mark.process
def test_a_model_of_ones_own_is_factorised_by_the_program(tmp_path: Path) -> None:
    made = warm.program(
        sys.executable, FILE, "--name", "wide_resnet16_2", "--classes", "7", "--output", tmp_path / "wrn"
    )
    assert made.returncode == 0, made.stderr
    command = ("factorise", tmp_path / "wrn", "--from-scratch", "--rank", "0.25")
    done = program("--import", FILE, *command, "--output", tmp_path / "low", "--quiet")
    assert done.returncode == 0, done.stderr
    model = lrsurgery.load_model(tmp_path / "low")
    report = lrsurgery.rank_report(model)
    assert [row.name for row in report.dense] == ["fc"]
    assert len(report.factorised) == 16
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    timed = program("--import", FILE, "bench", tmp_path / "low", "--batch", 1, "--seconds", 0.1, "--json")
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout)["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    without = program(*command, "--output", tmp_path / "other")
    assert without.returncode == 2
    assert without.stderr.count("\n") == 1
    assert "wide_resnet16_2" in without.stderr


def test_a_file_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.py: no such Python file"):
        import_file(tmp_path / "none.py")
    (tmp_path / "bad_model.py").write_text("1 / 0\n")
    with pytest.raises(SourceError, match=r"bad_model\.py: ZeroDivisionError: division by zero"):
        import_file(tmp_path / "bad_model.py")
    assert "bad_model" not in sys.modules
