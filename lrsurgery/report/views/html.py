"""The report as one HTML page that needs nothing else: style, script and JSON are all inside it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from string import Template

from lrsurgery.files.json import Json
from lrsurgery.report.schema import Report
from lrsurgery.report.targets.columns import columns_of, curve_words
from lrsurgery.report.views import speed, web
from lrsurgery.report.views.columns import HEADINGS, LADDER, named, page_columns
from lrsurgery.report.views.web.facts import ABOUT, TERMS, bench_facts, option_facts, origin, slower_words
from lrsurgery.report.views.web.sentences import Part, halfway, sentences, work_of
from lrsurgery.report.views.web.tiles import tiles

ENDINGS = (".html", ".htm")
# joined in this order: each may use what stands before it
PARTS = ("draw", "plots", "table", "layers", "detail", "blocks", "curve", "runs", "bench", "summary", "page")


def render(report: Report, *, sort: str = "model", every: bool = True) -> str:
    """The page of a report; text in it is shown as text, whatever it contains. Readers sort its tables themselves.

    Raises ValueError where a number is not finite: JSON has no such numbers, and a browser would read none of it.
    """
    folder = files(web)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(f"{part}.js").read_text(encoding="utf-8") for part in PARTS)
    title = f"{report.name or 'lrsurgery'}: rank report"
    return Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title.encode("utf-8", "replace").decode()),  # a file's name may hold half a character
        style=style,
        style_hash=_allowed(style),
        script=script,
        script_hash=_allowed(script),
        report=_embedded(report.to_dict()),
        view=_embedded(view(report)),
    )


def view(report: Report) -> Json:
    """What the page says of a report and how it names figures; the script lays it out.

    A sentence is a list of parts: a text, {"value", "text"} of a figure, {"code"}, or {"text", "href"}.
    """
    halfway_rung, bench = halfway(report), report.bench
    return {
        "tiles": [asdict(tile) for tile in tiles(report)],
        "sentences": [_plain(said) for said in sentences(report)],
        "about": ABOUT[report.about],
        "origin": origin(report),
        "options": _listed(option_facts(report.options)),
        "terms": _listed(TERMS.items()),
        "columns": page_columns(report),
        "ladder": named(LADDER),
        "curve": named(columns_of(report.curve)) if report.curve else [],
        "curveWords": curve_words(report.curve) if report.curve else [],
        "choice": report.choice["lines"] if report.choice else [],
        "runs": named(speed.RUNS),
        "layers": named(speed.LAYERS),
        "works": [work_of(run) for run in bench["runs"]] if bench else [],
        "bench": _listed(bench_facts(bench)) if bench else [],
        "slower": _plain(slower_words(bench)) if bench else [],
        "headings": HEADINGS,
        "halfway": None if halfway_rung is None else halfway_rung[0].rank,
    }


def _plain(parts: Iterable[Part]) -> list[object]:
    return [part if isinstance(part, str) else asdict(part) for part in parts]


def _listed(facts: Iterable[tuple[str, Iterable[Part]]]) -> list[list[object]]:
    return [[name, _plain(parts)] for name, parts in facts]


def _embedded(body: Json) -> str:
    """JSON that an HTML parser sees no tag, comment or entity in, and a JSON parser reads unchanged."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _allowed(text: str) -> str:
    """The content security policy's name of an inline script or style: no other one runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
