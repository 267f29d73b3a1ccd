/* Expert load: thumbnails of all layers to choose from, the chosen one large, and the range of its routing bias. */
const loaded = trained.filter((arm) => arm.loads?.steps.length);
let loadArm = loaded[0], loadLayer = 0;

/* Load relative to the mean -> colour, on a logarithmic scale that ends at a quarter and at four times. */
function loadColours() {
  const low = colour("load-low"), even = colour("load-even"), high = colour("load-high"), none = mixed(colour("load-none"), colour("load-none"), 0);
  return (ratio) => {
    if (ratio <= 0) return none;
    const octaves = Math.max(-2, Math.min(2, Math.log2(ratio)));
    return octaves < 0 ? mixed(even, low, -octaves / 2) : mixed(even, high, octaves / 2);
  };
}

const layerLabel = (name) => {
  const number = Number(name.match(/layers\.(\d+)/)?.[1] ?? NaN);
  if (Number.isNaN(number)) return name;
  return number >= (report.trunk ?? Infinity) ? `MTP block ${number - report.trunk + 1}` : `layer ${number}`;
};

function drawRamp() {
  const host = byId("ramp"), colours = loadColours();
  const stops = [[0, "none"], [0.25, "¼"], [0.35, ""], [0.5, "½"], [0.71, ""], [1, "1"], [1.41, ""], [2, "2"], [2.83, ""], [4, "4×"]];
  host.replaceChildren(...stops.map(([ratio, text]) => {
    const tile = element("i");
    tile.style.background = `rgb(${colours(ratio)})`;
    return element("span", {}, tile, element("b", { textContent: text || "\u00a0" }));
  }));
}

function drawThumbnails() {
  const colours = loadColours();
  byId("layers").replaceChildren(...loadArm.loads.layers.map((layer, index) => {
    const columns = loadArm.loads.steps.length;
    const canvas = element("canvas", { width: columns, height: Math.max(1, layer.experts) });
    canvas.setAttribute("aria-hidden", "true");
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    layer.percent.forEach((value, i) => {
      const at = 4 * ((i % layer.experts) * columns + Math.floor(i / layer.experts));
      image.data.set([...colours(value / 100), 255], at);
    });
    context.putImageData(image, 0, 0);
    const worst = element("small", { textContent: isNumber(layer.violation) ? `+${percent(layer.violation)}` : "" });
    const button = element("button", { type: "button", title: layer.name }, canvas, worst, layerLabel(layer.name));
    button.setAttribute("aria-pressed", String(index === loadLayer));
    button.onclick = () => { loadLayer = index; drawExperts(); byId("layers").children[index].focus(); };
    return button;
  }));
}

function drawExperts() {
  if (!loadArm || !byId("chart-experts")) return;
  loadLayer = Math.min(loadLayer, loadArm.loads.layers.length - 1);
  const { steps, layers, grouped: size } = loadArm.loads;
  const layer = layers[loadLayer];
  drawRamp();
  drawThumbnails();
  const edges = steps.map((step, i) => (i ? (steps[i - 1] + step) / 2 : step - ((steps[1] ?? step + 1) - step) / 2));
  edges.push(steps.at(-1) + (steps.length > 1 ? (steps.at(-1) - steps.at(-2)) / 2 : 0.5));
  const host = byId("chart-experts");
  const plot = lineChart(host, {
    x: steps, height: Math.max(150, Math.min(340, 46 + 26 * layer.experts)), format: grouped, cursorY: true,
    series: [{ label: "", quiet: true, bare: true, colour: "soft", values: steps.map(() => 0) }],
    range: () => [-0.5, layer.experts - 0.5], downward: true, xRange: [edges[0], edges.at(-1)],
    yAxis: { values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? `${tick}` : "")), grid: { show: false },
      incrs: [1, 2, 4, 8, 16, 32, 64, 128], space: 18 },
    under: (u) => paintCells(u, layer, edges),
    moved: (u) => readLoad(u, layer, steps),
  });
  host.dataset.drawn = layer.percent.length;
  const keys = host.onkeydown;
  host.onkeydown = (event) => {
    const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!down) return keys(event);
    event.preventDefault();
    const expert = Math.max(0, Math.min(layer.experts - 1, Math.round(plot.posToVal(Math.max(0, plot.cursor.top), "y")) + down));
    showCursor(plot, Math.max(0, plot.cursor.left), plot.valToPos(expert, "y"));
  };
  readLoad(plot, layer, steps);
  drawBias(layer, steps, [edges[0], edges.at(-1)]);
  byId("expert-note").textContent = "The percentage beside a layer is its maximal violation: how far its busiest expert was above the mean, " +
    "averaged over the last quarter." + (size > 1 ? ` Each column adds up ${grouped(size)} records.` : "");
}

function paintCells(u, layer, edges) {
  const colours = loadColours(), { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
  const rows = Array.from({ length: layer.experts + 1 }, (_, e) => Math.round(u.valToPos(e - 0.5, "y", true)));
  const gap = layer.experts <= 32 ? Math.round(devicePixelRatio) : 0; // the joints of the mosaic
  for (let column = 0; column + 1 < edges.length; column++) {
    const left = Math.round(u.valToPos(edges[column], "x", true)), right = Math.round(u.valToPos(edges[column + 1], "x", true));
    const joint = right - left > 5 ? gap : 0;
    for (let e = 0; e < layer.experts; e++) {
      ctx.fillStyle = `rgb(${colours(layer.percent[column * layer.experts + e] / 100)})`;
      ctx.fillRect(left, rows[e], Math.max(1, right - left - joint), Math.max(1, rows[e + 1] - rows[e] - gap));
    }
  }
  ctx.restore();
}

function readLoad(u, layer, steps) {
  const { idx, top } = u.cursor;
  const expert = top >= 0 ? Math.round(u.posToVal(top, "y")) : -1;
  const named = `${layerLabel(layer.name)}, ${layer.experts} experts`;
  if (idx === null || idx === undefined || expert < 0 || expert >= layer.experts) {
    byId("expert-readout").textContent = `${named[0].toUpperCase()}${named.slice(1)}. Point at a tile to read it.`;
    return;
  }
  const ratio = layer.percent[idx * layer.experts + expert] / 100;
  byId("expert-readout").textContent = `Step ${grouped(steps[idx])}, expert ${expert}: ${fixed(ratio, 2)} × the mean, ` +
    `${percent(ratio / layer.experts)} of the routed tokens`;
}

function drawBias(layer, steps, xRange) {
  const host = byId("chart-bias");
  const any = layer.bias_max.some(isNumber);
  host.hidden = host.previousElementSibling.hidden = !any;
  if (!any) return;
  lineChart(host, {
    x: steps, xRange, height: 120, format: (v) => significant(v, 2), guides: [{ value: 0, solid: true }],
    series: [{ label: "largest", values: layer.bias_max, colour: "load-high", width: 1.4 },
      { label: "smallest", values: layer.bias_min, colour: "load-low", width: 1.4 }],
    bands: [{ upper: 0, lower: 1, fill: colour("band") }],
    range: (min, max) => padded(min, max, 0),
  });
}
