"""The one reader of YAML: files of named values, as people write recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrsurgery.errors import RecipeError
from lrsurgery.files.json import Json, read_bytes

LONGEST = 1_000_000  # bytes of a file
LARGEST = 100_000  # values in a file, those of an alias counted wherever it stands


def read_yaml(file: Path) -> Json:
    """Read a YAML file of named values: numbers, texts, true, false, null, lists and mappings of these.

    Raises RecipeError if the file is missing, longer than 1 MB, nested without end or holds anything else.
    """
    if not file.exists() and not file.is_symlink():
        raise RecipeError(f"{file}: no such recipe")
    text = read_bytes(file, "a recipe", RecipeError)
    if len(text) > LONGEST:
        raise RecipeError(f"{file}: not a recipe (it has {len(text):,} bytes; at most {LONGEST:,} are read)")
    body = parse_yaml(text, f"{file}: not a recipe")
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise RecipeError(f"{file}: not a recipe; write one 'setting: value' a line")
    return body


def parse_yaml(text: str | bytes, lead: str) -> object:
    """The value of a YAML text; `lead` begins the error's line. Raises RecipeError."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            # a later value would take an earlier one's place without a word; merged keys (<<) are meant to
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for i, key in enumerate(keys) if key in keys[:i])
                raise ValueError(f"{twice!r} stands twice in the mapping of line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        body = yaml.load(text, Loader)
        _measure(body, {})
    except RecursionError as e:
        raise RecipeError(f"{lead} (it is nested too deeply)") from e
    except (ValueError, yaml.YAMLError) as e:  # ValueError: a date that does not exist, a number of 5,000 digits
        raise RecipeError(f"{lead} ({' '.join(str(e).split())[:200]})") from e
    return body


def _measure(value: object, known: dict[int, int | None]) -> int:
    """Count the values in a value. Raises ValueError for too many, for a list in itself or for other types."""
    if not isinstance(value, dict | list):
        if value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"a {type(value).__name__} is no value of a recipe; write it in quotes")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text holds the character NUL")
        return 1
    size = known.get(id(value), 0)
    if size is None:
        raise ValueError("an alias stands in what it names")
    if not size:
        known[id(value)] = None
        parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        size = 1 + sum(_measure(part, known) for part in parts)
        if size > LARGEST:
            raise ValueError(f"with its aliases it holds more than {LARGEST:,} values")
        known[id(value)] = size
    return size
