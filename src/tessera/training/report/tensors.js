/* FP8 health: one row a tensor, sortable and searchable, each figure with its course over the run. */
const measured = trained.filter((arm) => arm.health?.tensors.length);
let healthArm = measured[0];
const PAGE = 40; // rows shown at first
let shownRows = PAGE;
const sorting = { by: "flags", down: true };

const last = (values) => values.findLast(isNumber) ?? null;
const power = (value) => (isNumber(value) ? `2${[...(Number.isInteger(value) ? `${value}` : value.toFixed(1))]
  .map((c) => ({ "-": "⁻", ".": "·" })[c] ?? "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")}` : "–");
const inOrder = new Intl.Collator("en", { numeric: true }).compare;

/* field -> heading, and what rows are sorted by */
const COLUMNS = [
  ["name", "tensor", (t) => t.name],
  ["operand", "operand", (t) => t.operand],
  ["relative_rms", "relative RMS error", (t) => last(t.relative_rms)],
  ["saturated", "saturated", (t) => last(t.saturated)],
  ["flushed", "flushed", (t) => last(t.flushed)],
  ["rounded_twice", "rounded twice", (t) => last(t.rounded_twice)],
  ["scale_max", "scales", (t) => last(t.scale_max)],
];
const sortKeys = new Map(COLUMNS.map(([field, , key]) => [field, key]));
sortKeys.set("flags", (t) => t.flags.length);

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* The course of one figure. A span of at least a tenth of its size, so that a steady figure looks steady. */
function sparkline(values) {
  const known = values.map((value, i) => [i, value]).filter(([, value]) => isNumber(value));
  const picture = svg("svg", { class: "spark", viewBox: "0 0 46 18", "aria-hidden": "true" });
  if (!known.length) return picture;
  const low = Math.min(...known.map(([, v]) => v)), high = Math.max(...known.map(([, v]) => v));
  const span = Math.max(high - low, 0.1 * Math.abs(high), 1e-12), middle = (low + high) / 2;
  const place = ([i, value]) => [values.length > 1 ? 2 + (42 * i) / (values.length - 1) : 23, 9 - (14 * (value - middle)) / span];
  const points = known.map(place), end = points.at(-1);
  picture.append(svg("polyline", { points: points.map((p) => p.map((c) => c.toFixed(1)).join(",")).join(" ") }),
    svg("circle", { cx: end[0].toFixed(1), cy: end[1].toFixed(1), r: 1.8 }));
  return picture;
}

function scaleBar(low, high, range) {
  const at = (value) => 2 + (76 * (value - range[0])) / Math.max(1, range[1] - range[0]);
  const picture = svg("svg", { class: "spark scales", viewBox: "0 0 80 18", "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 2, x2: 78, y1: 9, y2: 9 }));
  if (isNumber(low)) picture.append(svg("rect", { class: "span", x: at(low), y: 6, width: Math.max(3, at(high) - at(low)), height: 6, rx: 1.5 }));
  return picture;
}

function drawTensors() {
  if (!healthArm || !byId("tensors")) return;
  const { tensors, steps } = healthArm.health;
  const wanted = byId("health-find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const operand = byId("health-operand").value, outliersOnly = byId("health-outliers").checked;
  const found = tensors.filter((t) => (!operand || t.operand === operand) && (!outliersOnly || t.flags.length) &&
    wanted.every((word) => `${t.name}.${t.operand}`.toLowerCase().includes(word)));
  found.sort(comparison());
  const scales = tensors.flatMap((t) => [last(t.scale_min), last(t.scale_max)]).filter(isNumber);
  const range = scales.length ? [scales.reduce((a, b) => Math.min(a, b)), scales.reduce((a, b) => Math.max(a, b))] : [0, 1];
  drawHeadings();
  const body = byId("tensors").tBodies[0];
  body.replaceChildren(...found.slice(0, shownRows).map((tensor) => row(tensor, range)));
  if (!found.length) body.append(element("tr", {}, element("td", { colSpan: COLUMNS.length, textContent: "No tensor fits." })));
  const more = byId("health-more");
  more.hidden = found.length <= shownRows;
  more.textContent = `Show all ${grouped(found.length)} tensors`;
  byId("tensors").dataset.drawn = found.length;
  const odd = tensors.filter((t) => t.flags.length).length;
  const errors = tensors.map((t) => last(t.relative_rms)).filter(isNumber).sort((a, b) => a - b);
  byId("health-summary").textContent = `${grouped(tensors.length)} tensors were compared with their FP8 codes, last at step ${grouped(steps.at(-1))}: ` +
    `half of them are off by less than ${percent(errors[Math.floor(errors.length / 2)] ?? null)} of their size, ` +
    (odd ? `and ${odd === 1 ? "1 stands" : `${grouped(odd)} stand`} out.` : "and none stands out.");
}

function comparison() {
  const key = sortKeys.get(sorting.by), way = sorting.down ? -1 : 1;
  return (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null) || inOrder(a.name, b.name);
    return (typeof x === "number" ? way * (x - y) : way * inOrder(x, y)) || inOrder(a.name, b.name) || inOrder(a.operand, b.operand);
  };
}

function drawHeadings() {
  byId("tensors").tHead.rows[0].replaceChildren(...COLUMNS.map(([field, title], i) => {
    const sorted = sorting.by === field, arrow = sorted ? (sorting.down ? " ↓" : " ↑") : "";
    const button = element("button", { type: "button", textContent: title + arrow });
    button.onclick = () => {
      sorting.down = sorted ? !sorting.down : i > 1;
      sorting.by = field;
      drawTensors();
      byId("tensors").tHead.rows[0].cells[i].firstChild.focus();
    };
    const cell = element("th", { scope: "col", className: field === "operand" ? field : i > 1 && field !== "scale_max" ? "n" : "" }, button);
    if (sorted) cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    return cell;
  }));
}

function row(tensor, range) {
  const figure = (field) => {
    const value = last(tensor[field]);
    const text = element("span", { textContent: value > 0 && value < 1e-5 ? "< 0.001\u202f%" : percent(value) });
    const odd = tensor.flags.includes(field) || (field === "relative_rms" && tensor.flags.includes("nonfinite"));
    if (odd) text.className = "out";
    const varies = new Set(tensor[field].filter(isNumber)).size > 1;
    const cell = element("span", { className: "cell" }, ...(varies ? [sparkline(tensor[field])] : []), text);
    return element("td", { className: "n" }, cell);
  };
  const operandName = tensor.operand.replaceAll("_", " ");
  const low = last(tensor.scale_min), high = last(tensor.scale_max);
  const reach = low === high ? power(low) : `${power(low)} … ${power(high)}`;
  const name = element("th", { scope: "row", className: "name", title: `${tensor.name}, ${grouped(tensor.elements)} elements` });
  const parts = tensor.name.replace(/^model\./, "").split(/(?<=\.)/);
  name.append(...parts.flatMap((part) => [part, document.createElement("wbr")]), element("small", { textContent: operandName }));
  if (tensor.nonfinite) name.append(element("span", { className: "out", textContent: ` ${grouped(tensor.nonfinite)} not finite` }));
  return element("tr", {}, name, element("td", { className: "operand", textContent: operandName }),
    figure("relative_rms"), figure("saturated"), figure("flushed"), figure("rounded_twice"),
    element("td", {}, element("span", { className: "cell wide-text" }, scaleBar(low, high, range), element("span", { textContent: reach }))));
}

function prepareTensors() {
  if (!healthArm || !byId("tensors")) return;
  const operands = [...new Set(measured.flatMap((arm) => arm.health.tensors.map((t) => t.operand)))].sort();
  byId("health-operand").append(...operands.map((name) => element("option", { value: name, textContent: name.replaceAll("_", " ") })));
  for (const id of ["health-find", "health-operand", "health-outliers"]) {
    byId(id).oninput = () => { shownRows = PAGE; drawTensors(); };
  }
  byId("health-more").onclick = () => { shownRows = Infinity; drawTensors(); };
}
