"""What tests of whole commands share: running one, loading strictly, comparing models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from lrsurgery.cli.app import app
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.parameters.views import dense_layers


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def load(cls: Any, folder: Path) -> nn.Module:
    """Loads and insists on a clean load."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    return model.eval()  # type: ignore[no-any-return]


def assert_same_layers(factorised: nn.Module, dense: nn.Module) -> None:
    originals = dense_layers(dense)
    layers = factorised_layers(factorised)
    assert layers
    for name, layer in layers.items():
        weight: Any = originals[name].weight
        assert layer.weight.shape == weight.shape, name
        assert (layer.weight - weight).norm() <= 1e-5 * weight.norm(), name


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def outputs(model: nn.Module) -> torch.Tensor:
    """In fp32, of the same tokens or noise at each call, for the models of `tiny`."""
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(model, PreTrainedModel):
            found: Any = model(torch.arange(2, 34).reshape(2, 16))
            return found[0].float()  # type: ignore[no-any-return]
        return model(torch.randn(2, 3, 32, 32, dtype=next(model.parameters()).dtype)).float()  # type: ignore[no-any-return]


def multiplied_out(tensors: dict[str, torch.Tensor], name: str, rows: int, columns: int) -> Any:
    """The matrix (rows, columns) of a layer in a folder, by numpy and the words of the format."""
    u, v = (tensors[f"{name}.{part}.weight"].double().numpy() for part in "uv")
    if f"{name}.order" not in tensors:
        return u @ v
    order, product = tensors[f"{name}.order"].numpy(), np.empty((rows, columns))
    if len(u) < rows:  # pivots among the rows
        product[order] = np.concatenate([v, u @ v])
    else:
        product[:, order] = np.concatenate([u, u @ v], axis=1)
    return product
