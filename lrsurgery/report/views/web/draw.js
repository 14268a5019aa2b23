"use strict";
// @ts-check
// The report itself, elements, numbers as text, the note beside the pointer. Everything from the report enters the
// page as text nodes and attributes, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const view = JSON.parse(document.getElementById("view").textContent); // words, tiles and columns, as Python made them

const NAMESPACE = "http://www.w3.org/2000/svg";
const SERIES = 8; // --series-0 ... --series-7 in page.css
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const VIRIDIS = [
  "440154",
  "482475",
  "414487",
  "355f8d",
  "2a788e",
  "21918c",
  "22a884",
  "44bf70",
  "7ad151",
  "bddf26",
  "fde725",
].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const ruler = document.createElement("canvas").getContext("2d");

// ---- elements -----------------------------------------------------------------------------------------------------

function dress(node, properties, children) {
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, action] of Object.entries(value)) node.addEventListener(event, action);
    else if (key === "style") for (const [name, text] of Object.entries(value)) node.style.setProperty(name, text);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const html = (tag, properties, ...children) => dress(document.createElement(tag), properties, children);
const svg = (tag, properties, ...children) => dress(document.createElementNS(NAMESPACE, tag), properties, children);
const known = (value) => value !== null && value !== undefined;
const capital = (text) => text[0].toUpperCase() + text.slice(1);

// ---- numbers ------------------------------------------------------------------------------------------------------

function scaled(value, base, units, space) {
  let at = 0;
  while (Math.abs(value) >= base * 0.9995 && at < units.length - 1) {
    value /= base;
    at += 1;
  }
  const digits = at === 0 ? 0 : Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
  return (
    value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }) +
    (units[at] && space + units[at])
  );
}

const show = {
  whole: (value) => value.toLocaleString("en"),
  count: (value) => scaled(value, 1000, ["", "k", "M", "G", "T"], "\u202f"),
  share(value) {
    const digits = value > 0.99 && value < 1 ? 2 : 1;
    return (100 * value).toFixed(digits) + "\u202f%";
  },
  number(value) {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 1e-3 || size >= 1e7)
      return value.toExponential(1).replace(".0", "").replace(/e[+]?/, "\u2009e").replace("e-", "e\u2212");
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return value.toLocaleString("en", {
      maximumSignificantDigits: 3,
      minimumSignificantDigits: Number.isInteger(value) ? 1 : 3,
    });
  },
  tick: (value) =>
    Math.abs(value) < 1e-3 || Math.abs(value) >= 1e3
      ? show.number(value)
      : value.toLocaleString("en", { maximumSignificantDigits: 5 }),
  times: (value) => value.toFixed(2) + "\u00d7",
  degrees: (value) => value.toFixed(1) + "\u00b0",
};

/** A layer's name, which may break after its dots. */
const broken = (name) =>
  name.split(".").flatMap((part, i, all) => (i < all.length - 1 ? [`${part}.`, html("wbr")] : part));

/** A number as text that keeps the report's own number beside it. */
const figure = (value, format = show.number) => html("span", { "data-value": value, class: "n" }, format(value));

/** A part of a sentence that Python made: a text, a figure of the report with its text, code, or a link. */
const partOf = (part) =>
  typeof part === "string"
    ? part
    : "code" in part
      ? html("code", {}, part.code)
      : "href" in part
        ? html("a", { href: part.href, rel: "noopener noreferrer" }, part.text)
        : figure(part.value, () => part.text);

function viridis(at) {
  const place = Math.min(1, Math.max(0, at)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  const mix = VIRIDIS[low].map((from, i) => Math.round(from + (place - low) * (VIRIDIS[low + 1][i] - from)));
  return `rgb(${mix.join(" ")})`;
}

// ---- the note that follows the pointer ----------------------------------------------------------------------------

function showTip(lines, x, y) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines.map((line) => html("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, document.documentElement.clientWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > window.innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}
