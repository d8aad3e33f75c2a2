// Draw each scene from its newest data. Plotly only gets numbers and safe names; free text is set as text.
import { GLYPHS, PHASES, clip, colour, local, make, number, plural, safe, score, interval, text } from "/static/format.js";

const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false };
const byId = (id) => document.getElementById(id);
const narrow = () => window.innerWidth < 560;
let about = { channels: new Map() };
export const learn = (known) => { about = { channels: new Map(known.channels.map((c) => [c.name, c])) }; };

function frame(more) {
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
function draw(id, data, layout) {
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
const shades = () => [[0, colour("heat-0")], [0.5, colour("heat-1")], [1, colour("heat-2")]];

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

export function phase(machine) {
  const windows = machine.windows;
  if (!windows.length) return undefined; // a new recording has started and has no full window yet
  const strideMs = windows.length > 1 ? Math.min(...windows.slice(1).map((w, i) => w.t - windows[i].t)) : 5000;
  const hues = Object.fromEntries(PHASES.map((p) => [p, colour(p)]));
  const bars = { base: [], x: [], y: [], colours: [], opacity: [], hover: [] };
  const bar = (w, row, hue, opacity, words) => {
    bars.base.push(local(w.t - strideMs / 2)); bars.x.push(strideMs); bars.y.push(row);
    bars.colours.push(hue); bars.opacity.push(opacity); bars.hover.push(words);
  };
  const knowsTruth = windows.some((w) => w.seen.truth);
  const hasAlarm = windows.some((w) => w.seen.alarm !== null);
  const hasActivity = windows.some((w) => w.seen.activity_alarm !== null);
  const rows = ["predicted", ...(knowsTruth ? ["true phase"] : []), ...(hasAlarm ? ["alarm"] : []), ...(hasActivity ? ["activity"] : [])];
  const lane0 = rows.length + 0.25;
  for (const w of windows) {
    const at = PHASES.indexOf(w.seen.decision);
    bar(w, 0, hues[w.seen.decision] ?? colour("muted"), opacityOf(w), `predicted ${w.seen.decision}, p = ${score(w.seen.p[at])}`);
    if (w.seen.truth) bar(w, rows.indexOf("true phase"), hues[w.seen.truth] ?? colour("missing"), 1, `true phase ${w.seen.truth}`);
    if (w.seen.alarm) bar(w, rows.indexOf("alarm"), colour("alarm"), 1, "infection alarm raised");
    if (w.seen.activity_alarm) bar(w, rows.indexOf("activity"), colour("warn"), 1, "activity alarm raised");
    PHASES.forEach((p, i) => bar(w, lane0 + i * 0.8, hues[p], w.seen.p[i], `p(${p}) = ${score(w.seen.p[i])}`));
  }
  const end = windows.at(-1).t + strideMs / 2;
  const start = Math.min(windows[0].t - strideMs / 2, end - 60_000);
  const pxPerMs = Math.max(0, byId("plot-phase").clientWidth - 80) / (end - start);
  const named = (row, of, opacity) => runs(windows, of, strideMs).filter((r) => hues[r.name] && r.ms * pxPerMs >= 18).map((r) => ({
    x: local(r.first.t - strideMs / 2), y: row, xanchor: "left", xshift: 3, showarrow: false,
    text: r.ms * pxPerMs < 90 ? GLYPHS[r.name] : `${GLYPHS[r.name]} ${r.name}`, font: { size: 12, color: onto(mixed(hues[r.name], opacity(r.first))) },
  }));
  draw("plot-phase", [{
    type: "bar", orientation: "h", base: bars.base, x: bars.x, y: bars.y,
    width: bars.y.map((y) => (y < lane0 ? 0.86 : 0.74)),
    marker: { color: bars.colours, opacity: bars.opacity, line: { width: 0 } },
    customdata: bars.hover, hovertemplate: "%{base|%H:%M:%S}  %{customdata}<extra></extra>",
  }], frame({
    barmode: "overlay", bargap: 0,
    annotations: [...named(0, (w) => w.seen.decision, opacityOf), ...named(rows.indexOf("true phase"), (w) => w.seen.truth, () => 1)],
    xaxis: { type: "date", range: [local(start), local(end)], tickformat: "%H:%M:%S", nticks: narrow() ? 4 : 9 },
    yaxis: { tickvals: [...rows.keys(), ...PHASES.map((_, i) => lane0 + i * 0.8)], ticktext: [...rows, ...PHASES.map((p) => `p ${p}`)],
      range: [lane0 + 4 * 0.8 + 0.5, -0.55] },
  }));
  const last = machine.phase;
  const alarm = last.threshold === null ? "no alarm threshold"
    : `p(infecting) = ${score(last.p[2])}, infection alarm from ${score(last.threshold)}`;
  const late = last.latency_ms === null ? "" : `; latency ${span(last.latency_ms)} after the end of the window`;
  facts("facts-phase", `Model ${last.model}, channel set ${last.threat}, input ${last.table}, filter ${last.filter}; ${alarm}${late}.`, last.caveat);
  const words = `${machine.vm}: ${last.decision}, probability ${score(last.p[PHASES.indexOf(last.decision)])}${last.truth ? `, true phase ${last.truth}` : ""}`;
  return describe("plot-phase", words);
}

const opacityOf = (w) => 0.35 + 0.65 * w.seen.p[Math.max(0, PHASES.indexOf(w.seen.decision))];
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

// Return the channels that have data, in the order of the event.
const shown = (machine) => machine.channels.map((name, i) => ({ name, i }))
  .filter(({ i }) => machine.bins.some((b) => b.values[i] !== null));

export const channelsOf = (machine) => shown(machine).map((c) => c.name);

export function telemetry(machine, chosen) {
  const rows = shown(machine), bins = withGaps(machine);
  const dark = rows.map(({ i }) => {
    const most = Math.max(...machine.bins.map((b) => Math.abs(b.values[i] ?? 0)));
    // Each channel has its own scale; the square root makes small values visible next to a burst.
    return bins.map((b) => (b.values === null || b.values[i] === null ? null : most ? Math.sqrt(Math.abs(b.values[i]) / most) : 0));
  });
  const units = rows.map(({ name }) => unit(name));
  const end = machine.bins.at(-1).t + machine.binMs;
  const range = [local(Math.min(machine.bins[0].t, end - 60_000)), local(end)];
  const time = { type: "date", range, tickformat: "%H:%M:%S", nticks: narrow() ? 3 : 6 };
  const size = narrow() ? 12.5 : 14.5;
  draw("plot-heat", [{
    type: "heatmap", x: bins.map((b) => local(b.t + machine.binMs / 2)), y: [...rows.keys()], z: dark, zmin: 0, zmax: 1,
    colorscale: shades(), showscale: false, xgap: 0, ygap: 1, zsmooth: false, hoverongaps: false,
    customdata: rows.map(({ name, i }, r) => bins.map((b) => `${safe(name)} ${b.values ? number(b.values[i]) : "–"} ${units[r]}`)),
    hovertemplate: "%{x|%H:%M:%S}  %{customdata}<extra></extra>",
  }], frame({
    height: 40 + Math.max(8, rows.length) * size, plot_bgcolor: colour("missing"), xaxis: time,
    yaxis: { tickvals: [...rows.keys()], ticktext: rows.map(({ name }) => (name === chosen ? "▸ " : "") + clip(safe(name), narrow() ? 19 : 26)),
      range: [rows.length - 0.5, -0.5], tickfont: { size: narrow() ? 9 : 10, color: colour("muted") } },
  }));
  const at = machine.channels.indexOf(chosen);
  draw("plot-line", [{
    type: "scatter", mode: "lines", x: bins.map((b) => local(b.t + machine.binMs / 2)), y: bins.map((b) => (b.values ? b.values[at] ?? null : null)),
    line: { color: colour("blue"), width: 1.8, shape: "hvh" }, connectgaps: false, // no fill, because Plotly fills across a gap
    hovertemplate: "%{x|%H:%M:%S}  %{y:.4~s}<extra></extra>",
  }], frame({ xaxis: time, yaxis: { showgrid: true, rangemode: "tozero", exponentformat: "SI", nticks: 4, title: { text: unit(chosen), font: { size: 11, color: colour("muted") } } } }));
  const known = about.channels.get(chosen);
  text(byId("channel-about"), known ? `${known.about}${known.trust === "guest" ? " Reported by the guest; malware can forge it." : ""}` : "");
  const last = machine.telemetry;
  const dead = machine.channels.length - rows.length;
  const parts = [plural(rows.length, "channel"), ...(dead ? [`${dead} not available here`] : []), `each on its own scale`,
    plural(last.late_rows, "late row"), plural(last.lost_rows, "lost row")];
  if (last.lateness_s !== null) parts.push(`bins closed ${number(last.lateness_s)} s after their end`);
  facts("facts-telemetry", parts.join(" · ") + ". Grey = no data.", last.late_rows + last.lost_rows > 0 ? "Some readings were late or lost." : null);
  return describe("plot-heat", `${machine.vm}: ${rows.length} channels over ${Math.round((end - machine.bins[0].t) / 1000)} seconds`);
}

// Insert empty columns where bins are missing, so that a gap is visible.
function withGaps(machine) {
  const out = [];
  for (const bin of machine.bins) {
    const last = out.at(-1);
    if (last && bin.t - last.t > 1.5 * machine.binMs) {
      out.push({ t: last.t + machine.binMs, values: null }, { t: bin.t - machine.binMs, values: null });
    }
    out.push(bin);
  }
  return out;
}
const span = (ms) => (ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000)} s`);
const unit = (name) => { const u = about.channels.get(name)?.unit ?? ""; return u === "1" ? "" : u; };

const UNTESTED = "untested";
export function leaderboard(data) {
  const rows = data.rows.slice(0, 24);
  const hues = rows.map((r) => colour(r.is_baseline ? "muted" : "blue"));
  const most = Math.max(...rows.map((r) => r.n_hosts));
  const label = (r) => [safe(r.model), ...(r.threat === "realistic" ? [] : [safe(r.threat)]), ...(r.table === "raw" ? [] : [safe(r.table)]),
    ...(r.n_hosts === most ? [] : [plural(r.n_hosts, "host")])].join(" · ");
  draw("plot-score", [{
    type: "scatter", mode: "markers+text", x: rows.map((r) => r.value), y: [...rows.keys()], text: rows.map((r) => score(r.value)),
    textposition: "top center", textfont: { size: 10.5, color: hues }, cliponaxis: false,
    marker: { size: 9, color: hues, symbol: rows.map((r) => (r.is_baseline ? "diamond-open" : "circle")), line: { width: 2, color: hues } },
    error_x: { type: "data", symmetric: false, array: rows.map((r) => (r.high === null ? NaN : r.high - r.value)), arrayminus: rows.map((r) => (r.low === null ? NaN : r.value - r.low)),
      color: colour("muted"), thickness: 1.6, width: 4 },
    customdata: rows.map((r) => `${label(r)}: ${r.value.toFixed(3)}${interval(r)}, ${plural(r.n_episodes, "episode")}${r.agent ? `, agent ${r.agent}` : ""}${r.p_holm === null ? "" : `, p = ${number(r.p_holm, 2)} (Holm) for the difference to the first model`}`),
    hovertemplate: "%{customdata}<extra></extra>",
  }], frame({
    height: 52 + 27 * Math.max(2, rows.length), xaxis: { range: [-0.01, 1.02], showgrid: true, dtick: 0.2, tickformat: ".1f" },
    yaxis: { tickvals: [...rows.keys()], ticktext: rows.map((r) => clip(label(r), 30)), range: [rows.length - 0.5, -0.75], tickfont: { size: 11, color: colour("ink") } },
  }));
  const first = data.rows[0];
  const words = [`${measure(data.metric)} on ${data.recipe.replaceAll("_", " ")}`, `${data.tested} of ${data.registered} malicious profiles tested`];
  if (first) words.push(plural(first.n_episodes, "episode"), plural(first.n_hosts, "host"));
  facts("facts-score", `${words.join(" · ")}. Open marks: baselines. Whiskers: 95 % intervals.`, null);
  const claims = data.inflation.map((i) => `${i.recipe.replaceAll("_", " ")}: ${score(i.value)}${interval(i)}`);
  list("notes-score", [...(data.headline ? [data.headline] : []), ...(claims.length ? [`Score of ${data.inflation_of ?? "the model"} by split protocol: ${claims.join("; ")}`] : []),
    ...data.notes, ...reasons(rows, label)]);
  return describe("plot-score", rows.map((r) => `${label(r)} ${score(r.value)}${interval(r)}`).join("; "));
}

const measure = (name) => name.replaceAll("_", " ").replace(/\bmacro f1\b/, "macro-F1");

// List each reason for a missing interval once, with the models that it applies to.
function reasons(rows, label) {
  const by = Map.groupBy(rows.filter((r) => r.why), (r) => `${plural(r.n_episodes, "episode")}, ${r.why}`);
  return [...by].map(([why, those]) => `${those.map(label).join(", ")}: ${why}`);
}

export function confusion(data) {
  const totals = data.counts.map((row) => row.reduce((a, b) => a + b, 0));
  const share = data.counts.map((row, i) => row.map((n) => (totals[i] ? n / totals[i] : null)));
  draw("plot-confusion", [{
    ...cells(share, data.counts.map((row) => row.map((n) => Math.round(n).toLocaleString("en")))),
    customdata: data.counts.map((row, i) => row.map((n, j) => `true ${safe(data.labels[i])}, predicted ${safe(data.labels[j])}: ${number(n, 4)} of ${number(totals[i], 4)} windows`)),
    hovertemplate: "%{customdata}<extra></extra>",
  }], frame({
    height: 74 + 38 * data.labels.length,
    annotations: marks(share, data.counts.map((row) => row.map((n) => Math.round(n).toLocaleString("en")))),
    xaxis: { ...places(data.labels), title: { text: "predicted phase", font: { size: 11, color: colour("muted") } } },
    yaxis: { ...places(data.labels), range: [data.labels.length - 0.5, -0.5], title: { text: "true phase", standoff: 8, font: { size: 11, color: colour("muted") } } },
  }));
  facts("facts-confusion", `${data.model}, ${data.threat}, ${data.recipe.replaceAll("_", " ")} · number of windows; shade = share of the true phase · ${plural(data.n_episodes, "episode")}, ${plural(data.n_hosts, "host")}.`, null);
  return describe("plot-confusion", data.labels.map((l, i) => `${l}: ${share[i][i] === null ? "no window" : Math.round(100 * share[i][i]) + " % correct"}`).join("; "));
}

export function profiles(data) {
  const z = data.cells.map((row) => row.map((c) => c?.value ?? null));
  const words = data.cells.map((row) => row.map((c) => (c ? score(c.value) : "")));
  const hatch = { x: [], y: [] };
  const stroke = (...points) => { for (const [x, y] of points) { hatch.x.push(x); hatch.y.push(y); } hatch.x.push(null); hatch.y.push(null); };
  data.cells.forEach((row, i) => row.forEach((c, j) => {
    if (c) return;
    for (let k = -0.6; k <= 0.61; k += 0.3) {
      const x0 = Math.max(-0.44, k - 0.44), x1 = Math.min(0.44, k + 0.44);
      stroke([j + x0, i + (k - x0)], [j + x1, i + (k - x1)]);
    }
  }));
  draw("plot-profile", [{
    ...cells(z, words), hoverongaps: false,
    customdata: data.cells.map((row, i) => row.map((c, j) => `${safe(data.profiles[i])} on ${safe(data.hosts[j])}: ${c ? `${score(c.value)}${interval(c)}, ${c.n_episodes} episodes` : UNTESTED}`)),
    hovertemplate: "%{customdata}<extra></extra>",
  }, { type: "scatter", mode: "lines", ...hatch, hoverinfo: "skip", line: { color: colour("muted"), width: 1 } }], frame({
    height: 104 + 32 * Math.max(2, data.profiles.length), annotations: marks(z, words),
    xaxis: { ...places(data.hosts), tickangle: narrow() || data.hosts.length > 4 ? -35 : 0, range: [-0.5, data.hosts.length - 0.5] },
    yaxis: { ...places(data.profiles), range: [data.profiles.length - 0.5, -0.5] },
  }));
  const none = data.untested_profiles.length ? `Untested: ${data.untested_profiles.join(", ")}.` : null;
  facts("facts-profile", `${measure(data.metric)} of ${data.model}, ${data.threat}, ${data.recipe.replaceAll("_", " ")}. Hatched = untested, – = no value.`, none);
  return describe("plot-profile", data.profiles.map((p, i) => `${p}: ${data.hosts.map((h, j) => `${h} ${words[i][j] || UNTESTED}`).join(", ")}`).join("; "));
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

const cells = (z) => ({ type: "heatmap", z, zmin: 0, zmax: 1, colorscale: shades(), showscale: false, xgap: 2, ygap: 2 });
const places = (names) => ({ tickvals: [...names.keys()], ticktext: names.map((n) => clip(safe(n), narrow() ? 13 : 18)), tickfont: { size: 11, color: colour("ink") } });
// Text of the cells, with a colour that contrasts with the shade; Plotly's own text has one colour for all cells.
const marks = (z, words) => z.flatMap((row, i) => row.map((v, j) => ({
  x: j, y: i, text: words[i][j], showarrow: false, font: { size: 11, color: ink(v) },
})).filter((m) => m.text !== ""));
function ink(v) {
  if (v === null) return colour("muted");
  const stops = shades().map(([, c]) => c.match(/\d+/g).map(Number));
  const [a, b, k] = v < 0.5 ? [stops[0], stops[1], v * 2] : [stops[1], stops[2], v * 2 - 1];
  return onto(a.map((x, i) => x + (b[i] - x) * k));
}
const onto = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#0c1116" : "#ffffff");
// Return the colour of a hue with an opacity on the background of a card.
function mixed(hue, opacity) {
  const [a, b] = [hue, colour("card")].map((c) => c.match(/\d+/g).map(Number));
  return a.map((x, i) => x * opacity + b[i] * (1 - opacity));
}

function facts(id, words, warning) {
  const place = byId(id);
  const parts = [document.createTextNode(words)];
  if (warning) parts.push(" ", make("strong", "", warning));
  if (place.textContent !== words + (warning ? " " + warning : "")) place.replaceChildren(...parts);
}
function list(id, lines) {
  const place = byId(id);
  if (place.dataset.lines === JSON.stringify(lines)) return;
  place.dataset.lines = JSON.stringify(lines);
  place.replaceChildren(...lines.map((line) => make("li", "", line)));
  place.hidden = lines.length === 0;
}
function describe(id, words) {
  const place = byId(id);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", words);
}
