// What needs attention first: the state of each machine and the order of the list, computed without touching the page.
import { PHASES } from "/static/format.js";

export const STALE_MS = 12_000; // a machine that sent nothing for this long is silent
// In the order of the list. Each state has a mark and words beside its colour.
export const STATES = {
  infection: { rank: 0, mark: "▲", words: "infection alarm" },
  activity: { rank: 1, mark: "◆", words: "activity alarm" },
  acknowledged: { rank: 2, mark: "✓", words: "acknowledged" },
  silenced: { rank: 3, mark: "Z", words: "silenced" },
  unknown: { rank: 4, mark: "?", words: "unknown or stale" },
  fine: { rank: 5, mark: "○", words: "no alarm" },
};

// Whether a machine replays a recording; its timestamps and labels are then those of the recording.
// Without an origin the run decides: only a watcher's events belong to the run "live".
export const isReplay = (machine) => (machine.origin === null ? machine.run !== "live" : machine.origin !== "live");
export const hasTruth = (phase) => PHASES.includes(phase?.truth);
export const isWrong = (phase) => hasTruth(phase) && phase.truth !== phase.decision;

export const heardAt = (machine) => Math.max(machine.seenAt, machine.phaseAt);
export const isStale = (machine, now) => now - heardAt(machine) > STALE_MS;
// Telemetry can continue without new predictions; an old prediction is then not current.
export const isCurrent = (machine, now) => machine.phase !== null && now - machine.phaseAt <= STALE_MS;

export const isSilenced = (alarm, now) => (alarm?.silenced_until_ms ?? 0) > now;
// "open", "acknowledged", "silenced" or "off" for one of a machine's two alarms.
export function alarmState(machine, kind, now) {
  const isOn = kind === "infection" ? machine.phase?.alarm : machine.phase?.activity_alarm;
  if (!isOn) return "off";
  const alarm = machine.alarms.get(kind);
  if (alarm?.acknowledged_ms) return "acknowledged";
  return isSilenced(alarm, now) ? "silenced" : "open";
}

export function attention(machine, now) {
  const infection = alarmState(machine, "infection", now), activity = alarmState(machine, "activity", now);
  if (infection === "open") return "infection";
  if (infection === "off" && activity === "open") return "activity"; // an infection alarm that is handled covers it
  const handled = infection === "off" ? activity : infection;
  if (handled !== "off") return handled;
  return isStale(machine, now) || !isCurrent(machine, now) || machine.phase.alarm === null ? "unknown" : "fine";
}

// Steps of a tenth, so that the order does not change with every prediction.
const urgency = (machine) => Math.round(10 * (machine.phase?.p[2] ?? 0));
const byName = new Intl.Collator("en", { numeric: true }).compare;

export function sorted(machines, now) {
  const keyed = machines.map((machine) => ({ machine, state: attention(machine, now) }));
  keyed.sort((a, b) => STATES[a.state].rank - STATES[b.state].rank || urgency(b.machine) - urgency(a.machine)
    || byName(a.machine.vm, b.machine.vm) || byName(a.machine.id, b.machine.id));
  return keyed.map((entry) => entry.machine);
}
