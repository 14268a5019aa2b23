"""The layout: twelve rooms that only look down, no circle of files, no room that is crowded."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import lrsurgery

PACKAGE = Path(lrsurgery.__file__).parent
MOST_FILES, MOST_LINES = 8, 350
BASE = {"", "files"}  # base files, and the folder of those that are about files: every room may import them
# what a room may import besides the base files, which import only each other
ALLOWED = {
    "linalg": set(),
    "surgery": {"linalg"},
    "checkpoints": {"surgery", "linalg"},
    "calibration": {"checkpoints", "surgery", "linalg"},
    "data": {"checkpoints", "surgery", "linalg"},
    "report": {"checkpoints", "surgery", "linalg"},
    # fitting to the dense model's outputs, of models in memory
    "refine": {"calibration", "checkpoints", "surgery", "linalg"},
    "factorise": {"refine", "calibration", "data", "report", "checkpoints", "surgery", "linalg"},
    # of factorise, the checks of what a layer becomes; of data, what a model is fed
    "export": {"factorise", "data", "report", "checkpoints", "surgery", "linalg"},
    "serving": {"checkpoints", "surgery", "linalg"},  # servers call it through their entry points
    # the switch from dense to low rank is `factorise_` on a model in memory
    "training": {"factorise", "calibration", "data", "report", "checkpoints", "surgery", "linalg"},
    "measure": {"training", "factorise", "calibration", "data", "report", "checkpoints", "surgery", "linalg"},
}
ALLOWED["cli"] = {*ALLOWED["measure"], "measure", "export", "refine"}
DOORS = {
    "__init__",
    "__main__",
    "hf",
    "timm",
}  # where the package is entered: they may import any room, and no file imports them


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def imported_by(file: Path) -> set[str]:
    """Modules of this package, as `room.file`, that a file's source imports, wherever in the source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lrsurgery":
            base = (node.module or "").split(".")[1:]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in FILES else ".".join(base) or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("lrsurgery.")}
    return {f"{name}.__init__" if f"{name}.__init__" in FILES else name for name in found}


GRAPH = {module: imported_by(file) for module, file in FILES.items()}


def room_of(module: str) -> str:
    """The room of a module; "" for base files and the package's doors."""
    return module.split(".", maxsplit=1)[0] if "." in module else ""


def test_every_arrow_is_looked_at() -> None:
    for module, names in GRAPH.items():
        assert names <= set(FILES), f"{module} imports {names - set(FILES)}"
    assert {room_of(module) for module in FILES} == {*BASE, *ALLOWED}


def test_rooms_only_look_down() -> None:
    for module, names in GRAPH.items():
        room = room_of(module)
        for name in names:
            other = room_of(name)
            if module in DOORS:
                continue
            if room in BASE:
                assert other in BASE, f"{module} imports {name}: base files import base files"
                assert name not in DOORS - {"__init__"}, f"{module} imports {name}"
            else:
                assert other in {*BASE, room, *ALLOWED[room]}, (
                    f"{module} imports {name}: {room} may not look into {other}"
                )


def test_there_is_no_circle_of_files() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            # the package's own names load on first use, so that whoever asks for its version enters no room
            for name in GRAPH[module] if module != "__init__" else ():
                visit(name, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_no_folder_is_crowded() -> None:
    inside = Counter(
        f.parent for name, f in FILES.items() if f.stem not in ("__init__", "__main__") and name not in DOORS
    )
    crowded = {str(folder.relative_to(PACKAGE)): count for folder, count in inside.items() if count > MOST_FILES}
    assert not crowded


def test_a_long_file_says_why() -> None:
    for module, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            assert "long" in docstring, f"{module} has {text.count(chr(10))} lines and does not say why it is so long"
