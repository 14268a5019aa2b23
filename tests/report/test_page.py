"""The HTML report: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lrsurgery.report.views.html import html_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
Look = Callable[..., dict[str, Any]]

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&amp;${1}'\"\u2028"
WIDE = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
SHARES = {"0.25": 0.42, "0.5": 0.66, "0.75": 0.9, "params:0.5": 0.5}  # of parameters, by the rank asked for
DYNAMICS = {"nuclear_rank": 1, "entropy_rank": 1.6, "stable_rank": 0.3, "frobenius_norm": 0.2, "spectral_norm": 0.02,
            "u_norm": 0.1, "v_norm": 0.11}  # fmt: skip


def spectrum(full: int, slope: float, cut: int | None = None) -> dict[str, Any]:
    """Falling singular values at about fifty positions, as a report has them."""
    last = min(full, cut or full)
    index = sorted({1 + round((last - 1) * (i / 49) ** 2) for i in range(50)})
    return {"index": index, "value": [10 * i**-slope * math.exp(-2.5 * i / full) for i in index]}


def effective(draw: random.Random, full: int) -> dict[str, Any]:
    share = draw.uniform(0.3, 0.6)
    return {
        "nuclear": full * share,
        "entropy": full * (share + 0.2),
        "stable": full * share**3,
        "condition": 1e3 * share,
    }


def factorised(draw: random.Random, name: str, rows: int, columns: int) -> dict[str, Any]:
    full = min(rows, columns)
    rank = draw.randrange(full // 4, full // 2)
    slope = draw.uniform(0.1, 0.7)
    kept = draw.uniform(0.7, 0.999)
    return {
        "name": name, "kind": "conv1d", "shape": [rows, columns], "status": "factorised", "reason": None,
        "full_rank": full, "rank": rank, "break_even": rows * columns // (rows + columns),
        "parameters_before": rows * columns, "parameters_after": rank * (rows + columns),
        "flops_before": 2 * rows * columns, "flops_after": 2 * rank * (rows + columns),
        "energy_kept": kept, "relative_error": math.sqrt(1 - kept), "spectral_error": draw.uniform(0.01, 0.3),
        "before": effective(draw, full), "after": effective(draw, rank),
        "spectrum_before": spectrum(full, slope), "spectrum_after": spectrum(full, slope, rank),
        "overlap": {
            "output": {"largest": draw.uniform(20, 90), "median": draw.uniform(1, 20)},
            "input": {"largest": draw.uniform(20, 90), "median": draw.uniform(1, 20)},
            "leading": [{"k": k, "output": 1 - k / 900, "input": 1 - k / 700} for k in (1, 4, 16, 64, rank)],
        },
        "ladder": None, "damage": draw.uniform(1, 90), "damage_high": draw.random() < 0.1,
    }  # fmt: skip


def dense(name: str, rows: int, columns: int, reason: str) -> dict[str, Any]:
    """A layer that stayed as it was: most of what a row can have is null."""
    size = rows * columns
    layer = dict.fromkeys(factorised(random.Random(0), name, rows, columns))
    same = {"parameters_before": size, "parameters_after": size, "flops_before": 2 * size, "flops_after": 2 * size}
    return {
        **layer,
        "name": name,
        "kind": "linear",
        "shape": [rows, columns],
        "status": "dense",
        "reason": reason,
        **same,
    }


def training_run(name: str, decay: str, shift: float, names: list[str]) -> dict[str, Any]:
    """A run that is dense for 100 steps, then factorised and healed."""
    steps = list(range(0, 401, 25))

    def loss(step: int) -> float:
        return 3.6 + shift + (1.2 * math.exp(-(step - 100) / 90) if step >= 100 else -0.1)

    stages = [(step, "dense") for step in steps if step <= 100] + [
        (step, "factorised") for step in steps if step >= 100
    ]
    evaluations = [
        {"step": step, "stage": stage, "loss": at, "perplexity": math.exp(at), "top1": 0.9 - at / 10}
        for step, stage in stages
        for at in [3.5 + shift if stage == "dense" else loss(step)]
    ]
    figures = {
        stage: {"loss": at, "perplexity": math.exp(at), "top1": 0.9 - at / 10}
        for stage, at in (("dense", 3.5), ("factorised", 4.8), ("healed", loss(400)))
    }
    layers = {}
    places = [1, 2, 4, 8, 16, 32]
    for i, layer in enumerate(names):
        start = 100 + 20 * i
        layers[layer] = {
            "step": steps,
            **{key: [start * part * (1 - shift * s / 500) for s in steps] for key, part in DYNAMICS.items()},
            "spectrum": {"index": places, "values": [[9 / k - s / 4000 for k in places] for s in steps]},
        }
    settings = {"decay": decay, "decay_strength": 0.01, "lr": 5e-4, "optimizer": "adamw", "steps": 400, "teacher": None,
                "data": "train.txt", "seed": 0}  # fmt: skip
    return {
        "name": name, "settings": settings, "stages": figures, "evaluations": evaluations,
        "losses": [{"step": s, "loss": loss(s) + math.sin(s) / 20, "lr": 1e-6 * (420 - s)} for s in range(0, 401, 5)],
        "layers": layers,
    }  # fmt: skip


def bench() -> dict[str, Any]:
    def run(work: str, batch: int, length: int | None, speedup: float, ideal: float) -> dict[str, Any]:
        now = 120.0 / speedup
        return {
            "work": work, "batch": batch, "length": length, "unit": "tokens", "flops": 10**10, "median_ms": now,
            "p95_ms": now * 1.1, "throughput": 1e5 / now,
            "against": {"flops": 15 * 10**9, "median_ms": 120.0, "p95_ms": 131.5, "throughput": 833.3},
            "speedup": speedup, "interval": [speedup - 0.06, speedup + 0.05], "confidence": 0.95, "rounds": 24,
            "reached": speedup > 1, "ideal": ideal,
        }  # fmt: skip

    layer = {"kind": "conv1d", "shape": [768, 3072], "rank": 300, "input": [1, 128, 768], "dense_ms": 1.31}
    return {
        "machine": {"processor": "Two-core server", "cores": 2, "threads": 2, "gpu": None, "system": "Linux",
                    "python": "3.12", "torch": "2.11"},
        "options": {"rounds": "auto"},
        "model": {"name": "gpt2-half", "parameters": 82_000_000, "bytes": 328_000_000, "peak_memory": 612_000_000},
        "against": {"name": "gpt2", "parameters": 124_439_808, "bytes": 497_759_232, "peak_memory": None},
        "runs": [run("prefill", 1, 128, 1.31, 1.52), run("prefill", 8, 128, 1.44, 1.52),
                 run("token by token", 1, 32, 0.94, 1.5)],
        "layers": [
            {**layer, "names": [f"transformer.h.{i}.mlp.c_fc" for i in range(4)], "factorised_ms": 0.9, "speedup": 1.45,
             "interval": [1.4, 1.5], "slower": False},
            {**layer, "names": ["transformer.h.0.attn.c_proj"], "factorised_ms": 1.6, "speedup": 0.82,
             "interval": [0.8, 0.84], "slower": True},
        ],
    }  # fmt: skip


def surgery_body(
    blocks: int, name: str = "gpt2-half", first: str | None = None, trained: bool = True
) -> dict[str, Any]:
    """A model after surgery, healed and timed: four layers a block and two outside of them."""
    draw = random.Random(blocks)
    layers = [
        factorised(draw, f"transformer.h.{block}.{kind}", *shape)
        if kind != "attn.c_proj" or block % 3
        else dense(f"transformer.h.{block}.{kind}", *shape, "over break-even")
        for block in range(blocks)
        for kind, shape in WIDE.items()
    ]
    layers += [dense("lm_head", 50257, 768, "output head"), factorised(draw, "pooler", 768, 768)]
    if first is not None:
        layers[0]["name"] = first
    names = [layer["name"] for layer in layers[:3]]
    before = sum(layer["parameters_before"] for layer in layers)
    after = sum(layer["parameters_after"] for layer in layers)
    return {
        "format_version": 2, "about": "factorised", "name": name,
        "totals": {
            "layers_factorised": sum(layer["status"] == "factorised" for layer in layers),
            "layers_dense": sum(layer["status"] == "dense" for layer in layers),
            "parameters_before": before, "parameters_after": after, "share": after / before, "bytes_before": before * 4,
            "bytes_after": after * 4, "flops_before": before * 2, "flops_after": after * 2, "energy_kept": 0.9312,
        },
        "ladder": None,
        "source": {"reference": "gpt2", "hub_id": None, "revision": "607a30d", "digest": "sha256:8e1a40c1"},
        "command": "lrsurgery factorise gpt2 gpt2-half --rank 0.5 --include 'transformer.*'",
        "options": {"rank": ["0.5"], "init": "spectral", "seed": 0, "exclude": []},
        "versions": {"lrsurgery": "0.1", "torch": "2.11", "transformers": "5.17"},
        "notes": ["1 layer lost more than half of its energy", "Speed was measured on another machine than training"],
        "layers": layers,
        "training": [
            training_run(f"healed-{decay}", decay, shift, names)
            for decay, shift in (("frobenius", 0.1), ("l2", 0.3))
            if trained
        ],
        "bench": bench() if trained else None,
    }  # fmt: skip


def profile_body(blocks: int) -> dict[str, Any]:
    """A dense model before surgery, with what each rank of the ladder would give."""
    body = surgery_body(blocks, "gpt2", trained=False)
    steps = [
        {"rank": rank, "energy_kept": 1 - (1 - share) ** 2, "relative_error": 1 - share, "damage": 100 * (1 - share)}
        for rank, share in SHARES.items()
    ]
    kept = {"name", "kind", "shape", "reason", "full_rank", "break_even", "parameters_before", "flops_before", "before",
            "spectrum_before"}  # fmt: skip
    for layer in body["layers"]:
        layer.update({key: None for key in layer if key not in kept}, status="dense")
        if layer["full_rank"]:
            layer["ladder"] = [
                {**step, "to": round(layer["full_rank"] * share * 0.6), "parameters": round(size * share)}
                for step, share, size in zip(steps, SHARES.values(), [layer["parameters_before"]] * 4, strict=True)
            ]
    after = dict.fromkeys(("parameters_after", "share", "bytes_after", "flops_after", "energy_kept"))
    ladder = [
        {**step, "layers": 40 - i, "parameters": round(1e8 * SHARES[step["rank"]]), "share": SHARES[step["rank"]]}
        for i, step in enumerate(steps)
    ]
    totals = {**body["totals"], **after}
    return {**body, "about": "dense", "totals": totals, "ladder": ladder, "command": "lrsurgery report gpt2"}


def runs_body() -> dict[str, Any]:
    """Several training runs compared, and no layers."""
    names = ["transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"]
    decays = ("frobenius", "l2", "none")
    runs = [training_run(f"decay-{decay}", decay, 0.1 + 0.1 * i, names) for i, decay in enumerate(decays)]
    return {
        "format_version": 2,
        "about": "runs",
        "name": "three decays",
        "totals": None,
        "layers": [],
        "training": runs,
        "bench": None,
    }


# ---- what is in the file -------------------------------------------------------------------------------------------


class Parts(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles, as an HTML parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, list[str]]] = [("", [])]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append((tag, []))

    def handle_endtag(self, tag: str) -> None:
        self.texts.append(("", []))

    def handle_data(self, data: str) -> None:
        self.texts[-1][1].append(data)

    def inside(self, tag: str) -> list[str]:
        return ["".join(pieces) for owner, pieces in self.texts if owner == tag]


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


BODIES: dict[str, Callable[[], dict[str, Any]]] = {
    "after surgery": lambda: surgery_body(12),
    "before surgery": lambda: profile_body(12),
    "training runs": runs_body,
    "hostile names": lambda: {**surgery_body(2, HOSTILE, HOSTILE), "notes": [HOSTILE], "command": HOSTILE},
    "a thousand layers": lambda: surgery_body(250),
    "a plan": lambda: {**surgery_body(2, trained=False), "about": "plan"},
    "nothing but a name": lambda: {
        "format_version": 2,
        "about": "factorised",
        "name": "bare",
        "totals": None,
        "layers": [],
    },
}


@pytest.mark.parametrize("which", BODIES)
def test_the_json_comes_back_as_it_went_in(which: str) -> None:
    assert embedded(html_page(BODIES[which]())) == BODIES[which]()


def test_a_name_never_becomes_markup() -> None:
    page = html_page(BODIES["hostile names"]())
    assert [tag for tag, _ in Parts(page).tags] == [tag for tag, _ in Parts(html_page(BODIES["after surgery"]())).tags]
    assert page.count("</script") == 2
    assert "<img" not in page


def test_half_a_character_in_a_name_can_be_written(tmp_path: Path) -> None:
    body = {**BODIES["nothing but a name"](), "name": "caf\udce9"}  # what a file name that is no UTF-8 becomes
    page = html_page(body)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert embedded(page) == body


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_lacks_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        html_page({**surgery_body(1), "totals": {"share": number}})


def test_the_page_asks_for_nothing() -> None:
    parts = Parts(html_page(surgery_body(2)))
    addresses = [value for _, attributes in parts.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import", parts.inside("style")[0])
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|innerHTML|eval|import)\s*[(=]", parts.inside("script")[-1])


def test_the_policy_names_the_only_script_and_style() -> None:
    parts = Parts(html_page(surgery_body(2)))
    policy = next(a["content"] for tag, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src {allowed(parts.inside('script')[-1])};" in policy
    assert f"style-src {allowed(parts.inside('style')[0])};" in policy


# ---- what a browser makes of it ------------------------------------------------------------------------------------


def allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


LOOK = """
const frames = async () => { // sizes and scrolling are told by frames
  for (let i = 0; i < 4; i += 1) await new Promise(requestAnimationFrame);
};
const all = (query, root = document) => [...root.querySelectorAll(query)];
const one = (query) => document.querySelector(query);
const cells = (row) => Object.fromEntries(
  all(":scope > [data-value]", row).map((cell) => [cell.dataset.key, cell.dataset.value]));
const numbers = () => Object.fromEntries(
  all("table[id]").map((table) => [table.id, all(":scope > tbody > tr:not(.detail)", table).map(cells)]));
const rows = () => all("#layers-table > tbody > tr:not(.detail)");
const column = (key) => rows().map((row) => row.querySelector(`:scope > [data-key="${key}"]`).dataset.value ?? null);
const flush = () => dispatchEvent(new Event("beforeprint")); // a printed page has all rows
const set = async (query, value, event = "change") => {
  one(query).value = value; one(query).dispatchEvent(new Event(event, { bubbles: true })); await frames();
};
function overflowing() {
  const width = document.documentElement.clientWidth;
  const found = [];
  for (const node of all("body *")) {
    if (node.closest("svg, #tip") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const what = [node.tagName, node.id || node.textContent.slice(0, 40)];
    const apart = ["auto", "scroll"].includes(style.overflowX) || style.display === "inline";
    if (!apart && node.clientWidth && node.scrollWidth > node.clientWidth + 1) found.push(["cut", ...what]);
    const boxed = node.parentElement.closest(".scroll, pre");
    if (!boxed && node.getBoundingClientRect().right > width + 1) found.push(["wide", ...what]);
  }
  for (const text of all(".frame svg text")) {
    const [box, frame] = [text, text.ownerSVGElement].map((node) => node.getBoundingClientRect());
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1
      && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    if (!inside) found.push(["text", text.textContent]);
  }
  return found;
}
"""


# Chromium reads its commands from 3 and answers on 4
START = "import os, sys; [os.dup2(int(sys.argv[end - 2]), end) for end in (3, 4)]; os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """A headless Chromium, spoken to over its debugging pipe, so that the page stays as it was written."""

    def __init__(self, folder: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        theirs, self.write, self.read, answers = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs), str(answers), str(CHROMIUM), *options],
            pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (*ends, theirs, answers):
            os.close(end)
        self.number = 0
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 60)[0], "the browser says nothing"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser went away"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        to = {} if session is None else {"sessionId": session}
        message = {"id": self.number, "method": method, "params": parameters, **to}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        found: dict[str, Any] = answer["result"]
        return found

    def look(self, file: Path, script: str, width: int, media: str) -> dict[str, Any]:
        """What a script finds in the page at this width. Fails where the page complains, or asks for anything."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        self.ask("Emulation.setEmulatedMedia", session, media=media)
        self.events.clear()
        self.ask("Page.navigate", session, url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        expression = LOOK + f"(async () => {{ await frames(); {script} }})()"
        answer = self.ask("Runtime.evaluate", session, expression=expression, awaitPromise=True, returnByValue=True)
        self.ask("Target.closeTarget", targetId=target)
        said = [(event["method"], event["params"]) for event in self.events]
        complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert [event for event in said if event[0] in complaints] == []
        asked = [event["request"]["url"] for method, event in said if method == "Network.requestWillBeSent"]
        assert [address for address in asked if not address.startswith("data:")] == [file.as_uri()]
        assert "exceptionDetails" not in answer, answer
        found: dict[str, Any] = answer["result"]["value"]
        return found

    def close(self) -> None:
        self.ask("Browser.close")
        self.process.wait(30)
        os.close(self.write)
        os.close(self.read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium or Chrome on the path to draw the page with")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def look(browser: Browser, tmp_path: Path) -> Look:
    def drawn(page: str, script: str, width: int = 1280, media: str = "screen") -> dict[str, Any]:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        return browser.look(file, script, width, media)

    return drawn


def dig(row: Any, path: str) -> Any:
    """The JSON's own value of a column: before.nuclear, interval.0."""
    if path == "kept":
        return row["parameters_after"] / row["parameters_before"]
    if path == "shape" or path == "input":
        return " × ".join(map(str, row[path]))
    if path == "names":
        return " ".join(row[path])
    for key in path.split("."):
        row = row[int(key) if isinstance(row, list) else key] if row is not None else None
    return row


def check_numbers(shown: list[dict[str, str]], rows: list[dict[str, Any]], least: int) -> None:
    """Every cell of a table holds the JSON's value, and there are at least so many different columns of numbers."""
    assert len(shown) == len(rows)
    numeric = set()
    for cells, row in zip(shown, rows, strict=True):
        for key, text in cells.items():
            value = dig(row, key)
            if isinstance(value, float | int) and not isinstance(value, bool):
                numeric.add(key)
                assert float(text) == value, key
            elif key not in ("status", "slower", "reached"):  # put into words
                assert text == value, key
    assert len(numeric) >= least


def natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


@pytest.fixture(scope="module")
def thousand() -> dict[str, Any]:
    return surgery_body(250)


@pytest.mark.parametrize(
    ("which", "width"),
    [(which, 375) for which in BODIES if which != "nothing but a name"]
    + [("after surgery", 1280), ("before surgery", 1280), ("nothing but a name", 1280)],
)
def test_nothing_is_cut_off_or_wider_than_the_window(which: str, width: int, look: Look) -> None:
    script = """
      const buttons = all("button.layer").slice(0, 1);
      buttons.forEach((button) => button.click());
      await frames();
      return { width: innerWidth, page: document.documentElement.scrollWidth, overflowing: overflowing(),
        objects: document.body.innerText.match(/\\[object|undefined|NaN/),
        plots: all(".frame svg").length, images: all("img").length, title: document.title,
        names: buttons.map((button) => button.textContent), head: one("h1").textContent };
    """
    body = BODIES[which]()
    found = look(html_page(body), script, width)
    assert found["width"] == width
    assert found["page"] <= width
    assert found["overflowing"] == []
    assert found["images"] == 0
    assert found["objects"] is None
    assert found["head"] == body["name"]
    assert found["title"] == f"{body['name']}: rank report"
    assert found["names"] == [layer["name"] for layer in body["layers"][:1]]
    assert found["plots"] >= (0 if which == "nothing but a name" else 3)


def test_every_number_of_the_tables_is_the_jsons(look: Look) -> None:
    body = surgery_body(12)
    script = """
      one("#heat-quantity").value = "before.stable";
      one("#heat-quantity").dispatchEvent(new Event("change"));
      const heat = all("td[data-layer][data-value]").map(({ dataset }) => [dataset.layer, dataset.value]);
      return { tables: numbers(), heat: Object.fromEntries(heat),
        summary: all("#summary [data-value]").map((node) => node.dataset.value) };
    """
    found = look(html_page(body), script)
    check_numbers(found["tables"]["layers-table"], body["layers"], 16)
    check_numbers(found["tables"]["runs-table"], body["training"], 13)
    check_numbers(found["tables"]["bench-table"], body["bench"]["runs"], 13)
    check_numbers(found["tables"]["bench-layers-table"], body["bench"]["layers"], 6)
    heat = {
        layer["name"]: layer["before"]["stable"]
        for layer in body["layers"]
        if layer["before"] and ".h." in layer["name"]
    }
    assert {name: float(value) for name, value in found["heat"].items()} == heat
    healed = body["training"][-1]["stages"]["healed"]["perplexity"]
    said = {float(value) for value in found["summary"]}
    totals = body["totals"]
    assert {totals["share"], totals["energy_kept"], totals["bytes_after"], healed, 1.31, 1.25} <= said


def test_headers_sort_a_thousand_layers_and_the_box_finds_some(thousand: dict[str, Any], look: Look) -> None:
    keys = ["name", "rank", "energy_kept", "kind", "after.stable", "damage"]
    script = f"""
      const first = rows().length;
      one("#layers .tall").scrollTop = 1e6;
      await frames();
      const scrolled = rows().length;
      const sorted = {{}};
      for (const key of {keys}) {{
        const button = one(`#layers-table th[data-key="${{key}}"] button`);
        sorted[key] = [];
        for (let i = 0; i < 3; i += 1) {{
          button.click();
          flush();
          sorted[key].push([one(`#layers-table th[data-key="${{key}}"]`).getAttribute("aria-sort"), column("name")]);
        }}
      }}
      await set("#layer-search", "h.7 C_FC", "input");
      const words = column("name");
      await set("#layer-search", "", "input");
      await set("#layer-status", "dense");
      return {{ first, scrolled, sorted, words, dense: column("name"), count: one("#layer-count").textContent }};
    """
    layers = thousand["layers"]
    found = look(html_page(thousand), script)
    names = [layer["name"] for layer in layers]
    assert found["first"] == 100
    assert found["scrolled"] == 200
    for key in keys:
        there = [layer for layer in layers if dig(layer, key) is not None]
        absent = [layer["name"] for layer in layers if dig(layer, key) is None]

        def by(layer: dict[str, Any], key: str = key) -> Any:
            return natural(layer[key]) if isinstance(layer.get(key), str) else dig(layer, key)

        up, down, off = found["sorted"][key]
        assert up == ["ascending", [layer["name"] for layer in sorted(there, key=by)] + absent], key
        assert down == ["descending", [layer["name"] for layer in sorted(there, key=by, reverse=True)] + absent], key
        assert off == [None, names], key
    assert found["words"] == [name for name in names if "h.7" in name and "c_fc" in name]
    assert found["dense"] == [layer["name"] for layer in layers if layer["status"] == "dense"]
    assert found["count"] == f"{len(found['dense'])} of {len(names):,} layers"


def test_rows_open_colours_turn_and_files_are_made(look: Look) -> None:
    script = """
      const saved = {};
      const made = [];
      URL.createObjectURL = (blob) => { made.push(blob); return "data:,"; };
      HTMLAnchorElement.prototype.click = function () { saved[this.download] = made.pop(); };
      one("#download-csv").click();
      one("#download-json").click();
      const [csv, json] = [await saved["gpt2-half.csv"].text(), await saved["gpt2-half.json"].text()];

      one("button.layer").click();
      await frames();
      const detail = one("tr.detail");
      const title = detail.querySelector("h3").textContent;
      const figures = all("figcaption strong", detail).map((node) => node.textContent);
      const angles = all("table", detail).map((table) => all("[data-value]", table).map((cell) => cell.dataset.value));
      detail.querySelector("thead button").click(); // a table inside sorts without closing it
      const stays = detail.isConnected && one("button.layer").getAttribute("aria-expanded");
      one("button.layer").click();
      const closed = all("tr.detail").length;
      rows()[3].querySelector("td").click();
      const other = one("tr.detail h3").textContent;

      const light = getComputedStyle(document.body).backgroundColor;
      one("#theme").click();
      const dark = getComputedStyle(document.body).backgroundColor;
      const cell = one("td.cell[tabindex='0']");
      cell.focus();
      cell.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      const next = document.activeElement.dataset.layer;
      const tip = one("#tip").textContent;
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
      const revealed = one("tr.detail h3").textContent;
      await set("#dynamics-layer", "1");
      const dynamics = all("#dynamics figcaption").map((node) => node.textContent);
      return { csv, json, title, figures, angles, stays, closed, other, light, dark, next, tip, revealed, dynamics };
    """
    body = surgery_body(12)
    layers = body["layers"]
    found = look(html_page(body), script)
    assert json.loads(found["json"]) == body
    read = list(csv.DictReader(io.StringIO(found["csv"])))
    assert [row["name"] for row in read] == [layer["name"] for layer in layers]
    assert [float(row["energy_kept"] or -1) for row in read] == [layer["energy_kept"] or -1 for layer in layers]
    assert found["title"] == layers[0]["name"]
    assert found["figures"][:3] == ["Singular values", "Energy kept", "Overlap of the leading directions"]
    assert float(found["angles"][0][1]) == layers[0]["overlap"]["output"]["largest"]
    assert [float(value) for value in found["angles"][1]] == [
        step[key] for step in layers[0]["overlap"]["leading"] for key in ("k", "output", "input")
    ]
    assert found["stays"] == "true"
    assert found["closed"] == 0
    assert found["other"] == layers[3]["name"]
    assert found["light"] != found["dark"]
    assert found["next"] == "transformer.h.1.attn.c_attn"
    assert found["tip"].startswith("transformer.h.1.attn.c_attnenergy kept: ")
    assert found["revealed"] == "transformer.h.1.attn.c_attn"
    assert "Singular values over training healed-l2" in found["dynamics"]


def test_before_surgery_the_chosen_rank_fills_the_table(look: Look) -> None:
    body = profile_body(3)
    script = """
      const before = [one("#layer-level").value, column("energy_kept")];
      await set("#layer-level", "0.75");
      return { before, after: column("energy_kept"), rank: column("rank"), ladder: numbers()["ladder-table"],
        heat: all("td.cell[data-value]").map((cell) => cell.dataset.value) };
    """
    found = look(html_page(body), script)

    def at(rank: str, key: str) -> list[Any]:
        return [
            next((step[key] for step in layer["ladder"] or [] if step["rank"] == rank), None)
            for layer in body["layers"]
        ]

    def read(texts: list[str | None]) -> list[float | None]:
        return [None if text is None else float(text) for text in texts]

    assert found["before"][0] == "params:0.5"  # the step nearest to half the size
    assert read(found["before"][1]) == at("params:0.5", "energy_kept")
    assert read(found["after"]) == at("0.75", "energy_kept")
    assert read(found["rank"]) == at("0.75", "to")
    check_numbers(found["ladder"], body["ladder"], 6)
    assert {float(value) for value in found["heat"]} == {
        value for value in at("0.75", "energy_kept") if value is not None
    }


def test_a_formula_in_a_name_stays_text_in_the_csv(look: Look) -> None:
    script = """
      const columns = [{ key: "name", value: (row) => row }, { key: "x", value: () => -1.5 }];
      return { csv: csvOf(columns, ["=1+1", 'a "b", c', "plain"]) };
    """
    found = look(html_page(surgery_body(1)), script)
    assert list(csv.reader(io.StringIO(found["csv"]))) == [
        ["name", "x"],
        ["'=1+1", "-1.5"],
        ['a "b", c', "-1.5"],
        ["plain", "-1.5"],
    ]


def test_paper_is_light_and_has_all_rows_and_no_controls(thousand: dict[str, Any], look: Look) -> None:
    script = """
      document.documentElement.dataset.theme = "dark";
      flush();
      await frames();
      const shown = (node) => node.getClientRects().length > 0;
      const box = one("#layers .tall");
      const controls = all("button, input, nav").filter((node) => shown(node) && !node.closest("th"));
      return { rows: rows().length, controls: controls.length,
        whole: box.scrollHeight <= box.clientHeight + 1, back: getComputedStyle(document.body).backgroundColor,
        ink: getComputedStyle(document.body).color };
    """
    found = look(html_page(thousand), script, 1040, "print")
    assert (found["rows"], found["controls"], found["whole"]) == (len(thousand["layers"]), 0, True)
    assert (found["back"], found["ink"]) == ("rgb(255, 255, 255)", "rgb(28, 30, 33)")
