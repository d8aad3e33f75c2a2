// Draw the scores of a run: leaderboard, confusion matrix, and scores by profile and host.
import { clip, colour, number, plural, safe, score, interval } from "/static/format.js";
import { byId, describe, draw, facts, frame, list, narrow, onto, shades } from "/static/plot.js";

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
