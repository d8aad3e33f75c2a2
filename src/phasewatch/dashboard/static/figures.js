// Draw the figures of the selected machine: phases, telemetry, and the cost of its watcher.
import { GLYPHS, PHASES, clip, colour, local, make, number, plural, safe, score } from "/static/format.js";
import { about, byId, describe, draw, facts, frame, mixed, narrow, onto, shades, span, unit } from "/static/plot.js";

const MIN_SPAN_MS = 60_000;
// One left margin for all figures of a machine, so that their times are below each other.
const margin = () => ({ l: narrow() ? 112 : 158, r: 10, t: 6, b: 24 });
const yAxis = { automargin: false };

export function legend() {
  const place = byId("phase-legend");
  place.replaceChildren(...PHASES.map((phase) => {
    const item = make("span", "", "");
    const swatch = make("span", "swatch");
    swatch.style.setProperty("--phase", `var(--${phase})`);
    item.append(swatch, `${GLYPHS[phase]} ${phase}`);
    return item;
  }), make("span", "", "opacity = probability"));
}

// Both figures of a machine show the same time. It begins with the first data, so a short watch fills the width.
function timeRange(history) {
  const bins = history.bins, windows = history.windows;
  const end = Math.max(bins.length ? bins.at(-1).t + history.binMs : 0, windows.length ? windows.at(-1).t + history.windowMs : 0);
  const first = Math.min(bins.length ? bins[0].t : end, windows.length ? windows[0].t : end);
  return [Math.min(end - MIN_SPAN_MS, Math.max(first, end - history.spanMs)), end];
}
const timeAxis = (history) => {
  const [start, end] = timeRange(history);
  return { type: "date", range: [local(start), local(end)], tickformat: end - start > 600_000 ? "%H:%M" : "%H:%M:%S", nticks: narrow() ? 4 : 9 };
};

export function phase(machine, history) {
  const windows = history.windows;
  if (!windows.length) return undefined; // a new recording has started and has no full window yet
  const steps = windows.slice(1).map((w, i) => w.t - windows[i].t);
  const strideMs = Math.max(history.windowMs, steps.length ? Math.min(...steps) : 1000);
  const hues = Object.fromEntries(PHASES.map((p) => [p, colour(p)]));
  const bars = { base: [], x: [], y: [], colours: [], opacity: [], hover: [] };
  const bar = (w, row, hue, opacity, words) => {
    bars.base.push(local(w.t)); bars.x.push(strideMs); bars.y.push(row);
    bars.colours.push(hue); bars.opacity.push(opacity); bars.hover.push(words);
  };
  const knowsTruth = windows.some((w) => w.truth);
  const hasAlarm = windows.some((w) => w.alarm !== null);
  const hasActivity = windows.some((w) => w.activity !== null);
  const rows = ["predicted", ...(knowsTruth ? ["true phase"] : []), ...(hasAlarm ? ["alarm"] : []), ...(hasActivity ? ["activity"] : [])];
  const lane0 = rows.length + 0.25;
  for (const w of windows) {
    const at = PHASES.indexOf(w.decision);
    bar(w, 0, hues[w.decision], opacityOf(w), `predicted ${w.decision}, p = ${score(w.p[at])}`);
    if (w.truth) bar(w, rows.indexOf("true phase"), hues[w.truth], 1, `true phase ${w.truth}`);
    if (w.alarm) bar(w, rows.indexOf("alarm"), colour("alarm"), 1, "infection alarm raised");
    if (w.activity) bar(w, rows.indexOf("activity"), colour("warn"), 1, "activity alarm raised");
    PHASES.forEach((p, i) => bar(w, lane0 + i * 0.8, hues[p], w.p[i], `p(${p}) = ${score(w.p[i])}`));
  }
  const [start, end] = timeRange(history);
  const pxPerMs = Math.max(0, byId("plot-phase").clientWidth - margin().l - 10) / (end - start);
  const named = (row, of, opacity) => runs(windows, of, strideMs).filter((r) => hues[r.name] && r.ms * pxPerMs >= 18).map((r) => ({
    x: local(r.first.t), y: row, xanchor: "left", xshift: 3, showarrow: false,
    text: r.ms * pxPerMs < 90 ? GLYPHS[r.name] : `${GLYPHS[r.name]} ${r.name}`, font: { size: 12, color: onto(mixed(hues[r.name], opacity(r.first))) },
  }));
  draw("plot-phase", [{
    type: "bar", orientation: "h", base: bars.base, x: bars.x, y: bars.y,
    width: bars.y.map((y) => (y < lane0 ? 0.86 : 0.74)),
    marker: { color: bars.colours, opacity: bars.opacity, line: { width: 0 } },
    customdata: bars.hover, hovertemplate: "%{base|%H:%M:%S}  %{customdata}<extra></extra>",
  }], frame({
    barmode: "overlay", bargap: 0, margin: margin(),
    annotations: [...named(0, (w) => w.decision, opacityOf), ...named(rows.indexOf("true phase"), (w) => w.truth, () => 1)],
    xaxis: timeAxis(history),
    yaxis: { ...yAxis, tickvals: [...rows.keys(), ...PHASES.map((_, i) => lane0 + i * 0.8)], ticktext: [...rows, ...PHASES.map((p) => `p ${p}`)],
      range: [lane0 + 4 * 0.8 + 0.5, -0.55] },
  }));
  const last = machine.phase;
  const alarm = last.threshold === null ? "no alarm threshold"
    : `p(infecting) = ${score(last.p[2])}, infection alarm from ${score(last.threshold)}`;
  const late = last.latency_ms === null ? "" : `; latency ${span(last.latency_ms)} after the end of the window`;
  const cell = strideMs > 1000 && history.windowMs > 500 ? ` A bar is the mean of ${span(history.windowMs)}.` : "";
  facts("facts-phase", `Model ${last.model}, channel set ${last.threat}, input ${last.table}, filter ${last.filter}; ${alarm}${late}.${cell}`, last.caveat);
  const words = `${machine.vm}: ${last.decision}, probability ${score(last.p[PHASES.indexOf(last.decision)])}${last.truth ? `, true phase ${last.truth}` : ""}`;
  return describe("plot-phase", words);
}

const opacityOf = (w) => 0.35 + 0.65 * w.p[Math.max(0, PHASES.indexOf(w.decision))];
// Return the runs of windows with one phase. They are labelled, because colours alone cannot be told apart by everybody.
function runs(windows, of, strideMs) {
  const out = [];
  for (const w of windows) {
    const last = out.at(-1), name = of(w);
    if (last && last.name === name && w.t - last.first.t < last.ms + strideMs / 2) last.ms = w.t - last.first.t + strideMs;
    else out.push({ name, first: w, ms: strideMs });
  }
  return out;
}

export function telemetry(machine, history, chosen) {
  const names = history.channels, bins = withGaps(history);
  const shade = names.map((name, i) => {
    const most = Math.max(...history.bins.map((b) => Math.abs(b.values[i] ?? 0)));
    // Each channel has its own scale; the square root makes small values visible next to a burst.
    return bins.map((b) => (b.values === null || b.values[i] === null ? null : most ? Math.sqrt(Math.abs(b.values[i]) / most) : 0));
  });
  const units = names.map(unit);
  const time = timeAxis(history);
  const size = narrow() ? 12.5 : 14.5;
  draw("plot-heat", [{
    type: "heatmap", x: bins.map((b) => local(b.t + history.binMs / 2)), y: [...names.keys()], z: shade, zmin: 0, zmax: 1,
    colorscale: shades(), showscale: false, xgap: 0, ygap: 1, zsmooth: false, hoverongaps: false,
    customdata: names.map((name, i) => bins.map((b) => `${safe(name)} ${b.values ? number(b.values[i]) : "–"} ${units[i]}`)),
    hovertemplate: "%{x|%H:%M:%S}  %{customdata}<extra></extra>",
  }], frame({
    height: 40 + Math.max(8, names.length) * size, plot_bgcolor: colour("missing"), xaxis: time, margin: margin(),
    yaxis: { ...yAxis, tickvals: [...names.keys()], ticktext: names.map((name) => (name === chosen ? "▸ " : "") + clip(safe(name), narrow() ? 19 : 26)),
      range: [names.length - 0.5, -0.5], tickfont: { size: narrow() ? 9 : 10, color: colour("muted") } },
  }));
  const at = names.indexOf(chosen);
  draw("plot-line", [{
    type: "scatter", mode: "lines", x: bins.map((b) => local(b.t + history.binMs / 2)), y: bins.map((b) => (b.values ? b.values[at] ?? null : null)),
    line: { color: colour("blue"), width: 1.8, shape: "hvh" }, connectgaps: false, // no fill, because Plotly fills across a gap
    hovertemplate: "%{x|%H:%M:%S}  %{y:.4~s}<extra></extra>",
  }], frame({ xaxis: time, margin: margin(), yaxis: { ...yAxis, showgrid: true, rangemode: "tozero", exponentformat: "SI", nticks: 4, title: { text: unit(chosen), font: { size: 11, color: colour("muted") } } } }));
  const known = about.channels.get(chosen);
  byId("channel-about").textContent = known ? `${known.about}${known.trust === "guest" ? " Reported by the guest; malware can forge it." : ""}` : "";
  const dead = history.nChannels - names.length;
  const parts = [plural(names.length, "channel"), ...(dead > 0 ? [`${dead} not available here`] : []), `each on its own scale`,
    ...(history.binMs > 500 ? [`a cell is the mean of ${span(history.binMs)}`] : []), plural(history.lateRows, "late row"), plural(history.lostRows, "lost row")];
  if (history.latenessS !== null) parts.push(`bins closed ${number(history.latenessS)} s after their end`);
  facts("facts-telemetry", parts.join(" · ") + ". Grey = no data.", history.lateRows + history.lostRows > 0 ? "Some readings were late or lost." : null);
  const seconds = Math.round((history.bins.at(-1).t + history.binMs - history.bins[0].t) / 1000);
  return describe("plot-heat", `${machine.vm}: ${names.length} channels over ${seconds} seconds`);
}

// Insert empty columns where bins are missing, so that a gap is visible.
function withGaps(history) {
  const out = [];
  for (const bin of history.bins) {
    const last = out.at(-1);
    if (last && bin.t - last.t > 1.5 * history.binMs) {
      out.push({ t: last.t + history.binMs, values: null }, { t: bin.t - history.binMs, values: null });
    }
    out.push(bin);
  }
  return out;
}

export function perf(data) {
  const tiles = [["latency p50", data.p50_ms === null ? "–" : span(data.p50_ms)], ["latency p99", data.p99_ms === null ? "–" : span(data.p99_ms), data.p99_ms > 50], ["windows/s", number(data.windows_per_s)],
    ["memory", `${number(data.rss_bytes)}B`], ["CPU", `${number(100 * data.cpu_cores)} %`], ["late ticks", data.late_ticks.toLocaleString("en"), data.late_ticks > 0],
    ["backlog", data.backlog.toLocaleString("en"), data.backlog > 100]];
  byId("tiles-perf").replaceChildren(...tiles.map(([name, value, isBad]) => {
    const tile = make("div", isBad ? "bad" : "");
    tile.append(make("dt", "", name), make("dd", "", value));
    return tile;
  }));
  const edges = data.latency_edges_ms;
  const names = edges.length ? [`< ${number(edges[0])}`, ...edges.slice(1).map((e, i) => `${number(edges[i])}–${number(e)}`), `≥ ${number(edges.at(-1))}`] : ["all"];
  draw("plot-perf", [{ type: "bar", x: [...names.keys()], y: data.latency_counts, marker: { color: colour("blue") }, customdata: names,
    hovertemplate: "%{customdata} ms: %{y}<extra></extra>" }], frame({
    bargap: 0.12, xaxis: { tickvals: [...names.keys()], ticktext: names, tickangle: -45, tickfont: { size: 9.5, color: colour("muted") } },
    yaxis: { showgrid: true, rangemode: "tozero", nticks: 4, title: { text: "windows", font: { size: 11, color: colour("muted") } } },
  }));
  facts("facts-perf", `${data.process}${data.vm ? ` of ${data.vm}` : ""}: ${plural(data.windows, "window")} in ${number(data.measured_s)} s; latency in ms from due to sent.${data.about ? " " + data.about : ""}`, null);
  return describe("plot-perf", tiles.map(([name, value]) => `${name} ${value}`).join(", "));
}

