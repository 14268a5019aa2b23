"""The layout: every module has a floor, imports only look down, and there is no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import lrsurgery

FLOORS = {
    4: {"cli", "report_cli", "study_cli", "bench_cli", "training_cli", "tables", "arguments", "console", "__main__"},
    3: {
        *("factorise", "stream", "assembly", "jobs", "options", "export", "report", "rows", "cards", "metadata"),
        *("reading", "profiles", "history", "markdown", "plots", "page", "studies", "findings"),
        *("finetune", "evaluation", "training", "callbacks", "runs", "switching", "saving", "preparation"),
        *("data", "images", "tasks", "recipes"),
        *("bench", "passes", "peak"),
        *("calibrate", "calibration", "settling"),
    },
    2: {
        *(
            "checkpoints",
            "loading",
            "skeletons",
            "sources",
            "staging",
            "tensors",
            "hf",
            "pieces",
            "spectra",
            "processes",
        ),
        *("moments", "collector", "allocation"),
    },
    1: {"threads", "plan", "surgery", "layers", "decay", "dynamics", "speed", "timing", "lockstep"},
    0: {
        *("linalg", "krylov", "angles", "measures", "ranks", "inits", "errors", "cache", "imports", "steps"),
        *("metric", "budget", "sizes"),
    },
}
PACKAGE = Path(lrsurgery.__file__).parent


def imports() -> dict[str, set[str]]:
    """Module -> modules of this package that its source imports, wherever in the source."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.glob("*.py"):
        names = found.setdefault(file.stem, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrsurgery."):
                names.add((node.module or "").split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "lrsurgery":
                names |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
            elif isinstance(node, ast.Import):
                names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lrsurgery.")}
    found.pop("__init__")
    return found


def test_every_module_has_a_floor() -> None:
    assert set().union(*FLOORS.values()) == set(imports())


def test_imports_only_look_down() -> None:
    floor = {module: number for number, modules in FLOORS.items() for module in modules}
    for module, names in imports().items():
        for name in names:
            assert floor[name] <= floor[module], f"{module} (floor {floor[module]}) imports {name} ({floor[name]})"


def test_there_is_no_circle() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
