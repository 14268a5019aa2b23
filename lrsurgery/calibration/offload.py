"""Models whose blocks stay on disk until they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook


@contextmanager
def in_memory(block: nn.Module) -> Iterator[None]:
    """Hold the weights that accelerate keeps on disk for a block in memory, from the first line to the last.

    Nothing happens to other models. A layer put in place of one from disk stays in memory afterwards.
    """
    loaded = []
    try:
        for module, hook in _offloading(block):
            hook.pre_forward(module)
            hook.offload = False  # or each call would load and drop them
            loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def _offloading(block: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
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
    """What `load(device_map=..., offload_folder=...)` gives with the weights of `blocks` on disk, others on `device`.

    `load` ends in transformers' `from_pretrained`; `skeleton` is the same model on the meta device. Safetensors are
    read where they lie, in the dtype asked for. Only pickles, and tensors that transformers converts as it loads (the
    experts of most mixtures), are written to `folder` first, which then must stay as long as the model.
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
