// The layer table, one layer's detail, and the heat map over blocks.

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

const keptShare = (layer) => known(layer.parameters_after) && layer.parameters_before ? layer.parameters_after / layer.parameters_before : null;

function layerColumns(open) {
  const of = (get) => (layer) => { const value = get(seen(layer)); return known(value) ? value : null; };
  const name = (layer) => html("button", { type: "button", class: "layer", "aria-expanded": "false", on: { click: (event) => { event.stopPropagation(); open(layer); } } }, html("span", {}, broken(layer.name)));
  const damage = (layer, value) => known(value) ? [seen(layer).damage_high ? html("span", { class: "flag" }, "\u25b2 high") : null, " ", show.number(value)] : "";
  return [
    { key: "name", label: "Layer", value: (layer) => layer.name, cell: name },
    { key: "spectrum", label: "Spectrum", value: steepness, cell: sparkline, drawn: true, title: "Singular values, log scale, dense and factorised; sorts by the last one drawn over the first" },
    { key: "kind", label: "Kind", value: of((l) => l.kind) },
    { key: "shape", label: "Shape", value: (layer) => (layer.shape || []).join(" \u00d7 ") || null },
    { key: "status", label: "Status", value: (layer) => (layer.reason ? `${layer.status}: ${layer.reason}` : layer.status) },
    { key: "rank", group: "Rank", label: "kept", value: of((l) => l.rank), format: show.whole },
    { key: "full_rank", group: "Rank", label: "full", value: of((l) => l.full_rank), format: show.whole },
    { key: "break_even", group: "Rank", label: "break-even", value: of((l) => l.break_even), format: show.whole, title: "The largest rank at which two factors have fewer parameters than the matrix" },
    { key: "parameters_before", group: "Parameters", label: "before", value: of((l) => l.parameters_before), format: show.count },
    { key: "parameters_after", group: "Parameters", label: "after", value: of((l) => l.parameters_after), format: show.count },
    { key: "kept", group: "Parameters", label: "kept", value: of(keptShare), format: show.share },
    { key: "energy_kept", label: "Energy kept", value: of((l) => l.energy_kept), format: show.share },
    { key: "relative_error", group: "Error", label: "relative", value: of((l) => l.relative_error), title: "Frobenius norm of the difference over the dense weight's" },
    { key: "spectral_error", group: "Error", label: "spectral", value: of((l) => l.spectral_error), title: "The largest singular value left out over the largest of all" },
    ...EFFECTIVE.flatMap((which) => ["before", "after"].map((when) => (
      { key: `${when}.${which}`, group: `${capital(which)} rank`, label: when, value: of((l) => l[when] && l[when][which]) }))),
    { key: "damage", label: "Predicted damage", value: of((l) => l.damage), cell: damage, title: "Share of parameters removed times stable rank; a rough guide" },
  ];
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
  const low = Math.max(high - 6, Math.min(Math.log10(Math.min(...all)), high - 0.5)); // rounding noise would flatten the rest
  const last = layer.full_rank || Math.max(...kinds.flatMap((when) => layer[`spectrum_${when}`].index));
  const across = (index) => (last > 1 ? 1 + ((index - 1) / (last - 1)) * (width - 2) : width / 2);
  const lines = kinds.map((when) => {
    const { index, value } = layer[`spectrum_${when}`];
    const points = index.map((at, i) => [at, value[i]]).filter(([, v]) => v > 0 && Math.log10(v) >= low);
    const d = points.map(([at, v], i) => `${i ? "L" : "M"}${across(at).toFixed(1)} ${(height - 2 - ((Math.log10(v) - low) / (high - low)) * (height - 4)).toFixed(1)}`).join("");
    return svg("path", { class: `line ${when}`, d });
  });
  const rank = seen(layer).rank;
  const mark = known(rank) ? svg("path", { class: "mark", d: `M${across(rank).toFixed(1)} 0V${height}` }) : null;
  return svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" }, mark, lines);
}

function layersSection() {
  const layers = report.layers;
  if (!layers.length) return null;
  const levels = report.about === "dense" && layers.every((layer) => !known(layer.rank)) ? (report.ladder || []).map((step) => step.rank) : [];
  const offered = levels.filter((rank) => layers.some((layer) => (layer.ladder || []).some((step) => step.rank === rank)));
  if (offered.length) {
    const step = halfway();
    level = step && offered.includes(step.rank) ? step.rank : offered[0];
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
    const detail = html("tr", { class: "detail" }, html("td", { colspan: table.columns.length }, html("div", { class: "inner" }, layerDetail(layer))));
    tr.after(detail);
    tr.classList.add("open");
    tr.querySelector("button.layer").setAttribute("aria-expanded", "true");
    opened = { layer, tr, detail };
  };
  const table = dataTable({ columns: layerColumns(open), rows: layers, caption: "Layers", name: "layers-table", onRow: open, tall: true });

  const search = html("input", { type: "search", id: "layer-search", placeholder: "Filter by name", "aria-label": "Filter layers by name", autocomplete: "off", spellcheck: "false" });
  const statuses = ["factorised", "dense"].filter((status) => layers.some((layer) => layer.status === status));
  const status = choice("layer-status", "Which layers", [["", "all layers"], ...statuses.map((s) => [s, s])]);
  const rank = choice("layer-level", "At rank", offered.map((one) => [one, `at rank ${one}`]), level);
  const count = html("span", { class: "muted", role: "status", id: "layer-count" });
  const filter = () => {
    close();
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const left = layers.filter((layer) => (!status.value || layer.status === status.value) && words.every((word) => layer.name.toLowerCase().includes(word)));
    count.textContent = left.length === layers.length ? `${show.whole(layers.length)} layers` : `${show.whole(left.length)} of ${show.whole(layers.length)} layers`;
    table.rows(left);
  };
  search.addEventListener("input", filter);
  status.addEventListener("change", filter);
  rank.addEventListener("change", () => { level = rank.value; close(); table.forget(); heat.draw(); });
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
  const tools = html("div", { class: "tools" }, search, statuses.length > 1 && status, offered.length > 1 && rank, count, html("span", { class: "gap" }),
    html("button", { type: "button", id: "download-csv", on: { click: () => save(csvOf(table.columns, table.shown()), "text/csv", fileName("csv")) } }, "Download CSV"));
  return [
    section("layers", "Layers", html("p", { class: "lead" }, "One row a layer, in the model\u2019s order. Headers sort; a row opens its spectrum, energy curve and angles.",
      known(level) && html("span", { class: "muted" }, " Nothing has been changed yet: what depends on a rank is what the chosen one would give.")), tools, table.box),
    heat.section,
  ];
}

function choice(id, label, options, chosen) {
  const list = html("select", { id, "aria-label": label }, options.map(([value, text]) => html("option", { value }, text)));
  if (known(chosen)) list.value = chosen;
  return list;
}

// ---- one layer -----------------------------------------------------------------------------------------------------

function layerDetail(raw) {
  const layer = seen(raw);
  const kinds = ["before", "after"].filter((when) => layer[`spectrum_${when}`]);
  const marks = [];
  if (known(layer.rank)) marks.push({ x: layer.rank, label: `rank ${show.whole(layer.rank)}`, paint: "var(--after)" });
  if (known(layer.break_even)) marks.push({ x: layer.break_even, label: `break-even ${show.whole(layer.break_even)}`, paint: "var(--muted)" });
  const names = { before: "dense", after: "factorised" };
  const spectrum = kinds.length && plot({
    title: "Singular values", height: 300, marks, x: { label: "position", format: show.whole }, y: { log: true },
    series: kinds.map((when) => ({ name: names[when], paint: `var(--${when})`, points: layer[`spectrum_${when}`].index.map((at, i) => [at, layer[`spectrum_${when}`].value[i]]) })),
  });
  const ranks = layer.ladder && layer.ladder.length ? dataTable({ rows: layer.ladder, caption: "At each rank of the ladder", columns: ladderColumns }).box : null;
  const pair = (before, after, format) => known(before) || known(after)
    ? [known(before) ? figure(before, format) : "?", known(after) ? [" \u2192 ", figure(after, format)] : ""].flat() : null;
  const rankOf = (which) => pair(layer.before && layer.before[which], layer.after && layer.after[which]);
  const shown = facts([
    ["Status", layer.reason ? `${layer.status}: ${layer.reason}` : layer.status],
    ["Rank", known(layer.rank) && known(layer.full_rank) ? [figure(layer.rank, show.whole), " of ", figure(layer.full_rank, show.whole)] : known(layer.full_rank) ? ["full, ", figure(layer.full_rank, show.whole)] : null],
    ["Parameters", pair(layer.parameters_before, layer.parameters_after, show.whole)],
    ["FLOPs", pair(layer.flops_before, layer.flops_after, show.count)],
    ["Energy kept", known(layer.energy_kept) ? figure(layer.energy_kept, show.share) : null],
    ["Relative error", known(layer.relative_error) ? figure(layer.relative_error) : null],
    ["Spectral error", known(layer.spectral_error) ? figure(layer.spectral_error) : null],
    ["Nuclear rank", rankOf("nuclear")], ["Entropy rank", rankOf("entropy")], ["Stable rank", rankOf("stable")], ["Condition number", rankOf("condition")],
    ["Predicted damage", known(layer.damage) ? [figure(layer.damage), layer.damage_high ? html("span", { class: "flag" }, " \u25b2 high") : null].filter(Boolean) : null],
  ]);
  return [html("h3", {}, broken(layer.name)), shown, html("div", { class: "plots" }, spectrum || null, energyPlot(layer, marks), overlapPlot(layer)), overlapTable(layer), ranks, dynamicsPlots([layer.name], EFFECTIVE.map((e) => `${e}_rank`))];
}

/** Energy kept at every rank: exact where all values are drawn, else with the ones between on a straight line of the log plot. */
function energyPlot(layer, marks) {
  const spectrum = layer.spectrum_before;
  if (!spectrum || !known(layer.full_rank) || spectrum.index[spectrum.index.length - 1] !== layer.full_rank) return null;
  const { index, value } = spectrum;
  const sums = [];
  let sum = 0;
  for (let k = 0; k < index.length; k += 1) {
    const from = k ? index[k - 1] : 0;
    for (let at = from + 1; at <= index[k]; at += 1) {
      const part = (at - from) / (index[k] - from);
      const between = k && value[k - 1] > 0 && value[k] > 0 ? value[k - 1] ** (1 - part) * value[k] ** part : value[k];
      sum += between * between;
    }
    sums.push([index[k], sum]);
  }
  if (!sum) return null;
  const exact = index.length === layer.full_rank;
  const spots = (layer.ladder || []).map((step) => ({ x: step.to, y: step.energy_kept, paint: "var(--before)" }));
  if (known(layer.rank) && known(layer.energy_kept)) spots.push({ x: layer.rank, y: layer.energy_kept, paint: "var(--after)" });
  return plot({
    title: "Energy kept", note: exact ? null : spots.length ? "dots measured, line interpolated" : "interpolated between the values drawn", height: 300, marks, spots,
    x: { label: "rank", format: show.whole }, y: { min: 0, max: 1, format: (v) => `${Math.round(100 * v)}\u202f%`, exact: show.share },
    series: [{ name: "energy", paint: "var(--before)", points: [[0, 0], ...sums.map(([at, part]) => [at, part / sum])] }],
  });
}

const sides = { output: "output side", input: "input side" };

function overlapPlot(layer) {
  const leading = (layer.overlap && layer.overlap.leading) || [];
  return leading.length < 2 ? null : plot({
    title: "Overlap of the leading directions", note: "dense with factorised; 1 is the same subspace", height: 300,
    x: { label: "leading directions", log: true, format: show.whole }, y: { min: 0, max: 1 },
    series: Object.keys(sides).map((side, i) => ({ name: sides[side], paint: colour(i), line: i ? "6 3" : "", dots: true, points: leading.map((one) => [one.k, one[side]]) })),
  });
}

function overlapTable(layer) {
  if (!layer.overlap) return null;
  const angles = Object.keys(sides).filter((side) => layer.overlap[side]).map((side) => ({ side: sides[side], ...layer.overlap[side] }));
  const leading = layer.overlap.leading || [];
  return html("div", { class: "beside" },
    angles.length ? dataTable({ rows: angles, caption: "Principal angles", columns: [
      { key: "side", label: "Side", value: (row) => row.side },
      { key: "largest", label: "largest", value: (row) => row.largest, format: show.degrees },
      { key: "median", label: "median", value: (row) => row.median, format: show.degrees }] }).box : null,
    leading.length ? dataTable({ rows: leading, caption: "Overlap of the k leading directions", columns: [
      { key: "k", label: "k", value: (row) => row.k, format: show.whole },
      { key: "output", label: "output side", value: (row) => row.output },
      { key: "input", label: "input side", value: (row) => row.input }] }).box : null);
}

// ---- blocks --------------------------------------------------------------------------------------------------------

const QUANTITIES = [
  ["energy_kept", "energy kept", (l) => l.energy_kept, show.share],
  ["relative_error", "relative error", (l) => l.relative_error, show.number],
  ["kept", "share of parameters kept", keptShare, show.share],
  ["before.stable", "stable rank, dense", (l) => l.before && l.before.stable, show.number],
  ["after.stable", "stable rank, factorised", (l) => l.after && l.after.stable, show.number],
];

/** transformer.h.3.mlp.c_fc -> ["transformer.h.*.mlp.c_fc", 3]; block null where no part of the name is a number. */
function splitName(name) {
  const parts = name.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  return at < 0 ? [name, null] : [[...parts.slice(0, at), "*", ...parts.slice(at + 1)].join("."), Number(parts[at])];
}

function heatMap(layers, reveal) {
  const offered = QUANTITIES.filter(([, , get]) => layers.some((layer) => known(get(seen(layer)))));
  const placed = layers.map((layer) => [layer, ...splitName(layer.name)]);
  const blocks = [...new Set(placed.map(([, , block]) => block).filter(known))].sort((a, b) => a - b);
  const kinds = [...new Set(placed.filter(([, , block]) => known(block)).map(([, kind]) => kind))];
  if (!offered.length || !blocks.length) return { section: null, draw() {} };
  const which = choice("heat-quantity", "Quantity", offered.map(([key, label]) => [key, label]));
  const place = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Heat map" });
  const scale = html("div", { class: "scale" });
  const alone = html("ul", { class: "alone" });

  const draw = () => {
    const [, label, get, format] = offered.find(([key]) => key === which.value);
    const value = new Map(placed.map(([layer]) => [layer, get(seen(layer)) ?? null]));
    const numbers = [...value.values()].filter(known);
    const [low, high] = numbers.length ? [Math.min(...numbers), Math.max(...numbers)] : [0, 1];
    const paint = (number) => viridis(high > low ? (number - low) / (high - low) : 1);
    const note = (layer) => [layer.name, known(value.get(layer)) ? `${label}: ${format(value.get(layer))}` : layer.reason || "no value"];
    const cell = (layer) => {
      const number = value.get(layer);
      const tell = (event) => { const box = event.target.getBoundingClientRect(); showTip(note(layer), box.left, box.top); };
      return html("td", {
        class: known(number) ? "cell" : "cell none", tabindex: "-1", "data-key": which.value, "data-value": number, "data-layer": layer.name, "aria-label": note(layer).join(", "),
        style: known(number) ? { background: paint(number) } : null,
        on: { pointerenter: tell, focus: tell, pointerleave: hideTip, blur: hideTip, click: () => { hideTip(); reveal(layer); }, keydown: (event) => walk(event, layer, reveal) },
      });
    };
    const at = new Map(placed.map(([layer, kind, block]) => [`${block} ${kind}`, layer]));
    const every = blocks.length > 40 ? 5 : 1;
    const head = html("tr", {}, html("th", { scope: "col" }, "block"), blocks.filter((_, i) => i % every === 0).map((block, i) => (
      html("th", { scope: "col", colspan: Math.min(every, blocks.length - every * i), class: every > 1 ? "start" : null }, String(block)))));
    const rows = kinds.map((kind) => html("tr", {}, html("th", { scope: "row" }, broken(kind)), blocks.map((block) => {
      const layer = at.get(`${block} ${kind}`);
      return layer ? cell(layer) : html("td", { class: "gone" });
    })));
    const table = html("table", { class: "heat", style: { "--cell": `${blocks.length > 40 ? 15 : blocks.length > 16 ? 24 : 36}px` }, role: "grid", "aria-label": `${label} by layer and block` }, html("thead", {}, head), html("tbody", {}, rows));
    const first = table.querySelector("td.cell");
    if (first) first.tabIndex = 0; // one stop for the tab key; arrows go on from there
    place.replaceChildren(table);
    scale.replaceChildren();
    dress(scale, {}, [html("span", { "data-value": low }, format(low)), html("span", { class: "ramp", style: { background: `linear-gradient(to right, ${VIRIDIS.map((c) => `rgb(${c.join(" ")})`).join(", ")})` } }), html("span", { "data-value": high }, format(high)),
      numbers.length < layers.length && html("span", { class: "key" }, html("i", { class: "cell none" }), "left dense or not known")]);
    alone.replaceChildren(...placed.filter(([layer, , block]) => !known(block) && known(value.get(layer))).map(([layer]) => html("li", {},
      html("i", { class: "cell", style: { background: paint(value.get(layer)) } }), html("code", {}, layer.name), " ", html("span", { "data-value": value.get(layer) }, format(value.get(layer))))));
  };
  which.addEventListener("change", draw);
  draw();
  return { draw, section: section("blocks", "Across the blocks",
    html("p", { class: "lead" }, "Each row is one kind of layer, each column a block; a click opens the layer."),
    html("div", { class: "tools" }, which, scale), place, alone) };
}

function walk(event, layer, reveal) {
  const td = event.target;
  const row = td.parentElement;
  const near = { ArrowLeft: td.previousElementSibling, ArrowRight: td.nextElementSibling,
    ArrowUp: row.previousElementSibling && row.previousElementSibling.cells[td.cellIndex], ArrowDown: row.nextElementSibling && row.nextElementSibling.cells[td.cellIndex] };
  if (event.key === "Enter") { hideTip(); reveal(layer); }
  if (!(event.key in near)) return;
  event.preventDefault();
  if (near[event.key] && near[event.key].matches("td.cell")) { td.tabIndex = -1; near[event.key].tabIndex = 0; near[event.key].focus(); }
}
