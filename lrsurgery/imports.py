"""Python files of the user's own, which register models with timm or transformers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lrsurgery.errors import SourceError

imported: list[str] = []  # for processes that this one starts


def import_file(file: Path) -> None:
    """Runs a Python file as the module of its name. Raises SourceError where it is missing or fails."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SourceError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # timm looks a model's function up by its module
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever it is, that file is at fault
        del sys.modules[file.stem]
        raise SourceError(f"{file}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    imported.append(str(file.resolve()))
