// Draw figures with Plotly, which loads after the first list of machines is shown. It only gets numbers and safe names;
// free text is set as text.
import { colour, make, number } from "/static/format.js";

const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false };
export const byId = (id) => document.getElementById(id);
export const narrow = () => window.innerWidth < 560;
export let about = { channels: new Map() };
export const learn = (known) => { about = { channels: new Map(known.channels.map((c) => [c.name, c])) }; };

export function frame(more) {
  const ink = colour("ink"), rule = colour("rule"), muted = colour("muted");
  const axis = { fixedrange: true, automargin: true, zeroline: false, showgrid: false, gridcolor: rule, linecolor: rule,
    ticks: "", tickfont: { size: 11, color: muted }, hoverformat: ".3~s" };
  return {
    autosize: true, dragmode: false, showlegend: false, margin: { l: 8, r: 10, t: 6, b: 6 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("card"), bordercolor: rule, font: { color: ink, size: 12 } },
    ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

// Draw one figure per place at a time. Further calls wait, and only the newest of them is drawn.
const busy = new Map();
export function draw(id, data, layout) {
  const place = byId(id);
  const height = layout.height ?? place.clientHeight;
  if (layout.height) place.style.height = `${layout.height}px`;
  const waiting = busy.get(id);
  if (waiting) { waiting.next = [data, layout]; return; }
  const job = { next: null };
  busy.set(id, job);
  Plotly.react(place, data, { ...layout, height }, CONFIG).finally(() => {
    busy.delete(id);
    if (job.next) draw(id, ...job.next);
  });
}
export const shades = () => [[0, colour("heat-0")], [0.5, colour("heat-1")], [1, colour("heat-2")]];

export function facts(id, words, warning) {
  const place = byId(id);
  const parts = [document.createTextNode(words)];
  if (warning) parts.push(" ", make("strong", "", warning));
  if (place.textContent !== words + (warning ? " " + warning : "")) place.replaceChildren(...parts);
}
export function list(id, lines) {
  const place = byId(id);
  if (place.dataset.lines === JSON.stringify(lines)) return;
  place.dataset.lines = JSON.stringify(lines);
  place.replaceChildren(...lines.map((line) => make("li", "", line)));
  place.hidden = lines.length === 0;
}
export function describe(id, words) {
  const place = byId(id);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", words);
}
export const span = (ms) => (ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000)} s`);
export const unit = (name) => { const u = about.channels.get(name)?.unit ?? ""; return u === "1" ? "" : u; };
export const onto = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#0c1116" : "#ffffff");
// Return the colour of a hue with an opacity on the background of a card.
export function mixed(hue, opacity) {
  const [a, b] = [hue, colour("card")].map((c) => c.match(/\d+/g).map(Number));
  return a.map((x, i) => x * opacity + b[i] * (1 - opacity));
}

