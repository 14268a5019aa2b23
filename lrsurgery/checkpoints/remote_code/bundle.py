"""One Python file from definitions of this package and all that they need of it: one source of truth, no import of it.

Names of two modules that are alike get the name of their module; annotations and comments are left out.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

PACKAGE = "lrsurgery"
# fields of `Kind` that no layer needs to be loaded, to run, to be resized or to be saved
UNUSED = ("fan_in", "inputs", "gradients", "outputs", "sample_input", "v_per_u", "no_form", "active")
SCOPES = (ast.FunctionDef, ast.Lambda, ast.ClassDef)


@dataclass(frozen=True)
class Home:
    """Where a name is defined: in a module of this package, or by an import of another's."""

    module: str  # empty for an import
    name: str
    line: str = ""  # the import, without a name of its own

    def import_as(self, name: str) -> str:
        return self.line if name == self.name else f"{self.line} as {name}"


@dataclass
class Module:
    """The definitions and imports at the top of a module."""

    name: str
    statements: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, Home] = field(default_factory=dict)
    order: list[ast.stmt] = field(default_factory=list)


Reached: TypeAlias = "dict[Home, str]"  # -> the name in the bundle


def bundle(roots: Sequence[tuple[str, str]]) -> str:
    """The source of these (module, name) definitions with what they reach, after the imports that it needs."""
    reached = _name_all(_reach([Home(*root) for root in roots]))
    lines = sorted(home.import_as(name) for home, name in reached.items() if not home.module)
    parts = ["\n".join(lines)]
    for module in _in_order([module for module, _ in roots]):
        own = {home.name for home in reached if home.module == module.name}
        for statement in module.order:
            if own & set(_defined_by(statement)):
                renamed = _Renamer(module, reached).visit(copy.deepcopy(statement))
                parts.append(ast.unparse(ast.fix_missing_locations(renamed)))
    return "\n\n\n".join(parts) + "\n"


@cache
def _module(name: str) -> Module:
    spec = find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    module = Module(name)
    for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module.imports |= _imported(statement)
        elif names := _defined_by(statement):
            module.order.append(statement)
            module.statements |= dict.fromkeys(names, statement)
    return module


def _imported(statement: ast.Import | ast.ImportFrom) -> dict[str, Home]:
    found = {}
    for alias in statement.names:
        bound = alias.asname or alias.name.partition(".")[0]
        if isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            ours = source.partition(".")[0] == PACKAGE
            line = "" if ours else f"from {source} import {alias.name}"
            found[bound] = Home(source if ours else "", alias.name, line)
        else:
            assert alias.name.partition(".")[0] != PACKAGE, alias.name
            found[bound] = Home("", alias.name, f"import {alias.name}")
    found.pop("annotations", None)
    return found


def _defined_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return [name for name in names if name != "__all__"]


def _home_of(module: Module, name: str, local: Mapping[str, Home] | None = None) -> Home | None:
    """Where a name of a module comes from; None for builtins, and names that a function has for itself."""
    if name in module.statements:
        return Home(module.name, name)
    found = (local or {}).get(name) or module.imports.get(name)
    return _home_of(_module(found.module), found.name) if found is not None and found.module else found


def _reach(roots: Sequence[Home]) -> list[Home]:
    found: dict[Home, None] = {}
    waiting = list(roots)
    while waiting:
        home = waiting.pop()
        if home in found:
            continue
        found[home] = None
        if not home.module:
            continue
        module = _module(home.module)
        statement = _stripped(copy.deepcopy(module.statements[home.name]))
        local = _local_imports(statement)
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        waiting += [each for name in sorted(names) if (each := _home_of(module, name, local)) is not None]
        waiting += [Home(home.module, name) for name in _defined_by(module.statements[home.name])]
    return list(found)


def _local_imports(statement: ast.AST) -> dict[str, Home]:
    """What functions import of this package."""
    found: dict[str, Home] = {}
    for node in ast.walk(statement):
        if _is_ours(node):
            assert isinstance(node, ast.ImportFrom)
            found |= _imported(node)
    return found


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE


def _name_all(homes: Sequence[Home]) -> Reached:
    """A name for each: its own, or where several have it, with its module's."""
    count: dict[str, int] = {}
    for home in homes:
        count[home.name] = count.get(home.name, 0) + 1
    names: Reached = {}
    taken: set[str] = set()
    for home in homes:
        name = home.name if count[home.name] == 1 else _longer(home)
        assert name not in taken, name
        taken.add(name)
        names[home] = name
    return names


def _longer(home: Home) -> str:
    if not home.module:
        return home.name
    place = "_".join(home.module.split(".")[-2:])
    return f"{home.name}_of_{place}"


def _in_order(roots: Sequence[str]) -> Iterator[Module]:
    """The modules, each after those that it imports."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[Module]:
        if name in done:
            return
        done.add(name)
        module = _module(name)
        for home in module.imports.values():
            if home.module:
                yield from visit(home.module)
        yield module

    for root in roots:
        yield from visit(root)
    for module in list(map(_module, sorted(done))):  # and those that functions import
        for statement in module.order:
            for home in _local_imports(statement).values():
                yield from visit(home.module)


class _Stripper(ast.NodeTransformer):
    """Takes out the annotations of functions and what their variables are, and the fields of kinds without a use."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        for each in ast.walk(node.args):
            if isinstance(each, ast.arg):
                each.annotation = None
        self.generic_visit(node)
        node.body = [self._plain(statement) for statement in node.body]
        return node

    def _plain(self, statement: ast.stmt) -> ast.stmt:
        if not isinstance(statement, ast.AnnAssign):
            return statement
        if statement.value is None:
            return ast.Pass()
        return ast.Assign(targets=[statement.target], value=statement.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.annotation = ast.Name(id="object", ctx=ast.Load())  # what makes it a field, and names nothing else
        node.value = self.visit(node.value) if node.value is not None else None
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id in ("Kind", "replace"):
            for keyword in node.keywords:
                if keyword.arg in UNUSED:
                    keyword.value = ast.Constant(value=None)
        return self.generic_visit(node)


def _stripped(statement: ast.stmt) -> Any:
    return _Stripper().visit(statement)


class _Renamer(ast.NodeTransformer):
    """Gives the names of a statement at the top of a module those that they have in the bundle."""

    def __init__(self, module: Module, reached: Reached) -> None:
        self._module, self._reached = module, reached
        self._own: list[set[str]] = []  # names that the functions and classes around a place have for themselves
        self._local: dict[str, Home] = {}

    def visit(self, node: ast.AST) -> Any:
        if not self._own and not self._local:
            node = _stripped(node)  # type: ignore[arg-type]
            self._local = {"": Home("", "")} | _local_imports(node)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.name = self._renamed(node.name)
        if not isinstance(node, SCOPES):
            return super().visit(node)
        for decorator in getattr(node, "decorator_list", ()):
            super().visit(decorator)
        self._own.append(_bound_in(node) - set(self._local))
        visited = self.generic_visit(node)
        self._own.pop()
        return visited

    def visit_Name(self, node: ast.Name) -> Any:
        if not any(node.id in own for own in self._own):
            node.id = self._renamed(node.id)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        return ast.Pass() if _is_ours(node) else node

    def _renamed(self, name: str) -> str:
        home = _home_of(self._module, name, self._local)
        return name if home is None else self._reached.get(home, name)


def _bound_in(scope: ast.AST) -> set[str]:
    """The names that a function or class gives a value itself, and not those that functions in it do."""
    if isinstance(scope, ast.ClassDef):
        return set()  # its names are not those of its functions, and none of them hides another here
    assert isinstance(scope, ast.FunctionDef | ast.Lambda)
    found = {each.arg for each in ast.walk(scope.args) if isinstance(each, ast.arg)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif node is not scope and isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom) and not _is_ours(node):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found
