// @ts-check
// The layer table: its columns, filters and sparklines.

const EFFECTIVE = ["nuclear", "entropy", "stable"];
let level = null; // the rank of the ladder that a dense report's table shows

/** A layer as the table shows it: with the ladder's figures at the chosen rank where it is not factorised yet. */
function seen(layer) {
  if (level === null) return layer;
  const step = (layer.ladder || []).find((one) => one.rank === level);
  if (!step) return layer;
  const { to, parameters, energy_kept, relative_error, damage } = step;
  return { ...layer, rank: to, parameters_after: parameters, energy_kept, relative_error, damage, damage_high: null };
}

function layerColumns(open) {
  const name = (layer) =>
    html(
      "button",
      {
        type: "button",
        class: "layer",
        "aria-expanded": "false",
        on: {
          click: (event) => {
            event.stopPropagation();
            open(layer);
          },
        },
      },
      html("span", {}, broken(layer.name)),
    );
  const damage = (layer, value) =>
    known(value)
      ? [seen(layer).damage_high ? html("span", { class: "flag" }, "\u25b2 high") : null, " ", show.number(value)]
      : "";
  const columns = columnsOf(view.columns, { name, damage }, seen);
  const spectrum = {
    key: "spectrum",
    label: "Spectrum",
    value: steepness,
    cell: sparkline,
    drawn: true,
    title: "Singular values, log scale, dense and factorised; sorts by the last one drawn over the first",
  };
  return columns.flatMap((column) => (column.key === "name" ? [column, spectrum] : [column]));
}

function steepness(layer) {
  const values = layer.spectrum_before && layer.spectrum_before.value;
  return values && values[0] > 0 ? values[values.length - 1] / values[0] : null;
}

function sparkline(layer) {
  const [width, height] = [84, 22];
  const kinds = ["before", "after"].filter((when) => layer[`spectrum_${when}`]);
  const all = kinds.flatMap((when) => layer[`spectrum_${when}`].value).filter((value) => value > 0);
  if (!all.length) return "";
  const high = Math.log10(Math.max(...all));
  // below six decades, rounding noise would flatten the rest
  const low = Math.max(high - 6, Math.min(Math.log10(Math.min(...all)), high - 0.5));
  const last = layer.full_rank || Math.max(...kinds.flatMap((when) => layer[`spectrum_${when}`].index));
  const across = (index) => (last > 1 ? 1 + ((index - 1) / (last - 1)) * (width - 2) : width / 2);
  const lines = kinds.map((when) => {
    const { index, value } = layer[`spectrum_${when}`];
    const points = index.map((at, i) => [at, value[i]]).filter(([, v]) => v > 0 && Math.log10(v) >= low);
    const d = points
      .map(
        ([at, v], i) =>
          `${i ? "L" : "M"}${across(at).toFixed(1)} ${(height - 2 - ((Math.log10(v) - low) / (high - low)) * (height - 4)).toFixed(1)}`,
      )
      .join("");
    return svg("path", { class: `line ${when}`, d });
  });
  const rank = seen(layer).rank;
  const mark = known(rank) ? svg("path", { class: "mark", d: `M${across(rank).toFixed(1)} 0V${height}` }) : null;
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" },
    mark,
    lines,
  );
}

function layersSection() {
  const layers = report.layers;
  if (!layers.length) return null;
  const levels =
    report.about === "dense" && layers.every((layer) => !known(layer.rank))
      ? (report.ladder || []).map((step) => step.rank)
      : [];
  const offered = levels.filter((rank) =>
    layers.some((layer) => (layer.ladder || []).some((step) => step.rank === rank)),
  );
  if (offered.length) {
    level = offered.includes(view.halfway) ? view.halfway : offered[0];
  }
  let opened = null;
  const close = () => {
    if (!opened) return;
    opened.detail.remove();
    opened.tr.classList.remove("open");
    opened.tr.querySelector("button.layer").setAttribute("aria-expanded", "false");
    opened = null;
  };
  const open = (layer, always) => {
    const same = opened && opened.layer === layer;
    close();
    if (same && !always) return;
    const tr = table.row(layer);
    const detail = html(
      "tr",
      { class: "detail" },
      html("td", { colspan: table.columns.length }, html("div", { class: "inner" }, layerDetail(layer))),
    );
    tr.after(detail);
    tr.classList.add("open");
    tr.querySelector("button.layer").setAttribute("aria-expanded", "true");
    opened = { layer, tr, detail };
  };
  const table = dataTable({
    columns: layerColumns(open),
    rows: layers,
    caption: "Layers",
    name: "layers-table",
    onRow: open,
    tall: true,
  });

  const search = html("input", {
    type: "search",
    id: "layer-search",
    placeholder: "Filter by name",
    "aria-label": "Filter layers by name",
    autocomplete: "off",
    spellcheck: "false",
  });
  const statuses = ["factorised", "dense"].filter((status) => layers.some((layer) => layer.status === status));
  const status = choice("layer-status", "Which layers", [["", "all layers"], ...statuses.map((s) => [s, s])]);
  const rank = choice(
    "layer-level",
    "At rank",
    offered.map((one) => [one, `at rank ${one}`]),
    level,
  );
  const count = html("span", { class: "muted", role: "status", id: "layer-count" });
  const filter = () => {
    close();
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const left = layers.filter(
      (layer) =>
        (!status.value || layer.status === status.value) &&
        words.every((word) => layer.name.toLowerCase().includes(word)),
    );
    count.textContent =
      left.length === layers.length
        ? `${show.whole(layers.length)} layers`
        : `${show.whole(left.length)} of ${show.whole(layers.length)} layers`;
    table.rows(left);
  };
  search.addEventListener("input", filter);
  status.addEventListener("change", filter);
  rank.addEventListener("change", () => {
    level = rank.value;
    close();
    table.forget();
    heat.draw();
  });
  filter();
  window.addEventListener("beforeprint", table.flush);
  table.table.tHead.addEventListener("click", close, true); // a detail stays with its row: before rows move, it goes

  const reveal = (layer) => {
    search.value = "";
    status.value = "";
    filter();
    table.flush();
    open(layer, true);
    table.row(layer).scrollIntoView({ block: "start" });
    table.row(layer).querySelector("button.layer").focus({ preventScroll: true });
  };
  const heat = heatMap(layers, reveal);
  const tools = html(
    "div",
    { class: "tools" },
    search,
    statuses.length > 1 && status,
    offered.length > 1 && rank,
    count,
    html("span", { class: "gap" }),
    html(
      "button",
      {
        type: "button",
        id: "download-csv",
        on: { click: () => save(csvOf(table.columns, table.shown()), "text/csv", fileName("csv")) },
      },
      "Download CSV",
    ),
  );
  return [
    section(
      "layers",
      "Layers",
      html(
        "p",
        { class: "lead" },
        "One row a layer, in the model\u2019s order. Headers sort; a row opens its spectrum, energy curve and angles.",
        known(level) &&
          html(
            "span",
            { class: "muted" },
            " Nothing has been changed yet: what depends on a rank is what the chosen one would give.",
          ),
      ),
      tools,
      table.box,
    ),
    heat.section,
  ];
}

function choice(id, label, options, chosen) {
  const list = html(
    "select",
    { id, "aria-label": label },
    options.map(([value, text]) => html("option", { value }, text)),
  );
  if (known(chosen)) list.value = chosen;
  return list;
}
