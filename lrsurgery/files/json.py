"""The one reader and the one writer of JSON.

What a file holds is checked against a type before it is used, so that no odd value gets any further than its reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from lrsurgery.errors import SourceError, SurgeryError

Json: TypeAlias = dict[str, Any]  # a JSON object of a file; readers turn it into typed values
Form = TypeVar("Form")


def read_json(file: Path, what: str = "a JSON object", error: type[SurgeryError] = SourceError) -> Json:
    """Read the JSON object in a file. Raises `error` if the file is missing or is not `what`.

    Nesting, lengths of numbers and broken characters are bounded by the parser (pydantic's).
    """
    from pydantic_core import from_json

    text = read_bytes(file, what, error)
    try:
        body = from_json(text)
    except ValueError as e:
        raise error(f"{file}: not {what} ({e})") from e
    if not isinstance(body, dict):
        raise error(f"{file}: not {what} (it holds a {type(body).__name__})")
    return body


def read_as(
    form: type[Form],
    file: Path,
    what: str,
    error: type[SurgeryError] = SourceError,
    *,
    newest: int | None = None,
    unnamed: int | None = None,
) -> Form:
    """Read the JSON of a file as a value of `form`: a dataclass, a TypedDict or any annotation pydantic knows.

    Keys that the form does not have are left out, unless it allows them. `newest` is the newest `format_version` that
    this program reads; None for a file without versions. `unnamed` is the version of a file that names none, which
    is refused by default. NaN and infinities count as null.

    Raises `error`, which names the key and what it should be, if the file is missing, is of a newer format or does not
    hold `what`.
    """
    lead = f"{file}: not {what}"
    if newest is None:
        return parse_as(form, read_bytes(file, what, error), lead, error)
    body = read_json(file, what, error)
    check_version(body.get("format_version", unnamed), newest, str(file), error)
    return checked(form, body, lead, error)


def check_version(found: object, newest: int, where: str, error: type[SurgeryError] = SourceError) -> None:
    """Raise `error` unless `found`, a file's `format_version`, is a version up to the `newest` that is read."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise error(f"{where}: format_version must be a whole number from 1, not {_shown(found)}")
    if found > newest:
        raise error(f"{where}: format {found} is newer than this lrsurgery reads ({newest}); update lrsurgery")


def parse_as(form: type[Form], text: bytes | str, lead: str, error: type[SurgeryError] = SourceError) -> Form:
    """The JSON `text` as a value of `form`, as `read_as`; `lead` begins the error's line."""
    from pydantic import ValidationError

    try:
        found: Form = _adapter(form).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as e:
        raise error(f"{lead} ({_first_fault(e)})") from e
    return found


def checked(
    form: type[Form], body: object, lead: str, error: type[SurgeryError] = SourceError, *, finite: bool = True
) -> Form:
    """A value that JSON gave, as a value of `form`; `lead` begins the error's line.

    NaN and infinities count as null; without `finite` they are left to the form.
    """
    return parse_as(form, json.dumps(_finite(body) if finite else body), lead, error)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


@cache
def _adapter(form: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(form)


def _first_fault(e: Any) -> str:
    """Where the first fault is and what it is: "layers.3.rank: input should be a valid integer, not 'x'"."""
    fault = e.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    said = fault["msg"][:1].lower() + fault["msg"][1:]
    found = "" if fault["type"] in ("missing", "json_invalid", "extra_forbidden") else f", not {_shown(fault['input'])}"
    return f"{place}: {said}{found}" if place else f"{said}{found}"


def read_bytes(file: Path, what: str, error: type[SurgeryError] = SourceError) -> bytes:
    """The bytes of a file, without a byte order mark. Raises `error` if it is missing or cannot be read."""
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as e:
        raise error(f"{file}: missing") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise error(f"{file}: not {what} ({e})") from e


def read_lines(form: type[Form], file: Path, what: str, error: type[SurgeryError] = SourceError) -> list[Form]:
    """Read an append-only .jsonl file, a value of `form` a line; [] without a file.

    A last line that a kill truncated is left out. Raises `error`, which names the line, for any other that is not JSON
    or does not hold `what`.
    """
    from pydantic_core import from_json

    if not file.exists():
        return []
    lines = [line for line in read_bytes(file, what, error).splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            body = from_json(line)
        except ValueError as e:
            if number == len(lines):
                break
            raise error(f"{file}: line {number} is not {what} ({e})") from e
        found.append(checked(form, body, f"{file}: line {number} is not {what}", error))
    return found


def json_text(body: object, indent: int | None = 2) -> str:
    """The text of a JSON file, or of one line of several. JSON has no NaN and no infinities: they are null."""
    return json.dumps(_finite(body), indent=indent, allow_nan=False) + "\n"


def _finite(body: object) -> object:
    if isinstance(body, float):
        return body if math.isfinite(body) else None
    if isinstance(body, Mapping):
        return {key: _finite(value) for key, value in body.items()}
    return [_finite(value) for value in body] if isinstance(body, list | tuple) else body
