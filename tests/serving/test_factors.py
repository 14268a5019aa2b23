"""A layer as a server runs it, from the tensors of a folder: against the factorised layer in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny

import lrsurgery
from lrsurgery.errors import SourceError
from lrsurgery.serving.factors import Part, rows_of
from lrsurgery.surgery.layers import FactorisedLayer


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp(request.param)
    save = {"gpt2": tiny.save_gpt2, "bert": tiny.save_biased_bert}[request.param]
    lrsurgery.factorise_checkpoint(save(root / "dense"), root / "pivoted", rank=0.6, loss_check=False)
    lrsurgery.export_form(root / "pivoted", root / "balanced", form="balanced")
    return root


def parts_of(folder: Path) -> list[tuple[Part, FactorisedLayer]]:
    """Each layer of a folder, loaded as a server hands over the tensors: those of Conv1D turned."""
    tensors = load_file(folder / "model.safetensors")
    found = []
    for name, layer in lrsurgery.factorised_layers(lrsurgery.load_model(folder)).items():
        part = Part(name, *layer.matrix_shape, layer.spec)
        for key, tensor in tensors.items():
            own = key.removeprefix(f"{name}.")
            if own != key:
                turned = layer.kind == "conv1d" and key.endswith(".weight")
                part.load(own, tensor.t() if turned else tensor)
        part.check()
        found.append((part, layer))
    assert found
    return found


@pytest.mark.parametrize("form", ["pivoted", "balanced"])
def test_it_computes_what_the_layer_does(folder: Path, form: str) -> None:
    for part, layer in parts_of(folder / form):
        torch.nn.init.normal_(layer.u.bias)  # type: ignore[arg-type]
        part.tensors["u.bias"] = layer.u.bias.detach()  # type: ignore[union-attr]
        x, bias = torch.randn(5, part.columns), part.dense_bias()
        assert bias is not None
        part.slice_(slice(0, part.rows), slice(0, part.columns))
        with torch.no_grad():
            torch.testing.assert_close(part.apply(x) + bias, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["pivoted", "balanced"])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_the_shares_of_two_processes_make_the_whole(folder: Path, form: str, by: str) -> None:
    whole, shares = parts_of(folder / form), [parts_of(folder / form) for _ in range(2)]
    for (part, layer), *halves in zip(whole, *shares, strict=True):
        x, outputs = torch.randn(5, part.columns), []
        for rank, (half, _) in enumerate(halves):
            size = getattr(part, by) // 2
            mine, all_rows, all_columns = (
                slice(size * rank, size * (rank + 1)),
                slice(0, part.rows),
                slice(0, part.columns),
            )
            half.slice_(*((mine, all_columns) if by == "rows" else (all_rows, mine)))
            outputs.append(half.apply(x if by == "rows" else x[:, mine]))
        made = torch.cat(outputs, -1) if by == "rows" else outputs[0] + outputs[1]
        matrix: Any = layer.matrix.detach()
        torch.testing.assert_close(made, x @ matrix.T, rtol=1e-4, atol=1e-5)


def test_each_process_has_its_share_of_each_block(folder: Path) -> None:
    """Of queries, keys and values in one matrix, and of the bias beside them."""
    for part, layer in parts_of(folder / "pivoted"):
        rows = part.rows // 4
        blocks = [2 * rows, rows, part.rows - 3 * rows]
        dense = layer.matrix.detach()
        for rank in range(2):
            wanted = torch.cat([block.chunk(2)[rank] for block in dense.split(blocks)])
            mine, _ = next(pair for pair in parts_of(folder / "pivoted") if pair[0].name == part.name)
            mine.slice_(rows_of(blocks, rank, 2), slice(0, part.columns))
            x = torch.randn(5, part.columns)
            torch.testing.assert_close(mine.apply(x), x @ wanted.T, rtol=1e-4, atol=1e-5)


def test_what_is_missing_or_of_another_shape_is_named(folder: Path) -> None:
    part, _ = parts_of(folder / "pivoted")[0]
    with pytest.raises(SourceError, match=r"\.v\.weight has shape \(3, 3\)"):
        part.load("v.weight", torch.zeros(3, 3))
    del part.tensors["order"]
    with pytest.raises(SourceError, match=r"\.order is missing"):
        part.check()
