"""One reader of JSON and one of YAML: a value of the wanted type, or one line that names the file and the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from lrsurgery.errors import OutputError, RecipeError, SourceError
from lrsurgery.files.json import json_text, read_as, read_json, read_lines
from lrsurgery.files.yaml import parse_yaml, read_yaml


class Point(NamedTuple):
    x: float
    y: float | None


@dataclass(frozen=True)
class Thing:
    name: str
    sizes: tuple[int, ...]
    at: Point | None = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "thing.json"


def test_a_value_comes_back_typed(file: Path) -> None:
    file.write_text('{"name": "a", "sizes": [1, 2], "at": {"x": 1, "y": null}, "further": 3}')
    assert read_as(Thing, file, "a thing") == Thing("a", (1, 2), Point(1.0, None))


def test_what_json_cannot_say_is_null_both_ways(file: Path) -> None:
    text = json_text({"name": "a", "sizes": [], "at": {"x": 1.0, "y": math.nan}})
    assert json.loads(text, parse_constant=pytest.fail)["at"]["y"] is None
    file.write_text('{"format_version": 1, "name": "a", "sizes": [], "at": {"x": 1.0, "y": Infinity}}')
    assert read_as(Thing, file, "a thing", newest=1).at == Point(1.0, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": 1, "sizes": []}', "not a thing (name: input should be a valid string, not 1)"),
        ('{"name": "a", "sizes": [1, "2"]}', 'sizes.1: input should be a valid integer, not "2"'),
        ('{"name": "a", "sizes": [1, true]}', "sizes.1: input should be a valid integer, not true"),
        ('{"name": "a"}', "(sizes: field required)"),
        ("[]", "not a thing"),
        ("", "not a thing"),
        ('{"name": "a", "sizes": [' + "9" * 6000 + "]}", "not a thing"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "not a thing"),
        ('{"name": "\\ud800", "sizes": []}', "not a thing"),
    ],
    ids=["number for text", "text for number", "bool", "missing", "list", "empty", "digits", "depth", "half character"],
)
def test_anything_else_is_one_line_with_the_key(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(OutputError) as found:
        read_as(Thing, file, "a thing", OutputError)
    assert str(found.value).startswith(f"{file}: ")
    assert words in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "folder", "loop", "none"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError):
        read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (3, "format 3 is newer than this lrsurgery reads (2); update lrsurgery"),
        ("2", 'format_version must be a whole number from 1, not "2"'),
        (None, "format_version must be a whole number from 1, not null"),
        (True, "format_version must be a whole number from 1, not true"),
        (0, "format_version must be a whole number from 1, not 0"),
    ],
)
def test_a_version_is_looked_at_before_anything_else(file: Path, version: object, words: str) -> None:
    file.write_text(json.dumps({"format_version": version, "what": "nobody knows yet"}))
    with pytest.raises(SourceError) as found:
        read_as(Thing, file, "a thing", newest=2)
    assert str(found.value) == f"{file}: {words}"


def test_lines_end_where_a_kill_cut_them_and_are_damaged_elsewhere(file: Path) -> None:
    file.write_text('{"x": 1, "y": 2}\n{"x": 2, "y": nu')
    assert read_lines(Point, file, "a point") == [Point(1, 2)]
    file.write_text('{"x": 1, "y": 2}\n{"x": 2, "y": nu\n{"x": 1, "y": 2}\n')
    with pytest.raises(SourceError, match=r"thing\.json: line 2 is not a point"):
        read_lines(Point, file, "a point")
    file.write_text('{"x": 1, "y": 2}\n{"x": "1", "y": 2}\n')
    with pytest.raises(SourceError, match=r"thing\.json: line 2 is not a point \(x: input should be a valid number"):
        read_lines(Point, file, "a point")
    assert read_lines(Point, file.with_name("none"), "a point") == []


def bomb() -> str:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), "with its aliases it holds more than 100,000 values"),
        ("a: &a [*a]", "an alias stands in what it names"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "9" * 6000, "not a recipe"),
        ("a: 2020-01-01", "a date is no value of a recipe; write it in quotes"),
        ("a: 2020-13-01", "not a recipe"),
        ('a: "b\\0c"', "a text holds the character NUL"),
        ("a: [", "not a recipe"),
        ("a: !!python/object/apply:os.system [ls]", "not a recipe"),
        ("- a", "write one 'setting: value' a line"),
        ("1: a", "write one 'setting: value' a line"),
        ("a: " + "x" * 1_000_001, "at most 1,000,000 are read"),
    ],
    ids=["bomb", "circle", "depth", "digits", "date", "no date", "nul", "cut", "code", "list", "key", "size"],
)
def test_a_recipe_of_anything_else_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as found:
        read_yaml(file)
    assert str(found.value).startswith(f"{file}: ")
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_aliases_that_people_write_are_read() -> None:
    assert parse_yaml("a: &a {x: [1, 2.5, yes, null]}\nb: *a", "text") == {
        "a": {"x": [1, 2.5, True, None]},
        "b": {"x": [1, 2.5, True, None]},
    }
