// Wires the stream to the scenes: which machine is shown, how old each scene's data is, banners, keys.
import { Machines } from "/static/machines.js";
import * as scenes from "/static/scenes.js";
import { Stream } from "/static/stream.js";
import { GLYPHS, PHASES, ago, clock, make, score, text } from "/static/words.js";

const byId = (id) => document.getElementById(id);
// Silence after which a scene calls its data old: a watcher sends every half second, scores are sent anew every 20 s.
const STALE_MS = { telemetry: 6000, phase: 12_000, perf: 12_000, score: 60_000, confusion: 60_000, profile: 60_000 };
const DRAW_MS = 250;

const machines = new Machines();
const newest = {}; // type → {data, at, run}
const places = Object.fromEntries([...document.querySelectorAll(".scene")].map((s) => [s.dataset.type, s]));
const costs = new Map(); // each measured process
const dirty = new Set(), drawn = new Set(); // what has news; what was drawn at all, seen or not
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
    if (state === "lost") text(byId("link-words"), "cut off");
  },
});

function banner() {
  const place = byId("banner");
  const kind = lost ? "lost" : gapWords ? "gap" : isPaused ? "paused" : "";
  const words = lost ? `${lost.words} since ${clock(lost.since)}. What you see is old.` : gapWords || (isPaused ? "Paused: the pictures are frozen, the states and alarms are not." : "");
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

// Of several processes the one that watches the shown machine, else a watcher, else whoever spoke last.
function cost() {
  const fresh = [...costs.values()].filter((c) => Date.now() - c.at <= STALE_MS.perf);
  return fresh.find((c) => c.data.vm !== null && c.data.vm === shown) ?? fresh.find((c) => c.data.vm === null)
    ?? fresh[0] ?? newest.perf;
}

// Age of a scene's newest data, or null before the first. Scenes of a machine speak of the one that is shown.
function madeAt(kind) {
  if (kind !== "telemetry" && kind !== "phase") return newest[kind]?.at ?? null;
  const machine = machines.all.get(shown);
  return machine?.[kind] ? machine[`${kind}At`] : null;
}
const isStale = (machine, now) => now - Math.max(machine.telemetryAt, machine.phaseAt) > STALE_MS.phase;
// Telemetry may go on where no window can be judged: the last decision is then as old as it is.
const isJudged = (machine, now) => machine.phase !== null && now - machine.phaseAt <= STALE_MS.phase;

function states(now) {
  for (const [kind, scene] of Object.entries(places)) {
    const at = madeAt(kind);
    const seen = at !== null || (["telemetry", "phase"].includes(kind) && [...machines.all.values()].some((m) => m[kind]));
    const state = !seen ? "awaiting" : at !== null && now - at <= STALE_MS[kind] && !lost ? "live" : "stale";
    const words = state === "awaiting" ? `awaiting ${kind}` : at === null ? "nothing from this machine"
      : state === "live" ? "live" : `stale since ${clock(at)}`;
    if (scene.dataset.state !== state) scene.dataset.state = state;
    text(scene.querySelector("[data-state-words]"), words);
    scene.querySelector(".empty").hidden = state !== "awaiting";
    scene.querySelector(".body").hidden = at === null;
    const of = kind === "telemetry" || kind === "phase" ? (at === null ? "" : shown) : newest[kind]?.run ?? "";
    text(scene.querySelector("[data-of]"), of);
  }
}

function alarms(now) {
  const all = [...machines.all.values()];
  const heard = all.filter((m) => !isStale(m, now) && !lost);
  const judged = heard.filter((m) => isJudged(m, now));
  const ringing = heard.filter((m) => m.phase?.alarm).sort((a, b) => a.phase.alarm_since_ns - b.phase.alarm_since_ns);
  const place = byId("alarms");
  const silent = all.length - heard.length, unjudged = heard.length - judged.length;
  let state = "none", words = "No machine is watched yet.";
  if (ringing.length) {
    state = "alarm";
    words = "Alarm: " + ringing.slice(0, 4).map((m) => `${m.vm} ${m.phase.decision}${m.phase.alarm_since_ns ? ` since ${clock(m.phase.alarm_since_ns / 1e6)}${isReplay(m) ? " (recorded)" : ""}` : ""}`).join("; ") + (ringing.length > 4 ? ` and ${ringing.length - 4} more` : "");
  } else if (all.length) {
    const trained = judged.filter((m) => m.phase.alarm !== null).length;
    state = silent || unjudged || trained < judged.length || !judged.length ? "doubt" : "calm";
    words = !judged.length ? "Nothing is known of any machine now." : trained ? `No alarm on ${trained} of ${all.length} machine${all.length === 1 ? "" : "s"}.`
      : "No alarm threshold was trained: read the phases, no alarm will ring.";
  }
  if (silent && state !== "none") words += ` ${silent} silent.`;
  if (unjudged && state !== "none") words += ` ${unjudged} not judged.`;
  if (place.dataset.state !== state) place.dataset.state = state;
  text(byId("alarm-words"), words);
  const title = `${ringing.length ? "▲ " : ""}${lost ? "(cut off) " : ""}phasewatch${titleWords ? " · " + titleWords : ""}`;
  if (document.title !== title) document.title = title;
}

// A replay's stamps are those of the day it was recorded on.
const isReplay = (machine) => machine.origin !== null && machine.origin !== "live";
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
      card.swatch = make("span", "swatch"); card.phase = make("span"); card.p = make("small"); card.pill = make("span", "pill", "alarm");
      card.now.append(card.swatch, card.phase, card.p);
      card.append(card.pill);
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
    const isOld = seen !== null && !stale && !isJudged(machine, now);
    text(card.phase, !seen ? "not judged yet" : isOld ? `not judged since ${clock(machine.phaseAt)}` : `${GLYPHS[seen.decision] ?? ""} ${seen.decision}`);
    text(card.p, seen && !isOld ? `p ${score(seen.p[PHASES.indexOf(seen.decision)])}` : "");
    card.pill.hidden = !seen?.alarm;
    card.swatch.style.setProperty("--phase", seen ? `var(--${seen.decision})` : "");
    const origin = isReplay(machine) ? `replay, ${machine.origin}` : "";
    text(card.sub, [machine.host === machine.vm ? "" : machine.host, origin, seen?.truth ? `truth ${seen.truth}` : ""].filter(Boolean).join(" · "));
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
  if (!lost) text(byId("link-words"), `live ${clock(now + stream.skew)}`);
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
  const ringing = [...machines.all.values()].filter((m) => m.phase?.alarm).sort((a, b) => a.phase.alarm_since_ns - b.phase.alarm_since_ns)[0];
  const act = { j: () => step(1), k: () => step(-1), "[": () => turn(-1), "]": () => turn(1), p: pause, t: flip, "?": () => byId("help").showModal(), a: () => ringing && choose(ringing.vm) }[e.key];
  if (act) { act(); e.preventDefault(); return; }
  const vm = /^[1-9]$/.test(e.key) ? [...machines.all.keys()][Number(e.key) - 1] : undefined;
  if (vm) choose(vm);
});
scenes.legend();
setInterval(tick, DRAW_MS);
tick();
