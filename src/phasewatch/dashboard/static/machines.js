// Keep the last bins and windows of each watched machine, and their arrival times. All lists are bounded.
const MAX_MACHINES = 24;
const TELEMETRY_MS = 120_000;
const PHASE_MS = 300_000;
const MAX_WINDOWS = 120; // a watcher predicts every second; more bars would make the figure slow

export class Machines {
  constructor() { this.all = new Map(); }

  get(vm, now) {
    let machine = this.all.get(vm);
    if (!machine) {
      if (this.all.size >= MAX_MACHINES) {
        const oldest = [...this.all.values()].reduce((a, b) => (a.at <= b.at ? a : b));
        this.all.delete(oldest.vm);
      }
      machine = { vm, host: null, origin: null, at: now, channels: [], bins: [], windows: [], telemetry: null, phase: null, telemetryAt: 0, phaseAt: 0 };
      this.all.set(vm, machine);
    }
    machine.at = Math.max(machine.at, now);
    return machine;
  }

  telemetry(data, at) {
    const machine = this.get(data.vm, at);
    machine.host = data.host ?? machine.host;
    machine.origin = data.origin;
    machine.telemetry = data;
    machine.telemetryAt = at;
    if (data.channels.join() !== machine.channels.join()) { machine.channels = data.channels; machine.bins = []; }
    data.values.forEach((values, i) => {
      const isNew = push(machine.bins, { t: data.t0_ns / 1e6 + i * data.bin_s * 1000, values, flags: data.flags[i] }, TELEMETRY_MS);
      if (isNew) machine.windows = [];
    });
    machine.binMs = data.bin_s * 1000;
    return machine;
  }

  phase(data, at) {
    const machine = this.get(data.vm, at);
    machine.host = data.host ?? machine.host;
    machine.phase = data;
    machine.phaseAt = at;
    push(machine.windows, { t: (data.t_start_ns + data.t_end_ns) / 2e6, seen: data }, PHASE_MS);
    if (machine.windows.length > MAX_WINDOWS) machine.windows.shift();
    return machine;
  }
}

// Append in order of time; a jump back or far ahead is a new recording and clears the list.
function push(rows, row, spanMs) {
  const last = rows.at(-1);
  const isNew = Boolean(last) && (row.t <= last.t || row.t - last.t > spanMs);
  if (isNew) rows.length = 0;
  rows.push(row);
  while (rows[0].t < row.t - spanMs) rows.shift();
  return isNew;
}
