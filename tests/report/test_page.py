"""The HTML report: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.browser import CHROMIUM, Browser
from support.reports import WHICH, Reports, Shop

from lrsurgery.report.schema import Report
from lrsurgery.report.views.html import render, view

pytestmark = pytest.mark.process
Look = Callable[..., dict[str, Any]]


def plain(found: object) -> Any:
    """As JSON brings it back: tuples become lists."""
    return json.loads(json.dumps(found))


# what is in the file


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


def embedded(page: str, name: str = "report") -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("which", WHICH)
def test_the_json_comes_back_as_it_went_in(which: str, report_of: Reports) -> None:
    found = report_of(which)
    page = render(found)
    assert embedded(page) == plain(found.to_dict())
    assert Report.from_dict(embedded(page)) == found
    assert embedded(page, "view") == plain(view(found))


def test_a_name_never_becomes_markup(report_of: Reports) -> None:
    page = render(report_of("hostile names"))
    assert [tag for tag, _ in Parts(page).tags] == [tag for tag, _ in Parts(render(report_of("after surgery"))).tags]
    assert page.count("</script") == 3
    assert "<img" not in page


def test_half_a_character_in_a_name_can_be_written(report_of: Reports, tmp_path: Path) -> None:
    found = replace(report_of("a plan"), name="caf\udce9")  # what a file name that is no UTF-8 becomes
    page = render(found)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert embedded(page) == plain(found.to_dict())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_lacks_is_refused(number: float, report_of: Reports) -> None:
    found = report_of("calibrated")
    rows = (replace(found.rows[0], relative_error=number), *found.rows[1:])
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(replace(found, rows=rows))


def test_the_page_asks_for_nothing(report_of: Reports) -> None:
    parts = Parts(render(report_of("after surgery")))
    addresses = [value for _, attributes in parts.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import", parts.inside("style")[0])
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|innerHTML|eval|import)\s*[(=]", parts.inside("script")[-1])


def test_the_policy_names_the_only_script_and_style(report_of: Reports) -> None:
    parts = Parts(render(report_of("after surgery")))
    policy = next(a["content"] for tag, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src {allowed(parts.inside('script')[-1])};" in policy
    assert f"style-src {allowed(parts.inside('style')[0])};" in policy


# what it says


def said(found: Report) -> str:
    """Tiles and sentences as a reader sees them."""
    made = plain(view(found))
    tiles = [[tile["label"], " ", tile["value"], " ", *tile["note"]] for tile in made["tiles"]]
    text = [part if isinstance(part, str) else part.get("text", part.get("code")) for parts in tiles for part in parts]
    words = [
        part if isinstance(part, str) else part.get("text", part.get("code"))
        for parts in made["sentences"]
        for part in parts
    ]
    return " ".join(["".join(text), "".join(words)])


def test_energy_kept_is_of_all_replaced_weights_together(report_of: Reports, shop: Shop) -> None:
    found = report_of("untrained")
    dense = tf.GPT2LMHeadModel.from_pretrained(shop.dense()).double()
    kept = norms = 0.0
    for row in found.factorised:
        singular = dense.get_submodule(row.name).weight.detach().svd().S.square()
        kept, norms = kept + float(singular[: row.rank].sum()), norms + float(singular.sum())
    tile = next(tile for tile in view(found)["tiles"] if tile["label"] == "Energy kept")
    assert tile["value"]["value"] == pytest.approx(kept / norms, rel=1e-5)


def test_the_page_says_what_calibration_looked_at_and_predicts(report_of: Reports) -> None:
    found = report_of("calibrated")
    assert found.calibration is not None
    assert found.predicted_loss is not None
    text = said(found)
    told = found.calibration
    assert f"importance {told['metric']}, from 4 sequences of {told['tokens']} tokens of {told['data']}." in text
    assert f"predicted to add {found.predicted_loss:.3g} to the loss of a {found.calibration['scored_in']}" in text
    assert "calibrat" not in said(report_of("untrained"))


def texts_of(parts: list[Any]) -> str:
    return "".join(part if isinstance(part, str) else part.get("code", part.get("text")) for part in parts)


def test_options_are_told_by_name_those_of_calibration_too(report_of: Reports) -> None:
    found = report_of("calibrated")
    told = {name: texts_of(parts) for name, parts in plain(view(found))["options"]}
    assert told["budget"] == "0.7"
    assert told["init"] == found.options["init"]
    assert told["calibration samples"] == "4"
    assert told["calibration data"] == found.options["calibration"]["data"]
    assert told["from scratch"] == "false"
    assert "rank" not in told  # a budget has none


def test_bench_tells_its_models_machine_and_slower_layers(report_of: Reports) -> None:
    found = report_of("after surgery")
    assert found.bench is not None
    made = plain(view(found))
    told = {name: texts_of(parts) for name, parts in made["bench"]}
    assert told["threads"] == str(found.bench["machine"]["threads"])
    assert told["new tokens"] == "2"
    sizes = numbers_in(dict(made["bench"])["this model"])
    assert {found.bench["model"]["parameters"], found.bench["model"]["bytes"]} <= sizes
    slower = {name for row in found.bench["layers"] if row["slower"] for name in row["names"]}
    assert {part["code"] for part in made["slower"] if "code" in part} <= slower
    assert numbers_in(made["slower"]) == ({len(slower)} if slower else set())
    assert made["works"] == ["prefill, 1 × 8", "decode, 1 × 8", "prefill, 1 × 16", "decode, 1 × 16"]


def numbers_in(value: object) -> set[float]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    parts = value.values() if isinstance(value, dict) else value
    return set().union(*map(numbers_in, parts))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", WHICH)
def test_what_is_said_are_numbers_of_the_report(which: str, report_of: Reports) -> None:
    found = report_of(which)
    made = plain(view(found))
    figures = [tile["value"]["value"] for tile in made["tiles"]] + [
        part["value"]
        for parts in (*made["sentences"], *(tile["note"] for tile in made["tiles"]))
        for part in parts
        if isinstance(part, dict) and "value" in part
    ]
    known = numbers_in(plain(found.to_dict()))
    counts = {float(n) for n in range(len(found.rows) + len(found.training) + 1)}  # of layers or runs of some sort
    energies = [tile["value"]["value"] for tile in made["tiles"] if tile["label"] == "Energy kept"]  # tested above
    assert set(figures) <= known | counts | set(energies)
    assert bool(figures) == (which != "nothing but a name")


# what a browser makes of it


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        missing = "no Chromium or Chrome on the path to draw the page with"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def look(browser: Browser, tmp_path: Path) -> Look:
    def drawn(found: Report, script: str, width: int = 1280, media: str = "screen") -> dict[str, Any]:
        file = tmp_path / "page.html"
        file.write_text(render(found), encoding="utf-8")
        return browser.look(file, script, width, media)

    return drawn


def dig(row: Any, path: str) -> Any:
    """The JSON's own value of a column: before.nuclear, interval.0."""
    if path == "kept":
        return row["parameters_after"] / row["parameters_before"]
    for key in path.split("."):
        row = row[int(key) if isinstance(row, list) else key] if row is not None else None
    if isinstance(row, list):
        return {"names": " ", "shape": " × ", "input": " × "}.get(path, ", ").join(map(str, row)) or None
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


def first_factorisable(layers: list[dict[str, Any]]) -> list[int]:
    """Position of the first layer that has something to draw; none where no layer has."""
    return [i for i, layer in enumerate(layers) if layer["full_rank"] is not None][:1]


def natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", text)]


@pytest.mark.parametrize(
    ("which", "width"),
    [(which, 375) for which in WHICH if which != "nothing but a name"]
    + [("after surgery", 1280), ("before surgery", 1280), ("nothing but a name", 1280)],
)
def test_nothing_is_cut_off_or_wider_than_the_window(which: str, width: int, report_of: Reports, look: Look) -> None:
    script = """
      const buttons = FIRST.map((at) => all("button.layer")[at]);
      buttons.forEach((button) => button.click());
      await frames();
      return { width: innerWidth, page: document.documentElement.scrollWidth, overflowing: overflowing(),
        objects: document.body.innerText.match(/\\[object|undefined|NaN/),
        plots: all(".frame svg").length, images: all("img").length, title: document.title,
        names: buttons.map((button) => button.textContent), head: one("h1").textContent };
    """
    report = report_of(which)
    body = plain(report.to_dict())
    first = first_factorisable(body["layers"])
    found = look(report, script.replace("FIRST", str(first)), width)
    assert found["width"] == width
    assert found["page"] <= width
    assert found["overflowing"] == []
    assert found["images"] == 0
    assert found["objects"] is None
    assert found["head"] == body["name"]
    assert found["title"] == f"{body['name']}: rank report"
    assert found["names"] == [body["layers"][at]["name"] for at in first]
    # of a layer its spectrum and energy; of a run at least loss, perplexity and the learning rate
    assert found["plots"] >= 2 * len(first) + 3 * len(body["training"][:1])


def test_every_number_of_the_tables_is_the_jsons(report_of: Reports, look: Look) -> None:
    report = report_of("after surgery")
    body = plain(report.to_dict())
    script = """
      one("#heat-quantity").value = "before.stable";
      one("#heat-quantity").dispatchEvent(new Event("change"));
      const heat = all("td[data-layer][data-value]").map(({ dataset }) => [dataset.layer, dataset.value]);
      return { tables: numbers(), heat: Object.fromEntries(heat),
        summary: all("#summary [data-value]").map((node) => node.dataset.value) };
    """
    found = look(report, script)
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
    shown = {float(value) for value in found["summary"]}
    totals = body["totals"]
    assert {totals["share"], totals["parameters_after"], healed, body["bench"]["runs"][0]["speedup"]} <= shown
    made = plain(view(report))
    assert shown == numbers_in(made["sentences"]) | numbers_in([{**tile, "bar": None} for tile in made["tiles"]])


def test_headers_sort_hundreds_of_layers_and_the_box_finds_some(report_of: Reports, look: Look) -> None:
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
    report = report_of("hundreds of layers")
    layers = plain(report.to_dict())["layers"]
    found = look(report, script)
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


def test_rows_open_colours_turn_and_files_are_made(report_of: Reports, look: Look) -> None:
    script = """
      const saved = {};
      const made = [];
      URL.createObjectURL = (blob) => { made.push(blob); return "data:,"; };
      HTMLAnchorElement.prototype.click = function () { saved[this.download] = made.pop(); };
      one("#download-csv").click();
      one("#download-json").click();
      const [csv, json] = [await saved["healed-frobenius.csv"].text(), await saved["healed-frobenius.json"].text()];

      const button = all("button.layer")[FIRST];
      button.click();
      await frames();
      const detail = one("tr.detail");
      const title = detail.querySelector("h3").textContent;
      const figures = all("figcaption strong", detail).map((node) => node.textContent);
      const angles = all("table", detail).map((table) => all("[data-value]", table).map((cell) => cell.dataset.value));
      detail.querySelector("thead button").click(); // a table inside sorts without closing it
      const stays = detail.isConnected && button.getAttribute("aria-expanded");
      button.click();
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
    report = report_of("after surgery")
    body = plain(report.to_dict())
    layers = body["layers"]
    (at,) = first_factorisable(layers)
    found = look(report, script.replace("FIRST", str(at)))
    assert json.loads(found["json"]) == body
    read = list(csv.DictReader(io.StringIO(found["csv"])))
    assert [row["name"] for row in read] == [layer["name"] for layer in layers]
    numeric = [key for key in read[0] if key not in ("name", "kind", "shape", "status", "form")]
    assert len(numeric) >= 18
    for row, layer in zip(read, layers, strict=True):
        told = {key: float(row[key]) if row[key] else None for key in numeric}
        assert told == {key: dig(layer, key) for key in numeric}
        assert row["form"] == (layer["form"] or "")
    assert found["title"] == layers[at]["name"]
    assert found["figures"][:3] == ["Singular values", "Energy kept", "Overlap of the leading directions"]
    assert float(found["angles"][0][1]) == layers[at]["overlap"]["output"]["largest"]
    assert [float(value) for value in found["angles"][1]] == [
        step[key] for step in layers[at]["overlap"]["leading"] for key in ("k", "output", "input")
    ]
    assert found["stays"] == "true"
    assert found["closed"] == 0
    assert found["other"] == layers[3]["name"]
    assert found["light"] != found["dark"]
    assert found["next"] == "transformer.h.1.attn.c_attn"
    assert found["tip"].startswith("transformer.h.1.attn.c_attnenergy kept: ")
    assert found["revealed"] == "transformer.h.1.attn.c_attn"
    assert "Singular values over training healed-frobenius" in found["dynamics"]


def test_before_surgery_the_chosen_rank_fills_the_table(report_of: Reports, look: Look) -> None:
    report = report_of("before surgery")
    body = plain(report.to_dict())
    script = """
      const before = [one("#layer-level").value, column("energy_kept")];
      await set("#layer-level", "0.75");
      return { before, after: column("energy_kept"), rank: column("rank"), ladder: numbers()["ladder-table"],
        heat: all("td.cell[data-value]").map((cell) => cell.dataset.value) };
    """
    found = look(report, script)

    def at(rank: str, key: str) -> list[Any]:
        return [
            next((step[key] for step in layer["ladder"] or [] if step["rank"] == rank), None)
            for layer in body["layers"]
        ]

    def read(texts: list[str | None]) -> list[float | None]:
        return [None if text is None else float(text) for text in texts]

    nearest = min(body["ladder"], key=lambda step: abs(step["share"] - 0.5))["rank"]
    assert found["before"][0] == nearest
    assert read(found["before"][1]) == at(nearest, "energy_kept")
    assert read(found["after"]) == at("0.75", "energy_kept")
    assert read(found["rank"]) == at("0.75", "to")
    check_numbers(found["ladder"], body["ladder"], 6)
    assert {float(value) for value in found["heat"]} == {
        value for value in at("0.75", "energy_kept") if value is not None
    }


def test_a_formula_in_a_name_stays_text_in_the_csv(report_of: Reports, look: Look) -> None:
    script = """
      const columns = [{ key: "name", value: (row) => row }, { key: "x", value: () => -1.5 }];
      return { csv: csvOf(columns, ["=1+1", 'a "b", c', "plain"]) };
    """
    found = look(report_of("a plan"), script)
    assert list(csv.reader(io.StringIO(found["csv"]))) == [
        ["name", "x"],
        ["'=1+1", "-1.5"],
        ['a "b", c', "-1.5"],
        ["plain", "-1.5"],
    ]


def test_paper_is_light_and_has_all_rows_and_no_controls(report_of: Reports, look: Look) -> None:
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
    report = report_of("hundreds of layers")
    found = look(report, script, 1040, "print")
    assert (found["rows"], found["controls"], found["whole"]) == (len(report.rows), 0, True)
    assert (found["back"], found["ink"]) == ("rgb(255, 255, 255)", "rgb(28, 30, 33)")
