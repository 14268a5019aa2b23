// @ts-check
// The benchmark: runs and layers against dense.

const workOf = (run) =>
  [run.work, `batch ${run.batch}`, known(run.length) && `${show.whole(run.length)} ${run.unit || ""}`.trim()]
    .filter(Boolean)
    .join(", ");
const numberAt =
  (...path) =>
  (row) =>
    path.reduce((at, key) => (known(at) ? at[key] : null), row) ?? null;

function benchSection() {
  const bench = report.bench;
  if (!bench) return null;
  const runs = bench.runs || [];
  const compared = runs.filter((run) => known(run.speedup));
  const machine = Object.entries(bench.machine || {})
    .filter(([, value]) => known(value))
    .map(([key, value]) => [words(key), String(value)]);
  const confidence = runs.length ? runs[0].confidence : null;
  const rate = `${capital([...new Set(runs.map((run) => run.unit).filter(Boolean))].join(" or ") || "items")} a second`;
  const times = (key, group, label, at) => ({ key, group, label, value: numberAt(...at), format: show.number });
  const table = dataTable({
    rows: runs,
    caption: "Runs",
    name: "bench-table",
    columns: [
      { key: "work", label: "Work", value: (run) => run.work },
      { key: "batch", label: "Batch", value: numberAt("batch"), format: show.whole },
      { key: "length", label: "Length", value: numberAt("length"), format: show.whole },
      times("median_ms", "Median, ms", "this", ["median_ms"]),
      times("against.median_ms", "Median, ms", "dense", ["against", "median_ms"]),
      times("p95_ms", "95th percentile, ms", "this", ["p95_ms"]),
      times("against.p95_ms", "95th percentile, ms", "dense", ["against", "p95_ms"]),
      times("throughput", rate, "this", ["throughput"]),
      times("against.throughput", rate, "dense", ["against", "throughput"]),
      { key: "speedup", group: "Speedup", label: "measured", value: numberAt("speedup"), format: show.times },
      { key: "interval.0", group: "Speedup", label: "from", value: numberAt("interval", 0), format: show.times },
      { key: "interval.1", group: "Speedup", label: "to", value: numberAt("interval", 1), format: show.times },
      {
        key: "ideal",
        group: "Speedup",
        label: "ideal",
        value: numberAt("ideal"),
        format: show.times,
        title: "What the arithmetic saved would give alone",
      },
      { key: "rounds", label: "Rounds", value: numberAt("rounds"), format: show.whole },
      {
        key: "reached",
        label: "Precision",
        value: (run) => (run.reached === false ? "not reached" : run.reached ? "reached" : null),
      },
    ],
  });
  const dots = compared.length
    ? intervals({
        title: "Speedup over dense",
        note: `${known(confidence) ? `bars: ${show.share(confidence).replace(".0", "")} intervals; ` : ""}diamonds: what the arithmetic alone would allow`,
        label: "times as fast as dense",
        rows: compared.map((run) => ({
          label: workOf(run),
          value: run.speedup,
          low: run.interval && run.interval[0],
          high: run.interval && run.interval[1],
          ideal: run.ideal,
        })),
      })
    : null;
  const size = (model) =>
    model &&
    [
      known(model.parameters) && [figure(model.parameters, show.words), " parameters"],
      known(model.bytes) && [", ", figure(model.bytes, show.bytes)],
      known(model.peak_memory) && [", peak memory ", figure(model.peak_memory, show.bytes)],
    ]
      .filter(Boolean)
      .flat();
  return section(
    "speed",
    "Speed",
    runs.length ? table.box : null,
    dots,
    benchLayers(bench.layers || []),
    facts([
      ["This model", size(bench.model)],
      ["Dense model", size(bench.against)],
      ...machine,
      ...optionPairs(bench.options),
    ]),
  );
}

function benchLayers(layers) {
  if (!layers.length) return null;
  const slower = layers.filter((layer) => layer.slower);
  const shown = slower.flatMap((layer) => layer.names);
  return [
    html("h3", {}, "Layer by layer"),
    html(
      "p",
      {},
      slower.length
        ? [
            `${show.whole(shown.length)} ${shown.length === 1 ? "layer is" : "layers are"} slower factorised than dense on this machine: `,
            ...shown.slice(0, 8).flatMap((name, i) => [i ? ", " : "", html("code", {}, name)]),
            shown.length > 8 ? ` and ${shown.length - 8} more; the table has them all.` : ".",
          ]
        : "No layer was measured to be slower factorised than dense.",
    ),
    dataTable({
      rows: layers,
      caption: "By shape and rank",
      name: "bench-layers-table",
      columns: [
        { key: "names", label: "Layers", value: (row) => row.names.join(" "), cell: (row) => listed(row.names) },
        { key: "kind", label: "Kind", value: (row) => row.kind ?? null },
        { key: "shape", label: "Shape", value: (row) => (row.shape || []).join(" \u00d7 ") || null },
        { key: "rank", label: "Rank", value: numberAt("rank"), format: show.whole },
        { key: "input", label: "Input", value: (row) => (row.input || []).join(" \u00d7 ") || null },
        { key: "dense_ms", group: "Median, ms", label: "dense", value: numberAt("dense_ms") },
        { key: "factorised_ms", group: "Median, ms", label: "factorised", value: numberAt("factorised_ms") },
        { key: "speedup", group: "Speedup", label: "measured", value: numberAt("speedup"), format: show.times },
        { key: "interval.0", group: "Speedup", label: "from", value: numberAt("interval", 0), format: show.times },
        { key: "interval.1", group: "Speedup", label: "to", value: numberAt("interval", 1), format: show.times },
        {
          key: "slower",
          label: "Verdict",
          value: (row) => (row.slower ? "slower" : "not slower"),
          cell: (row) => (row.slower ? html("span", { class: "flag" }, "\u25bc slower") : "not slower"),
        },
      ],
    }).box,
  ];
}

function listed(names) {
  const rest = names.length - 1;
  return [
    html("code", {}, names[0]),
    rest > 0
      ? html(
          "details",
          {},
          html("summary", {}, `and ${rest} more`),
          names.slice(1).map((name) => html("code", {}, name)),
        )
      : "",
  ];
}
