/* The charts over steps: loss and its difference, bits per byte, progress, acceptance of drafts. */
const SMOOTHING = [0, 10, 50]; // steps
let smoothing = 10;

/* Mean over a centred window; at the ends the window is what is there. Gaps stay gaps. */
function smoothed(values, window) {
  if (window < 2) return values;
  const before = Math.floor(window / 2), after = Math.ceil(window / 2);
  const sum = [0], count = [0];
  for (const value of values) {
    sum.push(sum.at(-1) + (value ?? 0));
    count.push(count.at(-1) + (value === null ? 0 : 1));
  }
  return values.map((value, i) => {
    const from = Math.max(0, i - before), to = Math.min(values.length, i + after);
    return value === null ? null : (sum[to] - sum[from]) / (count[to] - count[from]);
  });
}

/* Steps between two points; a recorded step may stand for several, and a point for several records. */
function stepsAPoint() {
  const { steps } = report;
  return steps.length > 1 ? (steps.at(-1) - steps[0]) / (steps.length - 1) : 1;
}

function drawLoss() {
  const host = byId("chart-loss");
  if (!host) return;
  const window = Math.round(smoothing / stepsAPoint());
  const series = [], bands = [];
  for (const arm of [...controls, ...twinFirst(trained)]) {
    const { lm_loss: loss, lm_loss_low: low, lm_loss_high: high } = arm.series;
    if (!loss) continue;
    const look = arm.control ? { colour: "control", width: 1.2, alpha: 0.8, dash: [5, 3], order: 200 } : armLook(arm);
    series.push({ label: arm.label, values: smoothed(loss, window), ...look });
    if (arm.control) continue;
    if (window > 1) series.push({ label: arm.label, quiet: true, values: loss, ...look, width: 1, alpha: 0.25 });
    if (low && window < 2) {
      bands.push({ upper: series.length, lower: series.length + 1, fill: withAlpha(colour(look.colour), 0.18) });
      series.push({ label: arm.label, quiet: true, bare: true, values: high, ...look });
      series.push({ label: arm.label, quiet: true, bare: true, values: low, ...look });
    }
  }
  for (const arm of twinFirst(trained)) {
    if (!arm.validation.loss.some(isNumber)) continue;
    const label = `${trained.length > 1 ? `${arm.label} ` : ""}held out`;
    series.push({ label, values: atNearestStep(arm.validation), colour: armColour(arm), dots: arm.name === "bf16" ? 9 : 6,
      order: 100 + trained.indexOf(arm) });
  }
  for (const arm of twinFirst([...trained, ...controls])) {
    if (!arm.unstable.length || !arm.series.lm_loss) continue;
    const label = `${report.arms.length > 1 ? `${arm.label} ` : ""}not finite or a spike`;
    series.push({ label, values: marked(arm), colour: "bad", dots: 8, order: 300 + report.arms.indexOf(arm) });
  }
  lineChart(host, { x: report.steps, series, bands, height: 330, format: (v) => fixed(v, 3), axisFormat: (v) => significant(v, 4),
    axis: !report.differences, range: padded });
  const note = byId("thinning-note");
  note.hidden = report.grouped < 2;
  note.textContent = `Each point is the mean of ${grouped(report.grouped)} recorded steps` +
    " (of the gradient norm the largest); without smoothing, the tint spans their smallest and largest loss.";
}

function nearest(step) {
  let at = report.steps.findIndex((known) => known >= step);
  if (at < 0) at = report.steps.length - 1;
  return at > 0 && step - report.steps[at - 1] < report.steps[at] - step ? at - 1 : at;
}

function atNearestStep({ steps, loss }) {
  const values = report.steps.map(() => null);
  steps.forEach((step, i) => {
    const at = nearest(step);
    if (at >= 0 && isNumber(loss[i])) values[at] = loss[i];
  });
  return values;
}

/* Where a step's loss is not finite, its mark stands on the latest one before it that is. */
function marked(arm) {
  const values = report.steps.map(() => null), loss = arm.series.lm_loss_high ?? arm.series.lm_loss;
  for (const step of arm.unstable) {
    const at = nearest(step), shown = loss.slice(0, at + 1).findLastIndex(isNumber);
    if (shown >= 0) values[at] = loss[shown];
  }
  return values;
}

function drawDifference() {
  const host = byId("chart-difference"), found = report.differences;
  if (!host) return;
  if (!found || !report.steps.length) {
    byId("difference-note").textContent = "The two arms have no step in common yet.";
    return;
  }
  const series = [], bands = [];
  if (found.band.low?.some(isNumber)) {
    series.push({ label: "controls", values: found.band.high, colour: "control", bare: true, shape: "area" });
    series.push({ label: "controls", values: found.band.low, colour: "control", bare: true, quiet: true });
    bands.push({ upper: 0, lower: 1, fill: colour("band") });
  }
  for (const arm of trained) {
    const drawn = found.arms[arm.name];
    if (!drawn) continue;
    const windows = drawn.windows.some(isNumber);
    if (windows) {
      series.push({ label: `${arm.label}, 50-step windows`, values: drawn.windows, colour: armColour(arm), width: 2.4 });
    }
    series.push({ label: `${arm.label}, each step`, values: drawn.points, colour: armColour(arm),
      width: windows ? 1 : 1.5, alpha: windows ? 0.3 : 1 });
  }
  const guides = [{ value: 0, solid: true }, { value: found.bar, text: `bar ±${trimmed(percent(found.bar))}` }, { value: -found.bar }];
  lineChart(host, { x: report.steps, series, bands, height: 220, format: signedPercent, guides, shadeFrom: found.judged_from,
    axisFormat: (v) => `${fixed(100 * v, Math.abs(v) < 0.1 ? 1 : 0)}\u202f%`, range: () => differenceRange(found) });
  const windows = Object.values(found.arms).some((arm) => arm.windows.some(isNumber));
  byId("difference-note").textContent = (windows ? "The verdict looks at the windows in the shaded second half. "
    : "The runs have no whole window of 50 steps in common. ") +
    (found.controls ? "" : "Without control runs nobody can say how much of this is chance.");
}

/* The windows, the band and the bar fit, or nine in ten of the steps where there is no window; the rest may be cut off. */
function differenceRange(found) {
  const arms = Object.values(found.arms);
  const windows = [...arms.flatMap((arm) => arm.windows), ...(found.band.low ?? []), ...(found.band.high ?? [])].filter(isNumber);
  const sizes = (windows.length ? windows : arms.flatMap((arm) => arm.points).filter(isNumber)).map(Math.abs);
  const largest = sizes.sort((a, b) => a - b)[Math.ceil(sizes.length * (windows.length ? 1 : 0.9)) - 1] ?? 0;
  const reach = Math.max(found.bar * 1.4, largest * 1.15);
  return [-reach, reach];
}

/* Columns given at their own steps -> one ascending x for all of them. */
function joined(columns) {
  const x = [...new Set(columns.flatMap(({ steps }) => steps))].sort((a, b) => a - b);
  return { x, columns: columns.map(({ steps, values }) => {
    const at = new Map(steps.map((step, i) => [step, values[i]]));
    return x.map((step) => at.get(step) ?? null);
  }) };
}

function drawBits() {
  const host = byId("chart-bits");
  if (!host) return;
  const arms = twinFirst(trained).filter((arm) => arm.validation.bits_per_byte.some(isNumber));
  if (!arms.length) return host.replaceChildren(element("p", { className: "empty", textContent: "No validation was recorded." }));
  const averaged = arms.filter((arm) => arm.validation.ema_bits_per_byte.some(isNumber));
  const { x, columns } = joined([
    ...arms.map(({ validation: v }) => ({ steps: v.steps, values: v.bits_per_byte })),
    ...averaged.map(({ validation: v }) => ({ steps: v.steps, values: v.ema_bits_per_byte })),
  ]);
  const series = arms.map((arm, i) => ({ label: arm.label, values: columns[i], ...armLook(arm), span: true }));
  for (const [i, arm] of averaged.entries())
    series.push({ label: `${arm.label}, averaged weights`, values: columns[arms.length + i], ...armLook(arm), dash: [5, 3], span: true });
  const guides = isNumber(report.bigram) ? [{ value: report.bigram, text: "Witten-Bell bigram" }] : [];
  lineChart(host, { x, series, guides, height: 190, format: (v) => fixed(v, 3), axisFormat: (v) => significant(v, 4),
    range: (min, max) => padded(min, max, report.bigram) });
}

function padded(min, max, ...also) {
  const all = [min, max, ...also].filter(isNumber);
  if (!all.length) return [0, 1];
  const low = Math.min(...all), high = Math.max(...all), pad = 0.08 * (high - low || Math.abs(high) || 1);
  return [low - pad, high + pad];
}

const PROGRESS = [
  ["tokens_per_s", "Tokens per second", compactCount, { zero: true }],
  ["mfu", "Model FLOPs utilisation", (v) => percent(v, 3), { zero: true }],
  ["gradient_norm", "Gradient norm, before clipping", (v) => significant(v, 3), { logarithmic: true }],
  ["learning_rate", "Learning rate", scientific, { zero: true, once: true }],
  ["mtp_loss", "MTP loss, nats per token", (v) => fixed(v, 3), {}],
  ["balance_loss", "Sequence-wise balance loss", scientific, {}],
  ["batch_size", "Sequences in a step", grouped, { zero: true, once: true, varying: true }],
  ["bias_update_speed", "Bias update speed", scientific, { zero: true, once: true, varying: true }],
  ["mtp_loss_weight", "Weight of the MTP loss", (v) => significant(v, 3), { zero: true, once: true, varying: true }],
];

function drawProgress() {
  const host = byId("multiples");
  if (!host) return;
  for (const [name, title, format, how] of PROGRESS) {
    let arms = twinFirst(trained).filter((arm) => arm.series[name]?.some(isNumber));
    if (how.once) arms = arms.slice(0, 1);
    if (!arms.length || (how.varying && new Set(arms[0].series[name].filter(isNumber)).size < 2)) continue;
    let chart = byId(`chart-${name}`);
    if (!chart) {
      chart = element("div", { className: "chart", id: `chart-${name}`, tabIndex: 0, role: "group", ariaRoleDescription: "chart", ariaLabel: `${title} over the steps` });
      host.insertBefore(element("figure", { className: "card" }, element("figcaption", { textContent: title }), chart), byId("acceptance"));
    }
    const series = arms.map((arm) => ({
      label: how.once ? "all arms" : arm.label, values: arm.series[name], ...(how.once ? { colour: "control" } : armLook(arm)) }));
    if (how.once && report.arms.length < 2) series[0].label = "";
    const positive = series.every(({ values }) => values.every((value) => value === null || value > 0));
    lineChart(chart, { x: report.steps, series, height: 150, format, logarithmic: how.logarithmic && positive,
      range: how.logarithmic && positive ? undefined : (min, max) => (how.zero ? [0, 1.1 * (max || 1)] : padded(min, max)) });
  }
}

function drawAcceptance() {
  const host = byId("chart-acceptance");
  if (!host) return;
  const drawn = twinFirst(trained).flatMap((arm) => arm.validation.mtp_acceptance.map((values, depth) => ({ arm, values, depth })));
  const { x, columns } = joined(drawn.map(({ arm, values }) => ({ steps: arm.validation.steps, values })));
  const deep = drawn.some(({ depth }) => depth > 0);
  const series = drawn.map(({ arm, depth }, i) => ({
    label: arm.label + (deep ? `, draft ${depth + 1}` : ""), values: columns[i], ...armLook(arm), span: true,
    dash: depth ? [6 - depth, 3] : undefined }));
  lineChart(host, { x, series, height: 150, format: (v) => percent(v, 3), range: (_, max) => [0, Math.min(1, 1.15 * (max || 1))] });
}
