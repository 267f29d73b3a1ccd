/* One chart over steps: uPlot with a legend of buttons that shows the values under the crosshair, arrow keys, and
   guides behind the lines. All charts share the crosshair by step. `hidden` remembers what the reader switched off,
   so that a chart may be drawn again at any time (another light, other smoothing). */
const charts = new Map(); // host -> uPlot
const hidden = new Map(); // host -> set of labels
const AXIS_WIDTH = 58;

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const plot = charts.get(target.parentElement);
    if (plot && target.clientWidth > 0 && target.clientWidth !== plot.width) {
      plot.setSize({ width: target.clientWidth, height: plot.height });
    }
  }
});

/* options: x, series [{label, values, colour, alpha, width, dash, dots, stepped, quiet, shape}], bands [{upper, lower,
   fill}], height, format (of values), axisFormat, range(min, max), logarithmic, guides [{value, text}], shadeFrom,
   axis (false: no x labels), xRange, downward (y grows downward), under (hook behind the axes), moved (hook),
   cursorY. Of a series, `dots` is a scatter of that size, `bare` has no line and bounds a band, `span` joins sparse
   points; `quiet` ones are not in the legend and follow the one before them; `order`
   is the place in the legend, which need not be that of drawing. */
function lineChart(host, options) {
  forget(host);
  host.replaceChildren();
  const legend = element("ul", { className: "legend" });
  const plotHost = element("div", { className: "plot" });
  host.append(legend, plotHost);
  legend.hidden = options.series.every(({ quiet }) => quiet);
  const { series } = options;
  const off = hidden.get(host) ?? hidden.set(host, new Set()).get(host);
  const ink = colour("soft"), line = colour("line");
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const axis = { stroke: ink, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
  const plot = new uPlot({
    width: Math.max(plotHost.clientWidth, 120),
    height: options.height,
    padding: [10, 14, 0, 0],
    legend: { show: false },
    cursor: {
      y: options.cursorY ?? false,
      sync: { key: "steps", scales: ["x", null], setSeries: false },
      points: { size: 7, show: options.cursorY ? false : undefined },
      drag: { x: true, y: false },
    },
    scales: {
      x: { time: false, range: (_, min, max) => xLimits(options, min, max) },
      y: {
        distr: options.logarithmic ? 3 : 1, dir: options.downward ? -1 : 1,
        range: options.range ? (_, min, max) => options.range(min, max) : undefined,
      },
    },
    axes: [
      { ...axis, size: options.axis === false ? 8 : 26, space: 70, grid: { show: false }, values: (_, ticks) =>
        ticks.map((tick) => (options.axis === false || !Number.isInteger(tick) ? "" : grouped(tick))) },
      { ...axis, size: AXIS_WIDTH, gap: 8, space: 26, ...(options.logarithmic && { filter: roundTicks, grid: { ...axis.grid, filter: roundTicks } }), values: (_, ticks) => ticks.map((tick) =>
          tick === null ? "" : trimmed((options.axisFormat ?? options.format)(tick))), ...options.yAxis },
    ],
    series: [{}, ...series.map((drawn) => ({
      label: drawn.label,
      show: !off.has(drawn.label),
      stroke: drawn.dots || drawn.bare ? "transparent" : withAlpha(colour(drawn.colour), drawn.alpha ?? 1),
      width: drawn.bare ? 0 : drawn.width ?? 1.6,
      dash: drawn.dash,
      spanGaps: drawn.span ?? false,
      paths: drawn.dots ? () => null : undefined,
      points: drawn.dots
        ? { show: true, size: drawn.dots, width: 1.5, fill: colour("card"), stroke: colour(drawn.colour) }
        : { show: !drawn.bare && (drawn.span || drawn.values.length < 2), size: 5, fill: colour(drawn.colour) },
    }))],
    bands: (options.bands ?? []).map(({ upper, lower, fill }) => ({ series: [upper + 1, lower + 1], fill })),
    hooks: {
      drawClear: [(u) => { shade(u, options); options.under?.(u); }],
      drawAxes: [(u) => drawGuides(u, options, font)],
      draw: [(u) => {
        host.dataset.drawn = series.reduce((sum, s) => sum + s.values.filter(isNumber).length, 0);
      }],
      setCursor: [(u) => { fillLegend(u, u.cursor.idx); options.moved?.(u); }],
    },
  }, [options.x, ...series.map((drawn) => drawn.values)], plotHost);

  const values = buildLegend(legend, plot, options, off);
  const place = element("li", { className: "place" });
  legend.append(place);
  function fillLegend(u, index) {
    place.textContent = isNumber(index) ? `step ${grouped(options.x[index])}` : "";
    for (const [i, shown] of values) shown.textContent = options.format(valueAt(series[i], index ?? lastIndex(series[i])));
  }
  fillLegend(plot, null);
  host.onkeydown = (event) => moveCursor(event, plot, () => {
    const read = values.map(([i]) => `${series[i].label} ${options.format(valueAt(series[i], plot.cursor.idx))}`);
    speak(`Step ${grouped(options.x[plot.cursor.idx])}: ${read.join(", ")}`);
  });
  charts.set(host, plot);
  resized.observe(plotHost);
  return plot;
}

function xLimits({ x, xRange }, min, max) {
  const whole = min === null || (min === x[0] && max === x.at(-1));
  if (xRange && whole) return xRange;
  return min === max ? [(min ?? 0) - 1, (max ?? 0) + 1] : [min, max];
}

const roundTicks = (_, ticks) => ticks.map((tick) => (/^[125]/.test(tick.toExponential()) ? tick : null));

function forget(host) {
  charts.get(host)?.destroy();
  charts.delete(host);
}

function buildLegend(legend, plot, { series }, off) {
  const values = [];
  const listed = series.map((drawn, i) => [drawn, i]).filter(([{ quiet }]) => !quiet);
  listed.sort(([a], [b]) => (a.order ?? 0) - (b.order ?? 0));
  for (const [drawn, i] of listed) {
    const key = element("i", { className: `key ${drawn.dots ? "dots" : drawn.shape ?? (drawn.dash ? "dashed" : "")}` });
    key.style.setProperty("--arm", drawn.shape === "area" ? colour("band") : withAlpha(colour(drawn.colour), drawn.alpha ?? 1));
    key.style.setProperty("--thick", `${drawn.width ?? 1.6}px`);
    const shown = element("b");
    const button = element("button", { type: "button" }, key, drawn.label, shown);
    button.setAttribute("aria-pressed", String(!off.has(drawn.label)));
    button.onclick = () => {
      const show = off.delete(drawn.label) || !off.add(drawn.label);
      button.setAttribute("aria-pressed", String(show));
      let j = i;
      do plot.setSeries(j + 1, { show }); while (series[++j]?.quiet);
    };
    legend.append(element("li", {}, button));
    if (drawn.shape !== "area") values.push([i, shown]);
  }
  return values;
}

/* Dots are sparse: under the crosshair counts the last one before it. */
function valueAt(drawn, index) {
  if (index === null || index === undefined) return null;
  if (!drawn.dots && !drawn.span) return drawn.values[index];
  for (let i = index; i >= 0; i--) if (isNumber(drawn.values[i])) return drawn.values[i];
  return null;
}
const lastIndex = (drawn) => drawn.values.findLastIndex(isNumber);

function moveCursor(event, plot, moved) {
  const last = plot.data[0].length - 1;
  const at = plot.cursor.idx ?? last;
  const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
  const next = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last }[event.key];
  if (next === undefined || last < 0) return;
  event.preventDefault();
  const index = Math.min(last, Math.max(0, next));
  showCursor(plot, plot.valToPos(plot.data[0][index], "x"), Math.max(plot.cursor.top, 10));
  moved();
}

/* Move the crosshair as a mouse would: fire the hooks of this chart and tell the others. */
const showCursor = (plot, left, top) => plot.setCursor({ left, top }, true, true);

function shade(u, { shadeFrom }) {
  if (shadeFrom === undefined) return;
  const { left, top, width, height } = u.bbox;
  const from = Math.max(left, u.valToPos(shadeFrom, "x", true));
  u.ctx.fillStyle = colour("faint");
  if (from < left + width) u.ctx.fillRect(from, top, left + width - from, height);
}

function drawGuides(u, { guides = [] }, font) {
  const { left, top, width, height } = u.bbox, { ctx } = u, ratio = devicePixelRatio;
  for (const { value, text, solid } of guides) {
    const y = Math.round(u.valToPos(value, "y", true));
    if (y < top || y > top + height) continue;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("soft");
    ctx.lineWidth = ratio;
    if (!solid) ctx.setLineDash([4 * ratio, 4 * ratio]);
    ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(left + width, y); ctx.stroke();
    if (text) {
      ctx.font = font.replace("12px", `${12 * ratio}px`);
      ctx.textAlign = "right";
      ctx.fillText(text, left + width - 6 * ratio, y + (value < 0 ? 15 : -6) * ratio);
    }
    ctx.restore();
  }
}
