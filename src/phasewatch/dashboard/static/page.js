// Connect the event stream to the page: machine cards, age of each scene's data, banners and keys.
import { Machines } from "/static/machines.js";
import * as scenes from "/static/scenes.js";
import { hasTruth, isReplay, isWrong, overallStatus } from "/static/status.js";
import { Stream } from "/static/stream.js";
import { GLYPHS, PHASES, ago, clock, make, score, text } from "/static/format.js";

const byId = (id) => document.getElementById(id);
// Age from which the data of a scene is stale: a watcher sends every half second, scores are sent again every 20 s.
const STALE_MS = { telemetry: 6000, phase: 12_000, perf: 12_000, score: 60_000, confusion: 60_000, profile: 60_000 };
const DRAW_MS = 250;

const machines = new Machines();
const newest = {}; // type → {data, at, run}
const places = Object.fromEntries([...document.querySelectorAll(".scene")].map((s) => [s.dataset.type, s]));
const costs = new Map(); // newest perf event by process and machine
const dirty = new Set(), drawn = new Set(); // scenes with new data; scenes drawn at least once
let shown = null, channel = null, isPaused = false, gapWords = "", lost = null;

const visible = new Set(Object.keys(places));
const watcher = new IntersectionObserver((entries) => {
  for (const e of entries) visible[e.isIntersecting ? "add" : "delete"](e.target.dataset.type);
}, { rootMargin: "300px" });
Object.values(places).forEach((s) => watcher.observe(s));

const stream = new Stream({
  event(kind, event, isOld) {
    const at = stream.madeAt(event, isOld);
    if (kind === "telemetry" || kind === "phase") {
      const machine = machines[kind](event.data, at);
      if (shown === null) choose(machine.vm);
      if (machine.vm === shown) dirty.add(kind);
    } else {
      newest[kind] = { data: event.data, at, run: event.run };
      if (kind === "perf") costs.set(`${event.data.process} ${event.data.vm ?? ""}`, newest.perf);
      dirty.add(kind);
    }
  },
  gap(words) { gapWords = words; banner(); },
  state(state, since, words) {
    const link = byId("link");
    if (link.dataset.state !== state) link.dataset.state = state;
    lost = state === "lost" ? { since, words } : null;
    if (state === "lost") text(byId("link-words"), "disconnected");
  },
});

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

function choose(vm) {
  shown = vm;
  dirty.add("telemetry").add("phase").add("perf");
  strip();
}

// The newest perf event of the process that watches the selected machine, else of any process.
function cost() {
  const fresh = [...costs.values()].filter((c) => Date.now() - c.at <= STALE_MS.perf);
  return fresh.find((c) => c.data.vm !== null && c.data.vm === shown) ?? fresh.find((c) => c.data.vm === null)
    ?? fresh[0] ?? newest.perf;
}

// Time of a scene's newest data, or null before the first. Phase and telemetry belong to the selected machine.
function madeAt(kind) {
  if (kind !== "telemetry" && kind !== "phase") return newest[kind]?.at ?? null;
  const machine = machines.all.get(shown);
  return machine?.[kind] ? machine[`${kind}At`] : null;
}
const isStale = (machine, now) => now - Math.max(machine.telemetryAt, machine.phaseAt) > STALE_MS.phase;
// Telemetry can continue without new predictions; an old prediction is then not current.
const isCurrent = (machine, now) => machine.phase !== null && now - machine.phaseAt <= STALE_MS.phase;

function states(now) {
  for (const [kind, scene] of Object.entries(places)) {
    const at = madeAt(kind);
    const seen = at !== null || (["telemetry", "phase"].includes(kind) && [...machines.all.values()].some((m) => m[kind]));
    const state = !seen ? "awaiting" : at !== null && now - at <= STALE_MS[kind] && !lost ? "live" : "stale";
    const isOfMachine = kind === "telemetry" || kind === "phase";
    const live = !isOfMachine ? "current" : isReplay(machines.all.get(shown) ?? { origin: null }) ? "replay" : "live";
    const words = state === "awaiting" ? "no data yet" : at === null ? "no data of this machine"
      : state === "live" ? live : `stale since ${clock(at)}`;
    if (scene.dataset.state !== state) scene.dataset.state = state;
    text(scene.querySelector("[data-state-words]"), words);
    scene.querySelector(".empty").hidden = state !== "awaiting";
    scene.querySelector(".body").hidden = at === null;
    text(scene.querySelector("[data-of]"), isOfMachine ? (at === null ? "" : shown) : newest[kind]?.run ?? "");
  }
}

function alarms(now) {
  const entries = [...machines.all.values()].map((machine) => {
    const isSilent = isStale(machine, now) || lost !== null;
    return { machine, isSilent, isCurrent: !isSilent && isCurrent(machine, now) };
  });
  const { state, reasons, words, alarmed } = overallStatus(entries);
  const place = byId("alarms");
  if (place.dataset.state !== state) place.dataset.state = state;
  if (place.dataset.reasons !== reasons.join(" ")) place.dataset.reasons = reasons.join(" ");
  text(byId("alarm-words"), words);
  const title = `${alarmed.length ? "▲ " : ""}${lost ? "(disconnected) " : ""}phasewatch${titleWords ? " · " + titleWords : ""}`;
  if (document.title !== title) document.title = title;
}

const cards = new Map();
function strip() {
  const now = Date.now();
  const place = byId("machines");
  for (const [vm, card] of cards) if (!machines.all.has(vm)) { card.remove(); cards.delete(vm); if (vm === shown) shown = null; }
  let n = 0;
  for (const machine of machines.all.values()) {
    n += 1;
    let card = cards.get(machine.vm);
    if (!card) {
      card = make("button", "machine");
      card.type = "button";
      card.onclick = () => choose(machine.vm);
      for (const part of ["vm", "age", "now", "sub"]) { card[part] = make("span", part); card.append(card[part]); }
      card.swatch = make("span", "swatch"); card.phase = make("span"); card.p = make("small"); card.pill = make("span", "pill", "alarm"); card.activity = make("span", "pill lesser", "activity"); card.wrong = make("span", "wrong", "wrong");
      card.now.append(card.swatch, card.phase, card.p);
      card.append(card.pill, card.activity, card.wrong);
      cards.set(machine.vm, card);
      place.append(card);
    }
    const seen = machine.phase, stale = isStale(machine, now) || lost !== null;
    card.setAttribute("aria-current", String(machine.vm === shown));
    card.classList.toggle("stale", stale);
    card.classList.toggle("alarmed", Boolean(seen?.alarm) && !stale);
    text(card.vm, n <= 9 ? `${n}  ${machine.vm}` : machine.vm);
    const at = Math.max(machine.telemetryAt, machine.phaseAt);
    card.age.classList.toggle("old", stale);
    text(card.age, stale ? `stale since ${clock(at)}` : ago(now - at));
    const isOld = seen !== null && !stale && !isCurrent(machine, now);
    text(card.phase, !seen ? "no prediction yet" : isOld ? `no prediction since ${clock(machine.phaseAt)}` : `${GLYPHS[seen.decision] ?? ""} ${seen.decision}`);
    text(card.p, seen && !isOld ? `p ${score(seen.p[PHASES.indexOf(seen.decision)])}` : "");
    card.pill.hidden = !seen?.alarm;
    card.activity.hidden = !seen?.activity_alarm || Boolean(seen.alarm);
    card.wrong.hidden = seen === null || isOld || !isWrong(seen);
    card.swatch.style.setProperty("--phase", seen ? `var(--${seen.decision})` : "");
    const origin = isReplay(machine) ? `replay, ${machine.origin}` : "";
    const truth = hasTruth(seen) ? `true phase ${seen.truth}` : seen !== null && isReplay(machine) ? "true phase unknown" : "";
    text(card.sub, [machine.host === machine.vm ? "" : machine.host, origin, truth].filter(Boolean).join(" · "));
  }
  if (shown === null && machines.all.size) choose(machines.all.keys().next().value);
}

function picker(machine) {
  const names = scenes.channelsOf(machine);
  if (!names.includes(channel)) channel = names.find((n) => n === "proc.vcpu_run") ?? names[0] ?? null;
  const select = byId("channel");
  if (select.dataset.names !== names.join()) {
    select.dataset.names = names.join();
    select.replaceChildren(...names.map((name) => { const o = make("option", "", name); o.value = name; return o; }));
  }
  if (select.value !== channel) select.value = channel ?? "";
}

const DRAW = {
  phase: () => { const m = machines.all.get(shown); if (m?.phase) scenes.phase(m); },
  telemetry: () => { const m = machines.all.get(shown); if (m?.telemetry && m.bins.length) { picker(m); if (channel) scenes.telemetry(m, channel); } },
  score: () => newest.score && scenes.leaderboard(newest.score.data),
  confusion: () => newest.confusion && scenes.confusion(newest.confusion.data),
  perf: () => newest.perf && scenes.perf(cost().data),
  profile: () => newest.profile && scenes.profiles(newest.profile.data),
};

function tick() {
  const now = Date.now();
  strip();
  states(now);
  alarms(now);
  banner();
  if (!lost) text(byId("link-words"), `connected ${clock(now + stream.skew)}`);
  if (document.hidden || isPaused || !window.Plotly) return;
  for (const kind of [...dirty]) {
    if (!visible.has(kind) && drawn.has(kind)) continue;
    dirty.delete(kind);
    if (places[kind].querySelector(".body").hidden) continue;
    drawn.add(kind);
    DRAW[kind]();
  }
}

let titleWords = "";
fetch("/about.json", { cache: "no-store" }).then((a) => a.json()).then((known) => {
  titleWords = known.title;
  text(byId("title"), known.title);
  scenes.learn(known);
  redraw();
}).catch(() => {});

function redraw() { for (const kind of Object.keys(DRAW)) dirty.add(kind); scenes.legend(); }
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", redraw);
window.addEventListener("resize", redraw);
function flip() {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  redraw();
}
function pause() { isPaused = !isPaused; byId("pause").setAttribute("aria-pressed", String(isPaused)); banner(); }
function step(by) { const all = [...machines.all.keys()]; if (all.length) choose(all[(all.indexOf(shown) + by + all.length) % all.length]); }
function turn(by) {
  const machine = machines.all.get(shown);
  const names = machine ? scenes.channelsOf(machine) : [];
  if (names.length) { channel = names[(names.indexOf(channel) + by + names.length) % names.length]; dirty.add("telemetry"); }
}
byId("theme").onclick = flip;
byId("pause").onclick = pause;
byId("keys").onclick = () => byId("help").showModal();
byId("channel").onchange = (e) => { channel = e.target.value; dirty.add("telemetry"); };
document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest("select, dialog[open]")) return;
  const alarmed = [...machines.all.values()].filter((m) => m.phase?.alarm).sort((a, b) => a.phase.alarm_since_ns - b.phase.alarm_since_ns)[0];
  const act = { j: () => step(1), k: () => step(-1), "[": () => turn(-1), "]": () => turn(1), p: pause, t: flip, "?": () => byId("help").showModal(), a: () => alarmed && choose(alarmed.vm) }[e.key];
  if (act) { act(); e.preventDefault(); return; }
  const vm = /^[1-9]$/.test(e.key) ? [...machines.all.keys()][Number(e.key) - 1] : undefined;
  if (vm) choose(vm);
});
scenes.legend();
setInterval(tick, DRAW_MS);
tick();
