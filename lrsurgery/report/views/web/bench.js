// @ts-check
// The benchmark: runs and layers against dense.

function benchSection() {
  const bench = report.bench;
  if (!bench) return null;
  const runs = bench.runs || [];
  const compared = runs.map((run, i) => ({ ...run, label: view.works[i] })).filter((run) => known(run.speedup));
  const confidence = runs.length ? runs[0].confidence : null;
  const table = dataTable({ rows: runs, caption: "Runs", name: "bench-table", columns: columnsOf(view.runs) });
  const dots = compared.length
    ? intervals({
        title: "Speedup over dense",
        note: `${known(confidence) ? `bars: ${show.share(confidence).replace(".0", "")} intervals; ` : ""}diamonds: what the arithmetic alone would allow`,
        label: "times as fast as dense",
        rows: compared.map((run) => ({
          label: run.label,
          value: run.speedup,
          low: run.interval && run.interval[0],
          high: run.interval && run.interval[1],
          ideal: run.ideal,
        })),
      })
    : null;
  return section(
    "speed",
    "Speed",
    runs.length ? table.box : null,
    dots,
    benchLayers(bench.layers || []),
    factsOf(view.bench),
  );
}

function benchLayers(layers) {
  if (!layers.length) return null;
  return [
    html("h3", {}, "Layer by layer"),
    html("p", {}, view.slower.map(partOf)),
    dataTable({
      rows: layers,
      caption: "By shape and rank",
      name: "bench-layers-table",
      columns: columnsOf(view.layers, {
        names: (row) => listed(row.names),
        slower: (row) => (row.slower ? html("span", { class: "flag" }, "\u25bc slower") : "not slower"),
      }),
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
