"""A calibration text that comes with the package: prose, dialogue and code; README.md gives sources and licences."""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"  # what --calibration calls it
DECLINED = "none"  # --calibration none: no data, not even this text
TITLE = "the built-in text"  # in messages


def read_texts() -> dict[str, str]:
    """Read the documents by name, about 200 KB in all, in alphabetical order."""
    files = sorted(Path(__file__).parent.glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def excerpts(characters: int) -> dict[str, str]:
    """Read the first lines of each document, about so many characters: enough for a quick look at every kind."""
    return {name: text[: text.rfind("\n", 0, characters) + 1] for name, text in read_texts().items()}
