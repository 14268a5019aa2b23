"""Where a model holds its modules (registered children, and lists, dicts or attributes), what it takes, which modules
give its output, modules without values, and what the code of a model raises.

`nn.Module` registers a child in `_modules`. Some models call a child through a plain list that they keep beside it
(MaskFormer's prediction heads), so a layer that is replaced among the registered children alone goes on being called.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lrsurgery.errors import Interrupted, PlanError, SurgeryError

Norm = nn.modules.batchnorm._NormBase
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


# inputs


def for_model(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without a mask that the model does not take, as FNet's kin; collators always make one."""
    if "attention_mask" not in inputs:
        return dict(inputs)
    taken = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    if "attention_mask" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def arguments_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's arguments; a timm model takes pixel_values."""
    if not hasattr(model, "config"):
        return ("pixel_values",)
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters.values()
    names = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    main = getattr(model, "main_input_name", "input_ids")
    return tuple(dict.fromkeys([*names[1:], main]))


def batch_norms(model: nn.Module) -> list[Norm]:
    """The normalisations that keep means and variances of what they were given."""
    return [module for module in model.modules() if isinstance(module, Norm) and module.track_running_stats]


# outputs

USUAL = ("fc", "classifier", "head", "heads", "lm_head")  # torchvision's names, where a trace shows nothing


def output_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules with parameters whose outputs are the model's, up to operations on one tensor (softmax, mean).

    A sum (of a residual) has several tensors, so no one module gives it. Of a model that cannot be traced, such as one
    whose path depends on its input, and of a plain Sequential, which is a block of a model as often as a model: the
    last ones under the usual names.
    """
    found = [] if type(model) is nn.Sequential else _traced(model)
    for name in () if found else USUAL:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            found += [m for m in part.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))][-1:]
    return found


def _traced(model: nn.Module) -> list[nn.Module]:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()  # auxiliary outputs are for training
        graph = fx.Tracer().trace(model)
    except Exception:  # a trace runs the model's own code on stand-ins for tensors, which raises anything
        return []
    finally:
        for each, was in training.items():
            each.training = was
    (output,) = (node for node in graph.nodes if node.op == "output")
    found: list[nn.Module] = []
    seen: set[fx.Node] = set()
    waiting = list(output.all_input_nodes)  # each part of a tuple or a dictionary
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = _module_of(model, node)
        if module is not None:
            found += [module] if not _is_used(model, node) else []
        else:
            tensors = [each for each in node.all_input_nodes if not _is_size(each)]
            waiting += tensors if len(tensors) == 1 else []
    return found


def _is_size(node: fx.Node) -> bool:
    """Tell whether a node is the shape of a tensor, or numbers that are made of shapes alone."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    inputs = node.all_input_nodes
    return node.op in ("call_function", "call_method") and bool(inputs) and all(map(_is_size, inputs))


def _module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module with parameters that gives the node's value, if one does."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if module is not None and any(True for _ in module.parameters()) else None


def _is_used(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether another module works on what comes of a node: a hidden state is no output, be it returned."""
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop()
        if _module_of(model, user) is not None:
            return True
        waiting += [each for each in user.users if each not in seen]
        seen |= set(user.users)
    return False


# modules without values

FILLS = {
    *("fill_", "zero_", "uniform_", "normal_", "exponential_"),
    *(f"{name}_" for name in ("constant", "ones", "zeros", "xavier_uniform", "xavier_normal", "kaiming_uniform")),
    *("kaiming_normal_", "trunc_normal_", "orthogonal_"),
}


class Unfilled(TorchFunctionMode):
    """Mode in which nothing fills a tensor on the meta device, which has no values to fill.

    The fills of their constructors are most of the time that modules take on the meta device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes all by name
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


PACKAGE = Path(__file__).parent


def frames_after_ours(error: BaseException) -> tuple[str, list[str]]:
    """The innermost file of this package that an error came through, and the functions called from there on.

    The file is relative to the package; empty if it came through none.
    """
    frames = [
        (Path(frame.f_code.co_filename), frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    last = max((i for i, (file, _) in enumerate(frames) if file.is_relative_to(PACKAGE)), default=-1)
    ours = frames[last][0].relative_to(PACKAGE).as_posix() if last >= 0 else ""
    return ours, [name for _, name in frames[last + 1 :]]


@contextmanager
def model_faults(reference: str) -> Iterator[None]:
    """Turn what the code of a model raises in a forward pass into one line that names the model.

    What this package raises, or a library that it calls beside the model, goes on as it is; so does a lack of memory.

    Raises SurgeryError.
    """
    try:
        yield
    except (SurgeryError, Interrupted, OSError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # of any type: a config that no forward pass goes with, images of another size
        if "_call_impl" not in frames_after_ours(e)[1]:  # of nn.Module
            raise
        reason = " ".join(str(e).split())[:300]
        raise SurgeryError(
            f"{reference}: the model cannot work on this data: {type(e).__name__}: {reason}; its config.json, its"
            " tokenizer or image processor and the data have to go together (--debug shows where it fails)"
        ) from e


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings (which models' outputs are), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


class _EndedError(Exception):
    """Ends a forward whose rest is not needed."""


def run_until(module: nn.Module, forward: Callable[[], object], *, before: bool = False) -> list[Any]:
    """Run `forward` until a module has returned, and give its output in a list, empty if the module is not reached.

    With `before`, run it until the module is called, and give its arguments.
    """
    found: list[Any] = []

    def end(_: nn.Module, arguments: Any, *output: Any) -> None:
        found.extend(output or [arguments])
        raise _EndedError

    handle = module.register_forward_pre_hook(end) if before else module.register_forward_hook(end)
    try:
        forward()
    except _EndedError:
        pass
    finally:
        handle.remove()
    return found
