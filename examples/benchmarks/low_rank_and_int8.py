"""Low rank, few bits and both: what each costs in quality at the bytes that it takes.

The embedded model at several budgets, calibrated on the text of `pydocs_text.py`, in fp32, with int8 weights (torchao,
a scale a row) and with 4-bit ones (bitsandbytes' nf4) in all its layers but table and head; dense int8 and nf4 beside
it. The dense layers of GPT-2 become equal linear layers of torch first, because torchao quantises no others. Bytes are
those of the layers that can shrink.

    python examples/benchmarks/low_rank_and_int8.py --text DIR [--save]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lrsurgery
from lrsurgery.checkpoints.load import load_model
from lrsurgery.export.quantised import quantise_
from lrsurgery.export.schemes import SCHEMES
from lrsurgery.surgery.apply import factorised_layers

MODEL = Path(__file__).parents[1] / "pydocs-gpt2"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.25)


def as_linear_(model: nn.Module) -> None:
    """Put an equal linear layer in the place of every Conv1D."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)


def bytes_of(model: nn.Module) -> int:
    """Bytes of the blocks' weights, scales and orders among them."""
    total = 0
    for name, tensor in model.state_dict().items():
        if ".h." in f".{name}" and "ln_" not in name and not name.endswith("bias"):
            parts = [getattr(tensor, part) for part in getattr(tensor, "tensor_data_names", [])] or [tensor]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def quantised_dense(stored: str) -> nn.Module:
    """The dense model in few bits, by each tool's own call."""
    model = load_model(MODEL)
    if stored == "nf4":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config).eval()  # type: ignore[no-any-return]
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    as_linear_(model)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and ".h." in name)
    return model


def perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Of non-overlapping windows of 256 tokens."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    loss = 0.0
    with torch.inference_mode():
        for part in torch.split(windows, 8):  # type: ignore[no-untyped-call]
            loss += float(model(part, labels=part).loss) * len(part)
    return float(torch.tensor(loss / len(windows)).exp())


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--text", required=True, type=Path, help="folder that pydocs_text.py wrote")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer, text = AutoTokenizer.from_pretrained(MODEL), (MODEL / "valid.txt").read_text()
    dense = load_model(MODEL)
    size = bytes_of(dense)
    rows: list[dict[str, Any]] = []

    def row(budget: float | str, model: nn.Module, stored: str) -> None:
        figures = {"of dense fp32": bytes_of(model) / size, "perplexity": perplexity(model, tokenizer, text)}
        rows.append({"layers": budget, "stored": stored, **figures})

    row("dense", dense, "fp32")
    for stored in SCHEMES:
        row("dense", quantised_dense(stored), stored)
    with tempfile.TemporaryDirectory() as folder:
        for budget in BUDGETS:
            output = Path(folder) / str(budget)
            calibration = lrsurgery.Calibration(data=str(given.text / "train.txt"))
            lrsurgery.factorise_checkpoint(MODEL, output, budget=str(budget), calibration=calibration)
            model = load_model(output)
            assert factorised_layers(model)
            row(budget, model, "fp32")
            for stored in SCHEMES:
                model = load_model(output)
                as_linear_(model)  # those that stayed dense
                quantise_(model, stored)
                row(budget, model, stored)
    harness.finish("low_rank_and_int8", rows, given)


if __name__ == "__main__":
    main()
