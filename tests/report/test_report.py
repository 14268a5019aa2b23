"""Reports: numbers against LAPACK on the dense weight, and the way through JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from transformers import AutoModelForCausalLM

import lrsurgery
import lrsurgery.hf
from lrsurgery.errors import PlanError, SourceError
from lrsurgery.linalg.spectrum import entropy_rank, nuclear_rank, stable_rank
from lrsurgery.report.read import read_report
from lrsurgery.report.schema import Report
from lrsurgery.runtime import Compute


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("report")
    zoo.save_transformers("gpt2", root / "dense")
    lrsurgery.factorise_checkpoint(root / "dense", root / "half", rank="params:0.5")
    return root / "dense", root / "half"


def test_rows_hold_what_lapack_says(folders: tuple[Path, Path]) -> None:
    dense, half = (AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False) for folder in folders)
    weights: dict[str, Any] = dict(dense.named_modules())
    layers: dict[str, Any] = dict(half.named_modules())
    rows = Report.read(folders[1]).factorised
    assert len(rows) == 8
    for row in rows:
        weight, product = weights[row.name].weight.double(), layers[row.name].weight.double()
        values = torch.linalg.svdvals(weight)
        assert row.rank is not None
        assert row.energy_kept == pytest.approx(
            float(values[: row.rank].square().sum() / values.square().sum()), rel=1e-5
        )
        assert row.relative_error == pytest.approx(float((weight - product).norm() / weight.norm()), rel=1e-4)
        assert row.spectral_error == pytest.approx(float(values[row.rank] / values[0]), rel=1e-3)
        for found, spectrum in ((row.before, values), (row.after, torch.linalg.svdvals(product)[: row.rank])):
            assert found is not None
            assert found.nuclear == pytest.approx(nuclear_rank(spectrum), rel=1e-3)
            assert found.entropy == pytest.approx(entropy_rank(spectrum), rel=1e-3)
            assert found.stable == pytest.approx(stable_rank(spectrum), rel=1e-3)


def test_totals_count_the_model_and_the_files(folders: tuple[Path, Path]) -> None:
    report = Report.read(folders[1])
    dense, half = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert (report.parameters_before, report.parameters_after) == (dense.num_parameters(), half.num_parameters())
    assert report.bytes_before == dense.num_parameters() * 4
    orders = sum(buffer.numel() for name, buffer in half.named_buffers() if name.endswith(".order"))  # int32
    assert orders
    assert report.bytes_after == (half.num_parameters() + orders) * 4
    assert report.versions["torch"] == torch.__version__.split("+")[0]


def test_report_in_memory_agrees_with_the_one_on_disk(folders: tuple[Path, Path]) -> None:
    dense, half = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    written = {row.name: row for row in Report.read(folders[1]).factorised}
    found = lrsurgery.rank_report(half, against=dense)
    assert found.parameters_before == dense.num_parameters()
    assert {row.name for row in found.factorised} == set(written)
    for row in found.factorised:
        assert row.rank == written[row.name].rank
        assert row.relative_error == pytest.approx(written[row.name].relative_error, rel=1e-4)
        assert row.after is not None
        assert row.after.entropy == pytest.approx(written[row.name].after.entropy, rel=1e-3)  # type: ignore[union-attr]


def test_report_without_its_file_is_made_from_the_factors(folders: tuple[Path, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders[1]).save_pretrained(tmp_path)
    (tmp_path / "rank_report.json").unlink()
    found, written = read_report([str(tmp_path)], Compute(device=torch.device("cpu"))), Report.read(folders[1])
    assert {(r.name, r.rank) for r in found.factorised} == {(r.name, r.rank) for r in written.factorised}
    assert (found.parameters_before, found.parameters_after) == (written.parameters_before, written.parameters_after)


def test_json_comes_back_as_it_went(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = Report.read(folders[1])
    (tmp_path / "rank_report.json").write_text(report.to_json())
    assert Report.read(tmp_path) == report


def test_a_folder_without_a_report_says_what_writes_one(folders: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError, match=r"dense: no rank_report\.json in it; lrsurgery factorise"):
        Report.read(folders[0])


def test_comparison_with_another_model_names_the_layer(folders: tuple[Path, Path]) -> None:
    half = AutoModelForCausalLM.from_pretrained(folders[1])
    with pytest.raises(PlanError, match=r"transformer\.h\.0\.attn\.c_attn: the model to compare with"):
        lrsurgery.rank_report(half, against=torch.nn.Linear(3, 3))
