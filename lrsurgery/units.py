"""Parsing and printing of numbers and byte sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrsurgery.errors import OutputError

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}


def finite(text: str) -> float:
    """Parse a number. Raises ValueError, also for NaN and infinities."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def size_of(text: str) -> float:
    """Parse `5GB`, `500MB`, `1GiB`, `10B` or a plain number into bytes. Raises ValueError."""
    text = text.strip().upper()
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return finite(text.removesuffix(unit or "B")) * UNITS.get(unit, 1)


def size_text(size: float) -> str:
    """Bytes as text, in the largest decimal unit not above the size."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if size >= UNITS[unit]), "")
    return f"{size / UNITS.get(unit, 1):.15g}{unit}"


def size_words(size: int) -> str:
    """A size as people read it: "12.3 GB", "840 KB", "12 bytes"."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if size >= UNITS[unit]), None)
    return f"{size:,} bytes" if unit is None else f"{size / UNITS[unit]:.3g} {unit}"


def parse_size(text: str) -> int:
    """Parse a shard size such as `5GB` into bytes. Raises OutputError for anything below 1 byte."""
    try:
        size = int(size_of(text))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise OutputError(f"shard size '{text}' is not readable; write a size such as 5GB or 500MB")
    return size


def duration_text(seconds: float) -> str:
    """A duration in words, roughly: "a second", "40 s", "3 min", "2.5 h"."""
    if seconds < 1:
        return "a second"
    for most, unit, size in ((90, "s", 1), (5400, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people read it: 768x3072."""
    return "x".join(map(str, shape))
