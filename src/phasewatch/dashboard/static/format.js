// Format numbers, times and colours.
export const PHASES = ["clean", "armed", "infecting", "active", "dormant"];
export const GLYPHS = { clean: "○", armed: "◔", infecting: "◑", active: "●", dormant: "◌" };

const NAME = /^[A-Za-z0-9._/-]{1,80}$/;
// The hub replaces unsafe names already. They are checked again here, because Plotly interprets tags in any text.
export const safe = (name) => (NAME.test(name) ? name : "unnamed");
export const clip = (name, most) => (name.length > most ? name.slice(0, most - 1) + "…" : name);

export const number = (v, digits = 3) => {
  if (v === null || v === undefined || !Number.isFinite(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  for (const [limit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return Number((v / limit).toPrecision(digits)) + " " + letter;
  }
  return size < 1e-3 ? v.toExponential(1) : String(Number(v.toPrecision(digits)));
};
export const score = (v) => (v === null || v === undefined ? "–" : v.toFixed(2));
export const interval = (row) => (row.low === null || row.low === undefined ? "" : ` [${score(row.low)}, ${score(row.high)}]`);
export const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

const two = (n, width = 2) => String(n).padStart(width, "0");
export const clock = (ms) => {
  const d = new Date(ms);
  return `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
};
// Plotly interprets dates as UTC, so it gets the local time as text.
export const local = (ms) => {
  const d = new Date(ms);
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${clock(ms)}.${two(d.getMilliseconds(), 3)}`;
};
export const ago = (ms) => {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 2 ? "now" : s < 120 ? `${s} s ago` : s < 7200 ? `${Math.round(s / 60)} min ago` : `${Math.round(s / 3600)} h ago`;
};

const colourProbe = document.createElement("span");
colourProbe.hidden = true;
document.documentElement.append(colourProbe);
// Return the current colour of a CSS variable; the style sheet alone defines the light and dark theme.
export const colour = (name) => {
  colourProbe.style.color = `var(--${name})`;
  return getComputedStyle(colourProbe).color;
};

export const text = (element, words) => { if (element.textContent !== words) element.textContent = words; };
export const make = (tag, className, words) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (words !== undefined) element.textContent = words;
  return element;
};
export const duration = (ms) => {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 60 ? `${s} s` : s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : s < 86_400 ? `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min` : `${Math.floor(s / 86_400)} d ${Math.floor(s / 3600) % 24} h`;
};
