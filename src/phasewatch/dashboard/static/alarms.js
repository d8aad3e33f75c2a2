// The alarm history, the evidence of an alarm, and the dialog to acknowledge or silence one.
import { STATES, isSilenced } from "/static/attention.js";
import { clock, duration, make, number, text } from "/static/format.js";
import { byId, unit } from "/static/plot.js";

const ROWS = 50; // shown at first
let most = ROWS;

export function stateOf(alarm, now) {
  if (alarm.resolved_ms !== null) return "resolved";
  if (alarm.acknowledged_ms) return "acknowledged";
  return isSilenced(alarm, now) ? "silenced" : alarm.kind === "activity" ? "activity" : "infection";
}

export function badge(state, words) {
  const place = make("span", "tag");
  place.dataset.state = state;
  place.append(make("b", "", state === "resolved" ? "–" : STATES[state].mark), ` ${words}`);
  return place;
}

const day = (ms) => { const d = new Date(ms); return d.toDateString() === new Date().toDateString() ? "" : `${d.getFullYear()}-${String(d.getMonth() + 1).padStart(2, "0")}-${String(d.getDate()).padStart(2, "0")} `; };
const WORDS = { infection: "raised", activity: "raised", acknowledged: "acknowledged", silenced: "silenced", resolved: "resolved" };

// Redraw the table if an alarm or a duration in it has changed. act(alarm, "acknowledge" | "silence"); show(alarm).
export function drawHistory(alarms, now, { act, show, of }) {
  const rows = alarms.slice(0, most);
  byId("history").hidden = rows.length === 0;
  byId("history-empty").hidden = rows.length > 0;
  text(byId("history-of"), of);
  const more = byId("history-more");
  more.hidden = alarms.length <= most;
  text(more, `Show ${alarms.length - most} more`);
  more.onclick = () => { most = Infinity; };
  const key = JSON.stringify([rows.map((a) => [a, stateOf(a, now), a.resolved_ms === null && !a.is_replay ? Math.floor(now / 1000) : 0])]);
  const body = byId("history").tBodies[0];
  if (body.dataset.key === key || body.contains(document.activeElement)) return;
  body.dataset.key = key;
  body.replaceChildren(...rows.map((alarm) => row(alarm, now, act, show)));
}

function row(alarm, now, act, show) {
  const line = make("tr"), state = stateOf(alarm, now);
  line.dataset.state = state;
  const cell = (name, ...parts) => { const place = make("td"); place.dataset.name = name; place.append(...parts); line.append(place); return place; };
  cell("State", badge(state, WORDS[state]));
  const link = make("button", "plain", alarm.vm);
  link.type = "button";
  link.onclick = () => show(alarm);
  cell("Machine", link, " ", make("small", "", alarm.kind), ...(alarm.is_replay ? [" ", make("small", "badge", "replay")] : []));
  cell("Raised", `${day(alarm.raised_ms)}${clock(alarm.raised_ms)}`);
  const end = alarm.resolved_ms ?? (alarm.is_replay ? null : now);
  cell("Lasted", end === null ? "open" : `${duration(end - alarm.raised_ms)}${alarm.resolved_ms === null ? " so far" : ""}`,
    ...(alarm.resolved_ms === null ? [] : [make("small", "block", `ended ${clock(alarm.resolved_ms)}${alarm.resolution ? `, ${alarm.resolution}` : ""}`)]));
  cell("Evidence", ...(alarm.evidence.length ? alarm.evidence.slice(0, 3).map((e) => make("span", "block", `${e.z > 0 ? "▲" : "▼"} ${e.channel} ${deviation(e)}`)) : [make("small", "", "none recorded")]));
  cell("Notes", ...notes(alarm, now));
  cell("Actions", ...buttons(alarm, now, act));
  return line;
}

// What people did with an alarm, as lines of text.
export function notes(alarm, now) {
  const lines = [];
  if (alarm.acknowledged_ms) lines.push(`acknowledged ${clock(alarm.acknowledged_ms)}${alarm.acknowledged_by ? ` by ${alarm.acknowledged_by}` : ""}${alarm.note ? `: ${alarm.note}` : ""}`);
  if (isSilenced(alarm, now)) lines.push(`silenced until ${day(alarm.silenced_until_ms)}${clock(alarm.silenced_until_ms)}${alarm.silence_reason ? `: ${alarm.silence_reason}` : ""}`);
  return lines.map((line) => make("span", "block", line));
}

export function buttons(alarm, now, act) {
  if (alarm.resolved_ms !== null || alarm.is_replay) return [];
  const out = [];
  if (!alarm.acknowledged_ms) out.push(["Acknowledge", "acknowledge"]);
  if (!isSilenced(alarm, now)) out.push(["Silence", "silence"]);
  return out.map(([words, what]) => {
    const place = make("button", "", words);
    place.type = "button";
    place.setAttribute("aria-label", `${words} the ${alarm.kind} alarm of ${alarm.vm}`);
    place.onclick = () => act(alarm, what);
    return place;
  });
}

const deviation = (e) => `${e.z > 0 ? "+" : "−"}${number(Math.abs(e.z), 2)} σ`;
const quantity = (v, u) => { const n = number(v); return `${n}${u && !/[kMG]$/.test(n) ? " " : ""}${u}`; };

// The evidence of one alarm: channels by deviation, with a bar on a logarithmic scale.
export function evidence(alarm) {
  const when = `${alarm.kind} alarm of ${clock(alarm.raised_ms)}`;
  if (!alarm.evidence.length) return [make("p", "facts", `Evidence of the ${when}: none recorded. It needs half a minute of quiet time before the alarm.`)];
  const table = make("table");
  const head = make("caption", "", `What moved most, ${when}`);
  table.append(head);
  for (const e of alarm.evidence) {
    const line = table.insertRow();
    line.append(make("th", "", e.channel));
    line.firstChild.scope = "row";
    const meter = make("span", "meter");
    meter.style.setProperty("--share", String(Math.min(1, Math.log10(1 + Math.abs(e.z)) / 3)));
    const cell = line.insertCell();
    cell.append(make("span", "", `${e.z > 0 ? "▲" : "▼"} ${deviation(e)}`), meter);
    line.insertCell().textContent = `${quantity(e.value, unit(e.channel))}, usually ${quantity(e.usual, unit(e.channel))}`;
  }
  return [table, make("p", "facts", "σ = robust standard deviations from the machine's own quiet minutes. It shows what changed, not why the model decided.")];
}

let token = "";

// Open the dialog; the change is sent with the token, because the cookie of a viewer may only look.
export function askChange(alarm, what) {
  const dialog = byId("act"), isSilence = what === "silence";
  text(byId("act-title"), `${isSilence ? "Silence" : "Acknowledge"} the ${alarm.kind} alarm of ${alarm.vm}`);
  text(byId("act-about"), isSilence ? "Alarms of this kind on this machine are recorded, and nobody is told of them until then."
    : "The alarm is marked as seen. It stays raised until the model no longer sees it.");
  text(byId("act-send"), isSilence ? "Silence" : "Acknowledge");
  byId("act-for").hidden = !isSilence;
  byId("act-error").hidden = true;
  byId("act-note").value = "";
  byId("act-token").value = token;
  byId("act-cancel").onclick = () => dialog.close();
  byId("act-form").onsubmit = (e) => {
    e.preventDefault();
    const given = byId("act-token").value.trim();
    const change = { id: alarm.id, by: byId("act-by").value.trim(), note: byId("act-note").value.trim(), silence_minutes: isSilence ? Number(byId("act-minutes").value) : 0 };
    send(change, given).then((failure) => {
      token = failure === null || failure.status !== 401 ? given : "";
      text(byId("act-error"), failure?.words ?? "");
      byId("act-error").hidden = failure === null;
      if (failure === null) dialog.close();
    });
  };
  dialog.showModal();
  (token ? byId("act-note") : byId("act-by")).focus();
}

async function send(change, given) {
  // A header can only carry ASCII; the token has nothing else.
  if (!/^[\x21-\x7e]+$/.test(given)) return { status: 401, words: "This is not a token." };
  try {
    const answer = await fetch("/alarms", { method: "POST", body: JSON.stringify(change), headers: { Authorization: `Bearer ${given}` } });
    if (answer.ok) return null;
    return { status: answer.status, words: answer.status === 401 ? "Wrong token." : (await answer.json()).error ?? `Error ${answer.status}` };
  } catch {
    return { status: 0, words: "The dashboard does not answer." };
  }
}
