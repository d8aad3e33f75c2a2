// Keep the newest prediction and the alarms of each machine. Its history stays on the server; all maps are bounded.
const MAX_MACHINES = 1024;
const MAX_ALARMS = 1000;
const FORGET_MS = 3_600_000; // the server forgets a silent machine after this time too

export class Machines {
  constructor() { this.all = new Map(); this.alarms = new Map(); }

  // A watcher's machines have an id, because two may have one name; the machines of a run have only a name.
  get(run, vm, host, now) {
    const id = JSON.stringify([run, vm, run === "live" ? host ?? "" : ""]);
    let machine = this.all.get(id);
    if (!machine) {
      if (this.all.size >= MAX_MACHINES) {
        const oldest = [...this.all.values()].reduce((a, b) => (a.at <= b.at ? a : b));
        this.all.delete(oldest.id);
      }
      machine = { id, run, vm, host: host || null, origin: null, at: now, touched: 0, phase: null, seenAt: 0, phaseAt: 0, alarms: new Map() };
      for (const alarm of this.alarms.values()) if (isOf(alarm, machine)) attach(machine, alarm);
      this.all.set(id, machine);
    }
    machine.at = Math.max(machine.at, now);
    machine.touched = Date.now(); // the clock of a producer may be wrong
    return machine;
  }

  seen(run, data, at) {
    const machine = this.get(run, data.vm, data.host, at);
    machine.origin = data.origin;
    machine.seenAt = Math.max(machine.seenAt, at);
    return machine;
  }

  phase(run, data, at) {
    const machine = this.get(run, data.vm, data.host, at);
    machine.host = data.host ?? machine.host;
    machine.phase = data;
    machine.phaseAt = at;
    return machine;
  }

  alarm(alarm) {
    this.alarms.delete(alarm.id);
    this.alarms.set(alarm.id, alarm);
    if (this.alarms.size > MAX_ALARMS) this.alarms.delete(this.alarms.keys().next().value);
    for (const machine of this.all.values()) if (isOf(alarm, machine)) attach(machine, alarm);
  }

  // Forget everything before the state of the server is read again.
  clear() { this.all.clear(); this.alarms.clear(); }

  prune(now) {
    for (const machine of this.all.values()) if (now - machine.touched > FORGET_MS) this.all.delete(machine.id);
  }

  // Open alarms first, of them infection alarms, then the newest.
  history() {
    const rank = (a) => (a.resolved_ms !== null ? 2 : a.kind === "infection" ? 0 : 1);
    return [...this.alarms.values()].sort((a, b) => rank(a) - rank(b) || b.raised_ms - a.raised_ms);
  }
}

export const isOf = (alarm, machine) => alarm.run === machine.run && alarm.vm === machine.vm
  && (alarm.host === "" || machine.host === null || machine.run !== "live" || alarm.host === machine.host);

// Keep the newest alarm of each kind.
function attach(machine, alarm) {
  const known = machine.alarms.get(alarm.kind);
  if (!known || known.id === alarm.id || known.raised_ms <= alarm.raised_ms) machine.alarms.set(alarm.kind, alarm);
}
