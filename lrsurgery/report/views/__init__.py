"""One report, several views; each file that names its `ENDINGS` is one.

To add a view: a file here with `ENDINGS = (".xyz",)`, the endings of its files, the usual one first, and
`render(report, *, sort, every) -> str`. The command line then lists it. Files without endings are what views share.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrsurgery.report.schema import Report


def _endings() -> dict[str, tuple[str, ...]]:
    """By name of the view; read from its source, since help must not wait for torch."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".py"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENDINGS":
                found[file.name.removesuffix(".py")] = ast.literal_eval(node.value)
    return found


VIEWS = _endings()


def render(report: Report, view: str, *, sort: str = "model", every: bool = False) -> str:
    """A report as one of `VIEWS`, its layers in an order of `ORDERS`; `every` layer where a view would shorten them."""
    text: str = import_module(f"{__name__}.{view}").render(report, sort=sort, every=every)
    return text
