// @ts-check
// Training runs: settings, curves, ranks and norms over the steps.

const HIGHER_IS_BETTER = /^(top|f1|exact|pearson|spearman|cosine)/;
const SETTINGS = ["decay", "decay_strength", "lr", "optimizer", "steps", "teacher", "data", "seed"];
const STAGES = ["dense", "factorised", "healed"];
const DYNAMICS = {
  nuclear_rank: "Nuclear rank",
  entropy_rank: "Entropy rank",
  stable_rank: "Stable rank",
  frobenius_norm: "Frobenius norm",
  spectral_norm: "Spectral norm",
  u_norm: "Norm of U",
  v_norm: "Norm of V",
};

const metricName = (key) => view.headings[key] || key.replaceAll("_", " ");
const SHARES = /^(top|f1|exact)/;
const metricFormat = (key) => (SHARES.test(key) ? show.share : show.number);
const words = (key) => (key === "lr" ? "learning rate" : key.replaceAll("_", " "));

/** The keys of some objects, wanted ones first, then the others as they come. */
function keysOf(objects, wanted, without = []) {
  const found = new Set(objects.flatMap((one) => Object.keys(one || {})));
  return [...wanted.filter((key) => found.has(key)), ...[...found].filter((key) => !wanted.includes(key))].filter(
    (key) => !without.includes(key),
  );
}

function trainingSection() {
  const runs = report.training;
  if (!runs.length) return null;
  const metrics = keysOf(
    runs.flatMap((run) => run.evaluations || []),
    Object.keys(view.headings),
    ["step", "stage"],
  );
  const line = (i) => ({ paint: colour(i), line: dash(i) });
  const evaluated = metrics.map((key) =>
    plot({
      title: capital(metricName(key)),
      note: `on the evaluation data; ${HIGHER_IS_BETTER.test(key) ? "higher" : "lower"} is better`,
      marks: changes(runs, key),
      x: { label: "step", format: show.whole },
      y: SHARES.test(key)
        ? { format: (v) => `${Number((100 * v).toPrecision(3))}\u202f%`, exact: show.share }
        : {},
      keyed: false,
      series: runs.map((run, i) => ({
        name: run.name,
        ...line(i),
        dots: true,
        points: (run.evaluations || []).map((one) => [one.step, one[key]]),
      })),
    }),
  );
  const losses = plot({
    title: "Training loss",
    note: "as logged",
    x: { label: "step", format: show.whole },
    y: {},
    keyed: false,
    series: runs.map((run, i) => ({
      name: run.name,
      ...line(i),
      points: (run.losses || []).map((one) => [one.step, one.loss]),
    })),
  });
  const rates = plot({
    title: "Learning rate",
    x: { label: "step", format: show.whole },
    y: { min: 0 },
    keyed: false,
    series: runs.map((run, i) => ({
      name: run.name,
      ...line(i),
      points: (run.losses || []).map((one) => [one.step, one.lr]),
    })),
  });
  return section(
    "training",
    runs.length > 1 ? "Training runs" : "Training",
    runsTable(runs).box,
    runs.length > 1 && legend(runs.map((run, i) => ({ name: run.name, ...line(i) }))),
    html("div", { class: "plots" }, evaluated, losses, rates),
    dynamics(runs),
  );
}

/** Where a run's evaluations pass from one stage to the next; one mark where all runs change at the same step. */
function changes(runs, key) {
  const found = runs.flatMap((run, i) =>
    (run.evaluations || [])
      .filter((one) => known(one[key]))
      .flatMap((one, at, all) =>
        at && all[at - 1].stage !== one.stage && known(one.stage)
          ? [{ x: one.step, label: one.stage, paint: colour(i) }]
          : [],
      ),
  );
  const distinct = new Map(found.map((one) => [`${one.x} ${one.label}`, one]));
  return distinct.size === 1 ? [{ ...found[0], paint: "var(--muted)" }] : [...distinct.values()];
}

function runsTable(runs) {
  const settings = keysOf(
    runs.map((run) => run.settings),
    SETTINGS,
  );
  const stages = keysOf(
    runs.map((run) => run.stages),
    STAGES,
  );
  const figures = keysOf(
    runs.flatMap((run) => Object.values(run.stages || {})),
    Object.keys(view.headings),
  );
  const plain = (value) => (Array.isArray(value) ? value.join(", ") || null : (value ?? null));
  return dataTable({
    rows: runs,
    caption: "Settings and results",
    name: "runs-table",
    columns: [
      { key: "name", label: "Run", value: (run) => run.name },
      ...settings.map((key) => ({
        key: `settings.${key}`,
        label: capital(words(key)),
        format: show.tick,
        value: (run) => plain(run.settings && run.settings[key]),
      })),
      ...figures.flatMap((metric) =>
        stages.map((stage) => ({
          key: `stages.${stage}.${metric}`,
          group: capital(metricName(metric)),
          label: stage,
          format: metricFormat(metric),
          value: (run) => run.stages?.[stage]?.[metric] ?? null,
        })),
      ),
    ],
  });
}

// ---- ranks and norms over the steps -------------------------------------------------------------------------------

/** [[step, mean over the named layers], ...] of a quantity, at the steps where any of them has it. */
function meanOver(run, names, quantity) {
  const sums = new Map();
  for (const name of names) {
    const layer = run.layers && run.layers[name];
    const values = layer && layer[quantity];
    if (!values) continue;
    layer.step.forEach((step, i) => {
      if (!known(values[i])) return;
      const [sum, count] = sums.get(step) || [0, 0];
      sums.set(step, [sum + values[i], count + 1]);
    });
  }
  return [...sums].map(([step, [sum, count]]) => [step, sum / count]).sort((a, b) => a[0] - b[0]);
}

function dynamicsPlots(names, quantities) {
  const lines = report.training
    .map((run, i) => ({ run, name: run.name, paint: colour(i), line: dash(i) }))
    .filter(({ run }) => names.some((name) => run.layers && run.layers[name]));
  const drawn = quantities
    .map((key) =>
      plot({
        title: DYNAMICS[key],
        note: names.length > 1 ? `mean over ${names.length} layers` : "over training",
        height: 200,
        x: { label: "step", format: show.whole },
        y: {},
        keyed: false,
        series: lines.map((line) => ({ ...line, points: meanOver(line.run, names, key) })),
      }),
    )
    .filter(Boolean);
  return drawn.length ? [lines.length > 1 && legend(lines), html("div", { class: "plots small" }, drawn)] : null;
}

/** Viridis without the end that the background would swallow. */
const shade = (at) => `light-dark(${viridis(0.85 * at)}, ${viridis(0.25 + 0.75 * at)})`;

/** A layer's singular values at up to six of the steps, one plot a run. */
function spectraOver(name) {
  return report.training.map((run) => {
    const layer = run.layers && run.layers[name];
    if (!layer || !layer.spectrum || !layer.spectrum.values.length) return null;
    const { index, values } = layer.spectrum;
    const wanted = Math.min(6, values.length);
    const picked = [
      ...new Set(
        Array.from({ length: wanted }, (_, i) => Math.round((i * (values.length - 1)) / Math.max(1, wanted - 1))),
      ),
    ];
    return plot({
      title: "Singular values over training",
      note: run.name,
      height: 200,
      x: { label: "position", format: show.whole },
      y: { log: true },
      keyed: true,
      series: picked.map((at, i) => ({
        name: `step ${show.whole(layer.step[at])}`,
        paint: shade(i / Math.max(1, picked.length - 1)),
        points: index.map((place, k) => [place, values[at][k]]),
      })),
    });
  });
}

function dynamics(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.layers || {})))];
  if (!names.length) return null;
  const which = choice("dynamics-layer", "Layer", [
    ["", `mean over ${names.length} layers`],
    ...names.map((name, i) => [String(i), name]),
  ]);
  const place = html("div", {});
  const draw = () => {
    const one = which.value === "" ? null : names[Number(which.value)];
    place.replaceChildren();
    dress(place, {}, [
      dynamicsPlots(one === null ? names : [one], Object.keys(DYNAMICS)),
      one !== null && html("div", { class: "plots" }, spectraOver(one)),
    ]);
  };
  which.addEventListener("change", draw);
  draw();
  return html(
    "div",
    { id: "dynamics" },
    html("h3", {}, "Ranks and norms while training"),
    html("div", { class: "tools" }, which),
    place,
  );
}
