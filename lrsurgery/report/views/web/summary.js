// @ts-check
// The summary: a few big figures, and sentences for a reader who goes no further. What they say is Python's.

const barOf = (share) =>
  html(
    "div",
    { class: "bars", "aria-hidden": "true" },
    html("i", { class: "was" }),
    html("i", { class: "is", style: { width: `${100 * share}%` } }),
  );

const tileOf = ({ label, value, note, bar }) =>
  html(
    "div",
    { class: "big" },
    html("div", { class: "label" }, label),
    html("div", { class: "value" }, partOf(value)),
    known(bar) && barOf(bar),
    note.length > 0 && html("div", { class: "note" }, note.map(partOf)),
  );

function summary() {
  if (!view.sentences.length) return null;
  return section(
    "summary",
    "Summary",
    view.tiles.length > 0 && html("div", { class: "bigs" }, view.tiles.map(tileOf)),
    html(
      "div",
      { class: "prose" },
      view.sentences.map((parts) => html("p", {}, parts.map(partOf))),
    ),
  );
}
