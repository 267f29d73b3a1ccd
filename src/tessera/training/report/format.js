/* Numbers as people read them, and the colours of the page as the canvas needs them. */
const root = document.documentElement;
const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function significant(value, digits = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const decimals = Math.min(8, Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value)))));
  return value.toFixed(decimals).replace("-", "−");
}
const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits).replace("-", "−") : "–");
const grouped = (value) =>
  isNumber(value) ? String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f") : "–";
const trimmed = (text) => text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");
const percent = (value, digits = 2) => (isNumber(value) ? `${significant(100 * value, digits)}\u202f%` : "–");
const signedPercent = (value) => (isNumber(value) && value > 0 ? "+" : "") + percent(value);
const scientific = (value) => {
  if (!isNumber(value) || value === 0 || Math.abs(value) >= 1e-3) return significant(value, 3);
  const [digits, power] = value.toExponential(2).split("e-");
  return `${digits.replace(/\.?0+$/, "")}·10${[...`-${power}`].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
};
const compactCount = (value) => {
  if (!isNumber(value) || value < 10000) return grouped(value);
  const power = Math.min(4, Math.floor(Math.log10(value) / 3));
  return `${significant(value / 1000 ** power, 3)}\u202f${"kMBT"[power - 1]}`;
};

const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const withAlpha = (hex, alpha) => hex + Math.round(255 * alpha).toString(16).padStart(2, "0");
const mixed = (from, to, share) => {
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => Math.round(channel(from, i) + share * (channel(to, i) - channel(from, i))));
};

/* Arms take the colours in their order; controls share one. */
const trained = report.arms.filter((arm) => !arm.control);
const controls = report.arms.filter((arm) => arm.control);
const armColour = (arm) => (arm.control ? "control" : `arm-${1 + (trained.indexOf(arm) % 6)}`);

/* The twin is drawn broad and pale, so that an arm that lies on it can still be seen. */
const armLook = (arm) => ({ colour: armColour(arm), order: trained.indexOf(arm),
  ...(arm.name === "bf16" && trained.length > 1 ? { width: 3.5, alpha: 0.55 } : { width: 1.5, alpha: 1 }) });
const twinFirst = (arms) => [...arms].sort((a, b) => (b.name === "bf16") - (a.name === "bf16"));

const speak = (text) => { byId("spoken").textContent = text; };
