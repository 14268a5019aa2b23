"""Detection of the repeated blocks of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def find_blocks(model: nn.Module) -> list[str]:
    """Find the names of a model's repeated blocks, in module order; blocks do not nest, and shared ones appear once.

    Blocks are the children of the outermost ModuleLists and Sequentials of which at least half are of one class with
    several layers: `model.layers.0`, `bert.encoder.layer.0`, `layer1.0`. Experts belong to their block. Stages are
    split only if their parts are certain to run in sequence: a Sequential of blocks (`blocks.1.0` of an EfficientNet),
    or a module with at least half of its parameters in one (`stages.1.blocks.0` of a ConvNeXt, whose downsampling is
    then in no block). A stage with a ModuleList of blocks stays whole, since it looks like a block with experts.

    Without such containers the blocks are single layers in containers, if they hold more than half of the parameters.
    """
    blocks = list(_blocks(model, "", deep=True))
    if not blocks:
        blocks = list(_blocks(model, "", deep=False))
        if 2 * sum(_size(block) for _, block in blocks) <= _size(model):
            return []
    names: dict[nn.Module, str] = {}
    for name, block in blocks:
        names.setdefault(block, name)
    return list(names.values())


def _blocks(module: nn.Module, name: str, *, deep: bool) -> Iterator[tuple[str, nn.Module]]:
    repeats = _repeats(module, deep)
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not repeats or isinstance(child, nn.ModuleList):  # a ModuleList is never called, so it is no block
            yield from _blocks(child, path, deep=deep)
        elif _size(child):
            yield from _parts(child, path)


def _parts(stage: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a stage, or the stage itself if it is one block."""
    if isinstance(stage, nn.Sequential) and _repeats(stage, True):
        yield from _blocks(stage, name, deep=True)
        return
    for key, child in stage.named_children():
        if isinstance(child, nn.Sequential) and _repeats(child, True) and 2 * _size(child) >= _size(stage):
            yield from _blocks(child, f"{name}.{key}", deep=True)
            return
    yield name, stage


def _repeats(module: nn.Module, deep: bool) -> bool:
    """Whether at least half of a container's children are of one class, with several layers each if `deep`."""
    children = [child for child in module.children() if _size(child)]
    if not children or not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    cls, count = Counter(map(type, children)).most_common(1)[0]
    return 2 * count >= len(children) and (not deep or any(_count_layers(c) > 1 for c in children if type(c) is cls))


def _count_layers(module: nn.Module) -> int:
    """Number of modules with a parameter of at least two axes, which excludes norms."""
    return sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
