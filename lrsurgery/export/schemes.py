"""Ways to store linear layers in few bits: what each is in transformers' config, and how a model in memory gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrsurgery.errors import SurgeryError
from lrsurgery.progress import Listener

EXTRA = "pip install 'lrsurgery[quantise]'"


@dataclass(frozen=True)
class Scheme:
    """One value of `--quantise`."""

    config: Callable[[torch.dtype, Sequence[str]], Any]  # dtype to compute in, modules to keep -> transformers' config
    convert_: Callable[[Any, Any, Listener], None]  # model, transformers' quantizer of this config, listener
    takes: Callable[[nn.Module], bool]  # of a linear layer: whether the tool can store it so
    note: str


def scheme_of(name: str) -> Scheme:
    """The scheme of a name. Raises SurgeryError that lists the known ones."""
    if name == "int4":
        raise SurgeryError("--quantise int4: torchao's 4-bit integers need a GPU; 4 bits that run anywhere are nf4")
    if name not in SCHEMES:
        raise SurgeryError(f"--quantise {name}: not a scheme; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _int8_config(dtype: torch.dtype, kept: Sequence[str]) -> Any:
    """torchao's int8 weights. Raises SurgeryError without torchao."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as e:
        raise SurgeryError(f"--quantise int8 needs torchao ({e}); run: {EXTRA}") from e
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(kept))


def _to_int8_(model: Any, quantizer: Any, listener: Listener) -> None:
    from torchao.quantization import quantize_

    quantizer._process_model_before_weight_loading(model)
    chosen = [
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if quantizer.param_needs_quantization(model, name)
    ]
    for done, name in enumerate(chosen, 1):
        quantize_(model.get_submodule(name), quantizer.quantization_config.get_apply_tensor_subclass())
        listener.progress(name, done, len(chosen))


def _nf4_config(dtype: torch.dtype, kept: Sequence[str]) -> Any:
    """bitsandbytes' 4-bit normal floats, one fp32 scale for 64. Raises SurgeryError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as e:  # its libraries for a GPU raise more than ImportError
        raise SurgeryError(f"--quantise nf4 needs bitsandbytes ({' '.join(str(e).split())}); run: {EXTRA}") from e
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=list(kept),
    )


def _to_nf4_(model: Any, quantizer: Any, listener: Listener) -> None:
    before = dict(model.named_modules())
    quantizer._process_model_before_weight_loading(model, device_map=None)  # puts empty layers in place
    chosen = [name for name, module in model.named_modules() if module is not before[name]]
    operation = quantizer.get_quantize_ops()
    for done, name in enumerate(chosen, 1):
        dense, narrow, key = before[name], model.get_submodule(name), f"{name}.weight"
        narrow.weight = operation.convert({key: dense.weight.detach()}, model=model)[key]
        narrow.bias = dense.bias
        narrow.train(dense.training)
        listener.progress(name, done, len(chosen))
    quantizer._process_model_after_weight_loading(model)


def _is_wide(linear: nn.Module) -> bool:
    """torchao takes no weight of one column, and a scale a row would save nothing there."""
    return getattr(linear, "in_features", 2) > 1


def _any(linear: nn.Module) -> bool:
    return True


SCHEMES = {
    "int8": Scheme(_int8_config, _to_int8_, _is_wide, "int8 with a scale a row (torchao)"),
    "nf4": Scheme(_nf4_config, _to_nf4_, _any, "4-bit normal floats with a scale for 64 of them (bitsandbytes' nf4)"),
}
