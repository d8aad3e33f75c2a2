// Connect the event stream to the page: list of machines, selected machine, alarms, age of the data, banners and keys.
import * as alarmView from "/static/alarms.js";
import { STALE_MS, STATES, attention, heardAt, isCurrent, isReplay, isStale } from "/static/attention.js";
import * as figures from "/static/figures.js";
import { GLYPHS, clock, make, plural, score, text } from "/static/format.js";
import { History, SPANS } from "/static/history.js";
import { MachineList } from "/static/list.js";
import { Machines } from "/static/machines.js";
import { byId, learn } from "/static/plot.js";
import * as scores from "/static/scores.js";
import { overallStatus } from "/static/status.js";
import { Stream } from "/static/stream.js";

// Age from which the data of a scene is stale: a watcher sends every half second, scores are sent again every 20 s.
const STALE_AFTER = { telemetry: 6000, phase: STALE_MS, perf: 12_000, score: 60_000, confusion: 60_000, profile: 60_000 };
const SCORES = ["score", "confusion", "profile"];
const DRAW_MS = 250;

const machines = new Machines();
const newest = {}; // type → {data, at, run}
const places = Object.fromEntries([...document.querySelectorAll(".scene[data-type]")].map((s) => [s.dataset.type, s]));
const costs = new Map(); // newest perf event by process and machine
const dirty = new Set(), drawn = new Set(); // scenes with new data; scenes drawn at least once
let shown = null, channel = null, isRead = false, isPaused = false, gapWords = "", lost = null, titleWords = "", view = "machines";

const visible = new Set(Object.keys(places));
const observer = new IntersectionObserver((entries) => {
  for (const e of entries) visible[e.isIntersecting ? "add" : "delete"](e.target.dataset.type);
}, { rootMargin: "300px" });
Object.values(places).forEach((s) => observer.observe(s));

const list = new MachineList(byId("machines"), machines, choose);
const stream = new Stream({
  state() { machines.clear(); costs.clear(); },
  event(kind, event, at) {
    if (kind === "alarm") { machines.alarm(event.alarm); return; }
    if (kind === "seen" || kind === "phase") {
      machines[kind](event.run, event.data, at);
      return;
    }
    newest[kind] = { data: event.data, at, run: event.run };
    if (kind === "perf") costs.set(`${event.data.process} ${event.data.vm ?? ""}`, newest.perf);
    dirty.add(kind);
  },
  read() { isRead = true; tick(); },
  gap(words) { gapWords = words; banner(); },
  link(state, since, words) {
    const link = byId("link");
    if (link.dataset.state !== state) link.dataset.state = state;
    lost = state === "lost" ? { since, words } : null;
    if (state === "lost") text(byId("link-words"), "disconnected");
  },
});
const history = new History(() => dirty.add("telemetry").add("phase"), () => stream.skew);

function banner() {
  const place = byId("banner");
  const kind = lost ? "lost" : gapWords ? "gap" : isPaused ? "paused" : "";
  const words = lost ? `${lost.words} since ${clock(lost.since)}. The data below is old.` : gapWords || (isPaused ? "Figures paused. States and alarms are still updated." : "");
  place.hidden = kind === "";
  if (place.dataset.kind === kind && place.dataset.words === words) return;
  place.dataset.kind = kind;
  place.dataset.words = words;
  place.replaceChildren(document.createTextNode(words));
  if (kind === "gap") {
    const close = make("button", "", "Dismiss");
    close.type = "button";
    close.onclick = () => { gapWords = ""; banner(); };
    place.prepend(close);
  }
}

const current = () => machines.all.get(shown) ?? null;
function choose(machine) {
  if (machine === undefined || machine === null) return;
  if (shown !== machine.id || history.machine === null) { shown = machine.id; history.select(machine); }
  dirty.add("telemetry").add("phase").add("perf");
  list.select(machine);
  head(Date.now());
}

// The newest perf event of the process that watches the selected machine, else of any process.
function cost() {
  const fresh = [...costs.values()].filter((c) => Date.now() - c.at <= STALE_AFTER.perf);
  const vm = current()?.vm;
  return fresh.find((c) => c.data.vm !== null && c.data.vm === vm) ?? fresh.find((c) => c.data.vm === null)
    ?? fresh[0] ?? newest.perf;
}

// Time of a scene's newest data, or null before the first. Phase and telemetry belong to the selected machine.
function madeAt(kind) {
  if (kind === "telemetry") return history.telemetryAt || null;
  if (kind === "phase") return current()?.phase ? current().phaseAt : null;
  return newest[kind]?.at ?? null;
}

function states(now) {
  const machine = current();
  for (const [kind, scene] of Object.entries(places)) {
    const at = madeAt(kind), isOfMachine = kind === "telemetry" || kind === "phase";
    const seen = at !== null || (kind === "phase" && [...machines.all.values()].some((m) => m.phase));
    const state = !seen ? "awaiting" : at !== null && now - at <= STALE_AFTER[kind] && !lost ? "live" : "stale";
    const live = !isOfMachine ? "current" : machine === null || isReplay(machine) ? "replay" : machine.origin === null ? "current" : "live";
    const words = state === "awaiting" ? "no data yet" : at === null ? "no data of this machine"
      : state === "live" ? live : `stale since ${clock(at)}`;
    if (scene.dataset.state !== state) scene.dataset.state = state;
    text(scene.querySelector("[data-state-words]"), words);
    scene.querySelector(".empty").hidden = state !== "awaiting";
    scene.querySelector(".body").hidden = at === null;
    text(scene.querySelector("[data-of]"), isOfMachine ? (at === null ? "" : machine?.vm ?? "") : newest[kind]?.run ?? "");
  }
}

function alarms(now) {
  const entries = [...machines.all.values()].map((machine) => {
    const isSilent = isStale(machine, now) || lost !== null;
    return { machine, isSilent, isCurrent: !isSilent && isCurrent(machine, now) };
  });
  const { state, reasons, words, alarmed } = overallStatus(entries, now);
  const place = byId("alarms");
  if (place.dataset.state !== state) place.dataset.state = state;
  if (place.dataset.reasons !== reasons.join(" ")) place.dataset.reasons = reasons.join(" ");
  text(byId("alarm-words"), words);
  const replays = entries.filter((e) => isReplay(e.machine)).length, live = entries.filter((e) => e.machine.origin === "live").length;
  const mode = byId("mode");
  mode.hidden = replays + live === 0;
  mode.dataset.mode = replays ? (live ? "both" : "replay") : "live";
  text(mode, replays ? (live ? `${plural(live, "live machine")}, ${plural(replays, "replay")}` : "Replay of recordings") : "Live");
  const title = `${alarmed.length ? "▲ " : ""}${lost ? "(disconnected) " : ""}${replays && !live ? "replay · " : replays ? "live and replay · " : ""}phasewatch${titleWords ? " · " + titleWords : ""}`;
  if (document.title !== title) document.title = title;
}

function counts(now) {
  const all = [...machines.all.values()];
  const open = [...machines.alarms.values()].filter((a) => a.resolved_ms === null && ["infection", "activity"].includes(alarmView.stateOf(a, now))).length;
  text(byId("count-machines"), all.length ? String(all.length) : "");
  text(byId("count-alarms"), open ? `${open} open` : machines.alarms.size ? String(machines.alarms.size) : "");
  const run = SCORES.map((kind) => newest[kind]?.run).find(Boolean);
  byId("tab-scores").hidden = run === undefined;
  text(byId("count-scores"), run === undefined ? "" : `of ${run}`);
  text(byId("filter-count"), list.filter ? `${list.order.length} of ${all.length}` : "");
}

// The selected machine: its state, what can be done with its alarm, and the alarm's evidence.
function head(now) {
  const machine = current(), place = byId("head");
  place.hidden = machine === null;
  if (machine === null) return;
  const state = attention(machine, now), seen = machine.phase;
  text(byId("h-machine"), machine.vm);
  // A raised infection alarm first, then a raised activity alarm, then the newest that has ended.
  const known = [machine.alarms.get("infection"), machine.alarms.get("activity")].filter(Boolean);
  const alarm = known.find((a) => a.resolved_ms === null) ?? known.sort((a, b) => b.raised_ms - a.raised_ms)[0] ?? null;
  const facts = [machine.host && machine.host !== machine.vm ? machine.host : "", isReplay(machine) ? `replay of a ${machine.origin ?? ""} episode`.replace("  ", " ") : "",
    seen ? `${GLYPHS[seen.decision] ?? ""} ${seen.decision}, p(infecting) ${score(seen.p[2])}` : "no prediction yet",
    isStale(machine, now) || lost ? `nothing since ${clock(heardAt(machine))}` : ""].filter(Boolean).join(" · ");
  text(byId("head-facts"), facts);
  const key = JSON.stringify([machine.id, state, isReplay(machine), alarm, alarm ? alarmView.stateOf(alarm, now) : ""]);
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  byId("head-badges").replaceChildren(alarmView.badge(state, STATES[state].words), ...(isReplay(machine) ? [make("span", "badge", "replay")] : []));
  const did = alarm === null ? [] : [...alarmView.notes(alarm, now), ...alarmView.buttons(alarm, now, alarmView.askChange)];
  byId("head-acts").replaceChildren(...did);
  byId("head-acts").hidden = did.length === 0;
  byId("evidence").replaceChildren(...(alarm === null ? [] : alarmView.evidence(alarm)));
  byId("evidence").hidden = alarm === null;
}

function picker() {
  const names = history.channels;
  if (!names.includes(channel)) channel = names.find((n) => n === "proc.vcpu_run") ?? names[0] ?? null;
  const select = byId("channel");
  if (select.dataset.names !== names.join()) {
    select.dataset.names = names.join();
    select.replaceChildren(...names.map((name) => { const o = make("option", "", name); o.value = name; return o; }));
  }
  if (select.value !== channel) select.value = channel ?? "";
}

const DRAW = {
  phase: () => { if (current()?.phase) figures.phase(current(), history); },
  telemetry: () => { if (current() && history.bins.length) { picker(); if (channel) figures.telemetry(current(), history, channel); } },
  score: () => newest.score && scores.leaderboard(newest.score.data),
  confusion: () => newest.confusion && scores.confusion(newest.confusion.data),
  perf: () => newest.perf && figures.perf(cost().data),
  profile: () => newest.profile && scores.profiles(newest.profile.data),
};

function tick() {
  const now = Date.now();
  machines.prune(now);
  if (shown === null && machines.all.size) { list.sort(true); choose(list.order[0]); }
  else if (shown !== null && current() === null && machines.all.size && !list.filter) { shown = null; }
  list.isLost = lost !== null;
  list.sort();
  if (view === "machines") list.draw();
  head(now);
  states(now);
  alarms(now);
  counts(now);
  banner();
  if (view === "alarms") alarmView.drawHistory(machines.history(), now, { act: alarmView.askChange, show: showAlarm, of: titleWords });
  if (!lost) text(byId("link-words"), `connected ${clock(now + stream.skew)}`);
  if (document.hidden || isPaused) return;
  if (view === "machines" && !lost) history.poll();
  if (!window.Plotly) { if (isRead) loadPlotly(); return; }
  for (const kind of [...dirty]) {
    if (!visible.has(kind) && drawn.has(kind)) continue;
    if (places[kind].querySelector(".body").hidden || places[kind].closest(".view").hidden) continue;
    dirty.delete(kind);
    drawn.add(kind);
    DRAW[kind]();
  }
}

// Plotly is large: it is loaded after the list of machines is on the screen.
let isLoading = false;
function loadPlotly() {
  if (isLoading) return;
  isLoading = true;
  requestAnimationFrame(() => setTimeout(() => {
    const script = make("script");
    script.src = "/plotly.min.js";
    script.onerror = () => { script.remove(); isLoading = false; };
    document.head.append(script);
  }));
}

function showAlarm(alarm) {
  const machine = [...machines.all.values()].find((m) => m.alarms.get(alarm.kind)?.id === alarm.id) ?? [...machines.all.values()].find((m) => m.run === alarm.run && m.vm === alarm.vm);
  if (!machine) return;
  show("machines");
  choose(machine);
}

function show(name) {
  view = name;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isShown = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isShown;
  }
  redraw();
  tick();
}

fetch("/about.json", { cache: "no-store" }).then((a) => a.json()).then((known) => {
  titleWords = known.title;
  text(byId("title"), known.title);
  learn(known);
  redraw();
}).catch(() => {});

function redraw() { for (const kind of Object.keys(DRAW)) dirty.add(kind); figures.legend(); }
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", redraw);
window.addEventListener("resize", () => { redraw(); list.draw(); });
function flip() {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  redraw();
}
function pause() { isPaused = !isPaused; byId("pause").setAttribute("aria-pressed", String(isPaused)); banner(); }
function turn(by) {
  const names = history.channels;
  if (names.length) { channel = names[(names.indexOf(channel) + by + names.length) % names.length]; dirty.add("telemetry"); }
}
function zoom(spanS) {
  for (const button of document.querySelectorAll(".spans button")) {
    const isChosen = Number(button.dataset.span) === spanS;
    button.setAttribute("aria-checked", String(isChosen));
    button.tabIndex = isChosen ? 0 : -1;
  }
  if (history.spanS !== spanS) history.zoom(spanS);
}
function nextZoom(by) { const all = SPANS.map(([s]) => s); zoom(all[(all.indexOf(history.spanS) + by + all.length) % all.length]); }

document.querySelector(".spans").replaceChildren(...SPANS.map(([spanS, words]) => {
  const button = make("button", "", words);
  button.type = "button";
  button.setAttribute("role", "radio");
  button.dataset.span = spanS;
  button.onclick = () => zoom(spanS);
  return button;
}));
zoom(history.spanS);
document.querySelector(".spans").addEventListener("keydown", (e) => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
  if (by) { nextZoom(by); document.querySelector(".spans [aria-checked=true]").focus(); e.preventDefault(); }
});
for (const tab of document.querySelectorAll("[role=tab]")) tab.onclick = () => show(tab.id.slice(4));
document.querySelector("[role=tablist]").addEventListener("keydown", (e) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (!by) return;
  const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")];
  const next = tabs[(tabs.findIndex((t) => t.id === `tab-${view}`) + by + tabs.length) % tabs.length];
  show(next.id.slice(4));
  next.focus();
  e.preventDefault();
});
byId("order").replaceChildren(...Object.values(STATES).map(({ mark, words }) => make("li", "", `${mark}  ${words}`)));
byId("filter").oninput = (e) => { list.setFilter(e.target.value); list.draw(); };
byId("filter").onkeydown = (e) => {
  if (e.key === "Escape") { e.target.value = ""; list.setFilter(""); e.target.blur(); }
  if (e.key === "Enter" || e.key === "ArrowDown") { choose(list.order[0]); byId("machines").focus(); e.preventDefault(); }
};
byId("theme").onclick = flip;
byId("pause").onclick = pause;
byId("keys").onclick = () => byId("help").showModal();
byId("channel").onchange = (e) => { channel = e.target.value; dirty.add("telemetry"); };
document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest("select, input, dialog[open]")) return;
  const oldest = () => [...machines.all.values()].filter((m) => attention(m, Date.now()) === "infection").sort((a, b) => a.phase.alarm_since_ns - b.phase.alarm_since_ns)[0];
  const act = { j: () => list.step(1), k: () => list.step(-1), "[": () => turn(-1), "]": () => turn(1), z: () => nextZoom(1), p: pause, t: flip,
    "?": () => byId("help").showModal(), "/": () => { show("machines"); byId("filter").focus(); }, a: () => { show("machines"); choose(oldest()); } }[e.key];
  if (act) { act(); e.preventDefault(); return; }
  const nth = /^[1-9]$/.test(e.key) ? list.order[Number(e.key) - 1] : undefined;
  if (nth) choose(nth);
});
figures.legend();
setInterval(tick, DRAW_MS);
tick();
