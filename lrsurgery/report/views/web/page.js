// @ts-check
// The page: header, ladder, explanations; the start.

const section = (id, title, ...content) => html("section", { id }, html("h2", {}, title), ...content);
const ABOUT = {
  dense: "Profile of a dense model, before any surgery",
  plan: "Planned surgery; nothing has been changed yet",
  factorised: "Low-rank model, after surgery",
  runs: "Training runs compared",
};

function optionPairs(options) {
  const text = (value) =>
    Array.isArray(value)
      ? value.map((one) => (typeof one === "object" ? JSON.stringify(one) : String(one))).join(", ")
      : typeof value === "object"
        ? JSON.stringify(value)
        : String(value);
  return Object.entries(options || {})
    .filter(([, value]) => known(value) && !(Array.isArray(value) && !value.length))
    .map(([key, value]) => [words(key), typeof value === "number" ? figure(value, String) : text(value)]);
}

function header() {
  const source = report.source || {};
  const from = [
    source.reference,
    source.hub_id !== source.reference && source.hub_id,
    source.revision && `revision ${source.revision}`,
  ]
    .filter(Boolean)
    .join(", ");
  const theme = html("button", { type: "button", id: "theme", on: { click: turnTheme } });
  const data = html(
    "button",
    {
      type: "button",
      id: "download-json",
      on: {
        click: () =>
          save(
            JSON.stringify(JSON.parse(document.getElementById("report").textContent), null, 2) + "\n",
            "application/json",
            fileName("json"),
          ),
      },
    },
    "Download JSON",
  );
  return html(
    "header",
    {},
    html(
      "div",
      { class: "top" },
      html("p", { class: "what" }, ABOUT[report.about] || "Rank report"),
      html("span", { class: "gap" }),
      data,
      theme,
    ),
    html("h1", {}, report.name || "Rank report"),
    report.command && html("pre", { class: "command" }, html("code", {}, report.command)),
    html(
      "p",
      { class: "muted origin" },
      [
        from && report.about !== "runs" && `from ${from}`,
        source.digest && `digest ${source.digest}`,
        ...Object.entries(report.versions || {}).map(([key, value]) => `${key} ${value}`),
      ]
        .filter(Boolean)
        .flatMap((part, i) => [i ? " \u00b7 " : "", html("span", {}, part)]),
    ),
  );
}

const isDark = () =>
  (document.documentElement.dataset.theme ||
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function nameTheme() {
  const button = document.getElementById("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
}

function turnTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
}

// ---- ladder -------------------------------------------------------------------------------------------------------

// a layer's ladder has its rank where the model's has the number of layers
const ladderColumns = columnsOf([
  view.ladder[0],
  { key: "to", label: "rank kept", form: "count" },
  ...view.ladder.slice(1),
]);

function ladderSection() {
  const steps = report.ladder || [];
  if (!steps.length) return null;
  const drawn = steps.filter((step) => known(step.share) && known(step.energy_kept)).sort((a, b) => a.share - b.share);
  const percent = (value) => `${Number((100 * value).toPrecision(4))}\u202f%`;
  const kindOf = (step) => (step.rank.includes(":") ? `${step.rank.split(":")[0]}:` : "of full rank");
  const kinds = [...new Set(steps.filter((step) => drawn.includes(step)).map(kindOf))];
  return section(
    "ladder",
    "What each rank would give",
    html(
      "p",
      { class: "lead" },
      "The whole model at each rank asked for; energy and error over the layers that would be factorised.",
    ),
    html(
      "div",
      { class: "ladder" },
      dataTable({ columns: ladderColumns, rows: steps, caption: "Ladder of ranks", name: "ladder-table" }).box,
      drawn.length > 1 &&
        plot({
          title: "Energy kept",
          note: "against the share of parameters",
          height: 260,
          x: { label: "share of parameters", format: percent },
          y: { pad: 0.16, format: percent, exact: show.share },
          series: kinds.map((name, i) => ({
            name,
            paint: colour(i),
            line: dash(i),
            dots: true,
            points: drawn.filter((step) => kindOf(step) === name).map((step) => [step.share, step.energy_kept]),
          })),
          spots: drawn
            .filter((step) => kindOf(step) === kinds[0]) // labels of the others would lie on top of each other
            .map((step) => ({ x: step.share, y: step.energy_kept, label: step.rank, paint: colour(0) })),
        }),
    ),
  );
}

// ---- words --------------------------------------------------------------------------------------------------------

const WORDS = [
  [
    "Rank",
    "How many independent directions a layer\u2019s matrix uses. A matrix of m by n is replaced by two, m by r and r by n; r is the rank kept, and the full rank is the smaller of m and n.",
  ],
  [
    "Break-even rank",
    "The largest rank at which the two factors have fewer parameters than the matrix that they replace.",
  ],
  [
    "Energy kept",
    "The sum of the squared singular values that are kept, over the sum of all of them. 100\u202f% is the same matrix. It speaks of weights, not of the model\u2019s answers.",
  ],
  [
    "Relative error, spectral error",
    "The size of what the layer lost against the size of what it was: in the Frobenius norm (all directions together), and in the spectral norm (the largest direction lost).",
  ],
  [
    "Nuclear, entropy and stable rank",
    "Three measures of how many directions matter, which need no threshold. Nuclear rank: the sum of the singular values over the largest. Entropy rank: the exponential of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007). Stable rank: the sum of their squares over the largest square; the least of the three to be moved by small values.",
  ],
  [
    "Principal angles, overlap",
    "How far the main directions of the dense layer and of the factorised one lie apart. An angle of 0\u00b0 or an overlap of 1 is the same subspace; 90\u00b0 or 0 has nothing in common.",
  ],
  [
    "Predicted damage",
    [
      "Share of parameters removed times stable rank. Xu 2026, ",
      html("a", { href: "https://arxiv.org/abs/2604.18085", rel: "noopener noreferrer" }, "arXiv:2604.18085"),
      ", found compression ratio times stable rank to correlate with accuracy loss (Pearson 0.84 to 0.89 over Qwen3 and Gemma3); a rough guide, not a measurement.",
    ],
  ],
  [
    "Healing",
    "Training after surgery, to win back what surgery lost. Frobenius decay pulls on the product of the two factors, L2 on each of them alone.",
  ],
  [
    "Speedup, ideal",
    "Dense time over factorised time of the same work, with the interval in which repeated measurements put it. Ideal is the ratio of the arithmetic; memory and overhead keep real runs from it.",
  ],
];

function explanation() {
  return section(
    "words",
    "What the words mean",
    html(
      "dl",
      { class: "words" },
      WORDS.map(([term, text]) => html("div", {}, html("dt", {}, term), html("dd", {}, text))),
    ),
  );
}

function notes() {
  const said = report.notes || [];
  return said.length
    ? html(
        "section",
        { id: "notes", class: "notes" },
        html("h2", {}, said.length === 1 ? "Note" : "Notes"),
        html(
          "ul",
          {},
          said.map((note) => html("li", {}, note)),
        ),
      )
    : null;
}

function options() {
  const pairs = optionPairs(report.options);
  return pairs.length ? section("options", "Options", facts(pairs)) : null;
}

const sections = [
  summary(),
  notes(),
  ladderSection(),
  layersSection(),
  trainingSection(),
  benchSection(),
  explanation(),
  options(),
]
  .flat()
  .filter(Boolean);
const contents = html(
  "nav",
  { "aria-label": "Contents" },
  sections.map((one) => html("a", { href: `#${one.id}` }, one.querySelector("h2").textContent)),
);
document.getElementById("page").append(header(), contents, ...sections);
nameTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
