// @ts-check
// The page: header, ladder, explanations; the start.

const section = (id, title, ...content) => html("section", { id }, html("h2", {}, title), ...content);
function header() {
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
      html("p", { class: "what" }, view.about),
      html("span", { class: "gap" }),
      data,
      theme,
    ),
    html("h1", {}, report.name || "Rank report"),
    report.command && html("pre", { class: "command" }, html("code", {}, report.command)),
    html(
      "p",
      { class: "muted origin" },
      view.origin.flatMap((part, i) => [i ? " \u00b7 " : "", html("span", {}, part)]),
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

function explanation() {
  return section(
    "words",
    "What the words mean",
    html(
      "dl",
      { class: "words" },
      view.terms.map(([term, parts]) => html("div", {}, html("dt", {}, term), html("dd", {}, parts.map(partOf)))),
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

const factsOf = (pairs) => facts(pairs.map(([term, parts]) => [term, parts.map(partOf)]));

const sections = [
  summary(),
  notes(),
  choiceSection(),
  ladderSection(),
  curveSection(),
  layersSection(),
  trainingSection(),
  benchSection(),
  explanation(),
  view.options.length && section("options", "Options", factsOf(view.options)),
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
