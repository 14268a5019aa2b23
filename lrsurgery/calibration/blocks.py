"""Finds a model's repeated blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def find_blocks(model: nn.Module) -> list[str]:
    """Name of a model's repeated blocks, in its modules' order; none inside another, each shared one once.

    They are the children of the outermost ModuleLists and Sequentials of which at least half are of one class that has
    several layers: `model.layers.0`, `bert.encoder.layer.0`, `layer1.0`. Experts in a block are part of it. Stages
    are split where it is sure that their parts follow each other: a Sequential of blocks (`blocks.1.0` of an
    EfficientNet), or a module with at least half its parameters in one (`stages.1.blocks.0` of a ConvNeXt, whose
    downsampling is then in no block). A stage that lists its blocks in a ModuleList, as a block does its experts, stays
    whole.

    Without any such container: single layers of containers, if they hold more than half of the parameters, else none.
    """
    found = list(_blocks(model, "", deep=True))
    if not found:
        found = list(_blocks(model, "", deep=False))
        if 2 * sum(_size(block) for _, block in found) <= _size(model):
            return []
    names: dict[nn.Module, str] = {}
    for name, block in found:
        names.setdefault(block, name)
    return list(names.values())


def _blocks(module: nn.Module, name: str, *, deep: bool) -> Iterator[tuple[str, nn.Module]]:
    repeats = _repeats(module, deep)
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not repeats or isinstance(child, nn.ModuleList):  # which nothing calls
            yield from _blocks(child, path, deep=deep)
        elif _size(child):
            yield from _parts(child, path)


def _parts(stage: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a stage, or itself if it is a block."""
    if isinstance(stage, nn.Sequential) and _repeats(stage, True):
        yield from _blocks(stage, name, deep=True)
        return
    for key, child in stage.named_children():
        if isinstance(child, nn.Sequential) and _repeats(child, True) and 2 * _size(child) >= _size(stage):
            yield from _blocks(child, f"{name}.{key}", deep=True)
            return
    yield name, stage


def _repeats(module: nn.Module, deep: bool) -> bool:
    """Whether a module is a container with half of its children or more of one class; `deep`: of several layers."""
    children = [child for child in module.children() if _size(child)]
    if not children or not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    kind, count = Counter(map(type, children)).most_common(1)[0]
    return 2 * count >= len(children) and (not deep or any(_layers(c) > 1 for c in children if type(c) is kind))


def _layers(module: nn.Module) -> int:
    """How many modules in this one have a weight of two dimensions or more, as norms have not."""
    return sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
