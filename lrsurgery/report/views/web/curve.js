// @ts-check
// The curve of a dense model: figures over size; and how a target chose the size of a model.

function curveSection() {
  const curve = report.curve;
  if (!curve) return null;
  const rows = curve.points.map((point, i) => ({
    ...point,
    budget: point.budget || "dense",
    knee: i === curve.knee ? "knee" : "",
  }));
  const percent = (value) => `${Number((100 * value).toPrecision(4))}\u202f%`;
  const over = (label, of, format) => {
    const points = rows.filter((row) => known(of(row))).map((row) => [row.share, of(row)]);
    const knee = curve.knee === null ? null : rows[curve.knee];
    return (
      points.length > 1 &&
      plot({
        title: capital(label),
        note: "against the share of parameters",
        height: 260,
        x: { label: "share of parameters", format: percent },
        y: { pad: 0.16, ...format },
        series: [{ name: label, paint: colour(0), line: "", dots: true, points }],
        spots:
          knee && known(of(knee)) ? [{ x: knee.share, y: of(knee), label: "knee", paint: "var(--after)" }] : [],
      })
    );
  };
  return section(
    "curve",
    "What each size loses",
    view.curveWords.map((line) => html("p", { class: "muted" }, line)),
    html(
      "div",
      { class: "ladder" },
      dataTable({ columns: columnsOf(view.curve), rows, caption: "Curve of sizes", name: "curve-table" }).box,
      over("loss", (row) => row.values.loss, {}),
      over("speedup", (row) => row.speedup, { format: show.times }),
    ),
  );
}

function choiceSection() {
  if (!view.choice.length) return null;
  return section(
    "choice",
    "How the size was chosen",
    view.choice.map((line) => html("p", {}, line)),
  );
}
