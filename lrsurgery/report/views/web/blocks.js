// @ts-check
// The heat map: kinds of layers against blocks.

const QUANTITIES = ["energy_kept", "relative_error", "kept", "before.stable", "after.stable"];

/** transformer.h.3.mlp.c_fc -> ["transformer.h.*.mlp.c_fc", 3]; block null where no part of the name is a number. */
function splitName(name) {
  const parts = name.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  return at < 0 ? [name, null] : [[...parts.slice(0, at), "*", ...parts.slice(at + 1)].join("."), Number(parts[at])];
}

function heatMap(layers, reveal) {
  const offered = QUANTITIES.map(columnOf)
    .filter((column) => column && layers.some((layer) => known(valueOf(seen(layer), column.key))));
  const placed = layers.map((layer) => [layer, ...splitName(layer.name)]);
  const blocks = [...new Set(placed.map(([, , block]) => block).filter(known))].sort((a, b) => a - b);
  const kinds = [...new Set(placed.filter(([, , block]) => known(block)).map(([, kind]) => kind))];
  if (!offered.length || !blocks.length) return { section: null, draw() {} };
  const which = choice(
    "heat-quantity",
    "Quantity",
    offered.map(({ key, title }) => [key, title]),
  );
  const place = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Heat map" });
  const scale = html("div", { class: "scale" });
  const alone = html("ul", { class: "alone" });

  const draw = () => {
    const { key, title: label, form } = columnOf(which.value);
    const format = FORMS[form];
    const value = new Map(placed.map(([layer]) => [layer, valueOf(seen(layer), key)]));
    const numbers = [...value.values()].filter(known);
    const [low, high] = numbers.length ? [Math.min(...numbers), Math.max(...numbers)] : [0, 1];
    const paint = (number) => viridis(high > low ? (number - low) / (high - low) : 1);
    const note = (layer) => [
      layer.name,
      known(value.get(layer)) ? `${label}: ${format(value.get(layer))}` : layer.reason || "no value",
    ];
    const cell = (layer) => {
      const number = value.get(layer);
      const tell = (event) => {
        const box = event.target.getBoundingClientRect();
        showTip(note(layer), box.left, box.top);
      };
      return html("td", {
        class: known(number) ? "cell" : "cell none",
        tabindex: "-1",
        "data-key": which.value,
        "data-value": number,
        "data-layer": layer.name,
        "aria-label": note(layer).join(", "),
        style: known(number) ? { background: paint(number) } : null,
        on: {
          pointerenter: tell,
          focus: tell,
          pointerleave: hideTip,
          blur: hideTip,
          click: () => {
            hideTip();
            reveal(layer);
          },
          keydown: (event) => walk(event, layer, reveal),
        },
      });
    };
    const at = new Map(placed.map(([layer, kind, block]) => [`${block} ${kind}`, layer]));
    const every = blocks.length > 40 ? 5 : 1;
    const head = html(
      "tr",
      {},
      html("th", { scope: "col" }, "block"),
      blocks
        .filter((_, i) => i % every === 0)
        .map((block, i) =>
          html(
            "th",
            { scope: "col", colspan: Math.min(every, blocks.length - every * i), class: every > 1 ? "start" : null },
            String(block),
          ),
        ),
    );
    const rows = kinds.map((kind) =>
      html(
        "tr",
        {},
        html("th", { scope: "row" }, broken(kind)),
        blocks.map((block) => {
          const layer = at.get(`${block} ${kind}`);
          return layer ? cell(layer) : html("td", { class: "gone" });
        }),
      ),
    );
    const table = html(
      "table",
      {
        class: "heat",
        style: { "--cell": `${blocks.length > 40 ? 15 : blocks.length > 16 ? 24 : 36}px` },
        role: "grid",
        "aria-label": `${label} by layer and block`,
      },
      html("thead", {}, head),
      html("tbody", {}, rows),
    );
    const first = table.querySelector("td.cell");
    if (first) first.tabIndex = 0; // one stop for the tab key; arrows go on from there
    place.replaceChildren(table);
    scale.replaceChildren();
    dress(scale, {}, [
      html("span", { "data-value": low }, format(low)),
      html("span", {
        class: "ramp",
        style: { background: `linear-gradient(to right, ${VIRIDIS.map((c) => `rgb(${c.join(" ")})`).join(", ")})` },
      }),
      html("span", { "data-value": high }, format(high)),
      numbers.length < layers.length &&
        html("span", { class: "key" }, html("i", { class: "cell none" }), "left dense or not known"),
    ]);
    alone.replaceChildren(
      ...placed
        .filter(([layer, , block]) => !known(block) && known(value.get(layer)))
        .map(([layer]) =>
          html(
            "li",
            {},
            html("i", { class: "cell", style: { background: paint(value.get(layer)) } }),
            html("code", {}, layer.name),
            " ",
            html("span", { "data-value": value.get(layer) }, format(value.get(layer))),
          ),
        ),
    );
  };
  which.addEventListener("change", draw);
  draw();
  return {
    draw,
    section: section(
      "blocks",
      "Across the blocks",
      html("p", { class: "lead" }, "Each row is one kind of layer, each column a block; a click opens the layer."),
      html("div", { class: "tools" }, which, scale),
      place,
      alone,
    ),
  };
}

function walk(event, layer, reveal) {
  const td = event.target;
  const row = td.parentElement;
  const near = {
    ArrowLeft: td.previousElementSibling,
    ArrowRight: td.nextElementSibling,
    ArrowUp: row.previousElementSibling && row.previousElementSibling.cells[td.cellIndex],
    ArrowDown: row.nextElementSibling && row.nextElementSibling.cells[td.cellIndex],
  };
  if (event.key === "Enter") {
    hideTip();
    reveal(layer);
  }
  if (!(event.key in near)) return;
  event.preventDefault();
  if (near[event.key] && near[event.key].matches("td.cell")) {
    td.tabIndex = -1;
    near[event.key].tabIndex = 0;
    near[event.key].focus();
  }
}
