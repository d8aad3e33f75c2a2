// The overall status above the machine cards, computed from the state of all machines without touching the page.
//
// Green means: every machine has a current prediction, an alarm threshold and no alarm of either kind, and is predicted clean with
// p(clean) of at least 0.5. A replay must match the labels of its recording too. Everything else is amber, or red
// for an infection alarm, so that a missing or wrong prediction never looks like an all-clear.
import { PHASES, clock, plural } from "/static/format.js";

const MIN_P_CLEAN = 0.5;
const MAX_NAMED = 4; // machines named in a sentence; the rest is counted

// Whether a machine replays a recording; its timestamps and labels are then those of the recording.
export const isReplay = (machine) => machine.origin !== null && machine.origin !== "live";
export const hasTruth = (phase) => PHASES.includes(phase?.truth);
export const isWrong = (phase) => hasTruth(phase) && phase.truth !== phase.decision;

const isClean = (phase) => phase.decision === "clean" && phase.p[0] >= MIN_P_CLEAN;

// entries: [{machine, isSilent, isCurrent}] → {state: "none" | "calm" | "doubt" | "alarm", reasons: [code], words, alarmed: [machine]}.
export function overallStatus(entries) {
  if (!entries.length) return { state: "none", reasons: [], words: "No machine is watched yet.", alarmed: [] };
  const heard = entries.filter((e) => !e.isSilent).map((e) => e.machine);
  const current = entries.filter((e) => e.isCurrent).map((e) => e.machine);
  const alarmed = heard.filter((m) => m.phase?.alarm).sort((a, b) => a.phase.alarm_since_ns - b.phase.alarm_since_ns);
  const quiet = current.filter((m) => !m.phase.alarm);
  const counts = {
    "silent": entries.length - heard.length,
    "no-prediction": heard.length - current.length,
    "no-threshold": current.filter((m) => m.phase.alarm === null).length,
    "activity": quiet.filter((m) => m.phase.activity_alarm).length,
    "not-clean": quiet.filter((m) => !isClean(m.phase)).length,
    "wrong": current.filter((m) => isReplay(m) && isWrong(m.phase)).length,
    "truth-unknown": current.filter((m) => isReplay(m) && !hasTruth(m.phase)).length,
  };
  const reasons = Object.keys(counts).filter((code) => counts[code] > 0);
  const details = [];
  if (counts.silent) details.push(`${plural(counts.silent, "machine")} silent.`);
  if (counts["no-prediction"]) details.push(`${plural(counts["no-prediction"], "machine")} without a current prediction.`);
  if (counts["no-threshold"]) details.push(`${plural(counts["no-threshold"], "machine")} without an alarm threshold, which cannot raise alarms.`);
  if (counts.activity) details.push(`Activity: ${named(quiet.filter((m) => m.phase.activity_alarm), (m) => m.vm)}.`);
  if (counts["not-clean"]) details.push(`Not clearly clean: ${named(quiet.filter((m) => !isClean(m.phase)), (m) => `${m.vm} ${m.phase.decision}`)}.`);
  if (counts.wrong) details.push(`Replay: ${counts.wrong} of ${plural(current.filter(isReplay).length, "prediction")} wrong.`);
  if (counts["truth-unknown"]) details.push(`Replay: true phase of ${plural(counts["truth-unknown"], "machine")} unknown.`);
  let state = reasons.length ? "doubt" : "calm", words;
  if (alarmed.length) {
    state = "alarm";
    words = `Infection alarm: ${named(alarmed, describeAlarm)}.`;
  } else if (!current.length) {
    words = "No current prediction for any machine.";
  } else {
    words = `No infection alarm on ${current.length} of ${plural(entries.length, "machine")}.`;
  }
  return { state, reasons, words: [words, ...details].join(" "), alarmed };
}

function describeAlarm(machine) {
  const { decision, alarm_since_ns: since, truth } = machine.phase;
  const notes = isReplay(machine) ? ` (recording${hasTruth(machine.phase) ? `, true phase ${truth}` : ""})` : "";
  return `${machine.vm}${since ? ` since ${clock(since / 1e6)}` : ""}, now ${decision}${notes}`;
}

function named(machines, describe) {
  const rest = machines.length - MAX_NAMED;
  return machines.slice(0, MAX_NAMED).map(describe).join("; ") + (rest > 0 ? ` and ${rest} more` : "");
}
