// The summary: a few big figures, and sentences for a reader who goes no further.

const big = (label, value, note, extra) =>
  html(
    "div",
    { class: "big" },
    html("div", { class: "label" }, label),
    html("div", { class: "value" }, value),
    extra,
    note && html("div", { class: "note" }, note),
  );

function bars(before, after) {
  const share = Math.min(1, after / before);
  return html(
    "div",
    { class: "bars", "aria-hidden": "true" },
    html("i", { class: "was" }),
    html("i", { class: "is", style: { width: `${100 * share}%` } }),
  );
}

/** The metric that a reader knows best, and its figures in the run of this name, else in the last one. */
function quality() {
  const staged = report.training.filter((run) => run.stages && Object.keys(run.stages).length);
  if (!staged.length || report.about === "runs") return null;
  const run = staged.find((one) => one.name === report.name) || staged[staged.length - 1];
  const metric = FAMILIAR.find((key) => STAGES.some((stage) => known(run.stages[stage]?.[key])));
  if (!metric) return null;
  const [dense, factorised, healed] = STAGES.map((stage) => run.stages[stage]?.[metric] ?? null);
  return {
    run,
    metric,
    dense,
    factorised,
    healed,
    better: HIGHER_IS_BETTER.test(metric) ? "higher" : "lower",
    format: metricFormat(metric),
  };
}

function sizeWords() {
  const {
    parameters_before: before,
    parameters_after: after,
    share,
    layers_factorised: factorised,
    layers_dense: dense,
  } = totals;
  if (!known(before)) return null;
  const said = [];
  if (report.about === "dense" || !known(after)) {
    said.push("The model has ", figure(before, show.words), " parameters");
    if (known(factorised) || known(dense))
      said.push(" and ", figure((factorised || 0) + (dense || 0), show.whole), " layers that were looked at");
    said.push(".");
  } else {
    said.push(
      report.about === "plan" ? "The plan replaces " : "Surgery replaced ",
      figure(factorised, show.whole),
      ` ${factorised === 1 ? "layer" : "layers"} by low-rank ones and leaves `,
      figure(dense, show.whole),
      " dense. The model goes from ",
      figure(before, show.words),
      " parameters to ",
      figure(after, show.words),
      known(share) ? [", ", figure(share, show.share), " of the original"] : "",
      ".",
    );
  }
  if (known(totals.bytes_before) && known(totals.bytes_after))
    said.push(
      " Its files shrink from ".replace("shrink", totals.bytes_after < totals.bytes_before ? "shrink" : "go"),
      figure(totals.bytes_before, show.bytes),
      " to ",
      figure(totals.bytes_after, show.bytes),
      ".",
    );
  if (known(totals.flops_before) && known(totals.flops_after))
    said.push(
      " The arithmetic of a token in the layers goes from ",
      figure(totals.flops_before, show.count),
      " to ",
      figure(totals.flops_after, show.count),
      " FLOPs.",
    );
  return said.flat();
}

/** The ladder's step nearest to half the size, before surgery. */
function halfway() {
  const steps = (report.ladder || []).filter((step) => known(step.share) && known(step.energy_kept));
  if (!steps.length || report.about === "factorised") return null;
  return [...steps].sort((a, b) => Math.abs(a.share - 0.5) - Math.abs(b.share - 0.5))[0];
}

function ladderWords() {
  const step = halfway();
  return (
    step && [
      "At rank ",
      html("code", {}, step.rank),
      ", the step of the ladder nearest to half the size, it would have ",
      figure(step.parameters, show.words),
      " parameters, ",
      figure(step.share, show.share),
      " of now, and the factorised layers would keep ",
      figure(step.energy_kept, show.share),
      " of their energy.",
    ]
  );
}

function energyWords() {
  if (!known(totals.energy_kept)) return null;
  return [
    report.about === "plan" ? "The replaced layers would keep " : "The replaced layers kept ",
    figure(totals.energy_kept, show.share),
    " of the energy of their weights (the sum of their squared singular values)",
    report.about === "factorised" && !quality()
      ? "; what that does to the model\u2019s answers has not been measured here."
      : ".",
  ];
}

function qualityWords(found) {
  if (!found) return null;
  const { metric, dense, factorised, healed, format, better, run } = found;
  const said = [`${capital(metricName(metric))} (${better} is better) `];
  if (known(dense)) said.push("was ", figure(dense, format), " for the dense model");
  if (known(factorised)) said.push(known(dense) ? ", " : "was ", figure(factorised, format), " right after surgery");
  if (known(healed))
    said.push(known(dense) || known(factorised) ? " and is " : "is ", figure(healed, format), " after healing");
  const settings = run.settings || {};
  if (known(healed) && known(settings.steps))
    said.push(
      ", which took ",
      figure(settings.steps, show.whole),
      " training steps",
      known(settings.decay) && settings.decay !== "none" ? ` with ${settings.decay} decay` : "",
    );
  return [...said, "."];
}

function speedWords() {
  const run = report.bench && (report.bench.runs || []).find((one) => known(one.speedup));
  if (!run) return null;
  const said = [
    run.speedup >= 1 ? "It runs " : "It runs slower, ",
    figure(run.speedup, show.times),
    " as fast as the dense model",
    ` (${workOf(run)}`,
  ];
  if (run.interval)
    said.push(
      "; ",
      known(run.confidence) ? `${Math.round(100 * run.confidence)}\u202f% interval ` : "interval ",
      figure(run.interval[0], show.times),
      " to ",
      figure(run.interval[1], show.times),
    );
  said.push(")", known(run.ideal) ? ["; the arithmetic alone would allow ", figure(run.ideal, show.times)] : "", ".");
  const slower = (report.bench.runs || []).filter((one) => known(one.speedup) && one.speedup < 1);
  if (slower.length && run.speedup >= 1)
    said.push(
      " In ",
      figure(slower.length, show.whole),
      ` of the ${report.bench.runs.length} runs it is slower than dense.`,
    );
  return said.flat();
}

function runsWords() {
  if (report.about !== "runs" || !report.training.length) return null;
  const said = [
    figure(report.training.length, show.whole),
    report.training.length === 1 ? " training run." : " training runs.",
  ];
  const {
    metric,
    ranked: [best, second],
  } = lastFigures();
  if (!best) return said;
  return [
    ...said,
    ` The best last ${metricName(metric)} is `,
    figure(best.value, metricFormat(metric)),
    ", by ",
    html("strong", {}, best.name),
    ` at step ${show.whole(best.step)}`,
    second ? [", ahead of ", html("strong", {}, second.name), " at ", figure(second.value, metricFormat(metric))] : "",
    ".",
  ].flat();
}

/** Each run's last figure of the metric that a reader knows best, best run first. */
function lastFigures() {
  const metric = FAMILIAR.find((key) =>
    report.training.some((run) => (run.evaluations || []).some((one) => known(one[key]))),
  );
  const sign = HIGHER_IS_BETTER.test(metric) ? -1 : 1;
  const ranked = report.training.flatMap((run) =>
    (run.evaluations || [])
      .filter((one) => known(one[metric]))
      .slice(-1)
      .map((one) => ({ name: run.name, step: one.step, value: one[metric] })),
  );
  return { metric, ranked: ranked.sort((a, b) => sign * (a.value - b.value)) };
}

function bigFigures(found) {
  const { parameters_before: before, parameters_after: after, share } = totals;
  const figures = [];
  if (known(before) && known(after))
    figures.push(
      big(
        "Size",
        known(share) ? figure(share, show.share) : figure(after, show.count),
        [figure(after, show.words), " of ", figure(before, show.words), " parameters"],
        before > 0 && bars(before, after),
      ),
    );
  else if (known(before)) figures.push(big("Size", figure(before, show.count), "parameters"));
  const step = known(after) ? null : halfway();
  if (step)
    figures.push(
      big(
        `Size at rank ${step.rank}`,
        figure(step.share, show.share),
        [figure(step.parameters, show.words), " parameters"],
        before > 0 && bars(before, step.parameters),
      ),
      big(
        `Energy kept at rank ${step.rank}`,
        figure(step.energy_kept, show.share),
        "in the layers that would be factorised",
      ),
    );
  if (known(totals.energy_kept))
    figures.push(big("Energy kept", figure(totals.energy_kept, show.share), "in the replaced layers"));
  if (found) {
    const now = found.healed ?? found.factorised ?? found.dense;
    const was = [
      ["dense", found.dense],
      ["before healing", found.factorised],
    ].filter(([, value]) => known(value) && value !== now);
    figures.push(
      big(capital(metricName(found.metric)), figure(now, found.format), [
        known(found.healed) ? "after healing" : known(found.factorised) ? "after surgery" : "dense",
        ...was.flatMap(([label, value], i) => [i ? ", " : "; ", `${label} `, figure(value, found.format)]),
      ]),
    );
  }
  if (report.about === "runs") {
    const { metric, ranked } = lastFigures();
    figures.push(
      ...ranked
        .slice(0, 4)
        .map(({ name, step, value }) =>
          big(name, figure(value, metricFormat(metric)), `${metricName(metric)} at step ${show.whole(step)}`),
        ),
    );
  }
  const run = report.bench && (report.bench.runs || []).find((one) => known(one.speedup));
  if (run) figures.push(big("Speed", figure(run.speedup, show.times), workOf(run)));
  const high = report.layers.filter((layer) => layer.damage_high).length;
  if (high)
    figures.push(
      big("At risk", figure(high, show.whole), `${high === 1 ? "layer" : "layers"} with high predicted damage`),
    );
  return figures.length ? html("div", { class: "bigs" }, figures) : null;
}

function summary() {
  const found = quality();
  const said = [sizeWords(), ladderWords(), energyWords(), qualityWords(found), speedWords(), runsWords()].filter(
    Boolean,
  );
  return said.length
    ? section(
        "summary",
        "Summary",
        bigFigures(found),
        html(
          "div",
          { class: "prose" },
          said.map((sentence) => html("p", {}, sentence)),
        ),
      )
    : null;
}
