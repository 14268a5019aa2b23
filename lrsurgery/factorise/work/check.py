"""The check of --check: a written folder computes what the plan's own factors compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.load import load_source
from lrsurgery.checkpoints.loading.modules import load_timm
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.upstream.samples import outputs_of, sample_inputs
from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.tables.ties import leaders_of_tied


def check_outputs(
    source: Source,
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Run a written folder and its dense source with the plan's own factors on the same random input; describe it.

    `factors` maps layers to (u.weight, v.weight); `dtype` is the one that weights were converted to, if any.

    Raises SurgeryError if the outputs differ by more than rounding.
    """
    found, wanted = (_load_wide(each, trust_remote_code) for each in (resolve(str(folder)), source))
    modules = dense_layers(wanted)
    every = factorised_layers(found)
    tied = leaders_of_tied(every)
    layers = {name: layer for name, layer in every.items() if tied.get(name, name) in factors}
    biases = {name: getattr(modules[name], "bias", None) for name in layers}
    specs = specs_of(found)
    swap_(wanted, {name: specs[name]._replace(side=None, pivots=None) for name in layers})
    for name, layer in factorised_layers(wanted).items():
        u, v = factors[tied.get(name, name)]
        layer.u.weight, layer.v.weight = nn.Parameter(u.float()), nn.Parameter(v.float())
        if not layer.layout.lookup:
            layer.u.bias = biases[name]  # type: ignore[assignment]
    reason = ""
    for inputs in sample_inputs(wanted):
        try:
            expected = outputs_of(wanted, inputs)
        except Exception as e:  # of the model's own code, for inputs that it does not take
            reason = " ".join(str(e).split())[:200]
            continue
        pairs = zip(outputs_of(found, inputs), expected, strict=True)
        worst = max((_difference(a, b) for a, b in pairs), default=0.0)
        limit = 1e-3 if dtype is None else 50 * torch.finfo(dtype).eps
        if worst > limit:
            raise SurgeryError(
                f"{source.reference}: the output computes something else than the plan's own factors: they differ by"
                f" {worst:.2g} of the largest value, where rounding explains {limit:.2g}; please report this model"
            )
        return f"--check: the output and the plan's own factors differ by {worst:.1g} of the largest value"
    return f"--check: not done, since random inputs do not suit this model ({reason})"


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite if other entries are finite."""
    finite = wanted.isfinite()
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    wanted = wanted[finite]
    return float((found[finite] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _load_wide(source: Source, trust_remote_code: bool) -> nn.Module:
    """The model in fp32, in which rounding is small."""
    if source.library == "timm":
        return load_timm(source, torch.float32)
    return load_source(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
