"""The report as one HTML page that needs nothing else: style, script and JSON are all inside it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

# joined in this order: each may use what stands before it
PARTS = ("draw", "plots", "table", "layers", "detail", "blocks", "runs", "bench", "summary", "page")


def html_page(body: Mapping[str, Any]) -> str:
    """The page that draws a report's JSON object; text in it is shown as text, whatever it contains.

    Raises ValueError where a number is not finite: JSON has no such numbers, and a browser would read none of it.
    """
    folder = files("lrsurgery") / "web"
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(f"{part}.js").read_text(encoding="utf-8") for part in PARTS)
    title = f"{body.get('name') or 'lrsurgery'}: rank report"
    return Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title.encode("utf-8", "replace").decode()),  # a file's name may hold half a character
        style=style,
        style_hash=_allowed(style),
        script=script,
        script_hash=_allowed(script),
        report=_embedded(body),
    )


def _embedded(body: Mapping[str, Any]) -> str:
    """JSON that an HTML parser sees no tag, comment or entity in, and a JSON parser reads unchanged."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _allowed(text: str) -> str:
    """The content security policy's name of an inline script or style: no other one runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
