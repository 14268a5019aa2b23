// @ts-check
// What a row of the layer table opens: one layer's spectrum, energy, angles, and ranks over training.

const MEASURED = ["energy_kept", "relative_error", "spectral_error", "weighted_error", "predicted_loss", "balance"];

function layerDetail(raw) {
  const layer = seen(raw);
  const kinds = ["before", "after"].filter((when) => layer[`spectrum_${when}`]);
  const marks = [];
  if (known(layer.rank)) marks.push({ x: layer.rank, label: `rank ${show.whole(layer.rank)}`, paint: "var(--after)" });
  if (known(layer.break_even))
    marks.push({ x: layer.break_even, label: `break-even ${show.whole(layer.break_even)}`, paint: "var(--muted)" });
  const names = { before: "dense", after: "factorised" };
  const spectrum =
    kinds.length &&
    plot({
      title: "Singular values",
      height: 300,
      marks,
      x: { label: "position", format: show.whole },
      y: { log: true },
      series: kinds.map((when) => ({
        name: names[when],
        paint: `var(--${when})`,
        points: layer[`spectrum_${when}`].index.map((at, i) => [at, layer[`spectrum_${when}`].value[i]]),
      })),
    });
  const ranks =
    layer.ladder && layer.ladder.length
      ? dataTable({ rows: layer.ladder, caption: "At each rank of the ladder", columns: ladderColumns }).box
      : null;
  const pair = (before, after, format) =>
    known(before) || known(after)
      ? [known(before) ? figure(before, format) : "?", known(after) ? [" \u2192 ", figure(after, format)] : ""].flat()
      : null;
  const rankOf = (which) => pair(layer.before && layer.before[which], layer.after && layer.after[which]);
  const shown = facts([
    ["Status", layer.reason ? `${layer.status}: ${layer.reason}` : layer.status],
    [
      "Rank",
      known(layer.rank) && known(layer.full_rank)
        ? [figure(layer.rank, show.whole), " of ", figure(layer.full_rank, show.whole)]
        : known(layer.full_rank)
          ? ["full, ", figure(layer.full_rank, show.whole)]
          : null,
    ],
    ["Parameters", pair(layer.parameters_before, layer.parameters_after, show.whole)],
    ["FLOPs", pair(layer.flops_before, layer.flops_after, show.count)],
    ...MEASURED.map(columnOf)
      .filter((column) => column && known(dig(layer, column.key)))
      .map(({ key, title, form }) => [capital(title), figure(dig(layer, key), FORMS[form])]),
    ["Nuclear rank", rankOf("nuclear")],
    ["Entropy rank", rankOf("entropy")],
    ["Stable rank", rankOf("stable")],
    ["Condition number", rankOf("condition")],
    [
      "Predicted damage",
      known(layer.damage)
        ? [figure(layer.damage), layer.damage_high ? html("span", { class: "flag" }, " \u25b2 high") : null].filter(
            Boolean,
          )
        : null,
    ],
  ]);
  return [
    html("h3", {}, broken(layer.name)),
    shown,
    html("div", { class: "plots" }, spectrum || null, energyPlot(layer, marks), overlapPlot(layer)),
    overlapTable(layer),
    ranks,
    dynamicsPlots(
      [layer.name],
      EFFECTIVE.map((e) => `${e}_rank`),
    ),
  ];
}

/** Energy kept at every rank: exact where all values are drawn, else the ones between lie on a line of the log plot. */
function energyPlot(layer, marks) {
  const spectrum = layer.spectrum_before;
  if (!spectrum || !known(layer.full_rank) || spectrum.index[spectrum.index.length - 1] !== layer.full_rank)
    return null;
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
  if (known(layer.rank) && known(layer.energy_kept))
    spots.push({ x: layer.rank, y: layer.energy_kept, paint: "var(--after)" });
  return plot({
    title: "Energy kept",
    note: exact ? null : spots.length ? "dots measured, line interpolated" : "interpolated between the values drawn",
    height: 300,
    marks,
    spots,
    x: { label: "rank", format: show.whole },
    y: { min: 0, max: 1, format: (v) => `${Math.round(100 * v)}\u202f%`, exact: show.share },
    series: [
      { name: "energy", paint: "var(--before)", points: [[0, 0], ...sums.map(([at, part]) => [at, part / sum])] },
    ],
  });
}

const sides = { output: "output side", input: "input side" };

function overlapPlot(layer) {
  const leading = (layer.overlap && layer.overlap.leading) || [];
  return leading.length < 2
    ? null
    : plot({
        title: "Overlap of the leading directions",
        note: "dense with factorised; 1 is the same subspace",
        height: 300,
        x: { label: "leading directions", log: true, format: show.whole },
        y: { min: 0, max: 1 },
        series: Object.keys(sides).map((side, i) => ({
          name: sides[side],
          paint: colour(i),
          line: i ? "6 3" : "",
          dots: true,
          points: leading.map((one) => [one.k, one[side]]),
        })),
      });
}

function overlapTable(layer) {
  if (!layer.overlap) return null;
  const angles = Object.keys(sides)
    .filter((side) => layer.overlap[side])
    .map((side) => ({ side: sides[side], ...layer.overlap[side] }));
  const leading = layer.overlap.leading || [];
  return html(
    "div",
    { class: "beside" },
    angles.length
      ? dataTable({
          rows: angles,
          caption: "Principal angles",
          columns: [
            { key: "side", label: "Side", value: (row) => row.side },
            { key: "largest", label: "largest", value: (row) => row.largest, format: show.degrees },
            { key: "median", label: "median", value: (row) => row.median, format: show.degrees },
          ],
        }).box
      : null,
    leading.length
      ? dataTable({
          rows: leading,
          caption: "Overlap of the k leading directions",
          columns: [
            { key: "k", label: "k", value: (row) => row.k, format: show.whole },
            { key: "output", label: "output side", value: (row) => row.output },
            { key: "input", label: "input side", value: (row) => row.input },
          ],
        }).box
      : null,
  );
}
