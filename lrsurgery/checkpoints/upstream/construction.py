"""Bounds on what a config makes torch build: what no file backs is refused before it takes memory or hours.

A config is a few bytes and may ask for 10^9 classes or 10^8 blocks. Small numbers are taken as they are; only above
those are the headers of the weight files read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import psutil
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lrsurgery.errors import SourceError
from lrsurgery.files.json import Json
from lrsurgery.modules import Unfilled

FEW = 10_000  # of anything, which is never looked at
MOST_CLASSES = 10**7  # of a model without files
MOST_PARTS = 10**6  # modules and parameters of a model without files
SMALL = 10**8  # parameters of a model that is never looked at
SLACK = 20  # parts or parameters of a model for each in the files: fused and quantised tensors stand for several
CLASSES = re.compile(r"(num_)?(labels|classes)")
COUNTS = (
    re.compile(  # what a model has a number of, or is wide; other numbers may be negative, such as ids and -1 for "all"
        r"n_(heads?|layers?|embd|inner|routed_experts|shared_experts)|d_(model|ff|kv)|head_dim"
        r"|num_(.*_)?(heads|layers|blocks|channels|experts|experts_per_tok|labels|classes)"
        r"|(.*_)?(hidden|intermediate|embedding|vocab|patch)_size"
    )
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")  # of them, for each token
BLOCKS = re.compile(r"n_layers?|(.*_)?(layers|depth|blocks)")


@dataclass(frozen=True)
class Held:
    """What the weight files hold."""

    tensors: int
    parameters: int
    widest: int  # largest dimension of a tensor

    def __str__(self) -> str:
        return f"the weight files hold {self.parameters:,} parameters in {self.tensors:,} tensors"


Look = Callable[[], "Held | None"]  # what the files hold; None without files


def check_numbers(config: Json, where: str, look: Look) -> None:
    """Raise SourceError for more classes or blocks than the files can back, or for less than none of anything.

    `where` names the config.
    """
    _check_experts(config, where)
    for key, value in _numbers(config):
        if value < 0 and COUNTS.fullmatch(key):
            raise SourceError(
                f"{where}: {key} {value:,} is below 0; correct it, or take the config.json of the weights"
            )
        if value <= FEW:
            continue
        if CLASSES.fullmatch(key):
            held = look()
            most = MOST_CLASSES if held is None else max(held.widest, FEW)
            if value > most:
                have = "" if held is None else f", and no tensor of the weight files has more than {held.widest:,} rows"
                raise SourceError(f"{where}: {key} {value:,} is above {most:,}{have}")
        elif BLOCKS.fullmatch(key):
            held = look()
            if value > _most_parts(held):
                raise SourceError(f"{where}: {key} {value:,} is above {_most_parts(held):,}{_but(held)}")


def _check_experts(config: Mapping[str, Any], where: str) -> None:
    """Raise SourceError for a config, or one in it, that chooses more experts for a token than there are."""
    counts = {key: value for key, value in config.items() if isinstance(value, int)}
    there = next((name for name in EXPERTS if counts.get(name)), None)
    for name in CHOSEN:
        if there is not None and counts.get(name, 0) > counts[there]:
            raise SourceError(
                f"{where}: {name} {counts[name]:,} is above {counts[there]:,}, the {there}; correct it, or take the"
                " config.json of the weights"
            )
    for inner in config.values():
        if isinstance(inner, dict):
            _check_experts(inner, where)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number in a config and the configs in it, with its key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value
        elif isinstance(value, list):
            yield from ((key, one) for one in value if isinstance(one, int))


def _most_parts(held: Held | None) -> int:
    return MOST_PARTS if held is None else SLACK * (held.tensors + 1000)


def _but(held: Held | None) -> str:
    return "" if held is None else f", and {held}"


@contextmanager
def bounded(where: str, look: Look) -> Iterator[None]:
    """Count the modules and parameters that are built in this context, in this thread.

    Raises SourceError, which `where` begins, for far more than the files hold tensors.
    """
    most, count, ours, checked = FEW, 0, get_ident(), False

    def hook(module: nn.Module, name: str, value: object) -> None:
        nonlocal most, count, checked
        if get_ident() != ours:
            return
        count += 1
        if count > most and not checked:
            most, checked = max(most, _most_parts(look())), True
        if count > most:
            raise SourceError(f"{where}: asks for more than {most:,} modules and parameters{_but(look())}")

    handles = [register_module_module_registration_hook(hook), register_module_parameter_registration_hook(hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_size(model: nn.Module, where: str, look: Look) -> None:
    """Raise SourceError for a model on the meta device that the files, or without files this machine, cannot fill."""
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked <= SMALL:
        return
    held = look()
    if held is not None and asked > SLACK * held.parameters + SMALL:
        raise SourceError(f"{where}: asks for {asked:,} parameters{_but(held)}")
    room = psutil.virtual_memory().total
    if held is None and 4 * asked > room:
        raise SourceError(
            f"{where}: asks for {asked:,} parameters, {4 * asked / 1e9:,.0f} GB in fp32; this machine has"
            f" {room / 1e9:,.0f} GB of memory"
        )


def held_by(described: Mapping[str, tuple[int, ...]]) -> Held:
    """What files hold, from the shapes of their tensors."""
    return Held(
        tensors=len(described),
        parameters=sum(math.prod(shape) for shape in described.values()),
        widest=max((size for shape in described.values() for size in shape), default=0),
    )


def meta_of(build: Callable[[], nn.Module]) -> nn.Module | None:
    """What `build` builds, on the meta device; None for a model that needs the values of its tensors."""
    import torch

    try:
        with torch.device("meta"), Unfilled():
            return build()
    except RuntimeError:  # NotImplementedError too
        return None
