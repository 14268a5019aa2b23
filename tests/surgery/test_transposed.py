"""Transposed convolutions against the dense layer, autograd and torch's own count of operations."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lrsurgery
from lrsurgery.linalg.weighted import Metric, weighted_norm
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.plan import SurgeryOptions, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept

GEOMETRIES: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    *(
        (nn.ConvTranspose1d, (7,), {"kernel_size": k, "stride": s, "padding": p, "output_padding": o, "dilation": d})
        for k, s, p, o, d in itertools.product([1, 3, 4], [1, 3], [0, 1], [0, 1], [1, 2])
        if o < max(s, d) and not (k == 1 and s == 1 and p)
    ),
    *(
        (nn.ConvTranspose2d, (4, 5), {"kernel_size": k, "stride": s, "padding": p, "output_padding": o, "dilation": d})
        for k, s, p, o, d in itertools.product(
            [(3, 2), (1, 1)], [(1, 2), (3, 3)], [(0, 0), (1, 0)], [(0, 0), (0, 1)], [(1, 1), (2, 1)]
        )
    ),
]
IDS = [f"{c.__name__} {' '.join(map(str, o.values()))}" for c, _, o in GEOMETRIES]


def low(model: nn.Sequential, rank: Any, **options: Any) -> tuple[nn.Sequential, Any]:
    model = copy.deepcopy(model)
    lrsurgery.factorise_(model, rank=rank, allow_larger=True, **options)
    (layer,) = factorised_layers(model).values()
    return model, layer


@pytest.mark.parametrize(("conv", "size", "options"), GEOMETRIES, ids=IDS)
def test_at_full_rank_it_is_the_dense_layer_and_below_the_best(conv: Any, size: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(9, 6, **options)).double()
    dense, x = model[0], torch.randn(2, 9, *size, dtype=torch.float64)
    full, layer = low(model, 1.0)
    assert layer.kind == f"conv-transpose{len(size)}d-channel"
    torch.testing.assert_close(full(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.weight + 0, dense.weight, rtol=1e-10, atol=1e-10)
    for form in ("balanced", "pivoted"):
        found, layer = low(model, 3, form=form)
        assert layer.side == (None if form == "balanced" else "columns")
        product = copy.deepcopy(dense)
        product.weight.data = layer.weight.detach() + 0
        torch.testing.assert_close(found(x), product(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found(x[0]), product(x[0]), rtol=1e-10, atol=1e-10)
        left_out = torch.linalg.svdvals(dense.weight.detach().flatten(1))[3:].norm()
        torch.testing.assert_close((layer.weight - dense.weight).norm().detach(), left_out)
        lrsurgery.densify_(found)
        assert type(found[0]) is conv
        assert repr(found[0]) == repr(dense)
        torch.testing.assert_close(found(x), product(x), rtol=1e-10, atol=1e-10)


def test_an_output_size_goes_on_to_the_layer() -> None:
    dense = nn.ConvTranspose2d(9, 6, 3, stride=2)
    _, layer = low(nn.Sequential(dense), 1.0)
    x = torch.randn(1, 9, 4, 5)
    for size in ([9, 11], [10, 12]):
        torch.testing.assert_close(layer(x, output_size=size), dense(x, output_size=size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sized", [False, True], ids=["", "with an output size"])
@pytest.mark.parametrize(("conv", "size", "options"), GEOMETRIES[::3], ids=IDS[::3])
def test_moments(conv: Any, size: Any, options: dict[str, Any], sized: bool) -> None:
    """The inputs as they are; by the chain rule the gradients of v's outputs are those of the matrix, times U."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv(9, 6, **options)

        def forward(self, x: Tensor) -> Tensor:
            if not sized:
                return self.layer(x)  # type: ignore[no-any-return]
            least = self.layer(x).shape[2:]
            size = [n - o for n, o in zip(least, self.layer.output_padding, strict=True)]
            return self.layer(x, output_size=size)  # type: ignore[no-any-return]

    model = Model()
    x, alone = torch.randn(3, 9, *size), torch.randn(9, *size)
    statistics = lrsurgery.collect_statistics(
        model, [x] if sized else [x, alone], loss=lambda out, _: (out.square().sum() / 2, 1)
    )
    moments, use = statistics.moments("layer"), statistics.uses["layer"]
    every = [x] if sized else [x, alone[None]]
    times = 2 if sized else 1  # the model calls it twice
    flat = torch.cat([each.flatten(2).transpose(1, 2).flatten(0, 1) for each in every])
    assert use.positions == use.outputs == times * len(flat)
    torch.testing.assert_close(moments.inputs, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-4)
    _, layer = low(nn.Sequential(model.layer), 1.0)
    wanted = torch.zeros(layer.rank, layer.rank)
    for each in every:
        inner = layer.v(each).detach().requires_grad_()
        out = layer.u(inner)
        if sized:
            out = layer.u(inner, [n - o for n, o in zip(out.shape[2:], layer.output_padding, strict=True)])
        (g,) = torch.autograd.grad(out.square().sum() / 2, inner)
        g = g.flatten(2).transpose(1, 2).flatten(0, 1)
        wanted += g.T @ g
    assert moments.gradients is not None
    u = layer.factors.u.detach()
    torch.testing.assert_close(u.T @ moments.gradients @ u, wanted / len(every), rtol=1e-3, atol=1e-3)
    assert weighted_norm(layer.factors.v.detach(), Metric(moments.inputs)) > 0


def test_operations_are_those_that_torch_counts() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(24, 16, (4, 3), stride=(2, 1)))
    x = torch.randn(1, 24, 5, 6)

    def operations(layer: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        return int(counter.get_total_flops())

    for form in ("balanced", "pivoted"):
        (row,) = make_plan(model, SurgeryOptions(target=parse_rank(5), form=form)).replacements
        found, _ = low(model, 5, form=form)
        assert operations(model) == 30 * row.flops
        assert operations(found) == 30 * (row.factorised_flops or 0)
        assert row.factorised_parameters == sum(p.numel() for p in found.parameters())
        (reported,) = lrsurgery.rank_report(found).rows
        assert (reported.flops_after, reported.parameters_after) == (row.factorised_flops, row.factorised_parameters)


def test_groups_stay_dense() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(32, 32, 4, groups=2), nn.ConvTranspose2d(8, 8, 4, groups=8))
    model.append(nn.Linear(9, 9))
    found = make_plan(model, SurgeryOptions(target=parse_rank(2)))
    assert {row.name: row.reason for row in found.rows if isinstance(row, Kept)} == {
        "0": "grouped transposed convolution",
        "1": "depthwise transposed convolution",
    }


def test_a_codec_from_files(tmp_path: Path) -> None:
    """EnCodec: convolutions and transposed ones of one dimension, both with a weight norm."""
    import transformers as tf
    from support.checks import assert_close, load, run

    import lrsurgery.hf

    torch.manual_seed(0)
    config = tf.EncodecConfig(
        num_filters=8, hidden_size=32, upsampling_ratios=[4, 2], num_lstm_layers=1, codebook_size=16, codebook_dim=32
    )
    tf.EncodecModel(config).save_pretrained(tmp_path / "dense")
    x = torch.randn(1, 1, 640)

    def decoded(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.decoder(model.encoder(x))
        return found

    dense = load(tf.EncodecModel, tmp_path / "dense")
    run("factorise", tmp_path / "dense", "--rank", "1.0", "--allow-larger", "--output", tmp_path / "full")
    full = load(tf.EncodecModel, tmp_path / "full")
    kinds = {layer.kind for layer in factorised_layers(full).values()}
    assert kinds == {"conv1d-channel", "conv-transpose1d-channel", "recurrent"}
    assert_close(decoded(full), decoded(dense), 1e-4)
    report = run("factorise", tmp_path / "dense", "--rank", "0.5", "--output", tmp_path / "low")
    low = load(tf.EncodecModel, tmp_path / "low")
    assert report["totals"]["parameters_after"] == sum(p.numel() for p in low.parameters())
    assert report["totals"]["parameters_before"] == sum(p.numel() for p in dense.parameters())
    in_memory = load(tf.EncodecModel, tmp_path / "dense")
    lrsurgery.factorise_(in_memory, rank="0.5", form="pivoted")
    assert torch.equal(decoded(low), decoded(in_memory))
    run("export", tmp_path / "low", "--to", "dense", "--output", tmp_path / "back")
    back = load(tf.EncodecModel, tmp_path / "back")
    assert not factorised_layers(back)
    assert_close(decoded(back), decoded(low), 1e-4)
