"""Models whose blocks stay on disk until they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook


@contextmanager
def hold_in_memory(block: nn.Module) -> Iterator[None]:
    """Hold the offloaded weights of a block in memory within this context; other models are unaffected.

    A layer that replaces an offloaded one stays in memory afterwards.
    """
    loaded = []
    try:
        for module, hook in _offload_hooks(block):
            hook.pre_forward(module)
            hook.offload = False  # otherwise each call would load and drop the weights
            loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def _offload_hooks(block: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    hooked = [(module, module._hf_hook) for module in block.modules() if hasattr(module, "_hf_hook")]
    if not hooked:
        return []
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    single: list[tuple[nn.Module, AlignDevicesHook]] = []
    for module, hook in hooked:
        single += [(module, each) for each in (hook.hooks if isinstance(hook, SequentialHook) else [hook])]
    return [(module, hook) for module, hook in single if isinstance(hook, AlignDevicesHook) and hook.offload]


def load_offloaded(
    load: Callable[..., nn.Module], skeleton: nn.Module, blocks: Sequence[str], folder: Path, device: str = "cpu"
) -> nn.Module:
    """Load a model by `load(device_map=..., offload_folder=...)` with `blocks` on disk and the rest on `device`.

    `load` passes its arguments to transformers' `from_pretrained`; `skeleton` is the same model on the meta device.
    Safetensors files are read in place. Pickles, and tensors that transformers converts on loading (the experts of most
    mixtures), are first written to `folder`, which must then exist as long as the model.
    """
    places: dict[str, str] = {}

    def place(module: nn.Module, name: str) -> None:
        start = f"{name}." if name else ""
        if name in blocks:
            places[name] = "disk"
        elif start and not any(block.startswith(start) for block in blocks):
            places[name] = device
        else:
            for key in {**module._parameters, **module._buffers}:
                places[f"{start}{key}"] = device
            for key, child in module.named_children():
                place(child, f"{start}{key}")

    place(skeleton, "")
    return load(device_map=places, offload_folder=folder)
