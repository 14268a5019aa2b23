"""Where a model holds its modules: registered children, and lists, dicts or attributes beside them.

`nn.Module` registers a child in `_modules`. Some models call a child through a plain list that they keep beside it
(MaskFormer's prediction heads), so a layer that is replaced among the registered children alone goes on being called.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.errors import PlanError

Put: TypeAlias = "Callable[[Any], None] | None"  # stores another object in a place; None where nothing can be stored
# types that hold no module; a subclass of a tensor holds none that is called as a layer
PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, Tensor, torch.dtype, torch.device)
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
# attributes of every module; hooks refer to modules in order to watch them, not to call them
OWN = frozenset(vars(nn.Module())) - {"_modules"}


@dataclass(frozen=True)
class _Place:
    where: str
    put: Put


class References:
    """Every reference to a module inside a model, as it is when this object is made.

    Attributes, lists, tuples, dicts, other objects, closures and weak references are followed; a module that a bound
    method, a set or the arguments of a partial function hold cannot be replaced there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._places: dict[int, list[_Place]] = {}
        seen: dict[int, object] = {}  # holds on to the objects, so that no number is used twice
        waiting: list[tuple[Any, str, Put, object]] = [(model, "", None, model)]  # object, where, put, holding module
        while waiting:
            value, where, put, holder = waiting.pop()
            is_module = type(value) not in PROXIES and isinstance(value, nn.Module)
            if is_module and value is not holder:
                self._places.setdefault(id(value), []).append(_Place(where, put))
            if not isinstance(value, tuple) and id(value) in seen:
                continue
            seen[id(value)] = value
            if is_module:
                where, holder = self._names.get(id(value), where), value
            for item, place, change in _inside(value, where, put):
                if type(item) in PROXIES or not isinstance(item, PLAIN):  # a dead proxy has no class to ask for
                    waiting.append((item, place, change, holder))

    def reason_to_keep(self, module: nn.Module) -> str | None:
        """Where the module is held in a way that allows no other in its place; None if it can be replaced."""
        fixed = [place.where for place in self._places.get(id(module), ()) if place.put is None]
        return f"also held by {min(fixed)}" if fixed else None

    def replace_(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in every place of `old`. Raises PlanError that names a place where that is impossible."""
        reason = self.reason_to_keep(old)
        if reason is not None:
            raise PlanError(f"{self._names.get(id(old), type(old).__name__)}: {reason}, so it cannot be replaced")
        new.train(old.training)
        for place in self._places.get(id(old), ()):
            assert place.put is not None
            place.put(new)


def _inside(value: Any, where: str, put: Put) -> Iterator[tuple[Any, str, Put]]:
    """Yield what an object holds, where, and what stores another object there."""
    if type(value) in PROXIES:
        try:
            yield value.__init__.__self__, f"a weak reference, {where}", _wrapped(put, weakref.proxy)
        except ReferenceError:  # what it referred to is gone
            return
    elif isinstance(value, weakref.ref):
        plain = type(value) is weakref.ref and value.__callback__ is None
        yield value(), f"a weak reference, {where}", _wrapped(put, weakref.ref) if plain else None
    elif isinstance(value, nn.Module):
        for key, item in list(vars(value).items()):
            if key == "_modules":
                yield from ((m, f"{where}.{name}", _at(item, name)) for name, m in list(item.items()))
            elif key not in OWN:
                yield item, f"{where}.{key}".lstrip("."), _at(vars(value), key)
    elif isinstance(value, dict):
        yield from ((item, f"{where}[{key!r}]", _at(value, key)) for key, item in list(value.items()))
    elif isinstance(value, list | deque):
        yield from ((item, f"{where}[{i}]", _at(value, i)) for i, item in enumerate(list(value)))
    elif isinstance(value, tuple):
        items = list(value)
        yield from ((item, f"{where}[{i}]", _into_tuple(value, items, i, put)) for i, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((item, f"a set, {where}", None) for item in list(value))
    elif isinstance(value, types.MethodType):
        yield value.__self__, f"a bound method, {where}", None
    elif isinstance(value, functools.partial):
        for item in (value.func, value.args):
            yield item, f"a partial function, {where}", None
        yield value.keywords, where, None
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents, f"the closure of {where}", functools.partial(setattr, cell, "cell_contents")
            except ValueError:  # a variable that has no value yet
                continue
    elif hasattr(value, "__dict__"):
        yield from ((item, f"{where}.{key}", _at(vars(value), key)) for key, item in list(vars(value).items()))


def _at(container: Any, key: Any) -> Put:
    return functools.partial(container.__setitem__, key)


def _wrapped(put: Put, wrap: Callable[[Any], Any]) -> Put:
    return None if put is None else lambda new: put(wrap(new))


def _into_tuple(old: tuple[Any, ...], items: list[Any], index: int, put: Put) -> Put:
    """Store a new tuple in the place of the old one; `items` are shared by all places of a tuple."""
    if put is None:
        return None

    def change(new: Any) -> None:
        items[index] = new
        put(type(old)(*items) if hasattr(old, "_fields") else type(old)(items))

    return change
