// The overall status above the list, computed from the state of all machines without touching the page.
//
// Green means: every machine has a current prediction, an alarm threshold and no alarm of either kind, and is predicted
// clean with p(clean) of at least 0.5. A replay must match the labels of its recording too. Everything else is amber, or
// red for an infection alarm that nobody has acknowledged or silenced, so that a missing or wrong prediction never looks
// like an all-clear.
import { alarmState, attention, hasTruth, heardAt, isReplay, isWrong } from "/static/attention.js";
import { clock, plural } from "/static/format.js";

const MIN_P_CLEAN = 0.5;
const MAX_NAMED = 4; // machines named in a sentence; the rest is counted

const isClean = (phase) => phase.decision === "clean" && phase.p[0] >= MIN_P_CLEAN;

// entries: [{machine, isSilent, isCurrent}] → {state: "none" | "calm" | "doubt" | "alarm", reasons: [code], words, alarmed: [machine]}.
export function overallStatus(entries, now = Date.now()) {
  if (!entries.length) return { state: "none", reasons: [], words: "No machine is watched yet.", alarmed: [] };
  const heard = entries.filter((e) => !e.isSilent).map((e) => e.machine);
  const current = entries.filter((e) => e.isCurrent).map((e) => e.machine);
  const alarmed = entries.filter((e) => alarmState(e.machine, "infection", now) === "open")
    .sort((a, b) => a.machine.phase.alarm_since_ns - b.machine.phase.alarm_since_ns);
  const handled = entries.map((e) => e.machine).filter((m) => ["acknowledged", "silenced"].includes(attention(m, now)));
  const quiet = current.filter((m) => !m.phase.alarm);
  const active = quiet.filter((m) => alarmState(m, "activity", now) === "open");
  const unclear = quiet.filter((m) => !m.phase.activity_alarm && !isClean(m.phase));
  const counts = {
    "silent": entries.length - heard.length,
    "no-prediction": heard.length - current.length,
    "no-threshold": current.filter((m) => m.phase.alarm === null).length,
    "handled": handled.length,
    "activity": active.length,
    "not-clean": unclear.length,
    "wrong": current.filter((m) => isReplay(m) && isWrong(m.phase)).length,
    "truth-unknown": current.filter((m) => isReplay(m) && !hasTruth(m.phase)).length,
  };
  const reasons = Object.keys(counts).filter((code) => counts[code] > 0);
  const details = [];
  if (counts.handled) details.push(`Acknowledged or silenced: ${named(handled, (m) => m.vm)}.`);
  if (counts.silent) details.push(`${plural(counts.silent, "machine")} silent.`);
  if (counts["no-prediction"]) details.push(`${plural(counts["no-prediction"], "machine")} without a current prediction.`);
  if (counts["no-threshold"]) details.push(`${plural(counts["no-threshold"], "machine")} without an alarm threshold, which cannot raise alarms.`);
  if (counts.activity) details.push(`Activity: ${named(active, (m) => m.vm)}.`);
  if (counts["not-clean"]) details.push(`Not clearly clean: ${named(unclear, (m) => `${m.vm} ${m.phase.decision}`)}.`);
  if (counts.wrong) details.push(`Replay: ${counts.wrong} of ${plural(current.filter(isReplay).length, "prediction")} wrong.`);
  if (counts["truth-unknown"]) details.push(`Replay: true phase of ${plural(counts["truth-unknown"], "machine")} unknown.`);
  let state = reasons.length ? "doubt" : "calm", words;
  if (alarmed.length) {
    state = "alarm";
    words = `Infection alarm: ${named(alarmed, describeAlarm)}.`;
  } else if (!current.length) {
    words = "No current prediction for any machine.";
  } else {
    words = `No infection alarm on ${current.filter((m) => !m.phase.alarm).length} of ${plural(entries.length, "machine")}.`;
  }
  return { state, reasons, words: [words, ...details].join(" "), alarmed: alarmed.map((e) => e.machine) };
}

function describeAlarm({ machine, isSilent }) {
  const { decision, alarm_since_ns: since, truth } = machine.phase;
  const notes = isReplay(machine) ? ` (replay${hasTruth(machine.phase) ? `, true phase ${truth}` : ""})` : "";
  const now = isSilent ? `silent since ${clock(heardAt(machine))}` : `now ${decision}`;
  return `${machine.vm}${since ? ` since ${clock(since / 1e6)}` : ""}, ${now}${notes}`;
}

function named(items, describe) {
  const rest = items.length - MAX_NAMED;
  return items.slice(0, MAX_NAMED).map(describe).join("; ") + (rest > 0 ? ` and ${rest} more` : "");
}
