// @ts-check
// Plots: lines over an axis with a cursor, and dots with intervals.

function ticksOf(low, high, log, wanted) {
  if (log) {
    const every = Math.max(1, Math.ceil(Math.log10(high / low) / wanted));
    for (const steps of [[1], [1, 3], [1, 2, 5]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
        if (power % every === 0) found.push(...steps.map((step) => step * 10 ** power));
      }
      const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
      if (inside.length >= 3) return inside;
    }
  }
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((s) => s * power >= rough * 0.999) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1)
    found.push(Number((at * step).toPrecision(12)));
  return found;
}

function axis(values, { log = false, min = null, max = null, format = show.tick, pad = 0 }, from, to, wanted) {
  let low = known(min) ? min : Math.min(...values);
  let high = known(max) ? max : Math.max(...values);
  if (low === high) {
    low = log ? low / 2 : low - (Math.abs(low) / 10 || 1);
    high = log ? high * 2 : high + (Math.abs(high) / 10 || 1);
  }
  if (!log) {
    const room = (high - low) * pad;
    low -= known(min) ? 0 : room;
    high += known(max) ? 0 : room;
  }
  const turn = log ? Math.log10 : (value) => value;
  const map = (value) => from + ((turn(value) - turn(low)) / (turn(high) - turn(low))) * (to - from);
  const ticks = ticksOf(low, high, log, wanted);
  const step = ticks[1] - ticks[0];
  // ticks that lie close together need the digits that tell them apart
  if (format === show.tick && !log && step < 1 && step >= 1e-4)
    return { map, ticks, format: (value) => value.toFixed(Math.ceil(-Math.log10(step) - 1e-9)) };
  return { map, ticks, format };
}

function textWidth(text, weight = 400) {
  ruler.font = `${weight} 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif`; // as in page.css
  return ruler.measureText(text).width * 1.02;
}

/** Draws at the width that there is, and again when it changes, so that text keeps its size on a phone. */
function responsive(label, height, draw) {
  const frame = html("div", { class: "frame", style: { "min-height": `${height(640)}px` } });
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(frame.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    const tall = height(width);
    const canvas = svg("svg", {
      viewBox: `0 0 ${width} ${tall}`,
      width,
      height: tall,
      role: "img",
      "aria-label": label,
    });
    draw(canvas, width, tall);
    frame.replaceChildren(canvas);
  }).observe(frame);
  return frame;
}

// ---- lines --------------------------------------------------------------------------------------------------------

const colour = (i) => `var(--series-${i % SERIES})`;
const dash = (i) => DASHES[Math.floor(i / SERIES) % DASHES.length];

function legend(series) {
  return html(
    "ul",
    { class: "legend" },
    series.map(({ name, paint, line }) => {
      const key = svg(
        "svg",
        { viewBox: "0 0 22 10", width: 22, height: 10, "aria-hidden": "true" },
        svg("path", { d: "M0 5H22", class: "line", "stroke-dasharray": line, style: { stroke: paint } }),
      );
      return html("li", {}, key, name);
    }),
  );
}

/**
 * A line plot: series [{name, paint, line, points: [[x, y], ...], dots}], marks [{x, label, paint}],
 * spots [{x, y, label, paint}],
 * x and y {label, log, min, max, format}.
 */
function plot({ title, note = null, series, marks = [], spots = [], x, y, height = 240, keyed = series.length > 1 }) {
  const usable = (x0, y0) => known(x0) && known(y0) && !(x.log && x0 <= 0) && !(y.log && y0 <= 0);
  series = series
    .map((one) => ({ ...one, points: one.points.filter(([a, b]) => usable(a, b)) }))
    .filter((one) => one.points.length);
  spots = spots.filter((spot) => usable(spot.x, spot.y));
  if (!series.length) return null;
  const named = html("figcaption", {}, html("strong", {}, title), note && html("span", { class: "muted" }, ` ${note}`));
  const label = `${title}: ${y.label || title} against ${x.label}, ${series.map((one) => one.name).join(", ")}`;
  const frame = responsive(
    label,
    () => height,
    (canvas, width, tall) => drawLines(canvas, width, tall, { series, marks, spots, x, y }),
  );
  return html("figure", { class: "plot" }, named, keyed && legend(series), frame);
}

function drawLines(canvas, width, tall, { series, marks, spots, x, y }) {
  const xs = [
    ...series.flatMap((one) => one.points.map((p) => p[0])),
    ...marks.map((m) => m.x),
    ...spots.map((s) => s.x),
  ];
  const ys = [...series.flatMap((one) => one.points.map((p) => p[1])), ...spots.map((s) => s.y)];
  const top = marks.length ? 12 + 14 * rowsOfMarks(marks) : 10;
  const bottom = tall - 38;
  const up = axis(ys, { pad: 0.06, ...y }, bottom, top, 5);
  const left = 10 + Math.max(...up.ticks.map((tick) => textWidth(up.format(tick))));
  const names = width >= 520 && series.length > 1 && series.length <= SERIES;
  const right = width - (names ? Math.min(170, 14 + Math.max(...series.map((one) => textWidth(one.name, 600)))) : 14);
  const along = axis(xs, { pad: 0.01, ...x }, left, right, Math.max(3, Math.floor((right - left) / 65)));

  for (const tick of up.ticks) {
    canvas.append(svg("line", { class: "grid", x1: left, x2: right, y1: up.map(tick), y2: up.map(tick) }));
    canvas.append(
      svg("text", { class: "tick", x: left - 6, y: up.map(tick) + 4, "text-anchor": "end" }, up.format(tick)),
    );
  }
  for (const tick of along.ticks) {
    canvas.append(svg("line", { class: "axis", x1: along.map(tick), x2: along.map(tick), y1: bottom, y2: bottom + 4 }));
    const wide = textWidth(along.format(tick)) / 2;
    const middle = Math.min(Math.max(along.map(tick), wide), width - wide);
    canvas.append(
      svg("text", { class: "tick", x: middle, y: bottom + 17, "text-anchor": "middle" }, along.format(tick)),
    );
  }
  canvas.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  canvas.append(svg("text", { class: "tick", x: right, y: tall - 5, "text-anchor": "end" }, `${x.label} \u2192`));
  drawMarks(canvas, marks, along, top, bottom, left, right);

  for (const { points, paint, line, dots } of series) {
    const d = points.map(([a, b], i) => `${i ? "L" : "M"}${along.map(a).toFixed(1)} ${up.map(b).toFixed(1)}`).join("");
    canvas.append(svg("path", { class: "line", d, "stroke-dasharray": line, style: { stroke: paint } }));
    if (dots || points.length === 1) {
      for (const [a, b] of points)
        canvas.append(svg("circle", { cx: along.map(a), cy: up.map(b), r: 2.8, style: { fill: paint } }));
    }
  }
  for (const spot of spots) drawSpot(canvas, spot, along, up, right);
  if (names) drawNames(canvas, series, up, right, top, bottom);
  addCursor(canvas, series, along, up, { left, right, top, bottom, x, y });
}

const rowsOfMarks = (marks) => Math.min(3, marks.length);

function drawMarks(canvas, marks, along, top, bottom, left, right) {
  marks.forEach(({ x, label, paint }, i) => {
    const row = i % 3;
    const at = along.map(x);
    const height = 12 + 14 * row;
    const wide = textWidth(label);
    const before = at + 4 + wide > right && at - 4 - wide > left;
    const start = before ? at - 4 : Math.max(left, Math.min(at + 4, right - wide));
    canvas.append(svg("line", { class: "mark", x1: at, x2: at, y1: height - 9, y2: bottom, style: { stroke: paint } }));
    canvas.append(
      svg("text", { class: "tick halo", x: start, y: height, "text-anchor": before ? "end" : "start" }, label),
    );
  });
}

function drawSpot(canvas, { x, y, label, paint }, along, up, right) {
  const [cx, cy] = [along.map(x), up.map(y)];
  canvas.append(svg("circle", { cx, cy, r: 4, class: "spot", style: { fill: paint } }));
  if (!label) return;
  const wide = textWidth(label);
  const before = cx + 8 + wide > right;
  const place = { x: before ? cx - 8 : cx + 8, y: cy + (before ? -8 : 16), "text-anchor": before ? "end" : "start" };
  canvas.append(svg("text", { class: "tick ink halo", ...place }, label));
}

function drawNames(canvas, series, up, right, top, bottom) {
  const ends = series
    .map((one) => ({ ...one, at: up.map(one.points[one.points.length - 1][1]) }))
    .sort((a, b) => a.at - b.at);
  ends.forEach((end, i) => {
    end.at = Math.max(end.at, i ? ends[i - 1].at + 14 : top + 4);
  });
  for (let i = ends.length - 1, floor = bottom; i >= 0; i -= 1, floor -= 14) ends[i].at = Math.min(ends[i].at, floor);
  for (const { name, paint, at } of ends) {
    let text = name;
    while (text.length > 3 && textWidth(text, 600) > 154) text = `${text.slice(0, -2)}\u2026`;
    canvas.append(svg("text", { class: "tick name", x: right + 8, y: at + 4, style: { fill: paint } }, text));
  }
}

/** A line at the nearest x, by pointer or arrow keys, and every series' value there. */
function addCursor(canvas, series, along, up, { left, right, top, bottom, x, y }) {
  const stops = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
  const line = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  const cover = svg("rect", {
    x: left,
    y: top,
    width: Math.max(0, right - left),
    height: bottom - top,
    class: "cover",
  });
  canvas.append(line, cover);
  canvas.setAttribute("tabindex", "0");
  let at = -1;
  const point = (i, where) => {
    at = i;
    const place = along.map(stops[i]);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.setAttribute("visibility", "visible");
    const here = series.flatMap(({ name, points }) =>
      points.filter((p) => p[0] === stops[i]).map((p) => `${name}: ${(y.exact || y.format || show.number)(p[1])}`),
    );
    const box = canvas.getBoundingClientRect();
    showTip(
      [`${x.label} ${(x.exact || x.format || show.number)(stops[i])}`, ...here],
      ...(where || [box.left + place, box.top + top]),
    );
  };
  const leave = () => {
    at = -1;
    line.setAttribute("visibility", "hidden");
    hideTip();
  };
  cover.addEventListener("pointermove", (event) => {
    const here = event.clientX - canvas.getBoundingClientRect().left;
    let best = 0;
    stops.forEach((stop, i) => {
      if (Math.abs(along.map(stop) - here) < Math.abs(along.map(stops[best]) - here)) best = i;
    });
    point(best, [event.clientX, event.clientY]);
  });
  cover.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!step) return;
    event.preventDefault();
    point(Math.min(stops.length - 1, Math.max(0, at + step)));
  });
}

// ---- dots with intervals ------------------------------------------------------------------------------------------

/** rows [{label, value, low, high, ideal}] on one axis, with a line at 1. */
function intervals({ title, note, rows, label }) {
  const each = 40;
  const values = [1, ...rows.flatMap((row) => [row.value, row.low, row.high, row.ideal])].filter(known);
  const frame = responsive(
    title,
    () => 44 + each * rows.length,
    (canvas, width, tall) => {
      const bottom = tall - 38;
      const along = axis(
        values,
        { pad: 0.06, format: show.times },
        8,
        width - 24,
        Math.max(3, Math.floor(width / 110)),
      );
      for (const tick of along.ticks) {
        const at = along.map(tick);
        canvas.append(svg("line", { class: "grid", x1: at, x2: at, y1: 0, y2: bottom }));
        const place = Math.min(Math.max(at, 18), width - 18);
        canvas.append(
          svg("text", { class: "tick", x: place, y: bottom + 17, "text-anchor": "middle" }, show.times(tick)),
        );
      }
      canvas.append(svg("line", { class: "one", x1: along.map(1), x2: along.map(1), y1: 0, y2: bottom }));
      canvas.append(
        svg("text", { class: "tick", x: width - 24, y: tall - 5, "text-anchor": "end" }, `${label} \u2192`),
      );
      rows.forEach((row, i) => {
        const y = i * each + 30;
        const paint = row.value < 1 ? "var(--warn)" : "var(--after)";
        canvas.append(svg("text", { class: "tick ink halo", x: 8, y: y - 14 }, row.label));
        if (known(row.low))
          canvas.append(
            svg("line", {
              class: "span",
              x1: along.map(row.low),
              x2: along.map(row.high),
              y1: y,
              y2: y,
              style: { stroke: paint },
            }),
          );
        if (known(row.ideal)) {
          const at = along.map(row.ideal);
          canvas.append(
            svg("path", {
              class: "hollow",
              d: `M${at} ${y - 5}L${at + 5} ${y}L${at} ${y + 5}L${at - 5} ${y}Z`,
              style: { stroke: "var(--muted)" },
            }),
          );
        }
        canvas.append(
          svg("circle", { class: "spot", cx: along.map(row.value), cy: y, r: 4.5, style: { fill: paint } }),
        );
      });
    },
  );
  return html(
    "figure",
    { class: "plot" },
    html("figcaption", {}, html("strong", {}, title), note && html("span", { class: "muted" }, ` ${note}`)),
    frame,
  );
}
