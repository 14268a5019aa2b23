"""Low rank beside what one would take instead: dense int8 (torchao), and narrower MLPs with as many parameters.

One language model, everything calibrated on the same samples. Width pruning keeps the neurons of each MLP whose outputs
are largest (mean square of a neuron's activation times the squared norm of its column in the next layer), as many in
every block as leave the blocks' layers as many parameters, and so operations, as the low-rank model has. "Refitted"
solves the next layer anew by least squares on the calibration inputs. All are measured in fp32 after
`prepare_for_inference_`, int8 as torchao runs it: prefill of 256 tokens and decode of 32, in turn. Perplexity is of
blocks that do not overlap, of the first text (that of calibration's kind) and of others.

    python examples/benchmarks/alternatives.py --text DIR [--model DIR] [--texts FILE ...] [--shares 0.8 0.6] [--save]
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import harness
import running
import torch
from low_rank_and_int8 import MODEL, as_linear_
from torch import Tensor, nn

import lrsurgery
from lrsurgery.progress import SILENT

MLPS = {"c_proj": ("c_fc",), "down_proj": ("gate_proj", "up_proj")}  # last layer of an MLP: those before it


def blocks_of(tokenizer: Any, file: Path, size: int, most: int) -> list[Tensor]:
    """At most so many blocks (1, size) of a file's tokens."""
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    return list(ids[: len(ids) // size * size].view(-1, 1, size)[:most])


@torch.inference_mode()
def perplexity(model: nn.Module, blocks: Sequence[Tensor]) -> float:
    losses = torch.stack([model(block, labels=block).loss for block in blocks])
    return float(losses.mean().exp())


def mlps_of(model: nn.Module) -> dict[str, tuple[list[str], str]]:
    """MLP -> (its first layers, its last layer), by name."""
    found = {}
    for name, module in model.named_modules():
        for last, first in MLPS.items():
            if name.endswith("mlp") and all(
                isinstance(getattr(module, each, None), nn.Linear) for each in (*first, last)
            ):
                found[name] = [f"{name}.{each}" for each in first], f"{name}.{last}"
    return found


def prune_(model: nn.Module, statistics: lrsurgery.Statistics, kept: int, *, refit: bool) -> None:
    """Keep so many parameters of the layers in blocks, by fewer neurons in each MLP."""
    mlps = mlps_of(model)
    layers = {name: model.get_submodule(name) for name in statistics.uses if is_layer(model, name)}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}  # type: ignore[union-attr,operator]
    of_mlps = sum(sizes[name] for first, last in mlps.values() for name in (*first, last))
    part = 1 - (sum(sizes.values()) - kept) / of_mlps
    for first, last in mlps.values():
        down: Any = model.get_submodule(last)
        moment = statistics.moments(last).inputs
        score = moment.diagonal() * down.weight.detach().square().sum(0)
        stay = score.topk(max(1, round(part * len(score)))).indices.sort().values
        weight = down.weight.detach()[:, stay]
        if refit:
            own = moment[stay][:, stay].double()
            own += 1e-3 * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
            seen = down.weight.detach().double() @ moment[:, stay].double()
            weight = torch.linalg.solve(own, seen.T).T.to(weight)
        set_(down, weight)
        for name in first:
            up: Any = model.get_submodule(name)
            set_(up, up.weight.detach()[stay])
            if up.bias is not None:
                up.bias = nn.Parameter(up.bias.detach()[stay])


def is_layer(model: nn.Module, name: str) -> bool:
    """Whether it is a linear layer in a block, which all of these ways are about."""
    return isinstance(model.get_submodule(name), nn.Linear) and "head" not in name


def set_(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight.contiguous())
    layer.out_features, layer.in_features = weight.shape


def in_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = copy.deepcopy(model)
    quantize_(made, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "head" not in name)
    return made


def megabytes(model: nn.Module) -> float:
    """Of all weights as they are kept, tied ones once."""
    kept = {id(tensor): tensor for tensor in model.parameters()}
    total = 0
    for tensor in kept.values():
        parts = [getattr(tensor, part) for part in getattr(tensor, "tensor_data_names", [])] or [tensor]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total / 1e6


def make(model: nn.Module, statistics: lrsurgery.Statistics, shares: Sequence[float]) -> dict[str, nn.Module]:
    """All models to compare, by name."""
    made = {"dense": model, "dense, int8": in_int8(model)}
    layers = [name for name in statistics.uses if is_layer(model, name)]
    whole = sum(model.get_submodule(name).weight.numel() for name in layers)  # type: ignore[union-attr,operator,misc]
    for share in shares:
        low = copy.deepcopy(model)
        lrsurgery.factorise_(low, budget=share, statistics=statistics, form="pivoted", listener=SILENT)
        kept = whole - (count(model) - count(low))
        made[f"{share} low rank"] = low
        for refit, name in ((False, "narrow"), (True, "narrow, refitted")):
            made[f"{share} {name}"] = copy.deepcopy(model)
            prune_(made[f"{share} {name}"], statistics, kept, refit=refit)
        made[f"{share} low rank, int8"] = in_int8(low)
    return made


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument(
        "--text", required=True, type=Path, help="folder that pydocs_text.py wrote, or another train.txt"
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=Path, nargs="+", default=[MODEL / "valid.txt"], help="to measure perplexity on")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=1000, help="at most, of each text")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().requires_grad_(False)
    as_linear_(model)
    samples = blocks_of(tokenizer, given.text / "train.txt", given.block_size, given.samples)
    batches = [{"input_ids": block} for block in samples]
    statistics = lrsurgery.collect_statistics(model, batches, listener=SILENT)
    made = make(model, statistics, given.shares)
    texts = {file.stem: blocks_of(tokenizer, file, given.block_size, given.blocks) for file in given.texts}
    quality = {name: {t: perplexity(each, blocks) for t, blocks in texts.items()} for name, each in made.items()}
    for name, each in made.items():
        if "int8" not in name:
            lrsurgery.prepare_for_inference_(each)
    x = samples[0][:, :256]
    prefill = {
        name: functools.partial(running.infer, functools.partial(m, logits_to_keep=1), x) for name, m in made.items()
    }
    decode = {name: functools.partial(running.generate, each, x) for name, each in made.items()}
    seconds = {"prefill": harness.in_turn(prefill, given.repeats), "decode": harness.in_turn(decode, given.repeats)}
    rows = [row(name, made, quality, seconds) for name in made]
    harness.finish("alternatives", rows, given)


def row(
    name: str,
    made: Mapping[str, nn.Module],
    quality: Mapping[str, Mapping[str, float]],
    seconds: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    found: dict[str, Any] = {"model": name, "parameters, M": count(made[name]) / 1e6, "MB": megabytes(made[name])}
    found |= {f"perplexity, {text}": value for text, value in quality[name].items()}
    for work, taken in seconds.items():
        found[f"{work}, ms"] = 1e3 * median(taken[name])
        found[f"{work}, of dense"] = harness.ratio(taken["dense"], taken[name])["median"]
    return found


if __name__ == "__main__":
    main()
