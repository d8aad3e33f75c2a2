// The history of the selected machine: asked from the server for one time span, and kept up to date by short requests.
import { PHASES } from "/static/format.js";

export const SPANS = [[60, "1 min"], [600, "10 min"], [3600, "1 h"]];
const POLL_MS = { 60: 1000, 600: 1000, 3600: 5000 };

export class History {
  // changed(): new data; lag(): clock of the server minus clock of the browser, ms
  constructor(changed, lag) {
    Object.assign(this, { changed, lag, machine: null, spanS: 600, isAsking: false, askedAt: 0 });
    this.clear();
  }

  clear() {
    Object.assign(this, { epoch: null, channels: [], nChannels: 0, bins: [], windows: [], binMs: 500, windowMs: 500,
      lateRows: 0, lostRows: 0, latenessS: null, telemetryAt: 0, turn: (this.turn ?? 0) + 1 });
    this.askedAt = 0;
  }

  get spanMs() { return this.spanS * 1000; }

  select(machine) { this.machine = machine; this.clear(); this.poll(); }
  zoom(spanS) { this.spanS = spanS; this.clear(); this.poll(); }

  poll(now = performance.now()) {
    if (this.machine === null || this.isAsking || (this.askedAt && now - this.askedAt < POLL_MS[this.spanS])) return;
    this.isAsking = true;
    this.askedAt = now;
    const turn = this.turn;
    this.ask().then((found) => {
      this.isAsking = false;
      if (turn !== this.turn) this.poll(); // another machine or span was chosen meanwhile
      else if (found) this.merge(found);
    }, () => { this.isAsking = false; });
  }

  async ask() {
    const { run, vm, host } = this.machine;
    const newest = Math.min(this.bins.at(-1)?.t ?? Infinity, this.windows.at(-1)?.t ?? Infinity);
    this.after = this.epoch === null || !Number.isFinite(newest) ? 0 : newest;
    const query = new URLSearchParams({ run, vm, host: run === "live" ? host ?? "" : "", span: this.spanS, after: Math.floor(this.after) });
    const answer = await fetch(`/history.json?${query}`, { cache: "no-store" });
    return answer.ok ? answer.json() : null;
  }

  merge(found) {
    const isOther = found.epoch !== this.epoch || found.channels.join() !== this.channels.join();
    if (isOther && this.after > 0) { // a new recording, or another set of channels: everything is asked again
      this.clear();
      this.poll();
      return;
    }
    Object.assign(this, { epoch: found.epoch, channels: found.channels, nChannels: found.n_channels, binMs: found.cell_ms, windowMs: found.window_ms,
      lateRows: found.late_rows ?? 0, lostRows: found.lost_rows ?? 0, latenessS: found.lateness_s ?? null,
      telemetryAt: found.telemetry_ms === null ? 0 : found.telemetry_ms - this.lag() });
    this.bins = joined(this.bins, found.bins.map(([t, values]) => ({ t, values })), this.spanMs);
    this.windows = joined(this.windows, found.windows.map(([t, decision, truth, alarm, activity, p]) =>
      ({ t, decision: PHASES[decision], truth: truth === null ? null : PHASES[truth], alarm, activity, p })), this.spanMs);
    this.changed();
  }
}

// Replace the cells that the answer has anew, and drop those before the time span.
function joined(known, fresh, spanMs) {
  if (!fresh.length) return known;
  const kept = known.filter((cell) => cell.t < fresh[0].t);
  const start = fresh.at(-1).t - spanMs;
  return [...kept, ...fresh].filter((cell) => cell.t > start);
}
